"""Trivial sandboxed derivations through the whole farm, upload and signing included, beside `nix-build -j2`.

Both sides get the same file in turn, evaluate it themselves, and build into stores that never saw it. The farm has one
worker with two slots, as `nix-build -j2` has two jobs; starting the farm is not part of the measurement.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

from tests.benchmarks.report import arguments, progress, publish
from tests.support.farm import Farm, WorkerSpec

EXPRESSION = """
let one = n: derivation {{
  name = "trivial-${{toString n}}"; system = builtins.currentSystem; builder = "/bin/sh";
  args = [ "-c" "echo building ${{toString n}}; echo {salt}-${{toString n}} > $out" ];
}};
in {{ all = builtins.genList one {count}; }}
"""


def nix_build(file: Path, store: Path) -> float:
    settings = {
        "build-users-group": "",
        "substituters": "",
        "sandbox": "true",
        "sandbox-fallback": "false",
        "sandbox-paths": "/bin/sh=/bin/busybox",
    }
    flags = [word for name, value in settings.items() for word in ("--option", name, value)]
    began = time.monotonic()
    subprocess.run(
        ["nix-build", file, "-A", "all", "-j2", "--no-out-link", "--store", store, *flags],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.monotonic() - began


def farm_build(farm: Farm, file: Path, count: int) -> float:
    began = time.monotonic()
    done = farm.build(file, "-A", "all", timeout_s=900)
    took = time.monotonic() - began
    if done.returncode != 0 or farm.api("submissions")[0]["counts"]["done"] != count:
        raise SystemExit(f"the farm did not build all {count}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return took


def main() -> None:
    parser = arguments("builds per second of trivial derivations", runs=3)
    parser.add_argument("--count", type=int, default=1000, help="derivations in each run (default: %(default)s)")
    options = parser.parse_args()
    ours, peer = [], []
    with tempfile.TemporaryDirectory(prefix="drover-bench-") as directory:
        root = Path(directory)
        farm = Farm(root, [WorkerSpec("bench", slots=2)])
        try:
            farm.start().wait_for_workers(1)
            warm = root / "warm.nix"
            warm.write_text(EXPRESSION.format(salt="warm", count=20))
            farm_build(farm, warm, 20)
            nix_build(warm, root / "nix-warm")
            for run in range(options.runs):
                file = root / f"run-{run}.nix"
                file.write_text(EXPRESSION.format(salt=f"{os.getpid()}-{run}", count=options.count))
                peer.append(options.count / nix_build(file, root / f"nix-{run}"))
                ours.append(options.count / farm_build(farm, file, options.count))
                progress(f"run {run + 1}: farm {ours[-1]:.1f}/s, nix-build -j2 {peer[-1]:.1f}/s")
        finally:
            farm.stop()
    publish("trivial", ours=ours, peer=peer, unit="builds/s", bigger_is_better=True, as_json=options.json)


if __name__ == "__main__":
    main()
