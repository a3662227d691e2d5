"""Reader of workers' records: looks again and again how failures fall on workers, and gives the answer to the fold.

It runs beside everything else. A store that is slow or gone leaves the last records, and none after a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from coordinator.api.flakes import WorkerRecordView
from coordinator.errors import CoordinatorError
from coordinator.readmodel.flakes import worker_records
from coordinator.stores.worker_counts import WorkerCounts
from infra.clock import Clock

#: Seconds between two looks, and between looks until the store has answered once.
LOOK_EVERY_S: Final = 60.0
FIRST_LOOKS_S: Final = 5.0
#: Attempts that are older say nothing of a machine, which may have been mended.
WINDOW_S: Final = 7 * 86400.0
#: Records that are older than this are shown no more.
STALE_S: Final = 900.0

#: Counts the attempts since a time; may raise a `CoordinatorError`.
Counts = Callable[[float], Awaitable[Sequence[WorkerCounts]]]


class WorkerRecords:
    """`show` is called with the records by worker."""

    def __init__(self, read: Counts, clock: Clock, show: Callable[[Mapping[str, WorkerRecordView]], None]) -> None:
        self._read = read
        self._clock = clock
        self._show = show
        self._read_at = 0.0

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S if self._read_at else FIRST_LOOKS_S)

    async def look(self) -> None:
        """Read and show the records as of now."""
        now = self._clock.now()
        try:
            records = worker_records(await self._read(now - WINDOW_S))
        except CoordinatorError:
            if self._read_at and now - self._read_at > STALE_S:
                self._show({})
                self._read_at = 0.0
            return
        self._read_at = now
        self._show(records)
