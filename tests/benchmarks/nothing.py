"""`./run bench nothing`: a submission that is wholly in the cache, beside `nix-build` of the same that is wholly valid.

All steps are roots, which is the most that both can be asked: of a graph below one root neither looks further. The
outputs are imported into Nix's store and pushed to the farm's cache, which is not measured. Nix evaluates in each run;
the farm's client does so in its first, and later finds what it kept. Seconds, smaller is better.
"""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

from infra.nix.drv_head import read_head
from infra.nix.nar import NarData, NarFile, write_events
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
_LENGTH = struct.Struct("<Q")


def prepare(bench: Bench, file: Path, store: Path) -> None:
    """Have all outputs in Nix's store and in the farm's cache.

    To build thousands takes minutes and is not measured. So Nix imports what their builders would write, and builds one
    of them again: where that differs the benchmark ends.
    """
    progress("importing and pushing what is not measured")
    drvs = _ran("nix-instantiate", file, "-A", "all", "--store", store).split()
    paths = [read_head(Path(f"{store}{drv}").read_bytes()).outputs[0] for drv in drvs]
    exported = b"".join(map(_exported, paths, drvs)) + _LENGTH.pack(0)
    _ran("nix-store", "--import", "--store", store, given=exported)
    _ran("nix-store", "--realise", "--check", drvs[len(drvs) // 2], "--store", store)
    for start in range(0, len(paths), PUSHED_AT_ONCE):
        some = paths[start : start + PUSHED_AT_ONCE]
        subprocess.run(
            bench.farm.command("cache", "push", "--store", store, "--keep-as", f"bench-{start}", *some),
            env=bench.farm.environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )


def _exported(path: str, drv: str) -> bytes:
    """Return what `nix-store --export` prints of a path, but for the end of the list."""
    number = path.rpartition("-")[2]
    content = f"{os.getpid()}-{number}\n".encode()
    nar = b"".join(write_events([NarFile(b"", executable=False, size=len(content)), NarData(content)]))
    texts = [each + bytes(-len(each) % 8) for each in (path.encode(), drv.encode())]
    own, deriver = [_LENGTH.pack(len(each)) + text for each, text in zip((path, drv), texts, strict=True)]
    return _LENGTH.pack(1) + nar + b"NIXE\0\0\0\0" + own + _LENGTH.pack(0) + deriver + _LENGTH.pack(0)


def _ran(*words: str | Path, given: bytes = b"") -> str:
    done = subprocess.run([*words, *FLAGS], input=given, capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{words[0]} ended with status {done.returncode}:\n{done.stderr.decode()[-2000:]}")
    return done.stdout.decode()


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
        _ran("nix-instantiate", file, "-A", "all", "--store", bench.farm.eval_store)
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
