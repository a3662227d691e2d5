"""The screen of one command: a terminal with a live region below what scrolls, or lines for a file or a pipe.

The region is drawn over itself, each frame with what scrolls in one write between the marks of a synchronised update,
so that a terminal shows whole frames. A window that became narrower has wrapped the lines of the last frame, and most
terminals wrap what they show too: `LiveRegion` counts the rows that they take now. Rich's `Live` counts those that they
took, and leaves pieces of its frames behind.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final, TextIO

from coordinator.cli.ci import Ci, defused, detected, section, verdict
from coordinator.cli.lines import Line, plain, width_of, written
from coordinator.cli.live import Window
from coordinator.terminal_controls import harmless

_BEGIN: Final = "\x1b[?2026h"
_END: Final = "\x1b[?2026l"
_HIDE: Final = "\x1b[?25l"
_SHOW: Final = "\x1b[?25h"
_CLEAR_LINE: Final = "\x1b[K"
_CLEAR_BELOW: Final = "\x1b[J"
#: Of a terminal that says no size.
USUAL: Final = Window(80, 24)


def is_capable(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Return true if a live region can stand on a stream: a terminal that moves its cursor."""
    return stream.isatty() and environment.get("TERM", "dumb") not in {"dumb", "unknown"}


def wants_colours(environment: Mapping[str, str]) -> bool:
    """Return true if colours are welcome (no-color.org)."""
    return not environment.get("NO_COLOR")


def reflows(environment: Mapping[str, str]) -> bool:
    """Return true if the terminal wraps anew what it shows when its window changes: all but a few old ones do."""
    term = environment.get("TERM", "")
    old = "XTERM_VERSION" in environment or term.startswith(("linux", "vt"))
    return not old and (not term.startswith("screen") or "TMUX" in environment)


def _safe(lines: Sequence[Line]) -> list[Line]:
    return [[(harmless(text).replace("\n", " "), style) for text, style in line] for line in lines]


def _lines(lines: Sequence[Line]) -> str:
    """Return lines for an output that is no terminal, each with its newline."""
    return "".join([f"{defused(plain(line))}\n" for line in lines])


class LiveRegion:
    """The region below the text that scrolls: gives what must be written for a new frame, and remembers the last."""

    def __init__(self, *, reflows: bool, colours: bool) -> None:
        self._reflows = reflows
        self.colours = colours
        #: Cells of each line of the frame that stands; the cursor is at the beginning of the last one.
        self._widths: tuple[int, ...] = ()

    def frame(self, scrolled: Sequence[Line], lines: Sequence[Line], window: Window) -> str:
        """Return what replaces the region by `scrolled`, which goes away upwards, and the region `lines`."""
        text = [_BEGIN, _HIDE, self._to_top(window)]
        text += [f"{written(line, colours=self.colours)}{_CLEAR_LINE}\n" for line in scrolled]
        text.append("\n".join([written(line, colours=self.colours) + _CLEAR_LINE for line in lines]))
        text += [_CLEAR_BELOW, "\r", _END]
        self._widths = tuple([width_of(line) for line in lines])
        return "".join(text)

    def end(self, scrolled: Sequence[Line], window: Window) -> str:
        """Return what takes the region away and leaves the terminal as it was."""
        text = self.frame(scrolled, (), window)
        return text + _SHOW

    def _to_top(self, window: Window) -> str:
        """Return what moves the cursor to the beginning of the region."""
        if not self._reflows:
            rows = len(self._widths) - 1
        else:
            rows = sum(max(1, -(-width // window.width)) for width in self._widths[:-1])
        # Above the window is what scrolled away, which no cursor reaches.
        rows = min(rows, window.height - 1)
        return f"\r\x1b[{rows}A" if rows > 0 else "\r"


class Screen:
    """Output for people: lines, and on a terminal a live region below them."""

    def __init__(self, stream: TextIO, environment: Mapping[str, str], ci: Ci = Ci.NONE) -> None:
        self._stream = stream
        self._ci = ci
        self.live = is_capable(stream, environment)
        self._region = LiveRegion(reflows=reflows(environment), colours=wants_colours(environment))
        #: A frame stands on the terminal.
        self._drawn = False
        #: What scrolls with the next frame.
        self._scrolled: list[Line] = []

    @classmethod
    def choose(cls, *, as_json: bool, ci: Ci | None = None) -> Screen:
        """Return standard output, or standard error where standard output is for JSON.

        `ci` is the runner whose sections are used; None: the one that started this program, if any.
        """
        runner = detected(os.environ) if ci is None else ci
        return cls(sys.stderr if as_json else sys.stdout, os.environ, runner)

    def window(self) -> Window:
        """Return the size of the terminal as it is now."""
        try:
            width, height = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            return USUAL
        return Window(width or USUAL.width, height or USUAL.height)

    def line(self, text: str, style: str = "") -> None:
        """Write a text as it stands: not wrapped, nothing in it means anything, to the terminal neither."""
        self.block([[(each, style)] for each in text.split("\n")])

    def status(self, text: str) -> None:
        """Write a line about the client's own doings."""
        self.line(text, "dim")

    def block(self, lines: Sequence[Line]) -> None:
        """Write lines that belong together, with nothing in between; below a live region they wait for its frame."""
        safe = _safe(lines)
        if self._drawn:
            self._scrolled += safe
        elif self.live:
            self._write("".join(f"{written(line, colours=self._region.colours)}\n" for line in safe))
        else:
            self._write(_lines(safe))

    def failure(self, key: str, title: str, lines: Sequence[Line]) -> None:
        """Write what is said of a failure: the sentence, what it printed, and what to do.

        Runners of continuous integration fold what it printed and show the sentence beside the change.
        """
        if self.live or self._ci is Ci.NONE:
            self.block(lines)
            return
        first, *middle, last = _safe(lines)
        log = section(self._ci, key, defused(f"log of {title}"), _lines(middle), time.time()) if middle else ""
        sentence = verdict(self._ci, defused(f"{title} failed"), defused(plain(first)))
        self._write(f"{sentence}\n{log}{_lines([last])}")

    def draw(self, lines: Sequence[Line]) -> None:
        """Draw a frame of the live region, and before it what scrolls."""
        scrolled, self._scrolled = self._scrolled, []
        self._drawn = True
        self._write(self._region.frame(scrolled, lines, self.window()))

    def undraw(self) -> None:
        """Take the live region away; what waited for its frame stays."""
        if self._drawn:
            self._drawn = False
            scrolled, self._scrolled = self._scrolled, []
            self._write(self._region.end(scrolled, self.window()))

    def _write(self, text: str) -> None:
        # In one piece: a pipe has other writers, and a terminal shows what it has.
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()
