"""Keeping what submissions made, and collecting what nobody keeps any more.

What must stay is told to the cache before each collection, level-triggered: every submission that the coordinator
knows is a root (while it runs without end, afterwards for the retention), and everything that a running submission may
still read, its members' outputs and their sources, is named as such. What a client is about to submit is leased by
intake from its first question on. So there is no moment at which a path is wanted and nobody says so.

Only `collect` collects, one at a time. The numbers that queries tell for `/metrics` are refreshed here too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from typing import Final

from coordinator.config import CacheSettings
from coordinator.derivations import DerivationsError, DerivationStore
from coordinator.metrics import CacheGauges
from coordinator.rows import SubmissionRow
from coordinator.views import Views
from infra.cache import Cache
from infra.cache.errors import CacheError
from infra.cache.fsck import FsckReport, RepairSource
from infra.cache.gc import CollectPlan, CollectReport
from infra.cache.resigning import ResignReport
from infra.clock import Clock
from scheduler.model import StepKey

HOUR_S: Final = 3600.0
#: Seconds between two looks at the numbers that queries tell.
GAUGES_S: Final = 60.0
#: Steps in one question about their paths.
STEPS_ASKED: Final = 20_000
#: The kind of the roots that submissions are.
SUBMISSION: Final = "submission"

_log = logging.getLogger(__name__)


class SubmissionNeeds:
    """What submissions need of the farm's own cache, from the read model and the stored derivations."""

    def __init__(self, views: Views, derivations: DerivationStore) -> None:
        self._views = views
        self._derivations = derivations

    async def live_paths(self) -> set[str]:
        """Return the outputs of all members of running submissions, and the sources of their recipes: full paths."""
        paths: set[str] = set()
        live = {key for row in self.rows() if not (row.ended or row.withdrawn) for key in row.members}
        for some in _slices(list(live)):
            members = await self._derivations.members(some)
            nodes = await self._derivations.nodes([drv for drvs in members.values() for drv in drvs])
            for node in nodes.values():
                paths.update(path for _, path in node.outputs)
                paths.update(node.sources)
        return paths

    async def outputs(self, row: SubmissionRow) -> list[str]:
        """Return the outputs of all members of a submission."""
        paths: list[str] = []
        for some in _slices(row.members):
            infos = await self._derivations.steps(some)
            paths += [path for info in infos.values() for _, path in info.outputs]
        return paths

    def rows(self) -> list[SubmissionRow]:
        """Return all submissions that the coordinator knows."""
        return self._views.submission_rows()


class Housekeeper:
    """Looks after one cache; `submissions` only for the one that the farm publishes to."""

    def __init__(
        self,
        cache: Cache,
        how: CacheSettings,
        gauges: CacheGauges,
        clock: Clock,
        *,
        submissions: SubmissionNeeds | None = None,
        sources: Sequence[RepairSource] = (),
    ) -> None:
        self.cache = cache
        self._how = how
        self._gauges = gauges
        self._clock = clock
        self._submissions = submissions
        self._sources = sources
        self._collecting = asyncio.Lock()
        #: Submissions whose root is as it must be, and when that root expires; None until the cache was asked.
        self._kept: dict[str, float | None] | None = None

    async def run(self) -> None:
        """Refresh the gauges and collect at the configured pace until cancelled; what fails is tried again later."""
        pause_s = self._how.collect_every_hours * HOUR_S
        next_collection = self._clock.now() + pause_s
        while True:
            try:
                await self.cache.write_uses()
                if self._submissions is not None:
                    async with self._collecting:
                        await self._keep_submissions(self._submissions)
                await self.refresh_gauges()
                if pause_s and self._clock.now() >= next_collection:
                    next_collection = self._clock.now() + pause_s
                    await self.collect()
            except (CacheError, DerivationsError) as error:
                _log.warning("housekeeping of the cache will be tried again: %s", error)
            await asyncio.sleep(GAUGES_S)

    async def collect(self, *, dry_run: bool = False) -> CollectReport:
        """Collect garbage once. Raises `MetadataError`, `ObjectStoreError`; what was begun is finished next time."""
        async with self._collecting:
            # In this order: a submission that comes in between is leased by intake.
            also: set[str] = set()
            if self._submissions is not None:
                also = await self._submissions.live_paths()
                await self._keep_submissions(self._submissions)
            plan = CollectPlan(
                also=frozenset(also),
                grace_s=self._how.grace_hours * HOUR_S,
                max_bytes=self._how.max_bytes,
                dry_run=dry_run,
            )
            return await self.cache.collect(plan)

    async def verify(self, *, full: bool, repair: bool) -> FsckReport:
        """Prove the cache, and repair it from `sources` if asked to. Raises `MetadataError`, `ObjectStoreError`."""
        return await self.cache.verify(full=full, repair=repair, sources=self._sources)

    async def resign(self) -> ResignReport:
        """Sign everything with the present keys. Raises `MetadataError`."""
        return await self.cache.resign()

    async def refresh_gauges(self) -> None:
        """Ask for the numbers that are not counted."""
        info = await self.cache.info()
        self._gauges.paths = info.paths
        self._gauges.stored_bytes = info.file_bytes
        self._gauges.leases = info.leases
        self._gauges.dangling = info.dangling

    async def _keep_submissions(self, submissions: SubmissionNeeds) -> None:
        """Make every submission the root that it should be now."""
        now = self._clock.now()
        if self._kept is None:
            # What was there before this start was written with the same members: a large one costs seconds.
            roots = await self.cache.roots()
            self._kept = {root.name: root.expires_at for root in roots if root.kind == SUBMISSION}
        rows = submissions.rows()
        known = {row.id for row in rows}
        # The root of one that the farm has forgotten stays until it expires.
        self._kept = {name: at for name, at in self._kept.items() if name in known}
        for row in rows:
            over = row.ended or row.withdrawn
            expires_at = self._how.expiry(row.touched_at) if over else None
            if expires_at is not None and expires_at <= now:
                continue
            if row.id in self._kept and self._kept[row.id] == expires_at:
                continue
            await self.cache.keep(SUBMISSION, row.id, await submissions.outputs(row), expires_at)
            self._kept[row.id] = expires_at


def _slices(keys: Sequence[StepKey]) -> Iterator[Sequence[StepKey]]:
    return (keys[start : start + STEPS_ASKED] for start in range(0, len(keys), STEPS_ASKED))
