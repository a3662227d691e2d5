"""Programs on a real pseudo-terminal, with an emulated terminal on its other side."""

from __future__ import annotations

import codecs
import os
import select
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.support.patience import PATIENCE_S
from tests.support.screens import Terminal

#: End of a frame that is drawn in one piece.
_FRAME_END = "\x1b[?2026l"


class PseudoTerminal:
    """A program's terminal: what is typed goes in, what the program writes goes to the emulated one."""

    def __init__(self, terminal: Terminal, descriptor: int, process: subprocess.Popen[bytes]) -> None:
        self.terminal = terminal
        self.process = process
        self.ended = False
        self._descriptor = descriptor
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting = ""

    def type(self, text: str) -> None:
        """Type text, control characters included."""
        os.write(self._descriptor, text.encode())

    def resize(self, width: int, height: int) -> None:
        """Change the window's size; the program gets a signal."""
        self.terminal.emulated.resize(height, width)
        termios.tcsetwinsize(self._descriptor, (height, width))

    def all(self) -> str:
        """Return all lines that scrolled away or are shown."""
        return "\n".join([*self.terminal.scrolled(), *self.terminal.shown()])

    def until(self, condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
        """Let the program write until the condition holds."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert not self.ended, self.all()
            assert time.monotonic() < deadline, self.all()
            for _ in self._frames(0.05):
                pass

    def frames(self) -> Iterator[list[str]]:
        """Yield what stands on the terminal after each frame, until the program ends."""
        while not self.ended:
            yield from self._frames(PATIENCE_S)

    def _frames(self, within_s: float) -> Iterator[list[str]]:
        if not select.select([self._descriptor], [], [], within_s)[0]:
            return
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:
            # Linux's way to say that the other side has closed it.
            data, self.ended = b"", True
        *whole, rest = (self._waiting + self._decoder.decode(data)).split(_FRAME_END)
        for frame in whole:
            self.terminal.write(frame + _FRAME_END)
            yield self.terminal.shown()
        begun = next((n for n in range(len(_FRAME_END) - 1, 0, -1) if rest.endswith(_FRAME_END[:n])), 0)
        self._waiting = rest[len(rest) - begun :] if begun else ""
        self.terminal.write(rest[: len(rest) - begun])


@contextmanager
def on_terminal(command: Sequence[str], terminal: Terminal, environment: Mapping[str, str]) -> Iterator[PseudoTerminal]:
    """Run a program on a terminal of the emulated one's size; the block's end ends it."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (terminal.emulated.lines, terminal.emulated.columns))
    process = subprocess.Popen(
        ["setsid", "--ctty", *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
    )
    os.close(theirs)
    try:
        yield PseudoTerminal(terminal, ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
