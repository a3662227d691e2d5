"""Answers of the core to stories and to lives of the simulation, to be compared between two ways to run it.

    python -m tests.scheduler.compiled_lives SEEDS [PLACE]

prints whether the core runs compiled, each golden story, and digests of all facts of each life.
"""

from __future__ import annotations

import importlib
import sys
from hashlib import sha256

from infra.compiled import finder


def main(seeds: int, place: str = "") -> None:
    """Play everything, with the modules compiled in `place` where it is named."""
    if place:
        finder.install(place)
    # Not before: what is imported already stays as it is.
    traces = importlib.import_module("tests.scheduler.test_traces")
    sim = importlib.import_module("tests.scheduler.sim")
    print("source" if (importlib.import_module("scheduler.state").__file__ or "").endswith(".py") else "compiled")
    for tale in traces.STORIES:
        scene = traces.Scene()
        tale(scene)
        print(tale.__name__, *scene.lines, sep="\n")
    for seed in range(seeds):
        life = sim.Sim(seed).live()
        # Instants are floats here, as of clocks; a story's are whole numbers, of which compiled code makes floats.
        lines = [*life.time.lines(), *map(repr, life.journal)]
        print(seed, len(lines), sha256("\n".join(lines).encode()).hexdigest())


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
