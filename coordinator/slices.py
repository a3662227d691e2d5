"""Long work in the event loop, done in slices between which every other task has its turn.

The work is a generator that yields at places where it may be interrupted, as `scheduler.pauses` says: the core's calls,
the folds of the views, pages of lists. In a thread it would be no better, because others read what it changes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from typing import Final, TypeVar

#: Processor time after which work gives the loop back, in seconds: a fifth of what the house allows (`loop_watch`).
SLICE_S: Final = 0.01

T = TypeVar("T")


async def in_slices(work: Generator[object, None, T]) -> T:
    """Do all of the work and return what it returns, giving the loop back after each `SLICE_S`."""
    began_s = time.thread_time()
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
        if time.thread_time() - began_s > SLICE_S:
            await asyncio.sleep(0)
            began_s = time.thread_time()
