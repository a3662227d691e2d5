"""The live region on an emulated terminal, as golden screens in three sizes (`--rewrite-screens` writes them anew)."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.models import FailureView, WatchEvent
from coordinator.cli.ci import Ci, detected
from coordinator.cli.follow import Follower
from coordinator.cli.forest import draw
from coordinator.cli.lines import Line
from coordinator.cli.live import Window
from coordinator.cli.progress import Progress
from coordinator.cli.rendering import failure_lines
from coordinator.cli.screen import LiveRegion, Screen
from coordinator.cli.top import farm_lines
from tests.support.redrawing import LINES_BEFORE
from tests.support.screens import NOW, Scripted, Terminal, busy_farm, calm, changed, counts, crowded, failed, failing
from tests.support.tmux import tmux

SCREENS = Path(__file__).parent / "screens"
SIZES = ((80, 24), (120, 40), (40, 15))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("tale", [calm, failing, crowded], ids=lambda tale: tale.__name__)
def test_the_screen_is_the_golden_one(
    tale: Callable[[Scripted], None], size: tuple[int, int], rewrite_screens: bool
) -> None:
    watched = Scripted(*size)
    tale(watched)
    shown = "\n".join([*watched.terminal.scrolled(), *watched.terminal.shown()]) + "\n"
    golden = SCREENS / f"{tale.__name__}-{size[0]}x{size[1]}.txt"
    if rewrite_screens:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(shown)
    assert shown == golden.read_text()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_screen_of_a_busy_farm_is_the_golden_one(size: tuple[int, int], rewrite_screens: bool) -> None:
    terminal = Terminal(*size)
    terminal.write(LiveRegion(colours=True).frame((), farm_lines(busy_farm(), NOW, Window(*size)), Window(*size)))
    shown = "\n".join(terminal.shown()) + "\n"
    golden = SCREENS / f"top-{size[0]}x{size[1]}.txt"
    if rewrite_screens:
        golden.write_text(shown)
    assert shown == golden.read_text()
    assert not terminal.scrolled()


@pytest.mark.parametrize("tale", [calm, failing, crowded], ids=lambda tale: tale.__name__)
def test_each_frame_replaces_the_last_one_whole_and_the_end_leaves_only_what_scrolled(
    tale: Callable[[Scripted], None],
) -> None:
    watched = Scripted(80, 24)
    tale(watched)
    before = [*watched.terminal.scrolled(), *watched.terminal.shown()]
    watched.see(seconds=0.0)
    assert [*watched.terminal.scrolled(), *watched.terminal.shown()] == before
    watched.follower.end()
    left = [*watched.terminal.scrolled(), *watched.terminal.shown()]
    assert left == before[: len(left)]
    assert not any("running" in line for line in left)
    assert not watched.terminal.emulated.cursor.hidden


@pytest.mark.parametrize("count", [1, 3])
def test_lines_that_are_as_wide_as_the_window_keep_their_last_cells(count: int, tmp_path: Path) -> None:
    region = LiveRegion(colours=True)
    lines: list[Line] = [[(f"{number:>20}", "bold")] for number in range(count)]
    frames = tmp_path / "frames"
    frames.write_text(region.frame((), lines, Window(20, 6)) + region.frame((), lines, Window(20, 6)))
    with tmux(tmp_path, f"cat {frames}; tmux -S {tmp_path / 'tmux'} wait-for -S done; cat", 20, 6) as server:
        server.wait("done")
        assert server.whole() == [text for line in lines for text, _ in line]


def test_a_window_that_changes_its_size_keeps_one_region_and_every_line_that_scrolled() -> None:
    watched = Scripted(100, 30)
    failing(watched)
    for width, height in ((60, 30), (33, 30), (120, 30)):
        watched.resize(width, height)
        watched.see(seconds=0.0)
        assert sum("9 · " in line or "/9" in line for line in watched.terminal.shown()) == 1
    watched.follower.end()
    assert sum("openssl-3.3 failed" in line for line in watched.terminal.scrolled() + watched.terminal.shown()) == 1


#: Sizes that a window gets one after the other, and what the program believes when it draws; it learns of each late.
RESIZED = ((120, 30), (90, 30), (64, 30), (120, 30), (50, 30), (64, 20), (100, 24))


def test_a_terminal_that_wraps_what_it_shows_keeps_one_region_and_every_line_that_scrolled(tmp_path: Path) -> None:
    believed = [RESIZED[0], *(size for each in pairwise(RESIZED) for size in each)]
    words = [f"{width},{height}" for width, height in believed]
    program = shlex.join([sys.executable, "-m", "tests.support.redrawing", str(tmp_path / "tmux"), *words])
    with tmux(tmp_path, program, *RESIZED[0]) as server:
        server.wait("drawn")
        for width, height in RESIZED[1:]:
            server.run("resize-window", "-x", str(width), "-y", str(height))
            for _ in ("with the old size", "with the new one"):
                server.send("go")
                server.wait("drawn")
            lines = server.whole()
            assert sum(line.startswith("⏸ hello") for line in lines) == 1, (width, lines)
            assert sum(" 6/9 " in line for line in lines) == 1, (width, lines)
            assert sum("failed on" in line for line in lines) == 1, (width, lines)
        server.send("go")
        server.wait("drawn")
        left = server.run("capture-pane", "-p", "-J", "-S", "-").split("\n")
    said = [f"said before: {number}" for number in range(LINES_BEFORE)]
    said += ["✔ zlib-1.3 on native in 13s", *failure_lines(failed("openssl-3.3", worker="ec2-large"))]
    assert [line.rstrip() for line in left if line.strip()] == said


def test_colours_are_left_out_where_nobody_wants_them_and_a_dumb_terminal_gets_lines() -> None:
    watched = Scripted(80, 24, NO_COLOR="1")
    failing(watched)
    assert "\x1b[1m" in watched.terminal.written
    assert not any(f"\x1b[{code}m" in watched.terminal.written for code in range(30, 48))
    for term in ("dumb", ""):
        assert not Screen(Terminal(80, 24), {"TERM": term} if term else {}).live  # type: ignore[arg-type]


HOSTILE = (
    "::endgroup::\n  ::set-output name=a::b\n##[endgroup]\nx ##vso[task.x]\n\x1b]0;STOLEN\x07\x1b]8;;http://evil\x07link\x1b]8;;\x07\n"
    "\x1b[2J\x1b[1;1H\x00<b>&amp;</b>\u202e\ufffd\nsection_end:1:drover\r\x1b[0K\n" + "y" * 100_000
)


class Pipe(io.StringIO):
    """An output that is no terminal."""


def plain(ci: Ci, *events: WatchEvent) -> str:
    pipe = Pipe()
    progress = Progress()
    follower = Follower(Screen(pipe, {}, ci), progress)
    for event in events:
        for news, each in progress.apply(event):
            follower.tell(news, each)
    return pipe.getvalue()


def test_a_failure_in_a_log_of_github_is_an_annotation_and_one_folded_section() -> None:
    step = failed("openssl-3.3", log_tail="one\ntwo")
    text = plain(Ci.GITHUB, *changed(step))
    key = f"{'0' * 32}-openssl-3.3"
    assert text.splitlines() == [
        f"::error title=openssl-3.3 failed::{failure_lines(step)[0]}",
        "::group::log of openssl-3.3",
        "  \u2502 one",
        "  \u2502 two",
        "::endgroup::",
        f"  the whole log: drover log {key}",
    ]


def test_a_failure_in_a_log_of_gitlab_is_one_section() -> None:
    text = plain(Ci.GITLAB, *changed(failed("openssl-3.3", log_tail="one\ntwo")))
    sections = re.findall("\x1b\\[0Ksection_(start|end):[0-9]+:(\\w+)\r\x1b\\[0K", text)
    assert sections == [("start", f"{'0' * 32}_openssl_3_3"), ("end", f"{'0' * 32}_openssl_3_3")]
    assert text.splitlines()[0].startswith("\u2718 openssl-3.3 failed")


@pytest.mark.parametrize("ci", list(Ci))
def test_nothing_that_a_log_or_a_message_says_is_obeyed_by_a_runner_or_a_terminal(ci: Ci) -> None:
    message = FailureView(kind="permanent", message=f"{HOSTILE[:200]}\n::error::forged")
    text = plain(ci, *changed(failed("broken", log_tail=HOSTILE, failure=message, worker="w\n::endgroup::")))
    own = {Ci.GITHUB: 3, Ci.GITLAB: 0, Ci.NONE: 0}[ci]
    assert len(re.findall(r"^\s*::", text, re.MULTILINE)) == own
    assert not re.search(r"##(\[|vso\[)", text)
    controls = re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f]", re.sub("\x1b\\[0Ksection_\\S+\r\x1b\\[0K", "", text))
    assert not controls if ci is not Ci.GITLAB else set(controls) <= {"\r", "\x1b"}
    assert "STOLEN" not in text
    assert max(map(len, text.splitlines())) < 2000
    watched = Scripted(80, 24)
    watched.see(*changed(failed("broken", log_tail=HOSTILE, failure=message)), counts(total=1, failed=1))
    assert watched.terminal.emulated.title == ""
    assert sum("broken failed on" in line for line in watched.terminal.scrolled() + watched.terminal.shown()) == 1


def test_the_runner_is_detected() -> None:
    assert detected({"GITHUB_ACTIONS": "true"}) is Ci.GITHUB
    assert detected({"GITLAB_CI": "true"}) is Ci.GITLAB
    assert detected({"CI": "true"}) is Ci.NONE


@settings(max_examples=60)
@given(st.dictionaries(st.integers(0, 30), st.integers(0, 30), max_size=31), st.integers(1, 12), st.integers(1, 6))
def test_a_drawing_has_each_step_once_and_keeps_its_bounds(edges: dict[int, int], room: int, depth: int) -> None:
    above = {str(low): str(high) if high > low else "" for low, high in edges.items()}
    running = [key for key in above if key not in set(above.values())]
    places, hidden = draw(running, above, room, depth)
    keys = [each.key for each in places]
    assert len(set(keys)) == len(keys) <= room
    assert set(running) - set(keys) == set(running[len(running) - hidden :])
    assert all(len(each.branches) <= 3 * depth for each in places)
    for number, each in enumerate(places):
        if each.branches:
            lower = [other for other in places[number + 1 :] if len(other.branches) == len(each.branches) - 3]
            assert lower, "a branch leads to something below it"
