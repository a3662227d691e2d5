"""Machines of which one is slower: control groups that give processes a large share, and some only a part of that."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from infra.process_tree import process_tree
from tests.support.patience import PATIENCE_S

PERIOD_US: Final = 100_000
#: Times that the group's processes together weigh as much as one of the machine's others: what else runs is no reason.
WEIGHT: Final = 64
#: Seconds in which processes must have left a group.
EMPTY_WITHIN_S: Final = PATIENCE_S
_V1: Final = Path("/sys/fs/cgroup/cpu")
_V2: Final = Path("/sys/fs/cgroup")


@contextmanager
def one_slow(leaders: Iterable[int], slow: int, part: float) -> Iterator[None]:
    """Let the process `slow` and all below it, now and later, have a part of one processor until the block ends.

    It and the trees of `leaders` go before what else the machine runs, so that it is slower than these whatever that
    is. By version 1 of control groups where it has a processor controller, else by version 2.
    """
    v1 = (_V1 / "cgroup.procs").exists()
    home = _V1 if v1 else _V2
    quick = home / f"drover-test-{os.getpid()}-{slow}"
    throttled = home / f"{quick.name}-slow"
    for group in (quick, throttled):
        group.mkdir()
        (group / ("cpu.shares" if v1 else "cpu.weight")).write_text(str(WEIGHT * (1024 if v1 else 100)))
    quota = int(part * PERIOD_US)
    if v1:
        (throttled / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (throttled / "cpu.cfs_quota_us").write_text(str(quota))
    else:
        (throttled / "cpu.max").write_text(f"{quota} {PERIOD_US}")
    try:
        for leader, group in (*((each, quick) for each in leaders), (slow, throttled)):
            for process in process_tree(leader):
                _move(process.pid, group)
        yield
    finally:
        for group in (quick, throttled):
            _empty(group, home)
            group.rmdir()


def _empty(group: Path, home: Path) -> None:
    deadline = time.monotonic() + EMPTY_WITHIN_S
    while pids := (group / "cgroup.procs").read_text().split():
        assert time.monotonic() < deadline, f"processes {pids} cannot leave {group}"
        for pid in pids:
            _move(int(pid), home)


def _move(pid: int, group: Path) -> None:
    # One that has ended is nowhere.
    with suppress(ProcessLookupError):
        (group / "cgroup.procs").write_text(str(pid))
