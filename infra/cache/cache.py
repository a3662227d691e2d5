"""The cache as the coordinator sees it: what is published, publishing, and answering.

Publishing turns claims into truth, in this order: a claim is checked on its face; its object is read once, whole, and
held against every hash and size; the narinfo is rendered and signed; then one transaction looks at what is published
*now*, places the new paths references first, and inserts them. So a path is visible only after its object was verified
and all that it refers to is visible. What is published is final: the same bits again are no change, other bits are a
recorded conflict.

Where objects are files, a path whose file is gone or has another size counts as absent everywhere: it is missing, its
narinfo is not answered, nothing may newly refer to it, and publishing its bits again repairs it. (Of remote stores the
database is believed: asking them for each narinfo would cost a round trip.)
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from infra.cache.candidates import (
    AlreadyPublished,
    Candidate,
    Conflict,
    Published,
    PublishOutcome,
    Rejected,
    RejectReason,
    malformed,
    references_first,
    rejected_for_references,
)
from infra.cache.counters import CacheCounters
from infra.cache.errors import (
    CacheError,
    ClosureTooLargeError,
    CorruptNarError,
    ObjectMissingError,
    ObjectStoreError,
)
from infra.cache.metadata import MAX_IN, conflicts, open_metadata, paths, reading, refs, writing
from infra.cache.objects import LocalObjectStore, ObjectStore
from infra.cache.signer import Signer
from infra.cache.verify import verify_nar
from infra.nix import narinfo as narinfo_format
from infra.nix.errors import FormatError
from infra.nix.signing import PublicKey, SecretKey
from infra.nix.store_path import HASH_PART_LENGTH, StoreDir

#: Narinfos kept in memory, some 1 KiB each.
NARINFOS_IN_MEMORY = 8192
#: Candidates of one `publish`.
MAX_BATCH = 10_000
#: Paths of one closure, in the question and in the answer.
MAX_CLOSURE = 100_000
#: Objects up to this size (on both sides) are verified one after the other in one thread: a hop costs more than one.
SMALL_BYTES = 256 * 1024
#: Objects that are verified at once, above that size.
VERIFY_CONCURRENCY = 4
#: Files whose presence is looked at without leaving the event loop; about 2 us each.
LOOK_INLINE = 64


@dataclass(frozen=True, slots=True)
class Row:
    """What the database knows of one path, as far as decisions need it."""

    serial: int
    store_path: str
    nar_hash: str
    url: str
    file_size: int
    narinfo: bytes

    @property
    def base_name(self) -> str:
        """File name of the store path."""
        return self.store_path.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over everything published; an object that serves two paths counts once in `file_bytes`."""

    paths: int
    nar_bytes: int
    file_bytes: int
    conflicts: int


_ROW_COLUMNS = (paths.c.serial, paths.c.store_path, paths.c.nar_hash, paths.c.url, paths.c.file_size, paths.c.narinfo)


