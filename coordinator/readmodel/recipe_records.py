"""Records of the recipes of steps that are shown, kept in memory: how often each succeeded and failed so far.

A handler that shows steps calls `fetch` first, which reads what is not known yet in one question; `of` then answers at
once. What ended does not change, so a record is read once for each attempt. A store that is slow or gone costs nothing
but the record.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import islice
from typing import Final

from coordinator.api.flakes import RecipeRecordView
from coordinator.api.models import StepStatus
from coordinator.errors import CoordinatorError
from coordinator.readmodel.flakes import newest_records
from coordinator.readmodel.rows import ACTIVE, StepRow
from coordinator.stores.timings import AttemptEnds

#: Records that are remembered, some 200 bytes each, and steps of one question.
REMEMBERED: Final = 8192
ASKED_AT_ONCE: Final = 200
#: Seconds that a question may take, and for which none is put after one that failed.
PATIENCE_S: Final = 0.5
PAUSE_S: Final = 10.0

#: A step, and the attempts of which its record tells.
_Key = tuple[str, int]
#: Reads how attempts of steps ended; may raise a `CoordinatorError`.
Ends = Callable[[Sequence[str]], Awaitable[Sequence[AttemptEnds]]]


async def _nothing(_steps: Sequence[str]) -> Sequence[AttemptEnds]:
    return ()


class RecipeRecords:
    """The records. Without `read` there are none."""

    def __init__(self, read: Ends = _nothing) -> None:
        #: Set once there is a store whose rows are written before they are read.
        self.read = read
        self._known: OrderedDict[_Key, RecipeRecordView | None] = OrderedDict()
        #: One question at a time: many watchers ask for the same failed step at once.
        self._reading: asyncio.Task[None] | None = None
        self._paused_until = 0.0

    def of(self, row: StepRow) -> RecipeRecordView | None:
        """Return a step's record; None where its recipe never came to an end, and where that is not known."""
        return self._known.get(_key(row))

    async def fetch(self, rows: Iterable[StepRow]) -> None:
        """Read the records of steps that are not known yet, for at most `PATIENCE_S`."""
        wanted = [key for key in map(_key, rows) if key[1]]
        if not wanted:
            return
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(PATIENCE_S):
                while clock() >= self._paused_until and (unknown := self._unknown(wanted)):
                    if self._reading is None:
                        self._reading = asyncio.create_task(self._read(unknown))
                    # It goes on when this ends: the next reader finds its answer.
                    await asyncio.wait({self._reading})
        except TimeoutError:
            self._paused_until = clock() + PAUSE_S

    def _unknown(self, wanted: Sequence[_Key]) -> list[_Key]:
        return list(islice((key for key in wanted if key not in self._known), ASKED_AT_ONCE))

    async def _read(self, keys: Sequence[_Key]) -> None:
        try:
            found = newest_records(await self.read([step for step, _ in keys]))
        except CoordinatorError:
            self._paused_until = asyncio.get_running_loop().time() + PAUSE_S
        else:
            self._known.update((key, found.get(key[0])) for key in keys)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        finally:
            self._reading = None

    async def fetch_failed(self, rows: Iterable[StepRow]) -> None:
        """Read the records of those that failed: a list shows the others without."""
        await self.fetch(row for row in rows if row.state is StepStatus.FAILED)


def _key(row: StepRow) -> _Key:
    """Return the step and its last attempt that has ended, 0 where none has."""
    return row.key, row.life.attempt - (row.state in ACTIVE)
