"""`./run bench chain`: a chain of trivial derivations through the whole farm, beside `nix-build` of the same file.

Each step reads the one before, so nothing runs side by side: it measures how long one step takes from the end of the
one before (upload, signature, publication, lease) to its own. Seconds, smaller is better.
"""

from __future__ import annotations

import os

from tests.benchmarks.beside_nix import Took, in_turn, remove, running
from tests.benchmarks.report import arguments

EXPRESSION = """
let
  link = before: n: derivation {{
    name = "chain-${{toString n}}"; system = builtins.currentSystem; builder = "/bin/sh"; inherit before;
    args = [ "-c" "read -r line < $before; echo $line-${{toString n}} > $out" ];
  }};
  first = builtins.toFile "start" "{salt}\\n";
in {{ all = builtins.foldl' link first (builtins.genList (n: n) {count}); }}
"""


def main() -> None:
    """Run the benchmark."""
    parser = arguments("seconds for a chain of trivial derivations", runs=3)
    parser.add_argument("--count", type=int, default=200, help="derivations in each run (default: %(default)s)")
    options = parser.parse_args()
    with running(2) as bench:
        files = [
            bench.write(f"run-{run}", EXPRESSION.format(salt=f"{os.getpid()}-{run}", count=options.count))
            for run in range(options.runs)
        ]
        warm = bench.write("warm", EXPRESSION.format(salt=f"warm-{os.getpid()}", count=10))
        bench.farm_build(warm, 10)
        bench.nix_build(warm, bench.root / "nix-warm")

        def nix(run: int) -> Took:
            store = bench.root / f"nix-{run}"
            took, _ = bench.nix_build(files[run], store)
            remove(store)
            return took

        in_turn(
            "chain",
            options.runs,
            ours=lambda run: bench.farm_build(files[run], options.count),
            peer=nix,
            steps=options.count,
            peer_is="nix-build",
            target=1.0,
            as_json=options.json,
        )


if __name__ == "__main__":
    main()
