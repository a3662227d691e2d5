"""Trivial sandboxed derivations through the whole farm, upload and signing included, beside Nix alone.

The farm has one worker with two slots. Peers: `nix-build -j2`, which gets the same file in turn and evaluates it itself
as the farm's client does; two bare connections to Nix daemons, which only build: the limit; and two such connections to
daemons as the worker starts them: what strangers' builds cost Nix itself. All build into stores that never saw the
derivations; starting the farm is not part of the measurement.
"""

from __future__ import annotations

import os

from tests.benchmarks.bare_daemons import build_bare, isolated, plain
from tests.benchmarks.beside_nix import remove, running
from tests.benchmarks.report import arguments, machine, progress, publish

EXPRESSION = """
let one = n: derivation {{
  name = "trivial-${{toString n}}"; system = builtins.currentSystem; builder = "/bin/sh";
  args = [ "-c" "echo building ${{toString n}}; echo {salt}-${{toString n}} > $out" ];
}};
in {{ all = builtins.genList one {count}; }}
"""
#: Row -> its peer, and the target of the ratio, where it has one.
ROWS = {
    "trivial": ("nix-build -j2", 1.5),
    "trivial-beside-daemons": ("two bare daemon connections", 0.8),
    "trivial-beside-isolated": ("two connections with the worker's isolation", None),
}


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
            # Each builds what the one before it did not: the worker's store has what the farm has built.
            store = bench.root / f"bare-{run}"
            peers["trivial-beside-daemons"].append(options.count / build_bare(file, store, plain(store)))
            # Others, since the worker's store has what the farm has built.
            other = bench.write(f"other-{run}", EXPRESSION.format(salt=f"{os.getpid()}-o{run}", count=options.count))
            took_s = build_bare(other, bench.root / f"made-{run}", isolated(bench.farm))
            peers["trivial-beside-isolated"].append(options.count / took_s)
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
