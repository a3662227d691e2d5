"""Pauses of Python's cycle collector, for work that makes very many objects at once, and a bound on what it walks.

A full collection walks every object that was made since the last one that was kept from it, holds the interpreter's
lock while it does, and so stops the event loop whatever thread it runs in: 225 ms for the plan of 50,000 derivations,
ten times in one submission. What such work makes is freed by counting references, or stays for good, so nothing is
lost by not looking. Cycles that exist when a long pause ends are never collected; there are few.

Work without a pause grows what a full collection walks too: with five intakes under way each took longer than the one
before, up to 66 ms. What is left after a long one is therefore kept from the next (`long_collections_kept_rare`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: Objects made in a pause and still there from which on the collector does not look at them afterwards either.
KEPT_OBJECTS: Final = 20_000
#: The generation that a full collection is of.
OLDEST: Final = 2
#: Seconds after which pauses that overlap let the collector work all the same, or it might never: on what is young.
MAX_PAUSE_S: Final = 30.0
#: Young collections before one that looks at everything, while pauses overlap: never.
NO_FULL_COLLECTION: Final = 1_000_000_000
#: Seconds of processor time of a full collection, some 100,000 objects, from which on what is left is kept from others.
LONG_COLLECTION_S: Final = 0.01


class _Pauses:
    """Count of the pauses under way in this process, and the time since which there was no gap."""

    def __init__(self) -> None:
        self.count = 0
        self.since_s = 0.0
        self.was_on = False
        #: What decides when to collect, while pauses overlap for so long that what is young is collected; else None.
        self.thresholds: tuple[int, int, int] | None = None

    def collect_the_young(self) -> None:
        """Let the collector work on what is made from now on, never on all of that at once."""
        self.thresholds = gc.get_threshold()
        gc.set_threshold(*self.thresholds[:2], NO_FULL_COLLECTION)
        gc.freeze()
        gc.enable()

    def end(self) -> None:
        """Let the collector work as before, but for what was made very much of."""
        # Made less freed since the last collection; counted also while the collector is off.
        if self.thresholds or gc.get_count()[0] > KEPT_OBJECTS:
            gc.freeze()
        if self.thresholds:
            gc.set_threshold(*self.thresholds)
            self.thresholds = None
        gc.enable()


_pauses: Final = _Pauses()


def keep_from_collector() -> None:
    """Keep the collector from all that there is now; for work of minutes, once in a while, on what it makes and keeps.

    What is referred to no more is freed as ever. Cycles among it are not: so this is for thousands of new objects.
    """
    gc.freeze()


@contextmanager
def long_collections_kept_rare() -> Iterator[None]:
    """Keep from the collector what a long collection leaves, for as long as the block runs: the next walks newer ones.

    Of what is left so, cycles that come to nothing later are never collected: those of requests under way, once for
    some 100,000 objects that stay.
    """
    began_s = 0.0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal began_s
        if info["generation"] < OLDEST:
            return
        if phase == "start":
            began_s = time.thread_time()
        elif time.thread_time() - began_s >= LONG_COLLECTION_S:
            gc.freeze()

    gc.callbacks.append(note)
    try:
        yield
    finally:
        gc.callbacks.remove(note)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the collector out for as long as the block runs. For one thread of the process, the event loop's."""
    if _pauses.count == 0:
        _pauses.was_on, _pauses.since_s = gc.isenabled(), time.monotonic()
        gc.disable()
    elif _pauses.was_on and not gc.isenabled() and time.monotonic() - _pauses.since_s > MAX_PAUSE_S:
        _pauses.collect_the_young()
    _pauses.count += 1
    try:
        yield
    finally:
        _pauses.count -= 1
        if _pauses.count == 0 and _pauses.was_on:
            _pauses.end()
