"""Pauses of Python's cycle collector, for work that makes very many objects at once.

A full collection walks every object that was made since the last one that was kept from it, holds the interpreter's
lock while it does, and so stops the event loop whatever thread it runs in: 225 ms for the plan of 50,000 derivations,
ten times in one submission. What such work makes is freed by counting references, or stays for good, so nothing is
lost by not looking. Cycles that exist when a long pause ends are never collected; there are few.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: Objects made in a pause and still there from which on the collector does not look at them afterwards either.
KEPT_OBJECTS: Final = 20_000
#: Seconds after which pauses that overlap let the collector work all the same, or it might never.
MAX_PAUSE_S: Final = 30.0


class _Pauses:
    """Count of the pauses under way in this process, and the time since which there was no gap."""

    def __init__(self) -> None:
        self.count = 0
        self.since_s = 0.0
        self.was_on = False


_pauses: Final = _Pauses()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the collector out for as long as the block runs. For one thread of the process, the event loop's."""
    if _pauses.count == 0:
        _pauses.was_on, _pauses.since_s = gc.isenabled(), time.monotonic()
        gc.disable()
    elif _pauses.was_on and time.monotonic() - _pauses.since_s > MAX_PAUSE_S:
        gc.enable()
    _pauses.count += 1
    try:
        yield
    finally:
        _pauses.count -= 1
        if _pauses.count == 0 and _pauses.was_on:
            # Made less freed since the last collection; counted also while the collector is off.
            if gc.get_count()[0] > KEPT_OBJECTS:
                gc.freeze()
            gc.enable()
