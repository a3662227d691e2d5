"""Processor and memory of a farm at rest, and what its start takes: a coordinator, a Ray head and one worker.

All processes of the farm count, with what they take meanwhile; ended ones too where their parents waited for them. The
target stands in the peer's place, because no tool beside keeps a farm ready: 1 % of a core and 500 MB, with nothing to
do and with 100,000 steps that wait for a worker which is not there (`--steps 0` leaves those out). What a snapshot of
the journal with these steps costs stands beside: the farm makes none before as many facts again have come.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

from coordinator.engine import compaction
from tests.benchmarks.ingest import write_store
from tests.benchmarks.processes import processor_of_all_s
from tests.benchmarks.report import arguments, machine, progress, publish
from tests.support.farm import Farm, WorkerSpec, processes_naming
from tests.support.graphs import Maker

TARGET_PERCENT = 1.0
TARGET_MB = 500.0
#: Seconds for the farm to come to rest: the first canary, first looks, Ray's own first retries, a list of nodes that
#: stays the same. They begin anew with each process that comes or ends, such as the child that makes a snapshot of the
#: journal after a large submission, whose time would count where it ends; at most so many seconds.
SETTLE_S = 45.0
SETTLE_MOST_S = 300.0
#: Seconds between two looks at the processes.
LOOK_S = 2.0
#: A system that no worker builds.
NOWHERE = "riscv64-linux"


def shared_fairly_mb(pids: list[int]) -> float:
    """Return the memory of processes, what several share counted once (proportional set size)."""
    total_kb = 0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total_kb += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total_kb / 1024


def wait_in_vain(farm: Farm, root: Path, count: int) -> None:
    """Submit steps that no worker can build."""
    maker = Maker(system=NOWHERE)
    made = [maker.plain(f"waits-{number}") for number in range(count)]
    write_store(root, made)
    drvs = "\n".join(each.drv for each in made)
    command = farm.command("build", "-", "--detach", "--store", root)
    subprocess.run(command, input=drvs, text=True, check=True, stdout=subprocess.DEVNULL, env=farm.environment)


def with_children(farm: Farm) -> frozenset[int]:
    """Return the processes of a farm, those among them whose words do not name it."""
    found: set[int] = set()
    for pid in processes_naming(str(farm.root)):
        found.add(pid)
        for thread in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                found.update(map(int, thread.read_text().split()))
    return frozenset(found)


def settle(farm: Farm) -> None:
    """Wait until the farm has come to rest, or for long enough."""
    began = changed = time.monotonic()
    there = with_children(farm)
    while time.monotonic() - changed < SETTLE_S and time.monotonic() - began < SETTLE_MOST_S:
        time.sleep(LOOK_S)
        now = with_children(farm)
        if now != there:
            there, changed = now, time.monotonic()


def at_rest(farm: Farm, seconds: float) -> tuple[float, float]:
    """Return percent of a core and MB of a farm that has nothing to do; progress names what takes most.

    What a child took before the measurement is no part of it, although its parent is charged with all of it when the
    child ends: verifiers end a minute after a submission.
    """
    before = {pid: processor_of_all_s([pid]) for pid in with_children(farm)}
    began = time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    after = {pid: processor_of_all_s([pid]) for pid in with_children(farm)}
    used = Counter({pid: 100 * (after[pid] - before.get(pid, 0.0)) / took for pid in after})
    for pid, percent in used.most_common(6):
        progress(f"  {percent:5.2f} %  {processes_naming(str(farm.root)).get(pid, 'a child')[-70:]}")
    return 100 * (sum(after.values()) - sum(before.values())) / took, shared_fairly_mb(list(after))


def snapshot_cost(journal: Path) -> tuple[float, float]:
    """Return seconds of processor and most MB of the process that makes a snapshot of a journal."""
    with closing(sqlite3.connect(journal)) as database:
        [epoch] = database.execute("SELECT value FROM journal_meta WHERE name = 'epoch'").fetchone()
    child = subprocess.Popen([sys.executable, "-m", compaction.__name__], stdin=subprocess.PIPE)
    assert child.stdin is not None
    child.stdin.write(json.dumps({"url": f"sqlite+aiosqlite:///{journal}", "epoch": epoch}).encode() + b"\n")
    child.stdin.flush()
    _, child.returncode, usage = os.wait4(child.pid, 0)
    assert child.returncode == 0
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = arguments("percent of a core and MB of a farm at rest", runs=1)
    parser.add_argument("--seconds", type=float, default=60, help="of each measurement (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100_000, help="that wait in the end (default: %(default)s)")
    options = parser.parse_args()
    rows: dict[str, list[tuple[float, float]]] = {"at rest": [], "with steps that wait": []}
    starts: list[float] = []
    facts = machine()
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory(prefix="drover-idle-") as directory:
            root = Path(directory)
            root.chmod(0o755)
            farm = Farm(root, [WorkerSpec("only", slots=2)])
            try:
                farm.start().wait_for_workers(1)
                starts.append(processor_of_all_s(processes_naming(str(root))))
                progress(f"start: {starts[-1]:.1f} s of processor, {len(processes_naming(str(root)))} processes")
                settle(farm)
                rows["at rest"].append(at_rest(farm, options.seconds))
                if options.steps:
                    wait_in_vain(farm, root / "waiting", options.steps)
                    settle(farm)
                    rows["with steps that wait"].append(at_rest(farm, options.seconds))
            finally:
                farm.stop()
            if options.steps:
                used_s, most_mb = snapshot_cost(farm.state / "journal.sqlite3")
                progress(f"a snapshot of the journal: {used_s:.1f} s of processor, {most_mb:.0f} MB at most")
    for name, measured in rows.items():
        for unit, target, values in (
            ("% of a core", TARGET_PERCENT, [percent for percent, _ in measured]),
            ("MB", TARGET_MB, [memory for _, memory in measured]),
        ):
            if values:
                publish(
                    f"idle, {name}",
                    ours=values,
                    peer=[target] * len(values),
                    unit=unit,
                    bigger_is_better=False,
                    as_json=options.json,
                    peer_is="the target",
                    start_processor_s=[round(start, 2) for start in starts],
                    machine=facts,
                )


if __name__ == "__main__":
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    main()
