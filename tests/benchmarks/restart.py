"""Start of a coordinator to its first lease with a 100,000-step submission in flight, and its memory at 300,000 steps.

What is measured: the state directory of a real coordinator (real intake, core, journal, cache) that was killed with -9
while it held the submission: some thousand steps built, some leased, a snapshot of the journal and a tail behind it.
Then the time from the start of the next process until the journal holds, committed, the first lease that it granted.
A stand-in worker greets it as soon as it listens to workers, holds the leases it had and takes more.

With `--ray` also the same for all of `drover up`: killed while a real worker builds, started again, its Ray nodes taken
over. The peer is the target: 5 s, and 600 MB of memory (RSS, once HTTP answers and the process has come to rest).
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator.journal.codec import decode_facts
from scheduler.facts import StepLeased
from tests.benchmarks.processes import memory_mb, processor_s
from tests.benchmarks.report import arguments, progress, publish
from tests.benchmarks.restart_farm import Plan
from tests.support.farm import Farm, WorkerSpec

TARGET_S = 5.0
TARGET_MB = 600.0
STEPS = 100_000
MEMORY_STEPS = 300_000
#: Only ends a benchmark that hangs.
PATIENCE_S = 900.0
#: Seconds after HTTP answers at which memory is read: by then what the start began has come to rest.
REST_S = 10.0


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds of wall time and of the process's own processor time to the first lease, and its memory."""

    lease_s: float
    processor_s: float
    rss_mb: float
    peak_mb: float


class Observer:
    """Reads a journal beside whoever writes it."""

    def __init__(self, state_dir: Path) -> None:
        self._file = state_dir / "journal.sqlite3"
        [(self._seq, _)] = self._ask("SELECT coalesce(max(seq), 0), NULL FROM journal_frames WHERE seq > ?", 0)

    def leased(self) -> bool:
        """Return whether a lease was granted since the last call."""
        rows = self._ask("SELECT seq, body FROM journal_frames WHERE seq > ? ORDER BY seq", self._seq)
        self._seq = rows[-1][0] if rows else self._seq
        return any(isinstance(fact, StepLeased) for _, body in rows for fact in decode_facts(body))

    def _ask(self, query: str, behind: int) -> list[tuple[int, bytes]]:
        with closing(sqlite3.connect(f"file:{self._file}?mode=ro", uri=True, timeout=60)) as connection:
            return connection.execute(query, (behind,)).fetchall()


def seed(plan: Plan) -> None:
    """Leave the state directory of a coordinator that was killed."""
    began = time.monotonic()
    with _running("seed", plan) as process:
        _wait_for(process, "seeded")
    progress(f"{plan.steps} steps seeded in {time.monotonic() - began:.0f} s")


def start(plan: Plan, template: Path) -> Start:
    """Start the coordinator on a copy of a state directory."""
    shutil.rmtree(plan.state_dir, ignore_errors=True)
    shutil.copytree(template, plan.state_dir, copy_function=_link)
    # What the copy left to the disk is none of the coordinator's.
    os.sync()
    observer = Observer(plan.state_dir)
    began = time.monotonic()
    with _running("serve", plan) as process:
        lease_s = _first_lease(observer, began)
        cpu_s = processor_s(process.pid)
        _wait_for(process, "ready")
        time.sleep(REST_S)
        return Start(lease_s, cpu_s, memory_mb(process.pid), memory_mb(process.pid, "VmHWM"))


def start_farm(farm: Farm) -> Start:
    """Kill the coordinator of a running farm with -9, and start it again."""
    farm.kill()
    observer = Observer(farm.state)
    began = time.monotonic()
    farm.launch()
    lease_s = _first_lease(observer, began)
    cpu_s = processor_s(farm.pid)
    while farm.health() != "ok":
        time.sleep(0.1)
    time.sleep(REST_S)
    return Start(lease_s, cpu_s, memory_mb(farm.pid), memory_mb(farm.pid, "VmHWM"))


def _link(source: str, target: str) -> None:
    """Copy databases, which are written to; link all else (thousands of objects)."""
    if ".sqlite3" in source or source.endswith(".json"):
        shutil.copy2(source, target)
    else:
        Path(target).hardlink_to(source)


def _first_lease(observer: Observer, began: float) -> float:
    while not observer.leased():
        if time.monotonic() - began > PATIENCE_S:
            raise SystemExit("no lease was granted")
        time.sleep(0.01)
    return time.monotonic() - began


@contextmanager
def _running(mode: str, plan: Plan) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.benchmarks.restart_farm", mode, plan.model_dump_json()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    if process.stdout.readline().strip() != word:
        raise SystemExit("the coordinator did not start")


def _show(name: str, found: Start) -> Start:
    progress(
        f"{name}: first lease after {found.lease_s:.2f} s ({found.processor_s:.2f} s of processor), "
        f"memory {found.rss_mb:.0f} MB, peak {found.peak_mb:.0f} MB"
    )
    return found


def _repeat(plan: Plan, runs: int, states: Path) -> list[Start]:
    template = states / f"state-{plan.steps}"
    if not template.exists():
        seed(plan.model_copy(update={"state_dir": template}))
    return [_show(f"{plan.steps} steps, run {run + 1}", start(plan, template)) for run in range(runs)]


def _with_ray(root: Path, plan: Plan, runs: int, states: Path) -> list[Start]:
    farm = Farm(root, [WorkerSpec("bench", slots=2)])
    shutil.copytree(states / f"state-{plan.steps}", farm.state)
    try:
        began, observer = time.monotonic(), Observer(farm.state)
        farm.start().wait_for_workers(1)
        _first_lease(observer, began)
        time.sleep(REST_S)
        return [_show(f"drover up, run {run + 1}", start_farm(farm)) for run in range(runs)]
    finally:
        farm.stop()


def main() -> None:
    parser = arguments(__doc__ or "", runs=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="for the time (default: %(default)s)")
    parser.add_argument("--memory-steps", type=int, default=MEMORY_STEPS, help="for the memory; 0 leaves it out")
    parser.add_argument("--before", type=int, default=3000, help="builds before the snapshot (default: %(default)s)")
    parser.add_argument("--after", type=int, default=10_000, help="builds behind it (default: %(default)s)")
    parser.add_argument("--held", type=int, default=64, help="leases held at the kill (default: %(default)s)")
    parser.add_argument("--ray", action="store_true", help="measure all of `drover up` too")
    parser.add_argument("--states", type=Path, help="keep the seeded state directories here and use them again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drover-bench-") as directory:
        root = Path(directory)
        states = options.states or root
        counts = {"before": options.before, "after": options.after, "held": options.held}
        plan = Plan(state_dir=root / "state", steps=options.steps, **counts)
        starts = _repeat(plan, options.runs, states)
        large = plan.model_copy(update={"steps": options.memory_steps})
        memory = _repeat(large, options.runs, states) if options.memory_steps else []
        whole = _with_ray(root, plan, options.runs, states) if options.ray else []
    times = [each.lease_s for each in starts]
    extra = {
        "processor_s": _median([each.processor_s for each in starts]),
        "memory_mb": _median([each.rss_mb for each in memory]),
        "peak_mb": _median([each.peak_mb for each in memory]),
        "large_s": _median([each.lease_s for each in memory]),
        "drover_up_s": [round(each.lease_s, 2) for each in whole],
        "drover_up_mb": [round(each.rss_mb) for each in whole],
    }
    publish(
        "restart",
        ours=times,
        peer=[TARGET_S] * len(times),
        unit="s",
        bigger_is_better=False,
        as_json=options.json,
        **extra,
    )


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


if __name__ == "__main__":
    main()
