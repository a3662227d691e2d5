"""Publishing: turning claims into truth.

In this order: a claim is checked on its face; its object is read once, whole, and held against every hash and size
(one that was before it was written here must only be there still, with its size); the narinfo is rendered and signed;
then one transaction looks at what is published *now*, places the new paths references first, and inserts them. So a
path is visible only after its object was verified and all that it refers to is visible. What is published is final: the
same bits again are no change, other bits are a recorded conflict.

A claim on a tombstoned path clears the tombstone. Objects that are being deleted are refused (`deletions`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from infra.cache.catalog.catalog import Catalog, Row, apart
from infra.cache.catalog.database import chunked, conflicts, paths, read_by, refs, write_by
from infra.cache.catalog.deletions import PUBLISH_WITHIN_S, deleted, maybe_deleted
from infra.cache.catalog.tombstones import reviving
from infra.cache.publishing.claims import (
    AlreadyPublished,
    Conflict,
    ProvenObject,
    Published,
    PublishOutcome,
    Rejected,
    RejectReason,
    malformed,
    references_first,
    rejected_for_references,
)
from infra.cache.publishing.signer import Signer
from infra.database_work import Apart, Ask, Prepared, Work
from infra.nix import narinfo as narinfo_format
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import hash_part_of
from infra.objects.errors import CorruptNarError, ObjectMissingError, ObjectStoreError
from infra.objects.store import LocalObjectStore
from infra.objects.verification import verify_nar

#: Objects up to this size (on both sides) are verified one after the other in one thread: a hop costs more than one.
SMALL_BYTES = 256 * 1024
#: Objects that are verified at once, above that size.
VERIFY_CONCURRENCY = 4
#: Published paths of one call that are remembered in place of others, because who waits for them asks next; more are an
#: import, and are remembered as far as there is room.
REMEMBERED_AT_ONCE = 256
#: Rows of one statement where SQLAlchemy renders it, which holds the event loop for some 10 us a row.
ROWS_AT_ONCE = 500
_PATH_COLUMNS = tuple(
    [column.name for column in paths.c if column.name not in {"serial", "last_used_at", "tombstoned_at"}]
)
_INSERT_PATHS = Prepared(
    lambda _: paths.insert().returning(paths.c.serial, sort_by_parameter_order=True), keys=_PATH_COLUMNS
)
_INSERT_REFS = Prepared(lambda _: refs.insert(), keys=("referrer", "reference"))


@dataclass(slots=True)
class _Decision:
    """Outcomes of a publishing transaction."""

    outcomes: dict[str, PublishOutcome] = field(default_factory=dict)
    #: Those that are new.
    rows: list[Row] = field(default_factory=list)
    #: Hash parts and URLs of what was pointed at another object.
    repaired: list[tuple[str, str]] = field(default_factory=list)


class Publisher:
    """Publishes into one cache, signing with `signer`."""

    def __init__(self, catalog: Catalog, signer: Signer) -> None:
        self._catalog = catalog
        self._signer = signer
        self._verifying = asyncio.Semaphore(VERIFY_CONCURRENCY)

    async def publish(
        self, batch: Sequence[NarInfo], verified: Callable[[], None], proofs: Collection[ProvenObject] = frozenset()
    ) -> list[PublishOutcome]:
        """See `Cache.publish`."""
        outcomes: list[PublishOutcome | None] = [None] * len(batch)
        waiting = list(range(len(batch)))
        while waiting:
            # Claims on one path are decided one after the other, as if they had come separately.
            first: dict[str, int] = {}
            for index in waiting:
                first.setdefault(batch[index].hash_part, index)
            chosen = set(first.values())
            decided = await self._publish_distinct([batch[index] for index in first.values()], verified, proofs)
            for index in chosen:
                outcomes[index] = decided[batch[index].store_path]
            waiting = [index for index in waiting if index not in chosen]
        return [outcome for outcome in outcomes if outcome is not None]

    async def _publish_distinct(
        self, batch: Sequence[NarInfo], verified: Callable[[], None], proofs: Collection[ProvenObject]
    ) -> dict[str, PublishOutcome]:
        faults = await apart(len(batch), lambda: [malformed(claim, self._catalog.store_dir) for claim in batch])
        outcomes: dict[str, PublishOutcome] = {
            claim.store_path: Rejected(claim.store_path, RejectReason.MALFORMED, fault)
            for claim, fault in zip(batch, faults, strict=True)
            if fault
        }
        sound = [claim for claim, fault in zip(batch, faults, strict=True) if not fault]
        if not sound:
            return outcomes
        began, forgotten = self._catalog.now(), self._catalog.forgotten
        database = self._catalog.database
        # SQLite does all of it in its own thread, at 50 us a claim; through SQLAlchemy's layers it is 120.
        known, before = await read_by(database, lambda: self._known(sound), small=True)
        unproven = await apart(
            len(sound),
            lambda: [claim for claim in sound if not self._is_repeat(claim, known.get(claim.hash_part))],
        )
        sealed: dict[str, bytes] = {}
        for claim, result in zip(unproven, await self._examine_all(unproven, proofs), strict=True):
            if isinstance(result, Rejected):
                outcomes[claim.store_path] = result
            else:
                sealed[claim.store_path] = result
        verified()
        proven = [claim for claim in sound if claim.store_path not in outcomes]
        decision = await write_by(database, lambda: self._decide(proven, sealed, before, began), small=True)
        if decision.repaired:
            self._catalog.forget(decision.repaired)
        self._catalog.remember(decision.rows, forgotten, displacing=len(decision.rows) <= REMEMBERED_AT_ONCE)
        return outcomes | decision.outcomes

    def _known(self, claims: Sequence[NarInfo]) -> Work[tuple[dict[str, Row], dict[str, int | None]]]:
        """Return the rows of claims by hash part, and the deletions of their objects."""
        rows = yield from self._catalog.finding_rows([claim.hash_part for claim in claims])
        return rows, (yield from deleted({claim.stored.url for claim in claims}))

    def _is_repeat(self, claim: NarInfo, row: Row | None) -> bool:
        return (
            row is not None
            and row.store_path == claim.store_path
            and row.nar_hash == claim.path.nar_hash
            and self._catalog.is_intact(row)
        )

    async def _examine_all(self, claims: Sequence[NarInfo], proofs: Collection[ProvenObject]) -> list[bytes | Rejected]:
        """Read and verify each object; gives the signed narinfo of those that hold."""
        small = [
            number
            for number, claim in enumerate(claims)
            if isinstance(self._catalog.objects, LocalObjectStore)
            and (_proof(claim) in proofs or max(claim.stored.file_size, claim.path.nar_size) <= SMALL_BYTES)
        ]
        of_small = set(small)
        results: dict[int, bytes | Rejected] = {}

        def examine_small() -> None:
            results.update((number, self._examine(claims[number], proofs)) for number in small)

        async def examine_large(number: int) -> None:
            async with self._verifying:
                results[number] = await asyncio.to_thread(self._examine, claims[number], proofs)

        async with asyncio.TaskGroup() as tasks:
            for number in range(len(claims)):
                if number not in of_small:
                    tasks.create_task(examine_large(number))
            if small:
                await asyncio.to_thread(examine_small)
        return [results[number] for number in range(len(claims))]

    def _examine(self, claim: NarInfo, proofs: Collection[ProvenObject]) -> bytes | Rejected:
        objects = self._catalog.objects
        try:
            if not (isinstance(objects, LocalObjectStore) and _proof(claim) in proofs):
                verify_nar(objects.open_blocking(claim.stored.url), claim)
            elif objects.head_now(claim.stored.url) != claim.stored.file_size:
                return _missing(claim)
        except ObjectMissingError:
            return _missing(claim)
        except CorruptNarError as error:
            return Rejected(claim.store_path, RejectReason.CORRUPT, str(error))
        except ObjectStoreError as error:
            return Rejected(claim.store_path, RejectReason.STORE_FAILED, str(error))
        path, references = claim.path, tuple(sorted(set(claim.path.references)))
        if references != path.references:
            path = replace(path, references=references)
        return NarInfo(path, claim.stored).signed(self._signer.sign(path.fingerprint())).render()

    def _decide(
        self, proven: Sequence[NarInfo], sealed: Mapping[str, bytes], before: Mapping[str, int | None], began: float
    ) -> Work[_Decision]:
        """Decide on proven claims by what is published now, and write it down; inside the publishing transaction."""
        decision = _Decision()
        gone = maybe_deleted(before, (yield from deleted({claim.stored.url for claim in proven})))
        too_late = self._catalog.now() - began > PUBLISH_WITHIN_S
        for claim in proven:
            if claim.store_path in sealed and (too_late or claim.stored.url in gone):
                decision.outcomes[claim.store_path] = _collected(claim)
        left = [claim for claim in proven if claim.store_path not in decision.outcomes]
        yield from self._record(left, sealed, decision)
        return decision

    def _record(self, proven: Sequence[NarInfo], sealed: Mapping[str, bytes], decision: _Decision) -> Work[None]:
        outcomes = decision.outcomes
        named = {claim.hash_part for claim in proven}
        references = {hash_part_of(reference) for claim in proven for reference in claim.path.references}
        rows = yield from self._catalog.finding_rows(named | references)
        dead = [row.serial for part in named if (row := rows.get(part)) is not None and row.tombstoned_at is not None]
        revived = yield from reviving(dead)
        intact: list[Row] = yield Apart(len(rows), lambda: list(filter(self._catalog.is_intact, rows.values())))
        present = {row.base_name: row.serial for row in intact if row.tombstoned_at is None or row.serial in revived}
        new = []
        for claim in proven:
            row = rows.get(claim.hash_part)
            if row is None:
                new.append(claim)
                continue
            outcome = _against(claim, row)
            if isinstance(outcome, AlreadyPublished) and claim.base_name not in present:
                if claim.store_path in sealed:
                    yield _pointing(self._catalog, claim, row)
                    decision.repaired.append((row.hash_part, row.url))
                    present[claim.base_name] = row.serial
                else:
                    outcome = _vanished(claim)
            elif isinstance(outcome, Conflict):
                yield from self._record_conflict(claim, row)
            outcomes[claim.store_path] = outcome
        sound = [claim for claim in new if claim.store_path in sealed]
        outcomes.update((claim.store_path, _vanished(claim)) for claim in new if claim.store_path not in sealed)
        ordered, blocked = yield Apart(len(sound), lambda: references_first(sound, present.keys()))
        outcomes.update(rejected_for_references(blocked))
        yield from self._insert(ordered, sealed, present)
        outcomes.update((claim.store_path, Published(claim.store_path)) for claim in ordered)
        decision.rows += [_row(claim, present[claim.base_name], sealed) for claim in ordered]

    def _insert(self, ordered: Sequence[NarInfo], sealed: Mapping[str, bytes], serials: dict[str, int]) -> Work[None]:
        now = self._catalog.now()
        for chunk in chunked(ordered, ROWS_AT_ONCE):
            rows = yield Apart(len(chunk), partial(_path_rows, chunk, sealed, now))
            inserted = yield Ask(_INSERT_PATHS, rows)
            for claim, (serial,) in zip(chunk, inserted, strict=True):
                serials[claim.base_name] = serial
        edges = yield Apart(len(ordered), lambda: _edges(ordered, serials))
        for part in chunked(edges, ROWS_AT_ONCE):
            yield Ask(_INSERT_REFS, part)

    def _record_conflict(self, claim: NarInfo, row: Row) -> Work[None]:
        same = (conflicts.c.serial == row.serial) & (conflicts.c.nar_hash == claim.path.nar_hash)
        again = conflicts.update().where(same).values(times=conflicts.c.times + 1).returning(conflicts.c.serial)
        if (yield Ask(again)):
            return
        first = conflicts.insert().values(
            serial=row.serial,
            nar_hash=claim.path.nar_hash,
            nar_size=claim.path.nar_size,
            url=claim.stored.url,
            file_size=claim.stored.file_size,
            deriver=claim.path.deriver,
            first_seen_at=self._catalog.now(),
            times=1,
        )
        yield Ask(first)


def _row(claim: NarInfo, serial: int, sealed: Mapping[str, bytes]) -> Row:
    stored, text = claim.stored, sealed[claim.store_path]
    return Row(serial, claim.store_path, claim.path.nar_hash, stored.url, stored.file_size, text, None)


def _path_rows(claims: Sequence[NarInfo], sealed: Mapping[str, bytes], now: float) -> list[dict[str, object]]:
    return [
        {
            "hash_part": claim.hash_part,
            "store_path": claim.store_path,
            **asdict(claim.stored),
            "nar_hash": claim.path.nar_hash,
            "nar_size": claim.path.nar_size,
            "deriver": claim.path.deriver,
            "ca": claim.path.ca,
            "narinfo": sealed[claim.store_path],
            "published_at": now,
        }
        for claim in claims
    ]


def _edges(claims: Sequence[NarInfo], serials: Mapping[str, int]) -> list[dict[str, int]]:
    return [
        {"referrer": serials[claim.base_name], "reference": serials[reference]}
        for claim in claims
        for reference in set(claim.path.references)
    ]


async def repoint(catalog: Catalog, claim: NarInfo) -> bool:
    """Point a path at another object with the same NAR, which the caller has verified; False if it cannot be."""

    def work() -> Work[Row | None]:
        row = (yield from catalog.finding_rows([claim.hash_part])).get(claim.hash_part)
        gone = yield from deleted([claim.stored.url])
        if row is None or row.nar_hash != claim.path.nar_hash or None in gone.values():
            return None
        yield _pointing(catalog, claim, row)
        return row

    row = await write_by(catalog.database, work, small=True)
    if row is not None:
        catalog.forget([(row.hash_part, row.url)])
    return row is not None


def _pointing(catalog: Catalog, claim: NarInfo, row: Row) -> Ask:
    """Return what points a path whose object was lost at one with the same NAR; its signature covers no URL.

    The catalog is to forget the path afterwards.
    """
    known = narinfo_format.parse(row.narinfo, catalog.store_dir)
    repaired = replace(known, stored=claim.stored).render()
    update = paths.update().where(paths.c.serial == row.serial)
    return Ask(update.values(**asdict(claim.stored), narinfo=repaired))


def _against(claim: NarInfo, row: Row) -> PublishOutcome:
    if row.store_path != claim.store_path:
        return Rejected(
            claim.store_path, RejectReason.MALFORMED, f"its hash part belongs to {row.store_path}, published before"
        )
    if row.nar_hash == claim.path.nar_hash:
        return AlreadyPublished(claim.store_path)
    return Conflict(claim.store_path, row.nar_hash, claim.path.nar_hash)


def _proof(claim: NarInfo) -> ProvenObject:
    return ProvenObject(claim.stored.url, claim.path.nar_hash, claim.path.nar_size)


def _missing(claim: NarInfo) -> Rejected:
    message = f"its object {claim.stored.url} is not in the store"
    return Rejected(claim.store_path, RejectReason.MISSING_OBJECT, message)


def _vanished(claim: NarInfo) -> Rejected:
    # It was a repeat when it was looked at, so its own object was not verified: it is not published blindly.
    return Rejected(claim.store_path, RejectReason.STORE_FAILED, "the path vanished while it was published; try again")


def _collected(claim: NarInfo) -> Rejected:
    return Rejected(
        claim.store_path,
        RejectReason.STORE_FAILED,
        f"its object {claim.stored.url} was collected as garbage while it was published; upload it again",
    )
