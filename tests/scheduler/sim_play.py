"""Plays seeds of the simulated farm (`tests.scheduler.sim`).

    ./run sim [--seeds N] [--start S]

plays seeds on all cores; a seed that fails prints its story and the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from tests.scheduler.sim import Sim

#: Lines of a story that are printed.
STORY_LINES = 400


def play(seed: int) -> Sim:
    """Live one life; raises whatever is found, with the story as notes of the exception."""
    sim = Sim(seed)
    try:
        return sim.live()
    except Exception as error:
        story = sim.time.lines()
        left = [f"… {len(story) - STORY_LINES} lines before"] if len(story) > STORY_LINES else []
        error.add_note("\n".join([*left, *story[-STORY_LINES:], f"again: ./run sim --start {seed} --seeds 1"]))
        raise


def failure_of(seed: int) -> tuple[int, str] | None:
    """Play a seed; its failure as text, with the story."""
    try:
        play(seed)
    except Exception as error:  # noqa: BLE001  whatever it is, it is this seed's failure
        return seed, "\n".join([*getattr(error, "__notes__", []), f"seed {seed}: {type(error).__name__}: {error}"])
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Play seeds on all cores until one fails."""
    parser = argparse.ArgumentParser(prog="./run sim", description="Play the simulated farm.")
    parser.add_argument("--seeds", type=int, default=10_000, metavar="N", help="how many seeds (10000)")
    parser.add_argument("--start", type=int, default=None, metavar="S", help="the first one; by default a fresh one")
    chosen = parser.parse_args(arguments)
    start = random.SystemRandom().randrange(10**9) if chosen.start is None else chosen.start
    print(f"seeds {start} to {start + chosen.seeds - 1}", flush=True)
    began = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for count, failure in enumerate(pool.map(failure_of, range(start, start + chosen.seeds), chunksize=20), 1):
            if failure is not None:
                print(failure[1])
                pool.shutdown(cancel_futures=True)
                return 1
            if count % 1000 == 0:
                print(f"{count} hold, {(time.monotonic() - began) / count * 1000:.1f} ms each", flush=True)
    print(f"all {chosen.seeds} hold, {(time.monotonic() - began) / max(1, chosen.seeds) * 1000:.1f} ms each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
