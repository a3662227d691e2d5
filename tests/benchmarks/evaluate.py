"""Attributes per second of an evaluation, and seconds from the command to the first build's start.

A generated set of 2,000 attributes, each of which evaluates some 10 ms of its own and two derivations. In turn in each
run: our own evaluators, nix-eval-jobs behind the same front where it is on PATH, and `nix-instantiate` (the peer), each
into an empty store. Then `drover build` of the same set on a farm of one agent: when the first build starts, beside
how long the whole evaluation takes; the target is a tenth of it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from coordinator.evaluation.inputs import Inputs, evaluation_of
from coordinator.evaluation.pool_limits import PROGRAM, PoolLimits
from coordinator.evaluation.source_plan import EvaluatorChoice
from tests.benchmarks.push import BIN
from tests.benchmarks.report import arguments, progress, publish

FILE = """
let
  make = name: more: derivation ({ inherit name; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-c" "echo > $out" ]; } // more);
  attribute = n: let sum = builtins.foldl' (a: b: a + b) 0 (builtins.genList (x: x * n) %d); in
    make "package-${toString n}" { inherit sum; dep = make "dep-${toString n}" { half = sum / 2; }; };
in builtins.listToAttrs (builtins.genList
  (n: { name = "p${toString n}"; value = attribute n; }) %d) // { recurseForDerivations = true; }
"""
SETTINGS = ("--option", "substituters", "")


def evaluated(file: Path, store: Path, choice: EvaluatorChoice, count: int) -> float:
    began = time.monotonic()
    inputs = Inputs((str(file),), flags=("--store", str(store), *SETTINGS))
    limits = PoolLimits.of_machine()
    found = asyncio.run(evaluation_of(inputs, limits, env=os.environ, on_messages=lambda _: None, choice=choice))
    if len(found.wanted) != count:
        raise SystemExit(f"{len(found.wanted)} attributes were found and not {count}")
    return time.monotonic() - began


def instantiated(file: Path, store: Path) -> float:
    began = time.monotonic()
    command: list[str | Path] = ["nix-instantiate", file, "--store", store, *SETTINGS]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def first_build(file: Path, store: Path, state_dir: Path) -> float:
    """Seconds from the start of `drover build` to its line about the first build."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.farm_server", state_dir], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip().removesuffix("/cache")
        command: list[str | Path] = [BIN / "drover", "build", file, "--store", store, *SETTINGS, "--no-eval-cache"]
        command += ["--coordinator", url, "--token-file", state_dir / "api-token"]
        began = time.monotonic()
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert client.stdout is not None
            for line in client.stdout:
                if any(word in line for word in ("started", "building dep-", "built")):
                    progress(f"first: {line.strip()}")
                    return time.monotonic() - began
            raise SystemExit("nothing was built")
        finally:
            client.kill()
            client.wait(30)
    finally:
        server.terminate()
        server.wait(60)


def main() -> None:
    parser = arguments("attributes per second, and time to the first build", runs=3)
    parser.add_argument("--count", type=int, default=2000, help="attributes (default: %(default)s)")
    parser.add_argument("--work", type=int, default=10_000, help="of each attribute (default: %(default)s)")
    options = parser.parse_args()
    there = shutil.which(PROGRAM) is not None
    own, jobs, peer, first = [], [], [], []
    with tempfile.TemporaryDirectory(prefix="drover-evaluate-") as directory:
        top = Path(directory)
        file = top / "set.nix"
        file.write_text(FILE % (options.work, options.count))
        for number in range(options.runs):
            own.append(options.count / evaluated(file, top / f"own-{number}", EvaluatorChoice.OWN, options.count))
            if there:
                choice = EvaluatorChoice.NIX_EVAL_JOBS
                jobs.append(options.count / evaluated(file, top / f"jobs-{number}", choice, options.count))
            peer.append(options.count / instantiated(file, top / f"plain-{number}"))
            first.append(first_build(file, top / f"client-{number}", top / f"farm-{number}"))
            progress(
                f"run {number}: own {own[-1]:.0f}/s, nix-instantiate {peer[-1]:.0f}/s, "
                f"first build after {first[-1]:.2f} s of {options.count / own[-1]:.2f} s"
            )
    publish(
        "evaluate",
        ours=own,
        peer=peer,
        unit="attributes/s",
        bigger_is_better=True,
        as_json=options.json,
        nix_eval_jobs=round(statistics.median(jobs), 1) if jobs else None,
        first_build_s=round(statistics.median(first), 3),
        whole_s=round(statistics.median(options.count / each for each in own), 3),
    )


if __name__ == "__main__":
    main()
