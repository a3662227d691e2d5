"""The journal: durable facts in SQL, appended in one commit per batch, read back in order.

Rules:
1. Facts are stored before anything acts on them. `append` returns after the commit and raises if there was none.
2. A row ("frame") holds the facts of one batch, at most `FRAME_FACTS`; `seq` has no gaps; a CRC guards each body.
3. What cannot be understood stops the start with one sentence; nothing is skipped, repaired or overwritten.
4. `notes` (what people called a submission) go into the same commit as the submission's facts. What several have in
   common, the roots of one graph, is stored once by its digest, until the last of them is forgotten.
5. One writer. Each that begins raises the **epoch** (`take_over`), and every write is conditional on it inside its own
   transaction: whoever comes back after another has taken over gets `FencedError`, and nothing of it is stored.
6. A server that is away and a full disk are waited for, at most `PATIENCE_S`; meanwhile nothing is acknowledged,
   because nothing is stored. Where the connection was lost it is not known whether a commit took place: `append` asks
   for the journal's last `seq` before it tries again.
7. A snapshot (facts of the core and records of the read model, see `readmodel.snapshot`) stands for all frames up to
   its `seq`. It
   counts once its row is there, which is written last; it is read again before anything older is removed, and the one
   before it is kept with the frames since. `load` starts at the newest whose checksums are right.

SQLite runs in WAL mode with `synchronous=NORMAL`: a commit survives the death of the process at any moment, because it
lies in the operating system by then; a power cut may lose the last moments, never the order or the consistency. That is
the right trade: publishing is idempotent, workers keep reports until acknowledged, and a full sync for each batch costs
more than all other work of the coordinator together. PostgreSQL commits as it is configured to.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy import Column, Integer, LargeBinary, MetaData, String, Table, delete, func, insert, inspect, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.errors import CoordinatorError
from coordinator.journal.codec import (
    CodecError,
    Record,
    StoredNote,
    decode_facts,
    decode_records,
    encode_facts,
    encode_records,
)
from infra.cache.catalog.database import Reign
from infra.database import PATIENCE_S, may_pass, reason
from infra.retry import Patience
from scheduler.facts import Fact, SubmissionAccepted, SubmissionForgotten, SubmissionRetried
from scheduler.model import SubmissionId

#: Facts in one frame; a larger batch becomes several frames of one commit.
FRAME_FACTS: Final = 4096
#: Facts of one commit that are encoded in the event loop, some microseconds each; more are in a thread.
INLINE_FACTS: Final = 512
#: Snapshots that are kept, with the frames since the oldest of them.
SNAPSHOTS_KEPT: Final = 2
#: What this module writes. 1 had no snapshots and no epoch, 2 a whole note for each submission; both are brought up to
#: date when they are opened.
FORMAT: Final = 3
_FIRST_WITH_EPOCH: Final = 2
#: Seconds after which a database that says nothing is told of.
SLOW_S: Final = 10.0
#: Frames read, and removed, at one time.
_READ_FRAMES: Final = 64
#: What names of marks begin with, among other rows of `journal_meta`.
_MARK: Final = "mark "
_PRUNE_FRAMES: Final = 500

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")

#: SQLite stores any integer in an INTEGER; PostgreSQL's has 32 bits, which a CRC without sign does not fit into.
_Big = sa.BigInteger().with_variant(Integer(), "sqlite")

_metadata = MetaData()
_meta = Table(
    "journal_meta",
    _metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Integer, nullable=False),
)
_frames = Table(
    "journal_frames",
    _metadata,
    Column("seq", _Big, primary_key=True, autoincrement=False),
    Column("facts", Integer, nullable=False),
    Column("crc", _Big, nullable=False),
    Column("body", LargeBinary, nullable=False),
)
_notes = Table(
    "journal_notes",
    _metadata,
    Column("submission", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)
#: What notes of several submissions may have in common, stored once.
_shared = Table(
    "journal_shared_notes",
    _metadata,
    Column("digest", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)
_shares = Table(
    "journal_note_shares",
    _metadata,
    Column("submission", String(64), primary_key=True),
    Column("digest", String(64), nullable=False, index=True),
)
_snapshots = Table(
    "journal_snapshots",
    _metadata,
    Column("snapshot", String(32), primary_key=True),
    #: The last frame that it stands for.
    Column("seq", _Big, nullable=False),
    Column("parts", Integer, nullable=False),
)
_parts = Table(
    "journal_snapshot_parts",
    _metadata,
    Column("snapshot", String(32), primary_key=True),
    Column("part", Integer, primary_key=True, autoincrement=False),
    #: 0: facts of the core, 1: records of the read model; all facts come first.
    Column("kind", Integer, nullable=False),
    Column("items", Integer, nullable=False),
    Column("crc", _Big, nullable=False),
    Column("body", LargeBinary, nullable=False),
)


class JournalError(CoordinatorError):
    """The journal cannot be read or written; the coordinator must not go on."""

    code: ClassVar[str] = "journal"


class FencedError(JournalError):
    """Another coordinator has taken over; nothing was written, and this one must end."""

    code: ClassVar[str] = "fenced"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A piece of the journal as `load` gives it: facts, or records of the read model that belong behind them."""

    facts: tuple[Fact, ...] = ()
    records: tuple[Record, ...] = ()


