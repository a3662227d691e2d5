"""`./run bench nothing`: a submission that is wholly in the cache, beside `nix-build` of the same that is wholly valid.

All steps are roots, which is the most that both can be asked: of a graph below one root neither looks further. The
outputs are built once by Nix and pushed to the farm's cache, which is not measured; both sides evaluate. Seconds,
smaller is better.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.benchmarks.beside_nix import FLAGS, Bench, in_turn, running
from tests.benchmarks.report import arguments, progress

EXPRESSION = """
let one = n: derivation {{
  name = "nothing-${{toString n}}"; system = builtins.currentSystem; builder = "/bin/sh";
  args = [ "-c" "echo {salt}-${{toString n}} > $out" ];
}};
in {{ all = builtins.genList one {count}; }}
"""
#: Paths that one command pushes: its line must fit.
PUSHED_AT_ONCE = 1000


def prepare(bench: Bench, file: Path, store: Path) -> None:
    """Build all by Nix, and push it into the farm's cache."""
    progress("building and pushing what is not measured")
    _, paths = bench.nix_build(file, store)
    for start in range(0, len(paths), PUSHED_AT_ONCE):
        some = paths[start : start + PUSHED_AT_ONCE]
        subprocess.run(
            bench.farm.command("cache", "push", "--store", store, "--keep-as", f"bench-{start}", *some),
            env=bench.farm.environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )


def main() -> None:
    """Run the benchmark."""
    parser = arguments("seconds for a submission with nothing to do", runs=5)
    parser.add_argument("--count", type=int, default=5000, help="steps (default: %(default)s)")
    options = parser.parse_args()
    with running(2) as bench:
        file = bench.write("nothing", EXPRESSION.format(salt=os.getpid(), count=options.count))
        store = bench.root / "nix"
        prepare(bench, file, store)
        # The client's store has the .drv files as Nix's has, so that neither writes them in a run.
        subprocess.run(
            ["nix-instantiate", file, "-A", "all", "--store", bench.farm.eval_store, *FLAGS],
            check=True,
            capture_output=True,
        )
        in_turn(
            "nothing",
            options.runs,
            ours=lambda _: bench.farm_build(file, options.count, "held"),
            peer=lambda _: bench.nix_build(file, store)[0],
            steps=options.count,
            peer_is="nix-build of what is valid",
            target=1.0,
            as_json=options.json,
        )


if __name__ == "__main__":
    main()
