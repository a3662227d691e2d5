"""Proving a cache: every narinfo leads to its object, the object to its NAR, the path to its references.

In order of publication, in batches, each path that can be requested is held against

    its object        there, with its size; with `full` read whole: file hash, NAR hash, NAR size
    its references    all there, none tombstoned
    its signature     one at least by a present key

and `repair` mends what it finds: an object is had again from one of the `RepairSource`s, with the very same NAR hash,
and the path points at it from then on; a signature is made anew. What cannot be had is taken out of the cache with all
that refers to it, so that clients get a clean 404 and the farm builds it again; their objects become orphans, which a
collection sweeps after its grace. Nothing is taken out because a store failed to answer: that ends verification.

Memory is bounded by a batch. Paths that go meanwhile are no fault.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Protocol

import sqlalchemy as sa

from infra.cache.catalog.catalog import Catalog
from infra.cache.catalog.database import chunked, conflicts, paths, reading, realisations, refs, writing
from infra.cache.publishing.publisher import repoint
from infra.cache.publishing.signer import Signer
from infra.nix import narinfo as narinfo_format
from infra.nix.errors import FormatError
from infra.nix.narinfo import NarInfo
from infra.objects.compression import COMPRESSION, Compression
from infra.objects.errors import CacheError, CorruptNarError, ObjectMissingError
from infra.objects.nar_writer import upload_nar
from infra.objects.verification import verify_nar

#: Paths that are looked at together, and objects at one time.
BATCH: Final = 200
CONCURRENCY: Final = 4
#: Faults that a report names; all are counted.
MAX_FAULTS: Final = 500

_log = logging.getLogger(__name__)


class RepairSource(Protocol):
    """Something that may have a NAR which the cache has lost."""

    @property
    def name(self) -> str:
        """Name in reports."""

    async def nar(self, info: NarInfo) -> AsyncGenerator[bytes, None] | None:
        """Return the NAR with this very hash, checked by its end, None if it is not here. Raises `CacheError`."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A path (full store path) that is not as promised, in one clause, and what was done about it."""

    path: str
    fault: str
    outcome: str


@dataclass(slots=True)
class FsckReport:
    """Report of a verification. `broken` counts paths; each is repaired, hidden or (without `repair`) left as it is.

    `hidden` counts only broken paths; whole ones that went with them, because they refer to them, are `dragged`.
    """

    checked: int = 0
    broken: int = 0
    repaired: int = 0
    hidden: int = 0
    dragged: int = 0
    faults: tuple[Fault, ...] = ()
    seconds: float = 0.0

    def add(self, fault: Fault) -> None:
        """Name a fault, unless there are too many."""
        if len(self.faults) < MAX_FAULTS:
            self.faults = (*self.faults, fault)


@dataclass(frozen=True, slots=True)
class Restored:
    """Outcome for lost paths (full store paths, sorted)."""

    #: They can be fetched, by now or again.
    here: tuple[str, ...]
    #: They are not in the cache, nor is what referred to them.
    gone: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Checked:
    """A row and what is wrong with it, "" for nothing."""

    serial: int
    store_path: str
    text: bytes
    #: None where the narinfo cannot be read: then nothing else is known.
    info: NarInfo | None
    lost_object: str = ""
    missing_reference: str = ""
    unsigned: bool = False

    @property
    def fault(self) -> str:
        """The worst of it."""
        if self.info is None:
            return "its narinfo cannot be read"
        return self.lost_object or self.missing_reference or ("no present key has signed it" if self.unsigned else "")


