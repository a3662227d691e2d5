"""Writer of timings: takes changed attempts from the fold and puts them into their store, in batches.

It runs beside everything else and holds nothing up. While the store fails it keeps one batch and tries again with
growing pauses; what changes meanwhile waits in the fold, which drops and counts the oldest beyond its bound. An attempt
whose values the store refuses is dropped and counted alone. The farm goes on whatever happens here: timings explain
builds, and no build waits for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from coordinator.readmodel.timeline import Timelines
from coordinator.stores.timings import DELETE_ROWS, AttemptEnds, AttemptTiming, TimingsError, TimingStore
from infra.clock import Clock
from infra.nix.store_path import package_of
from scheduler.model import StepKey

#: Seconds from a change to its batch, and attempts of one batch: its rows are some milliseconds of the writer's thread,
#: and its transaction costs the loop as much as a hundred of them. Readers do not wait for it (`flush`).
WRITE_EVERY_S: Final = 2.0
BATCH_ROWS: Final = 500
#: Seconds until the store is tried again, first and longest.
RETRY_FIRST_S: Final = 1.0
RETRY_LONGEST_S: Final = 10.0
#: Seconds between two looks at what is older than the retention, and between two deletions of one look.
EXPIRE_EVERY_S: Final = 600.0
EXPIRE_PAUSE_S: Final = 0.2
#: Seconds that the last batches get when the coordinator stops.
LAST_WRITES_S: Final = 5.0
DAY_S: Final = 86400.0
#: Characters of an attempt's features that are kept.
FEATURES_CHARACTERS: Final = 256

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
        #: Gives the features that a step asks for, None for one that is not known.
        self.features: Callable[[StepKey], Sequence[str] | None] = lambda _step: None
        #: Called with each batch of changed attempts, named, before the store has them.
        self.on_changed: Callable[[Sequence[AttemptTiming]], None] = lambda _: None
        #: Called with each batch that the store has.
        self.on_saved: Callable[[Sequence[AttemptTiming]], None] = lambda _: None
        #: The batch that the store has not taken yet.
        self._batch: list[AttemptTiming] = []
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
                if prepared:
                    await self._changed_before(expire_at)
                await asyncio.sleep(pause_s)
                try:
                    await self._write(prepare=not prepared)
                    prepared = True
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
            await self._finish(prepared=prepared)

    async def _changed_before(self, at: float) -> None:
        """Wait until an attempt has changed, or until a time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, at - self._clock.now())):
                await self._timelines.changed.wait()

    async def flush(self) -> None:
        """Write all that waits now. Raises `TimingsError`, at once while the store is known to fail."""
        async with self._writing:
            if self.trouble:
                raise TimingsError(self.trouble)
            await self._write_all(prepare=True)

    async def ends_of(self, steps: Sequence[str]) -> list[AttemptEnds]:
        """Return how the attempts of steps ended, all that have until now. Raises `TimingsError`, as `flush` does."""
        await self.flush()
        return await self._store.ends_of(steps)

    async def _write(self, *, prepare: bool) -> None:
        async with self._writing:
            await self._write_all(prepare=prepare)

    async def _write_all(self, *, prepare: bool) -> None:
        if prepare:
            await self._store.prepare()
            self._timelines.dropped += self._store.removed
            self._store.removed = 0
        while self._batch or self._timelines.waiting:
            if not self._batch:
                self._batch = self._named(self._timelines.take(BATCH_ROWS))
                self.on_changed(self._batch)
            try:
                await self._store.save(self._batch)
            except TimingsError as error:
                if not error.values:
                    raise
                await self._write_singly()
            else:
                self.on_saved(self._batch)
            self._batch = []
        # Not where they are taken: a reader whose write fails leaves them, and `run` has to try again.
        self._timelines.changed.clear()

    async def _write_singly(self) -> None:
        """Write the attempts of the batch one by one, without those whose values the store refuses."""
        while self._batch:
            try:
                await self._store.save(self._batch[-1:])
            except TimingsError as error:
                if not error.values:
                    raise
                self._timelines.dropped += 1
                _log.warning(
                    "the timing of attempt %d of %s is not kept: %s",
                    self._batch[-1].attempt,
                    self._batch[-1].step,
                    error,
                )
            self._batch.pop()

    def _named(self, batch: Sequence[AttemptTiming]) -> list[AttemptTiming]:
        """Add the names, which facts do not have."""
        for timing in batch:
            names = self._names(StepKey(timing.step)) if timing.name is None else None
            if names is not None:
                timing.name, timing.system = names
                timing.package = package_of(timing.name)
                features = self.features(StepKey(timing.step))
                timing.features = None if features is None else ",".join(features)[:FEATURES_CHARACTERS]
        return list(batch)

    async def _expire(self) -> None:
        before = self._clock.now() - self._days * DAY_S if self._days else 0.0
        dropped = DELETE_ROWS
        while dropped == DELETE_ROWS:
            dropped = await self._store.drop(before, self._rows)
            await asyncio.sleep(EXPIRE_PAUSE_S)

    async def _finish(self, *, prepared: bool) -> None:
        waiting = len(self._batch) + self._timelines.waiting
        try:
            async with asyncio.timeout(LAST_WRITES_S):
                await self._write(prepare=not prepared)
        except (TimingsError, TimeoutError) as error:
            why = str(error) or "the database takes too long"
            _log.warning("timings of %d attempts were not kept at the end: %s", waiting, why)

    def _fell(self, why: str) -> None:
        if not self.trouble:
            _log.warning("%s Builds go on; at most the newest timings are kept until it answers.", why)
        self.trouble = self._store.trouble = why

    def _rose(self) -> None:
        if self.trouble:
            _log.warning("timings are kept again; %d attempts were dropped so far", self._timelines.dropped)
            self.trouble = self._store.trouble = ""
