"""Retention of what submissions made, and collection of the paths that no root keeps any more.

Before each collection the cache receives all roots anew (level-triggered): every submission that the coordinator
knows is a root (while it runs without end, afterwards for the retention), and everything that a running submission may
still read, its members' outputs and their sources, is named as such. What a client is about to submit is leased by
intake from its first question on; these leases end here, between two collections, once the submission is a root. So
there is no moment at which a path is wanted and neither root nor lease names it.

Submissions with the same members share one root, which has the name of one of them and lasts as long as the longest: a
graph that is submitted every few minutes is stored once.

Only `collect` collects, one at a time. The numbers for `/metrics` that need queries are refreshed here too.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, cast

from coordinator.config import CacheSettings
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from coordinator.stores.derivations import DerivationsError, DerivationStore
from coordinator.stores.path_leases import PathLeases
from infra.cache.cache import Cache
from infra.cache.publishing.key_rotation import ResignReport
from infra.cache.repair.fsck import FsckReport, RepairSource
from infra.cache.retention.collector import CollectPlan, CollectReport
from infra.clock import Clock
from infra.heap import give_back_free_memory
from infra.objects.errors import CacheError
from infra.retry import Outage
from infra.sqlite_driver import shrink_connections
from scheduler.model import StepKey

HOUR_S: Final = 3600.0
#: Seconds between two reads of the numbers that need a query.
GAUGES_S: Final = 60.0
#: Steps in one question about their paths.
STEPS_ASKED: Final = 20_000
#: Paths of a root from which on the system gets back what writing it needed: their names stay with statements.
MANY_PATHS: Final = 10_000
#: The kind of the roots that submissions are.
SUBMISSION: Final = "submission"

_log = logging.getLogger(__name__)


class SubmissionNeeds:
    """Paths of the farm's own cache that submissions need, from the read model and the stored derivations."""

    def __init__(self, views: Views, derivations: DerivationStore, leases: PathLeases) -> None:
        self._views = views
        self._derivations = derivations
        self._leases = leases
        #: Submission -> (its members, how many they were, their digest): members grow, or become another list.
        self._digests: dict[str, tuple[list[StepKey], int, bytes]] = {}

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

    async def alike(self) -> dict[bytes, list[SubmissionRow]]:
        """Return all submissions, those with the same members together, by the digest of their members."""
        before, self._digests = self._digests, {}
        alike: dict[bytes, list[SubmissionRow]] = {}
        for row in self.rows():
            known = before.get(row.id)
            if known is None or known[0] is not row.members or known[1] != len(row.members):
                # Members may join while a thread reads them.
                members = tuple(row.members)
                known = (row.members, len(members), await asyncio.to_thread(_digest, members))
            self._digests[row.id] = known
            alike.setdefault(known[2], []).append(row)
        return alike

    async def end_leases(self, rooted: Collection[str]) -> None:
        """End what intake leased for submissions that are roots by now, or are not known any more."""
        known = {row.id for row in self.rows()}
        await self._leases.end(known.difference(rooted))


@dataclass(slots=True)
class CacheGauges:
    """Numbers of one cache that need a query; housekeeping reads them now and then."""

    paths: int = 0
    stored_bytes: int = 0
    leases: int = 0
    #: Published paths that refer to one that cannot be fetched. Anything but 0 is a bug.
    dangling: int = 0


