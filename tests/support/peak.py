"""The most memory that a command had."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

#: The kernel counts what a process had before it became the command, and that is its parent's memory. So the command's
#: parent is this small one, which says how the command ended. Python's own signals are not the command's.
_SMALL_PARENT = """
import os, signal, sys
said, *command = sys.argv[1:]
own = {signal.SIGPIPE, signal.SIGXFSZ}
process = os.posix_spawnp(command[0], command, os.environ, setsigdef=own)
_, status, use = os.wait4(process, 0)
with open(said, "w") as file:
    file.write(str(use.ru_maxrss * 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def with_peak(command: Sequence[str], said: Path) -> list[str]:
    """Return the command whose end leaves in `said` the bytes for `peak_bytes`; its status is the command's."""
    return [sys.executable, "-I", "-S", "-c", _SMALL_PARENT, str(said), *command]


def peak_bytes(said: Path) -> int:
    """Return the most resident memory of a command, or of the largest of its children that it waited for.

    However much the process has that started it, it is not counted; some 10 MB of a small parent are.
    """
    return int(said.read_text())
