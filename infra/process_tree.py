"""Process trees: the processes that live, those that belong together, and ending them.

A process is named by its number and its start time, since numbers are used again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """A live process; `started` distinguishes it from a later one of the same number."""

    pid: int
    parent: int
    session: int
    started: str


def live_processes() -> dict[int, Process]:
    """Return all live processes that can be looked at; zombies are dead."""
    return _from_proc() if sys.platform == "linux" else _from_ps()


def _from_proc() -> dict[int, Process]:
    found: dict[int, Process] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (process := _read_stat(int(entry.name))):
            found[process.pid] = process
    return found


def _read_stat(pid: int) -> Process | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The name stands in parentheses and may hold blanks: fields are counted after it (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        if fields[0] not in "ZX":
            return Process(pid, int(fields[1]), int(fields[3]), fields[19])
    return None


def _from_ps() -> dict[int, Process]:
    command = ["ps", "-axo", "pid=,ppid=,stat=,lstart="]
    listing = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    found: dict[int, Process] = {}
    for line in listing.stdout.splitlines():
        with contextlib.suppress(OSError, ValueError):
            pid, parent, state, started = line.split(None, 3)
            if not state.startswith("Z"):
                found[int(pid)] = Process(int(pid), int(parent), os.getsid(int(pid)), started)
    return found


def identity(pid: int) -> tuple[int, str]:
    """Return number and start time of a process as they can be written down; an empty time where it is gone."""
    return pid, _started(pid)


def is_alive(pid: int, started: str) -> bool:
    """Return whether the process of this identity lives."""
    return bool(started) and _started(pid) == started


def _started(pid: int) -> str:
    found = _read_stat(pid) if sys.platform == "linux" else live_processes().get(pid)
    return found.started if found else ""


def process_tree(root: int) -> set[Process]:
    """Return the live processes of session `root` and all that descend from them."""
    everyone = live_processes()
    members = {process.pid for process in everyone.values() if root in (process.session, process.pid)}
    grew = True
    while grew:
        more = {p.pid for p in everyone.values() if p.parent in members} - members
        members |= more
        grew = bool(more)
    return {everyone[pid] for pid in members if pid in everyone}


def children(parent: int) -> frozenset[Process]:
    """Return the live processes that a process has started itself."""
    return frozenset(process for process in live_processes().values() if process.parent == parent)


def signal_all(processes: Iterable[Process], number: signal.Signals) -> None:
    """Send a signal to each; those that are gone, or are not ours, are passed over."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, number)


def still_alive(remembered: Iterable[Process]) -> set[Process]:
    """Return those that live now."""
    now = live_processes()
    return {p for p in remembered if p.pid in now and now[p.pid].started == p.started}