class Fsck:
    """Verifies one cache."""

    def __init__(self, catalog: Catalog, signer: Signer, compression: Compression = COMPRESSION) -> None:
        self._catalog = catalog
        self._signer = signer
        self._compression: Compression = compression

    async def run(self, *, full: bool, repair: bool, sources: Sequence[RepairSource]) -> FsckReport:
        """See `Cache.verify`."""
        began = time.perf_counter()
        report = FsckReport()
        last = 0
        while True:
            rows = await self._batch(last)
            if not rows:
                break
            last = max(rows)
            absent = await self._absent_references(list(rows))
            slots = asyncio.Semaphore(CONCURRENCY)
            try:
                async with asyncio.TaskGroup() as group:
                    checks = [
                        group.create_task(self._check(slots, serial, *row, absent.get(serial, ""), full))
                        for serial, row in rows.items()
                    ]
            except BaseExceptionGroup as failed:
                # All mean the same: the store, or the database, does not answer.
                raise failed.exceptions[0] from None
            report.checked += len(checks)
            for found in (check.result() for check in checks):
                if found.fault:
                    report.broken += 1
                    outcome = await self._mend(found, sources, report) if repair else "left as it is"
                    report.add(Fault(found.store_path, found.fault, outcome))
        report.seconds = time.perf_counter() - began
        return report

    async def restore(self, store_paths: Iterable[str], sources: Sequence[RepairSource]) -> Restored:
        """See `Cache.restore`."""
        wanted = sorted(set(store_paths))
        async with reading(self._catalog.database) as connection:
            rows = await self._catalog.rows(connection, self._catalog.hash_parts(wanted))
        by_path = {row.store_path: row for row in rows.values() if row.tombstoned_at is None}
        report = FsckReport()
        for path, row in by_path.items():
            checked = await self._check(asyncio.Semaphore(1), row.serial, path, bytes(row.narinfo), "", full=False)
            if checked.fault:
                report.broken += 1
                outcome = await self._mend(checked, sources, report)
                _log.warning("%s: %s; %s", path, checked.fault, outcome)
        # One may have gone with another that it refers to.
        gone = await self._catalog.missing(wanted)
        return Restored(tuple(path for path in wanted if path not in gone), tuple(sorted(gone)))

    async def _batch(self, after: int) -> dict[int, tuple[str, bytes]]:
        async with reading(self._catalog.database) as connection:
            question = sa.select(paths.c.serial, paths.c.store_path, paths.c.narinfo)
            question = question.where(paths.c.serial > after, paths.c.tombstoned_at.is_(None))
            rows = await connection.execute(question.order_by(paths.c.serial).limit(BATCH))
            return {row.serial: (row.store_path, bytes(row.narinfo)) for row in rows}

    async def _absent_references(self, serials: Sequence[int]) -> dict[int, str]:
        """Return, for rows that refer to a tombstoned path, one such path; deleted rows have no referrers."""
        async with reading(self._catalog.database) as connection:
            question = sa.select(refs.c.referrer, paths.c.store_path).join(paths, paths.c.serial == refs.c.reference)
            question = question.where(refs.c.referrer.in_(serials), paths.c.tombstoned_at.is_not(None))
            return {row.referrer: row.store_path for row in await connection.execute(question)}

    async def _check(  # noqa: PLR0917 - a row and what is known of it
        self, slots: asyncio.Semaphore, serial: int, store_path: str, text: bytes, absent: str, full: bool
    ) -> _Checked:
        try:
            info = narinfo_format.parse(text, self._catalog.store_dir)
        except FormatError:
            return _Checked(serial, store_path, text, None)
        async with slots:
            lost = await self._object_fault(info, full)
        return _Checked(
            serial,
            store_path,
            text,
            info,
            lost,
            f"it refers to {absent}, which is absent" if absent else "",
            unsigned=not self._signer.has_signed(info.path.fingerprint(), info.path.sigs),
        )

    async def _object_fault(self, info: NarInfo, full: bool) -> str:
        objects = self._catalog.objects
        size = await objects.head(info.stored.url)
        if size is None:
            return "its object is gone"
        if size != info.stored.file_size:
            return f"its object has {size} bytes, not {info.stored.file_size}"
        if not full:
            return ""
        try:
            await asyncio.to_thread(lambda: verify_nar(objects.open_blocking(info.stored.url), info))
        except ObjectMissingError:
            return "its object is gone"
        except CorruptNarError as error:
            return error.reason
        return ""

    async def _mend(self, found: _Checked, sources: Sequence[RepairSource], report: FsckReport) -> str:
        """Repair what can be, hide what cannot; returns what was done."""
        repairs = []
        if found.info is None:
            return await self._hide(found, report)
        if found.lost_object:
            source = await self._fetch_again(found.info, sources)
            if source is None:
                return await self._hide(found, report)
            repairs.append(f"fetched again from {source}")
        if found.missing_reference:
            return await self._hide(found, report)
        if found.unsigned:
            await self._sign(found.serial, found.info)
            repairs.append("signed anew")
        report.repaired += 1
        return " and ".join(repairs)

    async def _fetch_again(self, info: NarInfo, sources: Sequence[RepairSource]) -> str | None:
        """Store the NAR anew from the first source that has it; returns that one's name."""
        for source in sources:
            try:
                chunks = await source.nar(info)
                if chunks is None:
                    continue
                async with aclosing(chunks):
                    uploaded = await upload_nar(self._catalog.objects, chunks, self._compression)
            except CacheError:
                # This source cannot help; the next may. What it left is an orphan.
                continue
            if (uploaded.nar_hash, uploaded.nar_size) != (info.path.nar_hash, info.path.nar_size):
                continue
            if await repoint(self._catalog, uploaded.narinfo(info.path)):
                return source.name
        return None

    async def _sign(self, serial: int, info: NarInfo) -> None:
        async with writing(self._catalog.database) as connection:
            text = await connection.execute(sa.select(paths.c.narinfo).where(paths.c.serial == serial))
            current = text.scalar_one_or_none()
            if current is None:
                return
            now = narinfo_format.parse(current, self._catalog.store_dir)
            signed = now.signed(self._signer.sign(now.path.fingerprint())).render()
            await connection.execute(paths.update().where(paths.c.serial == serial).values(narinfo=signed))
        self._catalog.forget([(info.hash_part, info.stored.url)])

    async def _hide(self, found: _Checked, report: FsckReport) -> str:
        """Take a path out of the cache with all that refers to it, if it still is as it was found."""
        async with writing(self._catalog.database) as connection:
            question = sa.select(paths.c.narinfo).where(paths.c.serial == found.serial)
            current = (await connection.execute(question)).scalar_one_or_none()
            if current is None or bytes(current) != found.text:
                report.broken -= 1
                return "collected or mended by somebody else meanwhile"
            reach = sa.select(paths.c.serial).where(paths.c.serial == found.serial).cte("reach", recursive=True)
            reach = reach.union(sa.select(refs.c.referrer).join(reach, refs.c.reference == reach.c.serial))
            columns = sa.select(paths.c.serial, paths.c.hash_part, paths.c.url, paths.c.store_path)
            rows = (await connection.execute(columns.where(paths.c.serial.in_(sa.select(reach.c.serial))))).all()
            names = {row.serial: row.store_path for row in rows}
            serials = sorted(names, reverse=True)
            for chunk in chunked(serials):
                named = [names[serial] for serial in chunk]
                await connection.execute(realisations.delete().where(realisations.c.out_path.in_(named)))
                await connection.execute(conflicts.delete().where(conflicts.c.serial.in_(chunk)))
                await connection.execute(refs.delete().where(refs.c.referrer.in_(chunk)))
            for chunk in chunked(serials):
                await connection.execute(paths.delete().where(paths.c.serial.in_(chunk)))
        self._catalog.forget((row.hash_part, row.url) for row in rows)
        report.hidden += 1
        others = len(rows) - 1
        report.dragged += others
        return f"hidden, with {others} paths that refer to it" if others else "hidden"