class Housekeeper:
    """Looks after one cache; `submissions` only for the one that the farm publishes to."""

    def __init__(
        self,
        cache: Cache,
        settings: CacheSettings,
        gauges: CacheGauges,
        clock: Clock,
        *,
        submissions: SubmissionNeeds | None = None,
        sources: Sequence[RepairSource] = (),
    ) -> None:
        self.cache = cache
        self._settings = settings
        self._gauges = gauges
        self._clock = clock
        self._submissions = submissions
        self._sources = sources
        self._collecting = asyncio.Lock()
        #: Roots by the name of the submission that gave it; None until they were read from the cache.
        self._kept: dict[str, _Kept] | None = None
        #: A root of so many paths was written that memory is worth giving back.
        self._kept_many = False

    async def run(self) -> None:
        """Refresh the gauges and collect at the configured pace until cancelled; what fails is tried again later."""
        pause_s = self._settings.collect_every_hours * HOUR_S
        next_collection = self._clock.now() + pause_s
        outage = Outage(_log, "it is tried again", over="housekeeping of the cache goes on")
        while True:
            try:
                await self.cache.write_uses()
                if self._submissions is not None:
                    async with self._collecting:
                        await self._submissions.end_leases(await self._keep_submissions(self._submissions))
                await self.cache.drop_lapsed_leases()
                await self._give_back()
                await self.refresh_gauges()
                if pause_s and self._clock.now() >= next_collection:
                    next_collection = self._clock.now() + pause_s
                    await self.collect()
            except (CacheError, DerivationsError) as error:
                outage.begin(f"housekeeping of the cache failed: {error}")
            else:
                outage.end()
            await asyncio.sleep(GAUGES_S)

    async def _give_back(self) -> None:
        """Give the system what naming the paths of a large submission needed: intake did that earlier for its own."""
        if self._kept_many:
            self._kept_many = False
            await shrink_connections()
            await asyncio.to_thread(give_back_free_memory)

    async def collect(self, *, dry_run: bool = False) -> CollectReport:
        """Collect garbage once. Raises `MetadataError`, `ObjectStoreError`; what was begun is finished next time."""
        async with self._collecting:
            # In this order: a submission that comes in between is leased by intake.
            also: set[str] = set()
            rooted: set[str] = set()
            if self._submissions is not None:
                also = await self._submissions.live_paths()
                rooted = await self._keep_submissions(self._submissions)
            plan = CollectPlan(
                also=frozenset(also),
                grace_s=self._settings.grace_hours * HOUR_S,
                max_bytes=self._settings.max_bytes,
                dry_run=dry_run,
            )
            report = await self.cache.collect(plan)
            if self._submissions is not None:
                # Not before: `also` does not name what came meanwhile.
                await self._submissions.end_leases(rooted)
            return report

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

    async def _keep_submissions(self, submissions: SubmissionNeeds) -> set[str]:
        """Make all submissions the roots that they should be now; returns those whose members are kept, or need not."""
        now = self._clock.now()
        if self._kept is None:
            # What was there before this start was written with the same members: a large one costs seconds.
            roots = await self.cache.roots()
            self._kept = {root.name: _Kept(root.expires_at) for root in roots if root.kind == SUBMISSION}
        alike = await submissions.alike()
        # The root of one that the farm has forgotten stays until it expires.
        known: set[str] = {row.id for rows in alike.values() for row in rows}
        self._kept = {name: kept for name, kept in self._kept.items() if name in known}
        for digest, rows in alike.items():
            await self._keep(submissions, digest, rows, now)
        return known

    async def _keep(
        self, submissions: SubmissionNeeds, digest: bytes, rows: Sequence[SubmissionRow], now: float
    ) -> None:
        """Make submissions with the same members one root."""
        kept = cast("dict[str, _Kept]", self._kept)
        times = [self._settings.expiry(row.touched_at) if row.ended or row.withdrawn else None for row in rows]
        ends = [at for at in times if at is not None]
        expires_at = max(ends) if len(ends) == len(times) else None
        if expires_at is not None and expires_at <= now:
            for row in rows:
                # It ran when this was last looked at.
                if row.id in kept and kept[row.id].expires_at is None:
                    await self.cache.drop(SUBMISSION, row.id)
                    del kept[row.id]
            return
        named = [row.id for row in rows if row.id in kept and kept[row.id].digest in {digest, b""}]
        name = named[0] if named else rows[0].id
        if name not in kept or kept[name].expires_at != expires_at or kept[name].digest not in {digest, b""}:
            outputs = await submissions.outputs(rows[0])
            await self.cache.keep(SUBMISSION, name, outputs, expires_at)
            self._kept_many = self._kept_many or len(outputs) >= MANY_PATHS
        kept[name] = _Kept(expires_at, digest)
        # Each had its own before, or had other members then.
        for row in rows:
            if row.id != name and kept.pop(row.id, None) is not None:
                await self.cache.drop(SUBMISSION, row.id)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A root as the cache has it; the digest of its members is b"" where it was kept before this start."""

    expires_at: float | None
    digest: bytes = b""


def _digest(members: Sequence[StepKey]) -> bytes:
    return hashlib.blake2b("\n".join(members).encode(), digest_size=20).digest()


def _slices(keys: Sequence[StepKey]) -> Iterator[Sequence[StepKey]]:
    return (keys[start : start + STEPS_ASKED] for start in range(0, len(keys), STEPS_ASKED))
