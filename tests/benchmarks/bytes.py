"""`./run bench bytes`: derivations with large outputs, first such that nothing compresses, then such that all does.

The farm, one worker with two slots, uploads, verifies, signs and publishes each. Beside it: `nix-build -j2`, then `nix
copy` of the results into a cache of files with zstd, one after the other. Seconds, smaller is better.
"""

from __future__ import annotations

import os

from tests.benchmarks.beside_nix import Bench, Took, in_turn, remove, running
from tests.benchmarks.report import arguments

EXPRESSION = """
let one = n: derivation {{
  name = "bytes-${{toString n}}"; system = builtins.currentSystem; builder = "/bin/sh";
  args = [ "-c" "echo {salt}-${{toString n}} > $out; {source} | head -c {size} >> $out" ];
}};
in {{ all = builtins.genList one {count}; }}
"""
#: What a builder writes, by whether it compresses.
SOURCES = {
    "incompressible": "cat /dev/urandom",
    "compressible": "yes 'some 40 bytes of text that come again and again'",
}


def measure(bench: Bench, kind: str, runs: int, count: int, megabytes: int, *, as_json: bool) -> None:
    """Measure one kind of output."""

    def text(salt: str, many: int) -> str:
        source, size = SOURCES[kind], megabytes * 1_000_000
        return EXPRESSION.format(salt=f"{os.getpid()}-{salt}", count=many, source=source, size=size)

    files = [bench.write(f"{kind}-{run}", text(f"{kind}-{run}", count)) for run in range(runs)]
    bench.farm_build(bench.write(f"{kind}-warm", text(f"{kind}-warm", 4)), 4)

    def nix(run: int) -> Took:
        store = bench.root / f"nix-{kind}-{run}"
        built, paths = bench.nix_build(files[run], store)
        copied = bench.nix_copy(store, paths)
        remove(store)
        return built + copied

    in_turn(
        f"bytes-{kind}",
        runs,
        ours=lambda run: bench.farm_build(files[run], count),
        peer=nix,
        steps=count,
        peer_is="nix-build -j2, then nix copy --to file:// with zstd",
        target=2.0,
        as_json=as_json,
    )


def main() -> None:
    """Run the benchmark."""
    parser = arguments("seconds for derivations with large outputs", runs=3)
    parser.add_argument("--count", type=int, default=200, help="derivations in each run (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=5, help="of each output (default: %(default)s)")
    parser.add_argument("--only", choices=tuple(SOURCES), help="one kind of output")
    options = parser.parse_args()
    with running(2) as bench:
        for kind in SOURCES:
            if options.only in {None, kind}:
                measure(bench, kind, options.runs, options.count, options.megabytes, as_json=options.json)


if __name__ == "__main__":
    main()
