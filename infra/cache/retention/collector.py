"""Collecting garbage so that nothing which is wanted can be lost, whatever happens at the same time.

Wanted is what a root names (pins, submissions, pushes, leases: `roots`), what `CollectPlan.also` names, what was
published within the last `fresh_s` seconds, and all that those refer to. A collection

    expires     roots whose time is over, and, for a size budget, whole roots, the last used last; never pins or leases
    marks       what is wanted, in one pass over the references (`mark_phase`, `reachability`)
    revives     what is wanted and tombstoned
    deletes     rows that were tombstoned `grace_s` ago and are not wanted
    erases      the objects of those rows that no other row names (`deletions`)
    tombstones  what is not wanted: it counts as absent from then on
    sweeps      objects that no row names, and what crashes left below `incoming/`, older than `orphan_s`

Marking only proposes, from what may be out of date. Each transaction that tombstones or deletes decides for itself, on
the present: a path goes only if no living root names it, and every path that refers to it goes with it or is gone. A
set of paths that nothing outside of it refers to, and of which no root names any, is unreachable; so this *is* the
query of reachability for a few thousand paths at a time, in one transaction with its answer. A tombstone that
was cleared meanwhile, even if there is a new one, is younger than the grace: its path is not deleted.

Every step is one transaction, or a deletion that was written down in one before; killed between any two, the next
collection goes on from there. On PostgreSQL an advisory lock keeps other processes from collecting; with SQLite there
is one process per state directory. What is left: a deletion that an object store carries out only after it was given
up, and its collector with it, may hit an object that was uploaded again meanwhile; `verify` finds it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.cache.catalog.catalog import Catalog
from infra.cache.catalog.database import (
    Database,
    chunked,
    conflicts,
    deletions,
    lock_key,
    not_expired,
    paths,
    reading,
    realisations,
    refs,
    root_paths,
    roots,
    writing,
)
from infra.cache.catalog.deletions import FORGOTTEN_AFTER_S, schedule_deletion, unreferenced_objects
from infra.cache.catalog.tombstones import revive
from infra.cache.errors import CollectorBusyError
from infra.cache.retention.mark_phase import Survey
from infra.cache.retention.reachability import removable_together
from infra.cache.retention.roots import RankedRoot
from infra.objects.errors import ObjectStoreError
from infra.objects.store import sweep_incoming

#: Paths that are decided on in one transaction, and objects that are deleted between two: some 20 ms.
BATCH = 1000
#: Roots that are ended in one transaction; each may name many paths.
ROOTS_AT_ONCE = 20
#: Objects that are deleted at once.
DELETE_CONCURRENCY = 16
#: Where the objects of paths are.
NARS = "nar"


@dataclass(frozen=True, slots=True)
class CollectPlan:
    """Parameters of a collection. Times are seconds, sizes bytes.

    `also` are full store paths that are wanted though no root names them. Paths younger than `fresh_s` are kept: their
    publisher may be about to name them. A tombstoned path is deleted after `grace_s`; more than the longest download.
    An object without a row is deleted after `orphan_s`; more than the time from an upload to its publication.
    `max_bytes` is the size that all objects should have at most, 0 for no limit. `dry_run` changes nothing.
    """

    also: frozenset[str] = frozenset()
    grace_s: float = 86_400.0
    fresh_s: float = 3600.0
    orphan_s: float = 86_400.0
    max_bytes: int = 0
    dry_run: bool = False


@dataclass(slots=True)
class CollectReport:
    """Report of a collection, done or with `dry_run` only planned."""

    dry_run: bool
    #: Paths that are wanted; of those, how many were tombstoned and are back.
    reachable: int = 0
    revived: int = 0
    #: Paths that are absent from now on.
    tombstoned: int = 0
    #: Rows, and their objects, that are gone for good.
    deleted_paths: int = 0
    deleted_objects: int = 0
    deleted_bytes: int = 0
    #: Objects that no row named, and uploads that were never completed.
    orphans: int = 0
    abandoned_uploads: int = 0
    #: Roots whose time was over.
    lapsed_roots: int = 0
    #: Roots that the size budget ended, as `kind name`.
    expired_roots: tuple[str, ...] = ()
    phase_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + time.perf_counter() - began


class Collector:
    """Collects one cache's garbage."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._collecting = asyncio.Lock()

    async def collect(self, plan: CollectPlan) -> CollectReport:
        """See `Cache.collect`."""
        async with self._collecting, collector_lock(self._catalog.database) as check:
            collection = Collection(self._catalog, plan, check)
            await (collection.rehearse() if plan.dry_run else collection.run())
            return collection.report

    async def resume(self) -> None:
        """Delete the objects that an interrupted collection had written down, unless another process is at it."""
        async with reading(self._catalog.database) as connection:
            waiting = sa.select(deletions.c.serial).where(deletions.c.done_at.is_(None)).limit(1)
            if (await connection.execute(waiting)).first() is None:
                return
        with suppress(CollectorBusyError):
            async with self._collecting, collector_lock(self._catalog.database) as check:
                await Collection(self._catalog, CollectPlan(), check).erase()


