"""No bytes of a stranger make a terminal do anything, and none of them hide text that follows."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.terminal_controls import (
    MAX_COLOURS,
    MAX_SEQUENCE_CHARS,
    MAX_STRING_CHARS,
    RESET,
    ControlFilter,
    harmless,
)

COLOUR = re.compile("\x1b\\[[0-9]+(;[0-9]+)*m")
#: The pieces that sequences are made of, and text.
PARTS = [*map(chr, [*range(0x20), *range(0x7F, 0xA0)]), *"[]PX^_k\\m?h", "0;", "38;5;", "31", "text", "日本", "\u202e"]
PIECES = st.lists(st.sampled_from(PARTS)).map("".join)
HOSTILE = st.one_of(PIECES, st.text(), st.binary().map(lambda data: data.decode(errors="replace")))


def shown(*chunks: str, colours: bool = True) -> str:
    control = ControlFilter(colours=colours)
    return "".join(map(control.feed, chunks)) + control.finish()


@given(HOSTILE)
def test_only_text_newlines_tabs_and_colours_come_out(text: str) -> None:
    out = shown(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", COLOUR.sub("", out))
    # No colour outlives its line.
    for line in out.split("\n"):
        colours = [found[0] for found in COLOUR.finditer(line)]
        assert not colours or colours[-1].endswith("0m")
    assert "\x1b" not in shown(text, colours=False)
    assert shown(out) == out


@given(st.binary())
def test_bytes_of_any_kind_come_out_harmless(data: bytes) -> None:
    control = ControlFilter(colours=False)
    out = control.feed_bytes(data) + control.finish()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)


@given(HOSTILE, st.data())
def test_it_does_not_matter_how_a_stream_is_cut(text: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    assert shown(text[:cut], text[cut:]) == shown(text)


@given(HOSTILE, st.text(alphabet=st.characters(exclude_categories=["C", "Z"]), min_size=1))
def test_nothing_hides_the_lines_that_follow(hostile: str, line: str) -> None:
    assert shown(f"{hostile}\n{line}\n").endswith(f"\n{line}\n")


@given(st.text(alphabet=st.characters(exclude_categories=["C"])))
def test_text_without_controls_is_kept(text: str) -> None:
    assert shown(text) == harmless(text) == text


@pytest.mark.parametrize(
    ("raw", "out"),
    [
        ("a\x1b]0;title\x07b", "ab"),
        ("a\x1b]0;title\x1b\\b", "ab"),
        ("a\x9d0;title\x9cb", "ab"),
        ("a\x1b]0;no end\nb", "a\nb"),
        ("a\x1bPq#0\x07 still\x1b\\b", "ab"),
        ("a\x1b_payload\x1b[31mb", f"a\x1b[31mb{RESET}"),
        ("a\x1bktitle\x1b\\b", "ab"),
        ("a\x1b[2J\x1b[?1049hb", "ab"),
        ("a\x1b[2\x08Jb", "ab"),
        ("a\x1b(0b\x1bcd", "abd"),
        ("a\x1b[31\x18mb", "amb"),
        ("a\x1b[12日", "a日"),
        ("\x1b[31mred\nplain\x1b[m", f"\x1b[31mred{RESET}\nplain\x1b[0m"),
        ("\x1b[0;1;31;40;8mx", f"\x1b[0;1;31mx{RESET}"),
        ("\x1b[38;5;31;1mx", f"\x1b[1mx{RESET}"),
        ("\x1b[38;2;31;32;33mx", "x"),
        ("\x1b[>4;1mx\x1b[4:3my", "xy"),
        ("10%\r20%\r\ndone\r", "10%\n20%\ndone\n"),
        ("evil\rfine", "evil\nfine"),
        ("ab\x08\x08c", "abc"),
        ("\u202etxt.exe", "txt.exe"),
    ],
)
def test_control_characters_that_a_terminal_would_obey_are_left_out(raw: str, out: str) -> None:
    assert shown(raw) == out


def test_a_control_sequence_without_an_end_is_text_again_after_a_bound() -> None:
    assert shown("\x1b]0;" + "x" * (MAX_STRING_CHARS + 7)) == "x" * 9
    assert shown("\x1b[" + "1" * (MAX_SEQUENCE_CHARS + 7)) == "1" * 7
    assert len(COLOUR.findall(shown("\x1b[31m" * (MAX_COLOURS + 7)))) == MAX_COLOURS + 1
