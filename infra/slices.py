"""Long work in the event loop, done in slices between which every other task has its turn.

The work is a generator that yields at places where it may be interrupted, as `scheduler.pauses` says: the core's calls,
the folds of the views, pages of lists, watch streams. In a thread it would be no better, because others read what it
changes. All that is under way takes turns, one slice each, and between two slices the loop does everything else: a
hundred watchers of one submission get its end one after the other.

Work that can wait stands back while something goes first. A commit of the journal takes a dozen rounds of the loop, and
had to wait for a slice of other work in each: the end of a build was known 100 ms later while all open steps
were walked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from typing import Final, TypeVar
from weakref import WeakKeyDictionary

#: Processor time after which work gives the loop back, in seconds. An answer or an event takes some five rounds of the
#: loop, each of which waits for a slice: all of them must fit into what the house allows for one (`loop_watch`).
SLICE_S: Final = 0.003

#: Seconds for which work that can wait stands back between two of its slices, at most: it has an eighth of a loop in
#: which something always goes first.
STAND_BACK_S: Final = 0.02

#: Objects that are freed between two pauses, with all that only they refer to.
FREED_AT_ONCE: Final = 256

_T = TypeVar("_T")


class _Turns:
    """Turns of a loop's long works: one goes on at a time, in the order of arrival."""

    __slots__ = ("calm", "first", "lock", "spent_s", "waiting")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        #: Processor time that slices have taken since the loop was last given back, at least.
        self.spent_s = 0.0
        #: Blocks that go first, and the absence of any.
        self.first = 0
        self.calm = asyncio.Event()
        #: Held by the one work that stands back or has its slice, of those that can wait.
        self.waiting = asyncio.Lock()

    @asynccontextmanager
    async def last(self) -> AsyncIterator[None]:
        """Stand back, behind others that do, for as long as something goes first, at most `STAND_BACK_S`."""
        async with self.waiting:
            if self.first:
                with suppress(TimeoutError):
                    async with asyncio.timeout(STAND_BACK_S):
                        await self.calm.wait()
            yield


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns] = WeakKeyDictionary()


def _turns_here() -> _Turns:
    loop = asyncio.get_running_loop()
    turns = _turns.get(loop)
    if turns is None:
        turns = _turns[loop] = _Turns()
    return turns


@contextmanager
def going_first() -> Iterator[None]:
    """Have works that can wait stand back for as long as the block runs, inside one event loop."""
    turns = _turns_here()
    turns.first += 1
    turns.calm.clear()
    try:
        yield
    finally:
        turns.first -= 1
        if not turns.first:
            turns.calm.set()


async def in_slices(work: Generator[object, None, _T], *, can_wait: bool = False) -> _T:
    """Do all of the work and return what it returns, giving the loop back after each `SLICE_S`.

    Work whose result no client waits for at the moment `can_wait`: it stands back for what is `going_first`.
    """
    turns = _turns_here()
    while True:
        async with turns.last() if can_wait else nullcontext(), turns.lock:
            # Others may have used up this slice of the loop's time. Who waits for a turn waits for the pause too.
            await _pause_if_due(turns)
            before_s = turns.spent_s - time.thread_time()
            spent_s, looked_at = turns.spent_s, time.perf_counter()
            try:
                while True:
                    next(work)
                    # No more was spent than has passed: at most pauses the system need not be asked.
                    if spent_s + time.perf_counter() - looked_at < SLICE_S:
                        continue
                    spent_s, looked_at = before_s + time.thread_time(), time.perf_counter()
                    if spent_s >= SLICE_S:
                        break
            except StopIteration as end:
                result: _T = end.value
                return result
            finally:
                turns.spent_s = before_s + time.thread_time()
            await _pause_if_due(turns)


async def free_in_slices(objects: list[object]) -> None:
    """Free what only `objects` refers to, with pauses, and empty it: freeing is work too, and a large one in one go.

    The caller drops its own names of them first.
    """
    await in_slices(_freeing(objects), can_wait=True)


def _freeing(objects: list[object]) -> Generator[None, None, None]:
    while objects:
        del objects[-FREED_AT_ONCE:]
        yield


async def _pause_if_due(turns: _Turns) -> None:
    if turns.spent_s >= SLICE_S:
        await asyncio.sleep(0)
        turns.spent_s = 0.0
