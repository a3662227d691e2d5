"""Control groups (Linux, version 2) of daemons: the kernel's own account of all that their builds use.

A group holds one daemon and what descends from it. It counts what /proc's accounts miss: processes that were killed,
that were never waited for, or that still run. `infra.daemon.usage` is what there is without groups.

Rules:
1. Whatever fails costs a measure, never a build.
2. Only root makes groups. They belong to root, and builds run under ids of their own: none can write its group, or
   leave it.
3. Groups are made where the machine's manager of groups gives them away: below a group that it has marked as delegated
   (`Delegate=yes` of systemd), or at the top, where a container has no manager. Memory and disks are counted where the
   group above could be given these controllers: it must hold no process itself (`DelegateSubgroup=` of systemd).
4. Names begin with the mark of their user. What a killed user left is removed when the next one of this mark sweeps.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

#: Controllers that count memory and disks; processor time needs none.
CONTROLLERS: Final = "+memory +io"
#: Attribute of a delegated group, as systemd sets it.
DELEGATED: Final = "user.delegate"
#: Bytes of a file of the kernel that are read at one time; nearly all are shorter.
KERNEL_FILE_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class GroupAccount:
    """Use by all processes of a group since it was made; None where the kernel does not count it."""

    cpu_s: float | None
    read_bytes: int | None
    written_bytes: int | None


def read_whole(path: str) -> bytes:
    """Return a file of the kernel. Raises `OSError`.

    Each build has several read, and a `Path` takes four times as long.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(descriptor, KERNEL_FILE_BYTES)
        while more := os.read(descriptor, KERNEL_FILE_BYTES):
            data += more
        return data
    finally:
        os.close(descriptor)


def cpu_seconds(cpu_stat: str) -> float | None:
    """Return the processor time in a `cpu.stat`."""
    for line in cpu_stat.splitlines():
        name, _, value = line.partition(" ")
        if name == "usage_usec" and value.isdecimal():
            return int(value) / 1e6
    return None


def disk_bytes(io_stat: str, stacked: Callable[[str], bool] = lambda _: False) -> tuple[int, int]:
    """Return the bytes read and written in an `io.stat`.

    Devices that lie over others (`stacked`, by "major:minor") are left out: their bytes are counted below them again.
    """
    read = written = 0
    for line in io_stat.splitlines():
        device, *fields = line.split()
        counts = dict(field.split("=", 1) for field in fields if "=" in field)
        if not stacked(device):
            read += int(counts.get("rbytes", 0))
            written += int(counts.get("wbytes", 0))
    return read, written


class ControlGroup:
    """One group. `remove` it once its processes have ended."""

    def __init__(self, directory: Path, removed: Callable[[], None]) -> None:
        self._directory = directory
        self._removed = removed
        #: Reads the peak since it was reset by this very descriptor; -1: not counted.
        self._peak = -1

    def take(self, pid: int) -> None:
        """Move a process into the group; what it forks later begins there. Blocks for some 10 ms. Raises `OSError`."""
        (self._directory / "cgroup.procs").write_text(str(pid))

    def account(self) -> GroupAccount:
        """Return what all processes used so far."""
        read = written = None
        with suppress(OSError, ValueError):
            read, written = disk_bytes(self._text("io.stat"), _is_stacked)
        cpu_s = None
        with suppress(OSError):
            cpu_s = cpu_seconds(self._text("cpu.stat"))
        return GroupAccount(cpu_s, read, written)

    def begin_peak(self) -> None:
        """Let `peak` be that from now on. Kernels before 6.12 have only that of a group's whole life: none then."""
        with suppress(OSError):
            if self._peak < 0:
                self._peak = os.open(self._directory / "memory.peak", os.O_RDWR | os.O_CLOEXEC)
            os.write(self._peak, b"reset\n")
            return
        self._end_peak()

    def peak(self) -> int | None:
        """Return the most memory since `begin_peak`, with the pages of files that the kernel keeps for the group.

        None where it is not counted.
        """
        if self._peak < 0:
            return None
        with suppress(OSError, ValueError):
            return int(os.pread(self._peak, 64, 0))
        return None

    def remove(self) -> None:
        """Remove it; where a process is left, the next sweep of its mark does."""
        self._end_peak()
        with suppress(OSError):
            self._directory.rmdir()
        self._removed()

    def _end_peak(self) -> None:
        if self._peak >= 0:
            os.close(self._peak)
            self._peak = -1

    def _text(self, name: str) -> str:
        return read_whole(f"{self._directory}/{name}").decode()


class ControlGroups:
    """Groups of one user below `parent`; only the holder of the user's lock may have it."""

    def __init__(self, parent: Path, user: str) -> None:
        self.parent = parent
        self._mark = f"drover-{sha256(user.encode()).hexdigest()[:12]}-"
        self._numbers = itertools.count()
        self._used: set[str] = set()

    @classmethod
    def found(cls, user: str) -> ControlGroups | None:
        """Return those of a user where this machine gives groups away (rule 3); None elsewhere."""
        if os.geteuid() != 0:
            return None
        with suppress(OSError):
            place = _place(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
            if place is None:
                return None
            top, own = place
            if own != top and _is_delegated(own.parent):
                own = own.parent
            elif own != top and not _is_delegated(own):
                return None
            # Refused where the group holds processes itself: then processor time alone is counted.
            with suppress(OSError):
                if _is_delegated(own):
                    (own / "cgroup.subtree_control").write_text(CONTROLLERS)
            return cls(own, user)
        return None

    def make(self) -> ControlGroup | None:
        """Make a group, and sweep; None where the kernel refuses one more."""
        self.sweep()
        name = f"{self._mark}{os.getpid()}-{next(self._numbers)}"
        # First of all: another thread may sweep.
        self._used.add(name)
        try:
            (self.parent / name).mkdir()
        except OSError:
            self._used.discard(name)
            return None
        return ControlGroup(self.parent / name, lambda: self._used.discard(name))

    def sweep(self) -> int:
        """Remove the groups of this user that nothing uses and nothing runs in; returns how many."""
        removed = 0
        for group in self.groups():
            if group.name not in self._used:
                with suppress(OSError):
                    group.rmdir()
                    removed += 1
        return removed

    def groups(self) -> list[Path]:
        """Return the directories of all groups of this user."""
        try:
            return list(self.parent.glob(f"{self._mark}*"))
        except OSError:
            return []


def _place(mountinfo: str, cgroup: str) -> tuple[Path, Path] | None:
    """Return the top of the hierarchy of version 2 and this process's own group in it; None where it is not seen."""
    own = next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), "")
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        words = fields.split()
        # A part of the hierarchy only, or a group outside of what is mounted: nothing to reckon with.
        if rest.startswith("cgroup2 ") and words[3] == "/" and own.startswith("/") and ".." not in own:
            top = Path(words[4])
            return top, top / own.strip("/") if own != "/" else top
    return None


def _is_delegated(group: Path) -> bool:
    try:
        return os.getxattr(group, DELEGATED) == b"1"
    except (OSError, AttributeError):
        return False


def _is_stacked(device: str) -> bool:
    try:
        return any(os.scandir(f"/sys/dev/block/{device}/slaves"))
    except OSError:
        return False
