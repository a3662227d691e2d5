"""Memory and processor time of other processes, as Linux accounts for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Self

_TICKS_A_SECOND = 100
#: Words of a command line -> the part of the farm that it is; the first that are there count. Others are "other".
_PROGRAMS: Final = (
    ("drover up", "coordinator"),
    ("ray::AgentHost", "agent"),
    ("nix-daemon", "nix"),
    ("infra/daemon/owner.py", "nix"),
    ("workers.ray_transport", "ray"),
    ("/ray/", "ray"),
    ("ray::", "ray"),
)


def memory_mb(pid: int, name: str = "VmRSS") -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/{pid}/status has no {name}")


def processor_s(pid: int) -> float:
    """Return the processor time of a process alone."""
    return _account(pid, 2)


def processor_of_all_s(pids: Iterable[int]) -> float:
    """Return the processor time of processes and of the children that they have waited for."""
    return sum(_account(pid, 4) for pid in pids)


def processor_by_program_s(commands: Mapping[int, str]) -> dict[str, float]:
    """Return the processor time of a farm's parts, of processes by their command lines.

    Children that ended are their parent's, but for those of an agent, which are Nix and its sandboxes.
    """
    found: dict[str, float] = {}
    for pid, command in commands.items():
        program = next((name for word, name in _PROGRAMS if word in command.partition(" --")[0]), "other")
        own, both = processor_s(pid), processor_of_all_s((pid,))
        ended = "nix" if program == "agent" else program
        found[program] = found.get(program, 0.0) + own
        found[ended] = found.get(ended, 0.0) + both - own
    return found


def children_processor_s(pid: int) -> float:
    """Return the processor time of the children that a process has, with those that they have waited for."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return processor_of_all_s(int(child) for thread in threads for child in (thread / "children").read_text().split())


def _account(pid: int, fields: int) -> float:
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11 : 11 + fields]
    except OSError:
        return 0.0
    return sum(map(int, ticks)) / _TICKS_A_SECOND


class Repeated:
    """Does something again and again in a thread of its own for as long as the block lasts."""

    def __init__(self, pause_s: float, work: Callable[[], object]) -> None:
        self._pause_s = pause_s
        self._work = work
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._pause_s):
            self._work()
