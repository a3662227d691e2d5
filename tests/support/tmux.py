"""A real tmux of a test's own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support.patience import PATIENCE_S


class Tmux:
    """A tmux server on a socket of its own, with one window."""

    def __init__(self, socket: Path, environment: Mapping[str, str]) -> None:
        self.socket = socket
        self._environment = {**environment, "LC_ALL": "C.UTF-8"}

    def run(self, *words: str) -> str:
        """Run tmux commands (`;` between them) and return what they print."""
        return subprocess.run(
            ["tmux", "-u", "-f", "/dev/null", "-S", str(self.socket), *words],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        ).stdout

    def wait(self, channel: str) -> None:
        """Wait until somebody has sent on a channel."""
        self.run("wait-for", channel)

    def send(self, channel: str) -> None:
        """Send on a channel."""
        self.run("wait-for", "-S", channel)

    def whole(self) -> list[str]:
        """Return the lines that scrolled and those that are shown, without the empty ones at the end."""
        return self.run("capture-pane", "-p", "-S", "-").rstrip("\n").split("\n")


@contextmanager
def tmux(directory: Path, command: str, width: int, height: int, **environment: str) -> Iterator[Tmux]:
    """Run a shell's command in a window of tmux; the block's end ends both."""
    server = Tmux(directory / "tmux", {**os.environ, **environment})
    server.run("new-session", "-d", "-x", str(width), "-y", str(height), command)
    try:
        yield server
    finally:
        server.run("kill-server")
