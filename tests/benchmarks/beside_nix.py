"""Both sides of the benchmarks that build: the whole farm, and plain Nix with stores that never saw the derivations.

Each side gets the same file and evaluates it itself. Wall times of a machine that does other things say little, so the
processor time of each side stands beside: Nix's with its builders, and the farm's of all its processes, their builders
and the client.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.processes import processor_by_program_s
from tests.benchmarks.report import machine, progress, publish
from tests.support.farm import Farm, WorkerSpec, processes_naming

SETTINGS = {
    "build-users-group": "",
    "substituters": "",
    "sandbox": "true",
    "sandbox-fallback": "false",
    "sandbox-paths": "/bin/sh=/bin/busybox",
    "experimental-features": "nix-command",
}
FLAGS = [word for name, value in SETTINGS.items() for word in ("--option", name, value)]
#: Seconds for one side of one run; only ends a benchmark that hangs.
LIMIT_S = 900.0
#: Attribute that each file has.
ROOT = "all"


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of one side: of a clock, and of processors."""

    wall_s: float
    processor_s: float
    #: Of the farm's side, by program.
    by_program_s: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: Took) -> Took:
        """Return both, one after the other."""
        return Took(self.wall_s + other.wall_s, self.processor_s + other.processor_s)


@dataclass(frozen=True, slots=True)
class Bench:
    """A farm that runs, and a directory for files and stores."""

    farm: Farm
    root: Path

    def write(self, name: str, text: str) -> Path:
        """Write a Nix file into a directory of its own: the client looks at all that lies beside a file."""
        directory = self.root / "expressions" / name
        directory.mkdir(parents=True)
        file = directory / "default.nix"
        file.write_text(text)
        return file

    def farm_build(self, file: Path, count: int, state: str = "done") -> Took:
        """Build a file in the farm; `count` steps of the submission end as `state`.

        Raises:
            SystemExit: they did not.
        """
        before = _of_farm_s(self.farm)
        took, done = _timed(self.farm.build_command(file, "-A", ROOT, "--json"), self.farm.environment)
        after = _of_farm_s(self.farm)
        used = {program: round(after[program] - before.get(program, 0.0), 2) for program in after}
        counts = json.loads(done.splitlines()[-1])["counts"]
        if counts[state] != count:
            raise SystemExit(f"the farm has {counts} and not {count} {state}; its log is {self.farm.log_path}")
        used["client"] = round(took.processor_s, 2)
        return Took(took.wall_s, sum(used.values()), used)

    def nix_build(self, file: Path, store: Path, jobs: int = 2) -> tuple[Took, list[str]]:
        """Build a file by `nix-build` into a store; return the outputs of its root too."""
        words: list[str | Path] = [
            "nix-build",
            file,
            "-A",
            ROOT,
            f"-j{jobs}",
            "--no-out-link",
            "--store",
            store,
            *FLAGS,
        ]
        took, printed = _timed(words, {**os.environ, "XDG_CACHE_HOME": f"{store}.cache"})
        return took, printed.split()

    def nix_copy(self, store: Path, paths: Sequence[str]) -> Took:
        """Copy closures into a new cache of files, compressed with zstd, which verifies, signs and sends nothing."""
        with tempfile.TemporaryDirectory(prefix="copied-", dir=self.root) as directory:
            to = f"file://{directory}/cache?compression=zstd"
            words: list[str | Path] = ["nix", "copy", "--from", store, "--to", to, "--no-check-sigs", *FLAGS, *paths]
            return _timed(words, {**os.environ, "XDG_CACHE_HOME": f"{directory}/memory"})[0]


def _timed(words: Sequence[str | Path], environment: dict[str, str]) -> tuple[Took, str]:
    """Run a command to its end; return what it took, with the processes that it waited for, and what it printed."""
    began, used = time.monotonic(), os.times()
    done = subprocess.run(list(words), env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    took = Took(time.monotonic() - began, sum(os.times()[2:4]) - sum(used[2:4]))
    if done.returncode != 0:
        raise SystemExit(f"{words[0]} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return took, done.stdout


def _of_farm_s(farm: Farm) -> dict[str, float]:
    return processor_by_program_s(processes_naming(str(farm.root)))


@contextmanager
def running(*slots: int) -> Iterator[Bench]:
    """A farm with a worker for each number of slots, each with a store of its own; stopped and removed after it."""
    # Else the client compiles its own modules at each start, which a person's does once.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="drover-bench-") as directory:
        root = Path(directory)
        farm = Farm(root, [WorkerSpec(f"bench-{number}", slots=each) for number, each in enumerate(slots)])
        try:
            farm.start().wait_for_workers(len(slots))
            yield Bench(farm, root)
        finally:
            farm.stop()


def in_turn(
    name: str,
    runs: int,
    *,
    ours: Callable[[int], Took],
    peer: Callable[[int], Took],
    steps: int,
    peer_is: str,
    target: float,
    as_json: bool,
) -> None:
    """Measure both sides once a run, each beginning every other run, and print both, ratio and machine."""
    mine: list[Took] = []
    theirs: list[Took] = []
    for run in range(runs):
        for side in (("peer", "ours"), ("ours", "peer"))[run % 2]:
            if side == "ours":
                mine.append(ours(run))
            else:
                theirs.append(peer(run))
        progress(
            f"{name}, run {run + 1}: farm {mine[-1].wall_s:.2f} s ({mine[-1].processor_s:.2f} s of processor), "
            f"{peer_is} {theirs[-1].wall_s:.2f} s ({theirs[-1].processor_s:.2f} s); farm: {mine[-1].by_program_s}"
        )
    publish(
        name,
        ours=[took.wall_s for took in mine],
        peer=[took.wall_s for took in theirs],
        unit="s",
        bigger_is_better=False,
        as_json=as_json,
        peer_is=peer_is,
        target=target,
        steps=steps,
        by_program_s=[took.by_program_s for took in mine],
        processor_s=[[round(a.processor_s, 2), round(b.processor_s, 2)] for a, b in zip(mine, theirs, strict=True)],
        machine=machine(),
    )


def remove(store: Path) -> None:
    """Remove a store, whose directories are closed to writing, as root may."""
    shutil.rmtree(store, ignore_errors=True)
