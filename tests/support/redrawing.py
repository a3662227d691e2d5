"""A program that draws a build's region: `python -m tests.support.redrawing SOCKET WIDTH,HEIGHT…`.

It draws a frame for each size in turn once something is sent on tmux's channel `go`, and sends on `drawn`.
"""

from __future__ import annotations

import os
import subprocess
import sys

from coordinator.cli.live import Window
from coordinator.cli.screen import Screen
from tests.support.screens import Scripted, failing

#: Lines that scroll before the first frame.
LINES_BEFORE = 20


class _Told(Screen):
    """A screen whose window is what the test says: a program may learn late that it was changed."""

    size = Window(80, 24)

    def window(self) -> Window:
        return self.size


def main(socket: str, *sizes: str) -> None:
    """Draw."""

    def say(*words: str) -> None:
        subprocess.run(["tmux", "-S", socket, "wait-for", *words], check=True)

    screen = _Told(sys.stdout, os.environ)
    # A window that is mostly full, as after a while of any build.
    screen.line("\n".join(f"said before: {number}" for number in range(LINES_BEFORE)))
    watched = Scripted(on=screen)
    for number, size in enumerate(sizes):
        width, height = map(int, size.split(","))
        screen.size = Window(width, height)
        if number:
            watched.see(seconds=0.0)
        else:
            failing(watched)
        say("-S", "drawn")
        say("go")
    watched.follower.end()
    say("-S", "drawn")
    say("go")


if __name__ == "__main__":
    main(*sys.argv[1:])