class Journal:
    """One journal in one database: `prepare`, `take_over`, `load` to its end, then `append`."""

    def __init__(self, engine: AsyncEngine, *, epoch: int = 0, patience_s: float = PATIENCE_S) -> None:
        self._engine = engine
        self._patience_s = patience_s
        self._epoch = epoch
        #: A random number that tells this journal from others; 0 before `take_over`.
        self._identity = 0
        self._seq = 0
        #: Facts in the frames behind the newest snapshot, of those that were read or written here.
        self._tail = 0
        self._trouble = ""

    @property
    def epoch(self) -> int:
        """Which reign over the journal this is, counted from 1; 0 before `take_over`."""
        return self._epoch

    @property
    def reign(self) -> Reign:
        """What caches are to be written under, after `take_over`."""
        return Reign(self._identity, self._epoch)

    @property
    def seq(self) -> int:
        """The last frame read or written."""
        return self._seq

    @property
    def tail(self) -> int:
        """Facts that a start would have to replay behind the newest snapshot."""
        return self._tail

    @property
    def trouble(self) -> str:
        """Why nothing can be stored at the moment, "" while all is well."""
        return self._trouble

    async def prepare(self) -> None:
        """Create the tables, or bring those of an older release up to date. Raises `JournalError`."""
        with _translated("open"):
            # On its own first: a journal that must not be touched is not even locked.
            async with self._engine.connect() as connection:
                await connection.run_sync(_check_format)
            async with self._engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    # Two that start at one time must not both create tables.
                    await connection.execute(select(func.pg_advisory_xact_lock(func.hashtext("drover-journal"))))
                await connection.run_sync(_bring_up_to_date)

    async def marks(self) -> dict[str, int]:
        """Return what the last reign left for the next one to compare itself with (`farm_secrets`)."""
        query = select(_meta).where(_meta.c.name.startswith(_MARK, autoescape=True))
        with _translated("read"):
            async with self._engine.connect() as connection:
                return {row.name.removeprefix(_MARK): row.value for row in await connection.execute(query)}

    async def take_over(self, marks: Mapping[str, int] | None = None) -> int:
        """Begin a reign: from now on whoever wrote before is fenced out. Returns the epoch. Raises `JournalError`.

        `marks`, of at most 50 characters and 31 bits, replace those of the last reign.
        """
        mine = _meta.c.name == "epoch"
        with _translated("open"):
            async with self._engine.begin() as connection:
                await connection.execute(sa.update(_meta).where(mine).values(value=_meta.c.value + 1))
                self._epoch = (await connection.execute(select(_meta.c.value).where(mine))).scalar_one()
                self._identity = await _identity(connection)
                if marks is not None:
                    await connection.execute(delete(_meta).where(_meta.c.name.startswith(_MARK, autoescape=True)))
                    rows = [{"name": f"{_MARK}{name}", "value": value} for name, value in marks.items()]
                    await connection.execute(insert(_meta), rows)
        return self._epoch

    async def check_epoch(self) -> None:
        """Raise `FencedError` if another has taken over, `JournalError` where that cannot be asked."""
        with _translated("read"):
            async with self._engine.connect() as connection:
                await self.fence(connection)

    async def fence(self, connection: AsyncConnection) -> None:
        """Check inside somebody's transaction in the same database that this is still the reign.

        With PostgreSQL nobody can take over before that transaction ends. Raises `FencedError`.
        """
        query = select(_meta.c.value).where(_meta.c.name == "epoch").with_for_update(read=True)
        now = (await connection.execute(query)).scalar_one_or_none()
        if now != self._epoch:
            raise FencedError(
                f"another coordinator has taken over the journal (epoch {now}, this one had {self._epoch}); "
                "this one ends, nothing was written."
            )

    async def load(self) -> AsyncIterator[Loaded]:
        """Yield everything in order, one piece at a time. Must be read to its end before the first `append`.

        Raises `JournalError` where a frame is missing, torn or not understood.
        """
        snapshot = await self._newest_snapshot()
        if snapshot is not None:
            name, self._seq = snapshot
            async for kind, items, body in self._read_parts(name):
                yield _decoded(kind, items, body, f"the journal's snapshot {name} is damaged")
        while True:
            query = select(_frames).where(_frames.c.seq > self._seq).order_by(_frames.c.seq).limit(_READ_FRAMES)
            with _translated("read"):
                async with self._engine.connect() as connection:
                    rows = (await connection.execute(query)).all()
            for row in rows:
                yield self._frame(row.seq, row.facts, row.crc, row.body)
            if len(rows) < _READ_FRAMES:
                return

    def _frame(self, seq: int, count: int, crc: int, body: bytes) -> Loaded:
        where = f"the journal is damaged at frame {seq}"
        if seq != self._seq + 1:
            raise JournalError(f"{where}: frame {self._seq + 1} is missing; restore the database from a backup.")
        if zlib.crc32(body) != crc:
            raise JournalError(f"{where}: its checksum does not match; restore the database from a backup.")
        loaded = _decoded(0, count, body, where)
        self._seq = seq
        self._tail += count
        return loaded

    async def notes(self) -> Mapping[SubmissionId, StoredNote]:
        """Return what was noted for each submission; equal shared parts are one object."""
        with _translated("read"):
            async with self._engine.connect() as connection:
                shared = {row.digest: row.body for row in await connection.execute(select(_shared))}
                shares = {row.submission: row.digest for row in await connection.execute(select(_shares))}
                rows = (await connection.execute(select(_notes))).all()
        if lost := set(shares.values()) - shared.keys():
            raise JournalError(
                f"the journal lacks {len(lost)} notes of submissions; restore the database from a backup."
            )
        bodies = {name: shared[digest] for name, digest in shares.items()}
        return {SubmissionId(row.submission): StoredNote(row.body, bodies.get(row.submission, b"")) for row in rows}

    async def append(self, facts: Sequence[Fact], notes: Mapping[SubmissionId, StoredNote] | None = None) -> None:
        """Store durable `facts` and `notes` in one commit, without the notes of what they say is forgotten.

        Returns when they are safe.

        Waits for a database that is away, and for room on a disk that is full. After any error the caller must stop:
        what is stored is not known.

        Raises:
            FencedError: another coordinator has taken over.
            JournalError: they cannot be stored.
        """
        # One that takes a submission in names all its steps: a mass rebuild's takes a tenth of a second.
        large = len(facts) > INLINE_FACTS or any(
            isinstance(fact, SubmissionAccepted | SubmissionRetried) for fact in facts
        )
        frames = await asyncio.to_thread(_numbered, facts, self._seq) if large else _numbered(facts, self._seq)
        forgotten = [fact.submission for fact in facts if isinstance(fact, SubmissionForgotten)]
        slow = asyncio.get_running_loop().call_later(SLOW_S, self._suffer, "its database does not answer")
        try:
            await self._store(frames, notes or {}, forgotten)
        finally:
            slow.cancel()
        if self._trouble:
            self._trouble = ""
            _log.warning("the journal can be written again")
        self._seq += len(frames)
        self._tail += len(facts)

    async def _store(
        self,
        frames: Sequence[dict[str, Any]],
        notes: Mapping[SubmissionId, StoredNote],
        forgotten: Sequence[SubmissionId],
    ) -> None:
        patience: Patience | None = None
        while True:
            try:
                # After a loss it is not known whether the last attempt was committed.
                if patience is None or not await self._is_stored(self._seq + len(frames)):
                    async with self._engine.begin() as connection:
                        await connection.execute(insert(_frames), frames)
                        if notes:
                            await _write_notes(connection, notes)
                        if forgotten:
                            await _forget_notes(connection, forgotten)
                        # Last: SQLite is locked for writing by now, and sees what is.
                        await self.fence(connection)
            except (SQLAlchemyError, OSError) as error:
                # The transaction of a lost connection may still end after it was asked about.
                late = patience is not None and isinstance(error, IntegrityError)
                if not late and not may_pass(error):
                    raise await self._unstorable(error) from None
                if patience is None:
                    patience = Patience(self._patience_s)
                    self._suffer(reason(error))
                if not await patience.pause():
                    raise _error("write", error) from None
            else:
                return

    def _suffer(self, why: str) -> None:
        if not self._trouble:
            self._trouble = f"the journal cannot be written ({why})"
            _log.warning("%s; nothing is taken on until it can", self._trouble)

    async def _unstorable(self, error: SQLAlchemyError | OSError) -> JournalError:
        """Return what to raise where waiting does not help. Raises `FencedError`."""
        if isinstance(error, IntegrityError):
            # A frame that is there already is another coordinator's.
            await self.check_epoch()
        return _error("write", error)

    async def _is_stored(self, last: int) -> bool:
        async with self._engine.begin() as connection:
            await self.fence(connection)
            found = (await connection.execute(select(func.max(_frames.c.seq)))).scalar_one_or_none() or 0
        if found not in (self._seq, last):
            raise JournalError(
                f"the journal ends at frame {found} where {self._seq} or {last} was expected: its database has lost "
                "what it had confirmed (is synchronous_commit off?); start again to go on from there."
            )
        return bool(found == last)

    # Snapshots.

    async def save_snapshot(self, seq: int, facts: Iterable[Fact], records: Iterable[Record]) -> None:
        """Store what stands for all frames up to `seq`, read it again, then remove what it makes needless.

        Each part is a commit of its own, so that `append` waits for none of it. May be cut off at any moment: the next
        snapshot removes what is left of this one.

        Raises:
            FencedError: another coordinator has taken over.
            JournalError: it cannot be stored, or does not come back as it was given.
        """
        name = secrets.token_hex(8)
        count = 0
        with _translated("write a snapshot of"):
            await self._sweep_snapshots(keep=SNAPSHOTS_KEPT)
            for kind, items, body in _encoded(facts, records):
                row = {"snapshot": name, "part": count, "kind": kind, "items": items, "crc": zlib.crc32(body)}
                async with self._engine.begin() as connection:
                    await connection.execute(insert(_parts).values(**row, body=body))
                    await self.fence(connection)
                count += 1
            async with self._engine.begin() as connection:
                await connection.execute(insert(_snapshots).values(snapshot=name, seq=seq, parts=count))
                await self.fence(connection)
        if not await self._is_whole(name, count, deeply=True):
            with _translated("write a snapshot of"):
                async with self._engine.begin() as connection:
                    await connection.execute(delete(_snapshots).where(_snapshots.c.snapshot == name))
                    await self.fence(connection)
            raise JournalError("a snapshot of the journal does not come back as it was written; check the disk.")
        with _translated("write a snapshot of"):
            await self._sweep_snapshots(keep=SNAPSHOTS_KEPT)
            await self._prune()

    def snapshot_taken(self, facts: int) -> None:
        """Note that a snapshot now stands for that many facts of the tail."""
        self._tail = max(0, self._tail - facts)

    async def snapshots(self) -> list[int]:
        """Return the last frame of every snapshot, newest first."""
        with _translated("read"):
            async with self._engine.connect() as connection:
                rows = await connection.execute(select(_snapshots.c.seq).order_by(_snapshots.c.seq.desc()))
        return [seq for (seq,) in rows]

    async def _newest_snapshot(self) -> tuple[str, int] | None:
        query = select(_snapshots).order_by(_snapshots.c.seq.desc(), _snapshots.c.snapshot)
        with _translated("read"):
            async with self._engine.connect() as connection:
                rows = (await connection.execute(query)).all()
        for row in rows:
            if await self._is_whole(row.snapshot, row.parts):
                return row.snapshot, row.seq
            _log.warning("the journal's snapshot up to frame %d is damaged; starting from what was before it", row.seq)
        if rows and not await self._begins():
            raise JournalError("every snapshot of the journal is damaged; restore the database from a backup.")
        return None

    async def _begins(self) -> bool:
        """Whether the first frame is still there."""
        with _translated("read"):
            async with self._engine.connect() as connection:
                return bool((await connection.execute(select(func.min(_frames.c.seq)))).scalar_one_or_none() == 1)

    async def _is_whole(self, name: str, parts: int, *, deeply: bool = False) -> bool:
        """Whether all parts are there with the right checksums, and can be understood where that is asked for."""
        count = 0
        try:
            async for kind, items, body in self._read_parts(name):
                count += 1
                if deeply:
                    _decoded(kind, items, body, "a part of the snapshot")
        except _DamagedPartError:
            return False
        return count == parts

    async def _read_parts(self, name: str) -> AsyncIterator[tuple[int, int, bytes]]:
        """Yield kind, number of items and body of every part in order. Raises `_DamagedPartError`."""
        part = 0
        while True:
            query = select(_parts).where(_parts.c.snapshot == name, _parts.c.part == part)
            with _translated("read"):
                async with self._engine.connect() as connection:
                    row = (await connection.execute(query)).one_or_none()
            if row is None:
                return
            if zlib.crc32(row.body) != row.crc:
                raise _DamagedPartError(f"the journal's snapshot {name} is damaged at part {part}.")
            yield row.kind, row.items, row.body
            part += 1

    async def _sweep_snapshots(self, keep: int) -> None:
        """Remove all but the newest `keep` snapshots, and parts that belong to none."""
        newest = select(_snapshots.c.snapshot).order_by(_snapshots.c.seq.desc(), _snapshots.c.snapshot).limit(keep)
        async with self._engine.begin() as connection:
            kept = [name for (name,) in await connection.execute(newest)]
            await connection.execute(delete(_snapshots).where(_snapshots.c.snapshot.not_in(kept)))
            await self.fence(connection)
        query = select(_parts.c.snapshot, _parts.c.part).where(_parts.c.snapshot.not_in(kept))
        async with self._engine.connect() as connection:
            needless = (await connection.execute(query)).all()
        for name, part in needless:
            async with self._engine.begin() as connection:
                await connection.execute(delete(_parts).where(_parts.c.snapshot == name, _parts.c.part == part))
                await self.fence(connection)

    async def _prune(self) -> None:
        """Remove the frames that the oldest of enough snapshots stands for."""
        kept = await self.snapshots()
        if len(kept) < SNAPSHOTS_KEPT:
            return
        while True:
            some = select(_frames.c.seq).where(_frames.c.seq <= kept[-1]).order_by(_frames.c.seq).limit(_PRUNE_FRAMES)
            async with self._engine.begin() as connection:
                gone = await connection.execute(delete(_frames).where(_frames.c.seq.in_(some.scalar_subquery())))
                await self.fence(connection)
            if gone.rowcount < _PRUNE_FRAMES:
                return


