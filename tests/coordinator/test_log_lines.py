"""Lines of logs: by number, found, cut, and as HTML that no builder can make anything else of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.http.web.log_html import PAGE_CHARS, line_html, lines_html
from coordinator.stores import log_lines
from coordinator.stores.log_lines import (
    LINE_BYTES,
    PAGE_BYTES,
    PIECE_BYTES,
    LineIndex,
    LineIndexes,
    NumberedLine,
    find_text,
    lines_from,
)

MARKUP = re.compile(r'</?(?:li|span|a|em)(?: (?:id|class|href|aria-label)="[\w #-]*")*>')


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "1.log"


def test_lines_are_told_by_number_in_pages(log: Path) -> None:
    log.write_bytes(b"".join(b"line %d\n" % number for number in range(1, 100_001)) + b"the last")
    assert LineIndex(log).count() == 100_001
    read = LineIndex(log).lines(99_000, 3)
    assert [(line.number, line.data) for line in read.lines] == [
        (number, b"line %d" % number) for number in (99_000, 99_001, 99_002)
    ]
    assert read.following == 99_003
    assert lines_from(log, read.end, read.following, 1).lines[0].data == b"line 99003"
    end = LineIndex(log).lines(100_001, 10)
    assert [line.data for line in end.lines] == [b"the last"]
    assert end.following == 0
    assert LineIndex(log).lines(200_000, 10).lines == ()


def test_a_log_that_is_not_there_is_empty(log: Path) -> None:
    assert LineIndex(log).count() == 0
    assert LineIndex(log).lines(1, 10).lines == ()
    assert find_text(log, b"x", 10) == ([], False)
    log.touch()
    assert LineIndex(log).count() == 0
    assert LineIndex(log).lines(5, 10).lines == ()


def test_a_line_of_ten_megabytes_is_cut_with_a_note_and_the_next_one_is_whole(log: Path) -> None:
    log.write_bytes(b"x" * 10_000_000 + b"\nnext\n" + b"y" * 9_000)
    first, second, third = LineIndex(log).lines(1, 10).lines
    assert (len(first.data), first.cut) == (LINE_BYTES, 10_000_000 - LINE_BYTES)
    assert (second.number, second.data, second.cut) == (2, b"next", 0)
    assert (len(third.data), third.cut) == (LINE_BYTES, 9_000 - LINE_BYTES)
    assert f"{first.cut:,} more bytes of this line are left out" in line_html(first)


def test_a_page_is_bounded_whatever_its_lines_are(log: Path) -> None:
    for text in (b"<", b"'", b"\x1b[31m<\x1b[0m", b"\xff", b"\x01"):
        log.write_bytes((text * (LINE_BYTES // len(text)) + b"\n") * 100)
        read = LineIndex(log).lines(1, 1000)
        assert sum(len(line.data) for line in read.lines) <= PAGE_BYTES + LINE_BYTES
        html, shown = lines_html(read.lines)
        assert 0 < shown <= len(read.lines)
        assert len(html) <= PAGE_CHARS


def test_a_text_is_found_across_pieces_and_each_line_once(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.write_bytes(b"one Needle, NEEDLE\nnothing\nand need\nle\nneedle\n")
    for piece in range(1, 60):
        monkeypatch.setattr(log_lines, "PIECE_BYTES", piece)
        assert find_text(log, b"nEEdle", 10) == ([1, 5], False), piece
        assert find_text(log, b"needle", 1) == ([1], True)
        assert LineIndex(log).lines(5, 1).lines[0].data == b"needle"


@given(st.lists(st.sampled_from([b"a", b"B", b"\n"]), max_size=40).map(b"".join), st.sampled_from([b"a", b"ab", b"bb"]))
def test_what_is_found_is_what_the_lines_have(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, text: bytes
) -> None:
    log = tmp_path_factory.getbasetemp() / "found.log"
    log.write_bytes(data)
    expected = [number for number, line in enumerate(data.lower().split(b"\n"), 1) if text in line]
    assert find_text(log, text, 100) == (expected, False)


@given(st.lists(st.binary(max_size=30).map(lambda data: data.replace(b"a", b"\n")), max_size=8), st.integers(1, 20))
def test_an_index_of_a_log_that_grows_is_that_of_the_whole_log(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], piece: int
) -> None:
    log = tmp_path_factory.getbasetemp() / "grows.log"
    log.write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_lines, "PIECE_BYTES", piece)
        grown = LineIndex(log)
    for part in parts:
        with log.open("ab") as file:
            file.write(part)
        lines = log.read_bytes().split(b"\n")
        count = len(lines) - (not lines[-1])
        assert grown.count() == count
        for number in range(1, count + 2):
            [*found] = grown.lines(number, 1).lines
            assert [line.data for line in found] == lines[number - 1 : number][: number <= count]


def test_an_index_is_kept_while_its_log_grows_and_not_for_another_file_in_its_place(log: Path) -> None:
    indexes = LineIndexes(2)
    log.write_bytes(b"x\n" * PIECE_BYTES)
    index = indexes.of(log)
    assert index.count() == PIECE_BYTES
    assert indexes.of(log) is index
    log.write_bytes(b"short\n")
    assert indexes.of(log) is not index
    assert indexes.of(log).count() == 1
    kept = [indexes.of(log.with_name(name)) for name in ("none", "neither")]
    assert [each.count() for each in kept] == [0, 0]


SEQUENCES = (b"\x1b[31m", b"\x1b[0m", b"\x1b[1;32m", b"\x1b[39m", b"\x1b[22m", b"\x1b[2J", b"\x9b31m")
STRINGS = (b"\x1b]8;;http://x\x07", b"\x1b]0;t\x07", b"\xff", b"\x00", b"\r", "é\u202e".encode())
TEXTS = (b"<script>", b"</li>", b"&lt;", b'"', b"'", b"text")
PIECES = st.sampled_from([*SEQUENCES, *STRINGS, *TEXTS])


@given(st.lists(PIECES, max_size=30).map(b"".join))
def test_the_html_of_a_line_is_its_text_and_spans_whatever_a_builder_prints(data: bytes) -> None:
    html = str(line_html(NumberedLine(7, data)))
    assert html.startswith('<li id="L7"><a class="number" href="#L7" aria-label="Line 7">7</a><span>')
    assert html.count("<span") == html.count("</span>")
    text = MARKUP.sub("", html)
    assert "<" not in text
    assert ">" not in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
