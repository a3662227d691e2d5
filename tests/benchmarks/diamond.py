"""`./run bench diamond`: layers whose steps read three of the layer before, on two workers with stores of their own.

Each worker has one slot. Half of what a step reads was built by the other worker and comes from the cache. Beside it:
`nix-build -j2` in one store, and `nix copy` of the closure of the result into a cache of files with zstd, one after the
other, because the farm's result is a cache too. Seconds, smaller is better.
"""

from __future__ import annotations

import os

from tests.benchmarks.beside_nix import Took, in_turn, remove, running
from tests.benchmarks.report import arguments

EXPRESSION = """
let
  at = list: n: builtins.elemAt list (n - n / {width} * {width});
  step = layer: inputs: n: derivation {{
    name = "diamond-${{toString layer}}-${{toString n}}"; system = builtins.currentSystem; builder = "/bin/sh";
    inherit inputs;
    args = [ "-c" "for input in $inputs; do read -r line < $input; done; echo {salt} $line ${{toString n}} > $out" ];
  }};
  numbers = builtins.genList (n: n) {width};
  row = before: layer: map (n: step layer (map (at before) [ n (n + 7) (n * 3 + 1) ]) n) numbers;
  first = map (step 0 [ (builtins.toFile "start" "{salt}\\n") ]) numbers;
in {{ all = builtins.foldl' row first (builtins.genList (n: n + 1) {more}); }}
"""


def main() -> None:
    """Run the benchmark."""
    parser = arguments("seconds for layers of trivial derivations on two workers", runs=3)
    parser.add_argument("--layers", type=int, default=20, help="layers in each run (default: %(default)s)")
    parser.add_argument("--width", type=int, default=50, help="steps of each layer (default: %(default)s)")
    options = parser.parse_args()
    steps = options.layers * options.width
    with running(1, 1) as bench:

        def text(salt: str, layers: int) -> str:
            return EXPRESSION.format(salt=f"{os.getpid()}-{salt}", width=options.width, more=layers - 1)

        files = [bench.write(f"run-{run}", text(str(run), options.layers)) for run in range(options.runs)]
        bench.farm_build(bench.write("warm", text("warm", 1)), options.width)

        def nix(run: int) -> Took:
            store = bench.root / f"nix-{run}"
            built, paths = bench.nix_build(files[run], store)
            copied = bench.nix_copy(store, paths)
            remove(store)
            return built + copied

        in_turn(
            "diamond",
            options.runs,
            ours=lambda run: bench.farm_build(files[run], steps),
            peer=nix,
            steps=steps,
            peer_is="nix-build -j2, then nix copy --to file:// with zstd",
            target=1.2,
            as_json=options.json,
        )


if __name__ == "__main__":
    main()