async def _write_notes(connection: AsyncConnection, notes: Mapping[SubmissionId, StoredNote]) -> None:
    """Store notes, and of what they share what is not there yet."""
    await connection.execute(insert(_notes), [{"submission": name, "body": note.own} for name, note in notes.items()])
    digests = {name: hashlib.sha256(note.shared).hexdigest() for name, note in notes.items() if note.shared}
    if not digests:
        return
    bodies = {digests[name]: note.shared for name, note in notes.items() if name in digests}
    known = select(_shared.c.digest).where(_shared.c.digest.in_(bodies))
    for digest in (await connection.execute(known)).scalars():
        del bodies[digest]
    if bodies:
        await connection.execute(insert(_shared), [{"digest": name, "body": body} for name, body in bodies.items()])
    await connection.execute(insert(_shares), [{"submission": name, "digest": each} for name, each in digests.items()])


async def _forget_notes(connection: AsyncConnection, submissions: Sequence[SubmissionId]) -> None:
    """Remove notes, and what no other note shares with them."""
    await connection.execute(delete(_notes).where(_notes.c.submission.in_(submissions)))
    theirs = _shares.c.submission.in_(submissions)
    digests = set((await connection.execute(select(_shares.c.digest).where(theirs))).scalars())
    if digests:
        await connection.execute(delete(_shares).where(theirs))
        unshared = _shared.c.digest.in_(digests) & _shared.c.digest.not_in(select(_shares.c.digest))
        await connection.execute(delete(_shared).where(unshared))


