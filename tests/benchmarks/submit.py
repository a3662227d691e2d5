"""Seconds from the start of `drover build --detach` to "submitted" for a graph of 25,000 derivations, and again.

Ours: the whole client as a person runs it (start of the interpreter, reading of the closure, sending, intake, answer),
against a coordinator without workers in a process of its own. The first time into empty databases, then the same graph
resubmitted. Peer: `nix-store --query --requisites` of the same roots, which neither sends nor verifies. Targets: 8 s
and 1 s.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.ingest import corpus, nix_requisites, write_store
from tests.benchmarks.push import Server
from tests.benchmarks.report import arguments, machine, progress, publish

BIN = Path(sys.executable).parent


def submit(server: Server, store: Path, drvs: str) -> tuple[float, float]:
    """Seconds of one `drover build --detach` of the roots on its standard input, and those of processors it took.

    The second is of the client alone; a machine that does other things does not change it much.
    """
    command: list[str | Path] = [BIN / "drover", "build", "-", "--detach", "--store", store]
    command += ["--coordinator", server.url, "--token-file", server.state_dir / "api-token"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, input=drvs, text=True, check=True, stdout=subprocess.DEVNULL)
    took, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = arguments("seconds from the client's start to an accepted submission", runs=3)
    parser.add_argument("--count", type=int, default=25_000, help="derivations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the graph (default: %(default)s)")
    options = parser.parse_args()
    first: list[float] = []
    again: list[float] = []
    peer: list[float] = []
    client: dict[str, list[float]] = {"first": [], "again": []}
    coordinator: dict[str, list[float]] = {"first": [], "again": []}
    facts = machine()
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
                for name, walls in (("first", first), ("again", again)):
                    before = server.processor_s()
                    wall, processor = submit(server, top / "client", drvs)
                    walls.append(wall)
                    client[name].append(processor)
                    coordinator[name].append(server.processor_s() - before)
                    progress(
                        f"run {number}, {name}: {wall:.2f} s (processor: client {processor:.2f} s, coordinator and its "
                        f"processes {coordinator[name][-1]:.2f} s), nix-store {peer[-1]:.2f} s"
                    )
            finally:
                server.stop()
    for name, walls, target in (("first", first, 8.0), ("again", again, 1.0)):
        publish(
            f"submit, {name} time" if name == "first" else "submit, again",
            ours=walls,
            peer=peer,
            unit="s",
            bigger_is_better=False,
            as_json=options.json,
            peer_is="nix-store --query --requisites of the same roots, which neither sends nor verifies",
            derivations=count,
            target_s=target,
            spread_s=[round(min(walls), 3), round(max(walls), 3)],
            client_processor_s=round(statistics.median(client[name]), 3),
            coordinator_processor_s=round(statistics.median(coordinator[name]), 3),
            machine=facts,
        )


if __name__ == "__main__":
    main()
