"""Looking at other people's processes, as the tests of cancelling and of dying do."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from infra.daemon.control_groups import ControlGroups
from infra.daemon.owner import descendants, parents

#: A builder that does all it can to survive: deaf to SIGTERM, in a session of its own, and forked twice.
SURVIVOR = """
trap '' TERM HUP INT
/bin/busybox setsid /bin/busybox sh -c 'trap "" TERM; while :; do /bin/busybox sleep 1; done' &
( ( while :; do /bin/busybox sleep 1; done ) & ) &
echo started
while :; do /bin/busybox sleep 1; done
"""
#: Leaves a process that holds none of the builder's streams, so that Nix sees the end of the build.
LEAVES_A_PROCESS = """
trap '' TERM HUP INT
/bin/busybox setsid /bin/busybox sh -c '
  (trap "" TERM HUP INT; echo > $PWD/left; while :; do /bin/busybox sleep 1; done) &
' > /dev/null 2>&1 < /dev/null
while [ ! -e $PWD/left ]; do :; done
"""


#: Name of a control group of drover: its user, the process that made it, and a number.
_GROUP = re.compile(r"drover-[0-9a-f]{12}-([0-9]+)-[0-9]+")


def sweep_dead_groups() -> int:
    """Remove the control groups of all users whose process has ended; returns how many. Those in use stay."""
    groups = ControlGroups.found("tests")
    removed = 0
    for directory in () if groups is None else groups.parent.glob("drover-*"):
        made = _GROUP.fullmatch(directory.name)
        if made is not None and not Path("/proc", made[1]).exists():
            with suppress(OSError):
                directory.rmdir()
                removed += 1
    return removed


def processes_with(text: str) -> list[int]:
    """Processes whose environment or command holds the text (a builder's has the paths of its outputs), oldest first.

    Not by number: the kernel starts again at the lowest after the last one, so a builder's `sleep` may precede it.
    """
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            try:
                seen = (directory / "environ").read_bytes() + (directory / "cmdline").read_bytes()
                # Field 22 of proc(5), less the two before the state and one for counting from 0.
                started = int((directory / "stat").read_bytes().rpartition(b")")[2].split()[19])
            except OSError:
                continue
            if text.encode() in seen:
                found.append((started, int(directory.name)))
    return [pid for _, pid in sorted(found)]


def daemons_below(process: int) -> list[int]:
    """The `nix-daemon --stdio` processes that descend from a process, without the owners above them."""
    found = []
    for pid in descendants(process, parents()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--stdio" in command[:2]:
            found.append(pid)
    return found


def above(process: int, command: str) -> int:
    """The one process of that command which a process descends from."""
    [found] = [pid for pid in ancestors(process) if command in " ".join(_command(pid)[:4])]
    return found


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")


def ancestors(process: int) -> list[int]:
    """The process, its parent, and so on up to the first."""
    parent_of = parents()
    found = [process]
    while above := parent_of.get(found[-1], 0):
        found.append(above)
    return found
