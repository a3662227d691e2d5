"""The screen of one command: a terminal with a live region below what scrolls, or lines for a file or a pipe.

The region is drawn over itself, each frame with what scrolls in one write between the marks of a synchronised update,
so that a terminal shows whole frames. Between frames the cursor stands at the beginning of the region, because a
terminal that wraps what it shows when its window becomes narrower takes the cursor along: the next frame begins there,
however many rows the last one takes now, and whatever the program believed the window's size to be. A frame's own
lines do not wrap, so that as many rows are counted back as it has lines. Rich's `Live` counts the rows that its last
frame took, and leaves pieces of its frames behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TextIO

from coordinator.cli.ci import Ci, defused, detected, section, verdict
from coordinator.cli.lines import Line, plain, written
from coordinator.cli.live import Window
from coordinator.terminal_controls import harmless

_BEGIN: Final = "\x1b[?2026h"
_END: Final = "\x1b[?2026l"
_HIDE: Final = "\x1b[?25l"
_SHOW: Final = "\x1b[?25h"
_CLEAR_LINE: Final = "\x1b[K"
_CLEAR_BELOW: Final = "\x1b[J"
#: Clears the cursor's row and those below it. tmux saves a screen that is cleared from its very first cell with what
#: scrolled, so it is cleared from the second one; a row that was wrapped and is only overwritten stays joined.
_CLEAR_REGION: Final = f"\r{_CLEAR_LINE} {_CLEAR_BELOW}\r"
_NO_WRAP: Final = "\x1b[?7l"
_WRAP: Final = "\x1b[?7h"
#: Of a terminal that reports no size.
USUAL: Final = Window(80, 24)


def is_capable(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Return true if a live region can stand on a stream: a terminal that moves its cursor."""
    return stream.isatty() and environment.get("TERM", "dumb") not in {"dumb", "unknown"}


def wants_colours(environment: Mapping[str, str]) -> bool:
    """Return true if colours are welcome (no-color.org)."""
    return not environment.get("NO_COLOR")


def _safe(lines: Sequence[Line]) -> list[Line]:
    return [[(harmless(text).replace("\n", " "), style) for text, style in line] for line in lines]


def _lines(lines: Sequence[Line]) -> str:
    """Return lines for an output that is no terminal, each with its newline."""
    return "".join([f"{defused(plain(line))}\n" for line in lines])


class LiveRegion:
    """The region below the text that scrolls: gives what must be written for a new frame, and remembers the last."""

    def __init__(self, *, colours: bool) -> None:
        self.colours = colours
        #: The window of the last frame.
        self._window: Window | None = None

    def frame(self, scrolled: Sequence[Line], lines: Sequence[Line], window: Window) -> str:
        """Return what replaces the region by `scrolled`, which goes away upwards, and the region `lines`."""
        text = [_BEGIN, _HIDE, "\r"]
        if scrolled or not lines or window != self._window:
            text.append(_CLEAR_REGION)
        self._window = window
        text += [f"{written(line, colours=self.colours)}\n" for line in scrolled]
        if lines:
            # A row is cleared before it is written, because the cursor stays on the last cell of a full one.
            *upper, last = [written(line, colours=self.colours) for line in lines]
            text += [_NO_WRAP, *(f"{_CLEAR_LINE}{line}\n" for line in upper), _CLEAR_REGION, last, "\r"]
            text += [f"\x1b[{len(upper)}A" if upper else "", _WRAP]
        text.append(_END)
        return "".join(text)

    def end(self, scrolled: Sequence[Line], window: Window) -> str:
        """Return what takes the region away and leaves the terminal as it was."""
        return self.frame(scrolled, (), window) + _SHOW


class Screen:
    """Output for people: lines, and on a terminal a live region below them."""

    def __init__(self, stream: TextIO, environment: Mapping[str, str], ci: Ci = Ci.NONE) -> None:
        self._stream = stream
        self._ci = ci
        self.live = is_capable(stream, environment)
        self._region = LiveRegion(colours=wants_colours(environment))
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


@contextlib.contextmanager
def resizing(resized: Callable[[], None]) -> Iterator[None]:
    """Have `resized` called when the window changes, as long as the block runs.

    Only a program's main thread gets signals; in another one the next frame shows the new size.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, resized)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)