class _DamagedPartError(JournalError):
    """A part of a snapshot is not what was written."""


def _numbered(facts: Sequence[Fact], seq: int) -> list[dict[str, Any]]:
    """Return the rows of one commit, numbered from `seq` + 1 on."""
    frames: list[dict[str, Any]] = []
    # Notes alone get an empty frame, so that the last `seq` always tells whether a commit took place.
    for start in range(0, len(facts), FRAME_FACTS) or (0,):
        part = facts[start : start + FRAME_FACTS]
        body = encode_facts(part)
        frames.append({"seq": seq + len(frames) + 1, "facts": len(part), "crc": zlib.crc32(body), "body": body})
    return frames


def _encoded(facts: Iterable[Fact], records: Iterable[Record]) -> Iterator[tuple[int, int, bytes]]:
    for some in _sliced(facts):
        yield 0, len(some), encode_facts(some)
    for some_records in _sliced(records):
        yield 1, len(some_records), encode_records(some_records)


def _sliced(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    some: list[_Item] = []
    for item in items:
        some.append(item)
        if len(some) == FRAME_FACTS:
            yield some
            some = []
    if some:
        yield some


def _decoded(kind: int, items: int, body: bytes, where: str) -> Loaded:
    try:
        loaded = Loaded(records=decode_records(body)) if kind else Loaded(facts=decode_facts(body))
    except CodecError as error:
        raise JournalError(f"{where}: {error}") from None
    found = len(loaded.facts) + len(loaded.records)
    if found != items:
        raise JournalError(f"{where}: it holds {found} facts instead of {items}.")
    return loaded


def _check_format(connection: Connection) -> int | None:
    """Return the format of the journal that is there, None if there is none. Raises `JournalError`."""
    if not inspect(connection).has_table(_meta.name):
        return None
    value = connection.execute(select(_meta.c.value).where(_meta.c.name == "facts_version")).scalar_one_or_none()
    if value is None:
        raise JournalError("the journal does not say its version; restore the database from a backup.")
    if value > FORMAT:
        raise JournalError(
            f"the journal was written by a newer version of drover (format {value}, this one reads {FORMAT}); "
            "start the newer version. Nothing was changed."
        )
    return int(value)


def _bring_up_to_date(connection: Connection) -> None:
    found = _check_format(connection)
    if found == FORMAT:
        return
    _metadata.create_all(connection)
    if found is None:
        connection.execute(insert(_meta).values(name="facts_version", value=FORMAT))
    else:
        connection.execute(sa.update(_meta).where(_meta.c.name == "facts_version").values(value=FORMAT))
    if found is None or found < _FIRST_WITH_EPOCH:
        connection.execute(insert(_meta).values(name="epoch", value=0))


async def _identity(connection: AsyncConnection) -> int:
    """Return the journal's number, drawn if it has none. For whoever has just raised the epoch, which locks the row."""
    query = select(_meta.c.value).where(_meta.c.name == "identity")
    found: int | None = (await connection.execute(query)).scalar_one_or_none()
    if found is None:
        found = secrets.randbelow(2**31 - 1) + 1
        await connection.execute(insert(_meta).values(name="identity", value=found))
    return found


def _error(verb: str, error: BaseException) -> JournalError:
    return JournalError(f"cannot {verb} the journal: {reason(error)}; the farm stops so that nothing is lost.")


@contextlib.contextmanager
def _translated(verb: str) -> Iterator[None]:
    """Turn database errors into one sentence without statement and parameters."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        raise _error(verb, error) from None
