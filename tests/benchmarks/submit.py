"""Seconds from the start of `drover build --detach` to "submitted" for a graph of 25,000 derivations, and again.

Ours: the whole client as a person runs it (start of the interpreter, reading of the closure, sending, intake, answer),
against a coordinator without workers in a process of its own. The first time into empty databases, then the same graph
resubmitted. Peer: `nix-store --query --requisites` of the same roots, which neither sends nor verifies. Targets: 8 s
and 1 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.ingest import corpus, nix_requisites, write_store
from tests.benchmarks.push import Server
from tests.benchmarks.report import arguments, progress, publish

BIN = Path(sys.executable).parent


def submit(server: Server, store: Path, drvs: str) -> float:
    """Seconds of one `drover build --detach` of the roots on its standard input."""
    command: list[str | Path] = [BIN / "drover", "build", "-", "--detach", "--store", store]
    command += ["--coordinator", server.url, "--token-file", server.state_dir / "api-token"]
    began = time.monotonic()
    subprocess.run(command, input=drvs, text=True, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    parser = arguments("seconds from the client's start to an accepted submission", runs=3)
    parser.add_argument("--count", type=int, default=25_000, help="derivations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the graph (default: %(default)s)")
    options = parser.parse_args()
    first, again, peer = [], [], []
    with tempfile.TemporaryDirectory(prefix="drover-submit-") as directory:
        top = Path(directory)
        progress(f"making {options.count} derivations")
        everything, roots = corpus(options.count, options.seed)
        write_store(top / "client", everything)
        drvs = "\n".join(made.drv for made in roots)
        count = len(everything)
        del everything
        for number in range(options.runs):
            peer.append(nix_requisites(top / "client", roots, count))
            server = Server(top / f"farm-{number}")
            try:
                first.append(submit(server, top / "client", drvs))
                again.append(submit(server, top / "client", drvs))
            finally:
                server.stop()
            progress(f"run {number}: first {first[-1]:.2f} s, again {again[-1]:.2f} s, nix-store {peer[-1]:.2f} s")
    publish(
        "submit",
        ours=first,
        peer=peer,
        unit="s",
        bigger_is_better=False,
        as_json=options.json,
        again_s=round(statistics.median(again), 3),
        again_spread_s=[round(min(again), 3), round(max(again), 3)],
        derivations=count,
        targets_s=[8.0, 1.0],
    )


if __name__ == "__main__":
    main()