@asynccontextmanager
async def collector_lock(database: Database) -> AsyncIterator[Callable[[], Awaitable[object]]]:
    """Keep other processes from collecting; gives a question that fails once that is not sure any more.

    Raises:
        CollectorBusyError: another process collects.
    """
    async with reading(database) as connection:
        if connection.dialect.name != "postgresql":
            # One process has the state directory, and with it the file.
            yield partial(asyncio.sleep, 0)
            return
        locked = await connection.execute(sa.select(sa.func.pg_try_advisory_lock(lock_key("collect"))))
        if not locked.scalar_one():
            raise CollectorBusyError("another process is collecting this cache's garbage; try again later")
        try:
            yield partial(connection.execute, sa.text("SELECT 1"))
        finally:
            try:
                await connection.execute(sa.select(sa.func.pg_advisory_unlock(lock_key("collect"))))
            except BaseException:
                # The lock belongs to the session, which must not live on in the pool.
                await connection.invalidate()
                raise


class Collection:
    """One collection: its plan, what it did so far, and the steps."""

    def __init__(self, catalog: Catalog, plan: CollectPlan, check: Callable[[], Awaitable[object]]) -> None:
        self._catalog = catalog
        self._plan = plan
        self._check = check
        self._also = frozenset(catalog.hash_parts(plan.also))
        self._began = catalog.now()
        self.report = CollectReport(plan.dry_run)

    async def rehearse(self) -> None:
        """Find out what `run` would do."""
        report, plan = self.report, self._plan
        async with reading(self._catalog.database) as connection:
            lapsed = sa.select(sa.func.count()).select_from(roots).where(~not_expired(self._began))
            report.lapsed_roots = (await connection.execute(lapsed)).scalar_one()
            waiting = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(deletions.c.file_size), 0))
            row = (await connection.execute(waiting.where(deletions.c.done_at.is_(None)))).one()
        survey = await self._survey()
        with report.phase("delete"):
            report.revived = len(survey.marks.to_revive())
            going = survey.marks.to_delete(self._began - plan.grace_s)
            objects, size = await survey.objects_of(going)
        report.tombstoned = len(survey.marks.to_tombstone())
        report.deleted_paths = len(going)
        report.deleted_objects, report.deleted_bytes = int(row[0]) + objects, int(row[1]) + size
        report.expired_roots = tuple(f"{root.kind} {root.name}" for root in survey.expiring)
        await self._sweep()

    async def run(self) -> None:
        """Collect."""
        report, plan = self.report, self._plan
        with report.phase("expire"):
            await self._expire()
        survey = await self._survey()
        with report.phase("expire"):
            await self._make_room(survey.expiring)
        with report.phase("revive"):
            for chunk in chunked(survey.marks.to_revive(), BATCH):
                async with writing(self._catalog.database) as connection:
                    revived = await revive(connection, chunk)
                report.revived += len(revived)
        with report.phase("delete"):
            before = self._began - plan.grace_s
            for chunk in chunked(survey.marks.to_delete(before), BATCH):
                report.deleted_paths += await self._delete(chunk, before)
        await self.erase()
        with report.phase("tombstone"):
            for chunk in chunked(survey.marks.to_tombstone(), BATCH):
                report.tombstoned += await self._tombstone(chunk)
        await self._sweep()
        with report.phase("forget"):
            async with writing(self._catalog.database) as connection:
                old = deletions.c.done_at < self._began - FORGOTTEN_AFTER_S
                await connection.execute(deletions.delete().where(old))

    async def erase(self) -> None:
        """Delete the objects that were written down for it."""
        failed: ObjectStoreError | None = None
        last = 0
        with self.report.phase("erase"):
            while True:
                async with reading(self._catalog.database) as connection:
                    waiting = sa.select(deletions.c.serial, deletions.c.url, deletions.c.file_size)
                    waiting = waiting.where(deletions.c.done_at.is_(None), deletions.c.serial > last)
                    batch = (await connection.execute(waiting.order_by(deletions.c.serial).limit(BATCH))).all()
                if not batch:
                    break
                last = batch[-1].serial
                await self._check()
                results = await self._erase_objects([row.url for row in batch])
                done = [row for row, error in zip(batch, results, strict=True) if error is None]
                async with writing(self._catalog.database) as connection:
                    gone = deletions.c.serial.in_([row.serial for row in done])
                    await connection.execute(deletions.update().where(gone).values(done_at=self._catalog.now()))
                self.report.deleted_objects += len(done)
                self.report.deleted_bytes += sum(row.file_size for row in done)
                failed = failed or next((error for error in results if error is not None), None)
        if failed is not None:
            raise failed

    async def _erase_objects(self, urls: Sequence[str]) -> list[ObjectStoreError | None]:
        slots = asyncio.Semaphore(DELETE_CONCURRENCY)

        async def erase(url: str) -> ObjectStoreError | None:
            async with slots:
                try:
                    await self._catalog.objects.delete(url)
                except ObjectStoreError as error:
                    return error
                return None

        return await asyncio.gather(*(erase(url) for url in urls))

    async def _survey(self) -> Survey:
        survey = Survey(self._catalog, self._began)
        with self.report.phase("mark"):
            await survey.take(self._plan.also, self._began - self._plan.fresh_s, self._plan.max_bytes)
        self.report.reachable = survey.marks.kept()
        return survey

    async def _expire(self) -> None:
        """End the roots whose time is over."""
        while True:
            async with writing(self._catalog.database) as connection:
                over = sa.select(roots.c.id).where(~not_expired(self._catalog.now())).limit(ROOTS_AT_ONCE)
                chunk = (await connection.execute(over)).scalars().all()
                await connection.execute(roots.delete().where(roots.c.id.in_(chunk)))
            self.report.lapsed_roots += len(chunk)
            if len(chunk) < ROOTS_AT_ONCE:
                return

    async def _make_room(self, expiring: Sequence[RankedRoot]) -> None:
        """End roots for which there is no room, but those that were kept again since they were looked at."""
        expired: list[str] = []
        for chunk in chunked(expiring, ROOTS_AT_ONCE):
            async with writing(self._catalog.database) as connection:
                for root in chunk:
                    seen = (roots.c.id == root.id) & (roots.c.kept_at == root.kept_at)
                    if (await connection.execute(roots.delete().where(seen))).rowcount:
                        expired.append(f"{root.kind} {root.name}")
        self.report.expired_roots = tuple(expired)

    async def _tombstone(self, serials: Sequence[int]) -> int:
        """Tombstone those of some paths, in falling order, that nothing needs; returns how many."""
        async with writing(self._catalog.database) as connection:
            now = self._catalog.now()
            question = sa.select(paths.c.serial, paths.c.hash_part, paths.c.url)
            question = question.where(paths.c.serial.in_(serials), paths.c.tombstoned_at.is_(None))
            rows = {row.serial: row for row in await connection.execute(question)}
            living = paths.c.tombstoned_at.is_(None)
            going = await self._unneeded(connection, {serial: row.hash_part for serial, row in rows.items()}, living)
            await connection.execute(paths.update().where(paths.c.serial.in_(going)).values(tombstoned_at=now))
        self._catalog.forget((rows[serial].hash_part, rows[serial].url) for serial in going)
        return len(going)

    async def _delete(self, serials: Sequence[int], tombstoned_before: float) -> int:
        """Delete the rows of those of some paths, in falling order, that nothing needs; returns how many."""
        async with writing(self._catalog.database) as connection:
            columns = (paths.c.serial, paths.c.hash_part, paths.c.store_path, paths.c.url, paths.c.file_size)
            question = sa.select(*columns).where(
                paths.c.serial.in_(serials), paths.c.tombstoned_at <= tombstoned_before
            )
            rows = {row.serial: row for row in await connection.execute(question)}
            anyone = sa.true()
            going = await self._unneeded(connection, {serial: row.hash_part for serial, row in rows.items()}, anyone)
            lost = sa.select(conflicts.c.url, conflicts.c.file_size).where(conflicts.c.serial.in_(going))
            objects: dict[str, int] = {row.url: row.file_size for row in await connection.execute(lost)}
            objects.update((rows[serial].url, rows[serial].file_size) for serial in going)
            named = [rows[serial].store_path for serial in going]
            await connection.execute(realisations.delete().where(realisations.c.out_path.in_(named)))
            await connection.execute(conflicts.delete().where(conflicts.c.serial.in_(going)))
            await connection.execute(refs.delete().where(refs.c.referrer.in_(going)))
            await connection.execute(paths.delete().where(paths.c.serial.in_(going)))
            await schedule_deletion(connection, objects)
        self._catalog.forget((rows[serial].hash_part, rows[serial].url) for serial in going)
        return len(going)

    async def _unneeded(
        self, connection: AsyncConnection, hash_parts: Mapping[int, str], counted: sa.ColumnElement[bool]
    ) -> list[int]:
        """Return those of some paths (by serial) that no root names, and no `counted` path but such as go too."""
        question = sa.select(root_paths.c.hash_part).join(roots, roots.c.id == root_paths.c.root)
        question = question.where(root_paths.c.hash_part.in_(hash_parts.values()), not_expired(self._catalog.now()))
        kept = self._also.union((await connection.execute(question)).scalars())
        edges = sa.select(refs.c.reference, refs.c.referrer).join(paths, paths.c.serial == refs.c.referrer)
        edges = edges.where(refs.c.reference.in_(hash_parts), refs.c.referrer != refs.c.reference, counted)
        named = {serial for serial, hash_part in hash_parts.items() if hash_part in kept}
        needing = [(reference, referrer) for reference, referrer in await connection.execute(edges)]
        return removable_together(sorted(hash_parts, reverse=True), named, needing)

    async def _sweep(self) -> None:
        """Delete objects that no row names, and what is left of uploads."""
        before = self._began - self._plan.orphan_s
        with self.report.phase("sweep"):
            batch: dict[str, int] = {}
            async for entry in self._catalog.objects.list(NARS):
                if entry.modified_at < before:
                    batch[entry.key] = entry.size_bytes
                if len(batch) >= BATCH:
                    await self._sweep_some(batch)
                    batch = {}
            await self._sweep_some(batch)
            self.report.abandoned_uploads = await sweep_incoming(
                self._catalog.objects, before=before, dry_run=self._plan.dry_run
            )
        if not self._plan.dry_run:
            await self.erase()

    async def _sweep_some(self, batch: Mapping[str, int]) -> None:
        if not batch:
            return
        async with reading(self._catalog.database) as connection:
            orphans = await unreferenced_objects(connection, batch)
        if orphans and not self._plan.dry_run:
            async with writing(self._catalog.database) as connection:
                orphans = await schedule_deletion(connection, orphans)
        self.report.orphans += len(orphans)
