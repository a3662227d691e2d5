"""Writer of timings: takes changed attempts from the fold and puts them into their store, in batches.

It runs beside everything else and holds nothing up. While the store fails it keeps one batch and tries again with
growing pauses; what changes meanwhile waits in the fold, which drops and counts the oldest beyond its bound. The farm
goes on whatever happens here: timings explain builds, and no build waits for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from coordinator.readmodel.timeline import Timelines
from coordinator.stores.timings import DELETE_ROWS, AttemptTiming, TimingsError, TimingStore, package_of
from infra.clock import Clock
from scheduler.model import StepKey

#: Seconds between two batches, and attempts of one: the rows of a batch are some milliseconds of the writer's thread.
WRITE_EVERY_S: Final = 0.5
BATCH_ROWS: Final = 500
#: Seconds until the store is tried again, first and longest.
RETRY_FIRST_S: Final = 1.0
RETRY_LONGEST_S: Final = 30.0
#: Tries of one batch before it is dropped: one that no database takes must not keep the others out.
TRIES: Final = 5
#: Seconds between two looks at what is older than the retention, and between two deletions of one look.
EXPIRE_EVERY_S: Final = 600.0
EXPIRE_PAUSE_S: Final = 0.2
#: Seconds that the last batches get when the coordinator stops.
LAST_WRITES_S: Final = 5.0
DAY_S: Final = 86400.0

#: Gives name and system of a step, None where they are not known.
NamesOf = Callable[[StepKey], tuple[str, str] | None]

_log = logging.getLogger(__name__)


class TimingWriter:
    """Serves one store. `days` and `rows` bound what is kept; 0 is no limit."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self, timelines: Timelines, store: TimingStore, names: NamesOf, clock: Clock, days: float, rows: int
    ) -> None:
        self._timelines = timelines
        self._store = store
        self._names = names
        self._clock = clock
        self._days = days
        self._rows = rows
        #: Called with each batch of changed attempts, named, before the store has them.
        self.on_changed: Callable[[Sequence[AttemptTiming]], None] = lambda _: None
        #: The batch that the store has not taken yet.
        self._batch: list[AttemptTiming] = []
        self._tries = 0
        #: What is wrong with the store, "" while all is well.
        self.trouble = ""
        #: One write at a time: readers have what waits written before they look.
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Serve until cancelled, then write what waits, for at most LAST_WRITES_S."""
        pause_s = WRITE_EVERY_S
        expire_at = 0.0
        prepared = False
        try:
            while True:
                await asyncio.sleep(pause_s)
                try:
                    if not prepared:
                        await self._store.prepare()
                        prepared = True
                    await self._write()
                    if self._clock.now() >= expire_at:
                        await self._expire()
                        expire_at = self._clock.now() + EXPIRE_EVERY_S
                except TimingsError as error:
                    prepared = False
                    pause_s = min(max(RETRY_FIRST_S, 2 * pause_s), RETRY_LONGEST_S)
                    self._fell(str(error))
                else:
                    pause_s = WRITE_EVERY_S
                    self._rose()
        finally:
            if prepared and not self.trouble:
                await self._finish()

    async def flush(self) -> None:
        """Write all that waits now. Raises `TimingsError`."""
        await self._store.prepare()
        await self._write()

    async def _write(self) -> None:
        async with self._writing:
            await self._write_all()

    async def _write_all(self) -> None:
        while self._batch or self._timelines.waiting:
            if not self._batch:
                self._batch = self._named(self._timelines.take(BATCH_ROWS))
                self.on_changed(self._batch)
            self._tries += 1
            try:
                await self._store.save(self._batch)
            except TimingsError:
                if self._tries == TRIES:
                    self._timelines.dropped += len(self._batch)
                    self._batch, self._tries = [], 0
                raise
            self._batch, self._tries = [], 0

    def _named(self, batch: Sequence[AttemptTiming]) -> list[AttemptTiming]:
        """Add the names, which facts do not have."""
        for timing in batch:
            names = self._names(StepKey(timing.step)) if timing.name is None else None
            if names is not None:
                timing.name, timing.system = names
                timing.package = package_of(timing.name)
        return list(batch)

    async def _expire(self) -> None:
        before = self._clock.now() - self._days * DAY_S if self._days else 0.0
        dropped = DELETE_ROWS
        while dropped == DELETE_ROWS:
            dropped = await self._store.drop(before, self._rows)
            await asyncio.sleep(EXPIRE_PAUSE_S)

    async def _finish(self) -> None:
        try:
            async with asyncio.timeout(LAST_WRITES_S):
                await self._write()
        except (TimingsError, TimeoutError) as error:
            _log.warning("the last timings were not kept: %s", str(error) or "the database takes too long")

    def _fell(self, why: str) -> None:
        if not self.trouble:
            _log.warning("%s Builds go on; at most the newest timings are kept until it answers.", why)
        self.trouble = why

    def _rose(self) -> None:
        if self.trouble:
            _log.warning("timings are kept again; %d attempts were dropped so far", self._timelines.dropped)
            self.trouble = ""