class Cache:
    """One signed cache. Made by `open`; safe for any number of tasks of one event loop."""

    def __init__(
        self,
        engine: AsyncEngine,
        objects: ObjectStore,
        store_dir: StoreDir,
        keys: Sequence[SecretKey],
        now: Callable[[], float],
    ) -> None:
        self._engine = engine
        self.objects = objects
        self.store_dir = store_dir
        self.counters = CacheCounters()
        self.signer = Signer(keys)
        self._now = now
        #: Hash part or URL -> row; only what is published, oldest use first, at most twice NARINFOS_IN_MEMORY.
        self._recent: OrderedDict[str, Row] = OrderedDict()
        #: One publishing transaction at a time: waiting here is fair, waiting for the database's lock is not.
        self._publishing = asyncio.Lock()
        self._verifying = asyncio.Semaphore(VERIFY_CONCURRENCY)

    @classmethod
    async def open(
        cls,
        database_url: str,
        objects: ObjectStore,
        *,
        store_dir: StoreDir,
        keys: Sequence[SecretKey],
        now: Callable[[], float],
    ) -> Cache:
        """Open, or make, the cache whose metadata is at `database_url` (`sqlite+aiosqlite:///FILE`).

        `now` gives Unix seconds. Every narinfo is signed by each of `keys`.

        Raises:
            SchemaTooNewError: a newer release wrote the database; nothing was touched.
            MetadataError: the database cannot be opened.
        """
        return cls(await open_metadata(database_url), objects, store_dir, keys, now)

    async def close(self) -> None:
        """Close the database."""
        await self._engine.dispose()

    @property
    def public_keys(self) -> tuple[PublicKey, ...]:
        """The keys that verify the signatures; `str()` of one is what `trusted-public-keys` wants."""
        return self.signer.public_keys

    async def missing(self, store_paths: Iterable[str]) -> set[str]:
        """Return those of the full store paths that cannot be fetched, in one question.

        Raises:
            MetadataError: the database failed.
        """
        asked = set(store_paths)
        async with reading(self._engine) as connection:
            rows = await self._rows(connection, self._hash_parts(asked))
        present = await self._present(rows.values())
        return asked - {row.store_path for row in present}

    async def narinfo(self, hash_part: str) -> bytes | None:
        """Return the signed narinfo of the path with this hash part, None if there is none that can be fetched.

        Raises:
            MetadataError: the database failed.
        """
        row = await self._find(hash_part, paths.c.hash_part) if len(hash_part) == HASH_PART_LENGTH else None
        return None if row is None else row.narinfo

    def narinfo_in_memory(self, hash_part: str) -> bytes | None:
        """Return what `narinfo` answers where that takes no database; None says nothing. For who cannot wait.

        Raises:
            ObjectStoreError: the directory of the objects cannot be looked at.
        """
        row = self._recent.get(hash_part)
        if row is None or not self._is_there(row):
            return None
        self._recent.move_to_end(hash_part)
        return row.narinfo

    async def object_size(self, url: str) -> int | None:
        """Return the size of the object with key `url`, None unless a published path names it and it can be fetched.

        Raises:
            MetadataError: the database failed.
        """
        row = await self._find(url, paths.c.url)
        return None if row is None else row.file_size

    async def closure(self, store_paths: Iterable[str], *, recursive: bool = True) -> tuple[list[bytes], list[str]]:
        """Return the signed narinfos of all that the full store paths reach, references first, and what is missing.

        Missing are paths of the question, and lost members of the closure, that cannot be fetched: full paths, sorted.
        Without `recursive` the answer holds the paths of the question only.

        Raises:
            ClosureTooLargeError: more than MAX_CLOSURE paths, asked or reached.
            MetadataError: the database failed.
        """
        asked = set(store_paths)
        if len(asked) > MAX_CLOSURE:
            raise ClosureTooLargeError(f"{len(asked)} paths were asked for at once; the limit is {MAX_CLOSURE}")
        hash_parts = self._hash_parts(asked)
        reached: dict[int, Row] = {}
        async with reading(self._engine) as connection:
            for some in _slices(hash_parts):
                reached.update(await self._reach(connection, some, recursive))
                if len(reached) > MAX_CLOSURE:
                    raise ClosureTooLargeError(f"the closure has more than {MAX_CLOSURE} paths; ask for parts of it")
        rows = [reached[serial] for serial in sorted(reached)]
        present = {row.store_path for row in await self._present(rows)}
        missing = (asked | {row.store_path for row in rows}) - present
        return [row.narinfo for row in rows if row.store_path in present], sorted(missing)

    async def publish(self, batch: Sequence[Candidate]) -> list[PublishOutcome]:
        """Verify, sign and publish; returns one outcome for each candidate, in order.

        A candidate may refer to others of the batch, whatever their order. One that fails takes only those along that
        refer to it. All that is published becomes visible together, when this returns.

        Raises:
            CacheError: more than MAX_BATCH candidates.
            MetadataError: the database failed; nothing of the batch is visible.
        """
        if len(batch) > MAX_BATCH:
            raise CacheError(f"{len(batch)} paths were offered at once; the limit is {MAX_BATCH}")
        began = time.perf_counter()
        outcomes: list[PublishOutcome | None] = [None] * len(batch)
        waiting = list(range(len(batch)))
        while waiting:
            # Claims on one path are decided one after the other, as if they had come separately.
            first: dict[str, int] = {}
            for index in waiting:
                first.setdefault(batch[index].hash_part, index)
            chosen = set(first.values())
            decided = await self._publish_distinct([batch[index] for index in first.values()])
            for index in chosen:
                outcomes[index] = decided[batch[index].store_path]
            waiting = [index for index in waiting if index not in chosen]
        decided_all = [outcome for outcome in outcomes if outcome is not None]
        self.counters.count_outcomes(decided_all)
        self.counters.on_publish(time.perf_counter() - began)
        return decided_all

    async def stats(self) -> Stats:
        """Return sums over everything published.

        Raises:
            MetadataError: the database failed.
        """
        objects = sa.select(paths.c.url, sa.func.max(paths.c.file_size).label("size")).group_by(paths.c.url).subquery()
        question = sa.select(
            sa.select(sa.func.count()).select_from(paths).scalar_subquery(),
            sa.select(sa.func.coalesce(sa.func.sum(paths.c.nar_size), 0)).scalar_subquery(),
            sa.select(sa.func.coalesce(sa.func.sum(objects.c.size), 0)).scalar_subquery(),
            sa.select(sa.func.count()).select_from(conflicts).scalar_subquery(),
        )
        async with reading(self._engine) as connection:
            return Stats(*(int(value) for value in (await connection.execute(question)).one()))

    # Publishing.

    async def _publish_distinct(self, batch: Sequence[Candidate]) -> dict[str, PublishOutcome]:
        outcomes: dict[str, PublishOutcome] = {}
        sound = []
        for candidate in batch:
            fault = malformed(candidate, self.store_dir)
            if fault:
                outcomes[candidate.store_path] = Rejected(candidate.store_path, RejectReason.MALFORMED, fault)
            else:
                sound.append(candidate)
        if not sound:
            return outcomes
        async with reading(self._engine) as connection:
            known = await self._rows(connection, [candidate.hash_part for candidate in sound])
        unproven = [candidate for candidate in sound if not self._is_repeat(candidate, known.get(candidate.hash_part))]
        sealed: dict[str, bytes] = {}
        for candidate, result in zip(unproven, await self._examine_all(unproven), strict=True):
            if isinstance(result, Rejected):
                outcomes[candidate.store_path] = result
            else:
                sealed[candidate.store_path] = result
        proven = [candidate for candidate in sound if candidate.store_path not in outcomes]
        async with self._publishing, writing(self._engine) as connection:
            outcomes.update(await self._record(connection, proven, sealed))
        return outcomes

    def _is_repeat(self, candidate: Candidate, row: Row | None) -> bool:
        return (
            row is not None
            and row.store_path == candidate.store_path
            and row.nar_hash == candidate.nar_hash
            and self._is_there(row)
        )

    async def _examine_all(self, candidates: Sequence[Candidate]) -> list[bytes | Rejected]:
        """Read and verify each object; gives the signed narinfo of those that hold."""
        small = [
            candidate
            for candidate in candidates
            if isinstance(self.objects, LocalObjectStore)
            and max(candidate.file_size, candidate.nar_size) <= SMALL_BYTES
        ]
        of_small = set(small)
        results: dict[Candidate, bytes | Rejected] = {}

        def examine_small() -> None:
            results.update((candidate, self._examine(candidate)) for candidate in small)

        async def examine_large(candidate: Candidate) -> None:
            async with self._verifying:
                results[candidate] = await asyncio.to_thread(self._examine, candidate)

        async with asyncio.TaskGroup() as tasks:
            for candidate in candidates:
                if candidate not in of_small:
                    tasks.create_task(examine_large(candidate))
            if small:
                await asyncio.to_thread(examine_small)
        return [results[candidate] for candidate in candidates]

    def _examine(self, candidate: Candidate) -> bytes | Rejected:
        try:
            verify_nar(self.objects.open_blocking(candidate.url), candidate)
        except ObjectMissingError:
            return Rejected(
                candidate.store_path, RejectReason.MISSING_OBJECT, f"its object {candidate.url} is not in the store"
            )
        except CorruptNarError as error:
            return Rejected(candidate.store_path, RejectReason.CORRUPT, str(error))
        except ObjectStoreError as error:
            return Rejected(candidate.store_path, RejectReason.STORE_FAILED, str(error))
        unsigned = candidate.narinfo()
        return replace(unsigned, sigs=self.signer.sign(unsigned.fingerprint(self.store_dir))).render()

    async def _record(
        self, connection: AsyncConnection, proven: Sequence[Candidate], sealed: Mapping[str, bytes]
    ) -> dict[str, PublishOutcome]:
        """Decide on proven claims by what is published now, and write it down; inside the publishing transaction."""
        outcomes: dict[str, PublishOutcome] = {}
        named = {candidate.hash_part for candidate in proven}
        named.update(reference[:HASH_PART_LENGTH] for candidate in proven for reference in candidate.references)
        rows = await self._rows(connection, list(named))
        present = {row.base_name: row.serial for row in await self._present(rows.values())}
        new = []
        for candidate in proven:
            row = rows.get(candidate.hash_part)
            if row is None:
                new.append(candidate)
                continue
            outcome = _against(candidate, row)
            if isinstance(outcome, AlreadyPublished) and candidate.base_name not in present:
                if candidate.store_path in sealed:
                    await self._repair(connection, candidate, row)
                    present[candidate.base_name] = row.serial
                else:
                    outcome = _vanished(candidate)
            elif isinstance(outcome, Conflict):
                await self._record_conflict(connection, candidate, row)
            outcomes[candidate.store_path] = outcome
        sound = [candidate for candidate in new if candidate.store_path in sealed]
        outcomes.update(
            (candidate.store_path, _vanished(candidate)) for candidate in new if candidate.store_path not in sealed
        )
        ordered, blocked = references_first(sound, present.keys())
        outcomes.update(rejected_for_references(blocked))
        await self._insert(connection, ordered, sealed, present)
        outcomes.update((candidate.store_path, Published(candidate.store_path)) for candidate in ordered)
        return outcomes

    async def _insert(
        self,
        connection: AsyncConnection,
        ordered: Sequence[Candidate],
        sealed: Mapping[str, bytes],
        serials: dict[str, int],
    ) -> None:
        if not ordered:
            return
        now = self._now()
        inserted = await connection.execute(
            paths.insert().returning(paths.c.serial, sort_by_parameter_order=True),
            [
                {
                    "hash_part": candidate.hash_part,
                    "store_path": candidate.store_path,
                    "url": candidate.url,
                    "compression": candidate.compression,
                    "file_hash": candidate.file_hash,
                    "file_size": candidate.file_size,
                    "nar_hash": candidate.nar_hash,
                    "nar_size": candidate.nar_size,
                    "deriver": candidate.deriver,
                    "ca": candidate.ca,
                    "narinfo": sealed[candidate.store_path],
                    "published_at": now,
                }
                for candidate in ordered
            ],
        )
        for candidate, serial in zip(ordered, inserted.scalars(), strict=True):
            serials[candidate.base_name] = serial
        edges = [
            {"referrer": serials[candidate.base_name], "reference": serials[reference]}
            for candidate in ordered
            for reference in set(candidate.references)
        ]
        if edges:
            await connection.execute(refs.insert(), edges)

    async def _repair(self, connection: AsyncConnection, candidate: Candidate, row: Row) -> None:
        """Point a path whose object was lost at another object with the same NAR; its signature covers no URL."""
        known = narinfo_format.parse(row.narinfo, self.store_dir)
        repaired = replace(
            known,
            url=candidate.url,
            compression=candidate.compression,
            file_hash=candidate.file_hash,
            file_size=candidate.file_size,
        )
        await connection.execute(
            paths.update()
            .where(paths.c.serial == row.serial)
            .values(
                url=candidate.url,
                compression=candidate.compression,
                file_hash=candidate.file_hash,
                file_size=candidate.file_size,
                narinfo=repaired.render(),
            )
        )

    async def _record_conflict(self, connection: AsyncConnection, candidate: Candidate, row: Row) -> None:
        same = (conflicts.c.serial == row.serial) & (conflicts.c.nar_hash == candidate.nar_hash)
        counted = await connection.execute(conflicts.update().where(same).values(times=conflicts.c.times + 1))
        if counted.rowcount:
            return
        await connection.execute(
            conflicts.insert().values(
                serial=row.serial,
                nar_hash=candidate.nar_hash,
                nar_size=candidate.nar_size,
                url=candidate.url,
                deriver=candidate.deriver,
                first_seen_at=self._now(),
                times=1,
            )
        )

    # Asking.

    async def _find(self, key: str, column: sa.Column[str]) -> Row | None:
        """Return a row whose object is there by its hash part or URL; a client asks for one, then for the other."""
        row = self._recent.get(key)
        if row is not None and self._is_there(row):
            self._recent.move_to_end(key)
            return row
        # Also where the row in memory has lost its object: it may have been repaired with another.
        async with reading(self._engine) as connection:
            found = await connection.execute(sa.select(*_ROW_COLUMNS).where(column == key).limit(1))
            row = next((Row(*values) for values in found), None)
        if row is None or not self._is_there(row):
            return None
        for name in (row.base_name[:HASH_PART_LENGTH], row.url):
            self._recent[name] = row
        while len(self._recent) > 2 * NARINFOS_IN_MEMORY:
            self._recent.popitem(last=False)
        return row

    def _hash_parts(self, store_paths: Iterable[str]) -> list[str]:
        parts = set()
        for store_path in store_paths:
            try:
                parts.add(self.store_dir.parse(store_path).hash_part)
            except FormatError:
                # Not a path of this store, so it cannot be published: it stays missing.
                continue
        return list(parts)

    async def _rows(self, connection: AsyncConnection, hash_parts: Sequence[str]) -> dict[str, Row]:
        found: dict[str, Row] = {}
        for some in _slices(hash_parts):
            question = sa.select(paths.c.hash_part, *_ROW_COLUMNS).where(paths.c.hash_part.in_(some))
            found.update((row[0], Row(*row[1:])) for row in await connection.execute(question))
        return found

    async def _reach(self, connection: AsyncConnection, hash_parts: Sequence[str], recursive: bool) -> dict[int, Row]:
        if not recursive:
            return {row.serial: row for row in (await self._rows(connection, hash_parts)).values()}
        reach = sa.select(paths.c.serial).where(paths.c.hash_part.in_(hash_parts)).cte("reach", recursive=True)
        reach = reach.union(sa.select(refs.c.reference).join(reach, refs.c.referrer == reach.c.serial))
        question = sa.select(*_ROW_COLUMNS).where(paths.c.serial.in_(sa.select(reach.c.serial))).limit(MAX_CLOSURE + 1)
        return {row[0]: Row(*row) for row in await connection.execute(question)}

    def _is_there(self, row: Row) -> bool:
        """Tell whether the object of a row has its size, as far as that is cheap to know."""
        if isinstance(self.objects, LocalObjectStore):
            return self.objects.head_now(row.url) == row.file_size
        return True

    async def _present(self, rows: Iterable[Row]) -> list[Row]:
        looked_at = list(rows)

        def look() -> list[Row]:
            return [row for row in looked_at if self._is_there(row)]

        return look() if len(looked_at) <= LOOK_INLINE else await asyncio.to_thread(look)


def _against(candidate: Candidate, row: Row) -> PublishOutcome:
    if row.store_path != candidate.store_path:
        return Rejected(
            candidate.store_path, RejectReason.MALFORMED, f"its hash part belongs to {row.store_path}, published before"
        )
    if row.nar_hash == candidate.nar_hash:
        return AlreadyPublished(candidate.store_path)
    return Conflict(candidate.store_path, row.nar_hash, candidate.nar_hash)


def _vanished(candidate: Candidate) -> Rejected:
    # It was a repeat when it was looked at, so its own object was not verified: it is not published blindly.
    return Rejected(
        candidate.store_path, RejectReason.STORE_FAILED, "the path vanished while it was published; try again"
    )


def _slices(values: Sequence[str]) -> Iterable[Sequence[str]]:
    return (values[start : start + MAX_IN] for start in range(0, len(values), MAX_IN))
