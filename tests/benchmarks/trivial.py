"""Trivial sandboxed derivations through the whole farm, upload and signing included, beside Nix alone.

The farm has one worker with two slots. Peers: `nix-build -j2`, which gets the same file in turn and evaluates it itself
as the farm's client does; and two bare connections to Nix daemons, which only build: the limit. All build into stores
that never saw the file; starting the farm is not part of the measurement.
"""

from __future__ import annotations

import os

from tests.benchmarks.bare_daemons import build_bare
from tests.benchmarks.beside_nix import remove, running
from tests.benchmarks.report import arguments, machine, progress, publish

EXPRESSION = """
let one = n: derivation {{
  name = "trivial-${{toString n}}"; system = builtins.currentSystem; builder = "/bin/sh";
  args = [ "-c" "echo building ${{toString n}}; echo {salt}-${{toString n}} > $out" ];
}};
in {{ all = builtins.genList one {count}; }}
"""
#: Row -> its peer, and the target of the ratio.
ROWS = {"trivial": ("nix-build -j2", 1.5), "trivial-beside-daemons": ("two bare daemon connections", 0.8)}


def main() -> None:
    """Run the benchmark."""
    parser = arguments("builds per second of trivial derivations", runs=3)
    parser.add_argument("--count", type=int, default=1000, help="derivations in each run (default: %(default)s)")
    options = parser.parse_args()
    ours: list[float] = []
    by_program_s: list[dict[str, float]] = []
    peers: dict[str, list[float]] = {row: [] for row in ROWS}
    with running(2) as bench:
        warm = bench.write("warm", EXPRESSION.format(salt="warm", count=20))
        bench.farm_build(warm, 20)
        bench.nix_build(warm, bench.root / "nix-warm")
        for run in range(options.runs):
            file = bench.write(f"run-{run}", EXPRESSION.format(salt=f"{os.getpid()}-{run}", count=options.count))
            store = bench.root / f"nix-{run}"
            peers["trivial"].append(options.count / bench.nix_build(file, store)[0].wall_s)
            remove(store)
            took = bench.farm_build(file, options.count)
            ours.append(options.count / took.wall_s)
            by_program_s.append(took.by_program_s)
            peers["trivial-beside-daemons"].append(options.count / build_bare(file, bench.root / f"bare-{run}"))
            figures = ", ".join(f"{ROWS[row][0]} {rates[-1]:.1f}/s" for row, rates in peers.items())
            progress(f"run {run + 1}: farm {ours[-1]:.1f}/s {took.by_program_s}, {figures}")
    for row, (peer_is, target) in ROWS.items():
        publish(
            row,
            ours=ours,
            peer=peers[row],
            unit="builds/s",
            bigger_is_better=True,
            as_json=options.json,
            peer_is=peer_is,
            target=target,
            by_program_s=by_program_s,
            machine=machine(),
        )


if __name__ == "__main__":
    main()
