"""Use of the machine by a daemon's builders, as the kernel accounts for it in /proc.

A process that is waited for adds what it used to its parent's account. Nix waits for its builders, so the difference of
the daemon's account over a build is the build's; it lacks what is still running. Memory has no such account: it is
looked at while the builders run. Where /proc has nothing (macOS, a daemon behind a socket) the answer is None. A
control group of the daemon's own (`infra.daemon.control_groups`) counts all of it more exactly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra.daemon.control_groups import GroupAccount, read_whole

#: Unit of /proc/PID/statm, bytes, and of times in /proc/PID/stat, seconds.
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
#: Files of /proc that one look at memory reads, some 10 us each on the event loop; beyond it the look is partial.
LOOK_FILES: Final = 1_000


@dataclass(frozen=True, slots=True)
class Account:
    """A process's account of the children that it has waited for; bytes are those from and to disks, its own too."""

    cpu_s: float
    #: Pages that children touched first: more of them show that a child ran, however short.
    faults: int
    read_bytes: int | None
    written_bytes: int | None
    #: Processor time of the process itself.
    own_cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class BuildersUse:
    """Use by builders between two accounts: seconds of all processors together, bytes from and to disks.

    The peak of memory is a control group's, with pages of files; None without one that counts it.
    """

    cpu_s: float
    read_bytes: int | None
    written_bytes: int | None
    peak_memory_bytes: int | None = None


def read_account(pid: int) -> Account | None:
    """Return the account of a process; None where /proc has none."""
    try:
        # pid (name) state ppid ...; the name may hold anything, parentheses and blanks included.
        fields = read_whole(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        # Fields 11, 14 to 17 of proc(5), less the two before the state and one for counting from 0.
        faults, user, system = int(fields[8]), int(fields[13]), int(fields[14])
        own = int(fields[11]) + int(fields[12])
    except (OSError, ValueError, IndexError):
        return None
    read, written = _disk_bytes(pid)
    return Account((user + system) * TICK_S, faults, read, written, own * TICK_S)


def used_between(before: Account | None, after: Account | None) -> BuildersUse | None:
    """Return what children used; None where an account is missing or no child ran."""
    if before is None or after is None or after.faults <= before.faults:
        return None
    return BuildersUse(
        cpu_s=round(after.cpu_s - before.cpu_s, 3),
        read_bytes=_difference(before.read_bytes, after.read_bytes),
        written_bytes=_difference(before.written_bytes, after.written_bytes),
    )


def used_by_group(
    before: GroupAccount, after: GroupAccount, daemon_s: float, used: BuildersUse | None
) -> BuildersUse | None:
    """Return `used` with what a group counted instead, less the seconds of the daemon that is in it."""
    cpu_s = None
    if before.cpu_s is not None and after.cpu_s is not None:
        cpu_s = round(max(0.0, after.cpu_s - before.cpu_s - daemon_s), 6)
    elif used is not None:
        cpu_s = used.cpu_s
    if cpu_s is None:
        return used
    read, written = (
        _difference(before.read_bytes, after.read_bytes),
        _difference(before.written_bytes, after.written_bytes),
    )
    return BuildersUse(
        cpu_s=cpu_s,
        read_bytes=read if read is not None or used is None else used.read_bytes,
        written_bytes=written if written is not None or used is None else used.written_bytes,
    )


def memory_below(pid: int) -> int | None:
    """Return the bytes that the processes below `pid` have for themselves now; None where it has none.

    Pages of files are left out, because processes share them and the kernel can drop them.
    """
    found = [_own_bytes(child) for child in _descendants(pid)]
    return sum(found) if found else None


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else max(0, after - before)


def _disk_bytes(pid: int) -> tuple[int | None, int | None]:
    try:
        lines = dict(line.split(b": ") for line in read_whole(f"/proc/{pid}/io").splitlines())
        return int(lines[b"read_bytes"]), int(lines[b"write_bytes"])
    except (OSError, ValueError, KeyError):
        return None, None


def _own_bytes(pid: int) -> int:
    try:
        words = Path(f"/proc/{pid}/statm").read_bytes().split()
        return max(0, int(words[1]) - int(words[2])) * PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return 0  # it ended meanwhile


def _descendants(root: int) -> Iterator[int]:
    """Yield processes below `root`, parents first, until LOOK_FILES files are read."""
    left = LOOK_FILES
    layer = [root]
    while layer:
        below: list[int] = []
        for pid in layer:
            # Any thread may have children: a build tool starts compilers from a pool.
            for tasks in _tasks(pid):
                left -= 1
                if left < 0:
                    return
                for child in _children(tasks):
                    left -= 1
                    below.append(child)
                    yield child
        layer = below


def _tasks(pid: int) -> Iterator[Path]:
    try:
        yield from (Path(entry.path) for entry in os.scandir(f"/proc/{pid}/task"))
    except OSError:
        return


def _children(task: Path) -> list[int]:
    try:
        return [int(word) for word in (task / "children").read_bytes().split()]
    except (OSError, ValueError):
        return []
