"""The journal: durable facts in SQL, appended in one commit per batch, read back in order.

Rules:
1. Facts are stored before anything acts on them. `append` returns after the commit and raises if there was none.
2. A row ("frame") holds the facts of one batch, at most `FRAME_FACTS`; `seq` has no gaps; a CRC guards each body.
3. What cannot be understood stops the start with one sentence; nothing is skipped, repaired or overwritten.
4. `notes` (what people called a submission) go into the same commit as the submission's facts. What several have in
   common, the roots of one graph, is stored once by its digest, until the last of them is forgotten.
5. One writer. Each that begins raises the **epoch** (`take_over`), and every write is conditional on it inside its own
   transaction: an earlier writer that comes back gets `FencedError`, and nothing of it is stored.
6. A server that is away and a full disk are waited for, at most `PATIENCE_S`; meanwhile nothing is acknowledged,
   because nothing is stored. Where the connection was lost it is not known whether a commit took place: `append` asks
   for the journal's last `seq` before it tries again.
7. A snapshot (facts of the core and records of the read model, see `readmodel.snapshot`) stands for all frames up to
   its `seq` (`snapshots`). It is read again before anything older is removed. `load` starts at the newest whose
   checksums are right.

SQLite runs in WAL mode with `synchronous=NORMAL`: a commit survives the death of the process at any moment, because it
lies in the operating system by then; a power cut may lose the last moments, never the order or the consistency. That is
the right trade: publishing is idempotent, workers keep reports until acknowledged, and a full sync for each batch costs
more than all other work of the coordinator together. PostgreSQL commits as it is configured to.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import delete, func, insert, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.journal import tables
from coordinator.journal.codec import StoredNote
from coordinator.journal.errors import FencedError, JournalError, journal_error, translated
from coordinator.journal.frames import FrameBody, Loaded, decoded, frame_bodies, numbered
from coordinator.journal.notes import Note, forget_notes, read_notes, write_notes
from coordinator.journal.single_frame import store_single_frame
from coordinator.journal.snapshots import Snapshots
from infra.cache.catalog.database import FencingToken
from infra.database import PATIENCE_S, may_pass, reason
from infra.retry import Outage, retrying
from scheduler.facts import Fact, SubmissionAccepted, SubmissionForgotten, SubmissionGrew, SubmissionRetried
from scheduler.model import SubmissionId

#: Facts of one commit that are encoded in the event loop, some microseconds each; more are in a thread.
INLINE_FACTS: Final = 512
#: Seconds after which the journal reports a database that does not answer.
SLOW_S: Final = 10.0
#: Frames read at one time.
_READ_FRAMES: Final = 64
#: What names of fingerprints begin with, among other rows of `journal_meta`.
_MARK: Final = "mark "

_log = logging.getLogger(__name__)


class Journal:
    """One journal in one database: `prepare`, `take_over`, `load` to its end, then `append`."""

    def __init__(self, engine: AsyncEngine, *, epoch: int = 0, patience_s: float = PATIENCE_S) -> None:
        #: What stands for frames that need not be replayed any more.
        self.snapshots = Snapshots(engine, self.fence)
        self._engine = engine
        self._patience_s = patience_s
        self._epoch = epoch
        #: A random number that distinguishes this journal from others; 0 before `take_over`.
        self._identity = 0
        self._seq = 0
        #: Facts in the frames behind the newest snapshot, of those that were read or written here.
        self._tail = 0
        #: Length of the tail that a caller waits for, and set once it has come.
        self._awaited = 0
        self._grown = asyncio.Event()
        self._outage = Outage(_log, "nothing is taken on until it can", over="the journal can be written again")

    @property
    def epoch(self) -> int:
        """Number of the coordinators that began to write, this one included; 0 before `take_over`."""
        return self._epoch

    @property
    def fencing_token(self) -> FencingToken:
        """Fencing token under which caches are written, after `take_over`."""
        return FencingToken(self._identity, self._epoch)

    @property
    def seq(self) -> int:
        """The last frame read or written."""
        return self._seq

    @property
    def tail(self) -> int:
        """Facts that a start would have to replay behind the newest snapshot."""
        return self._tail

    async def tail_reaches(self, facts: int) -> None:
        """Return once the tail has so many facts. For one caller at a time."""
        while self._tail < facts:
            self._awaited = facts
            self._grown.clear()
            await self._grown.wait()

    @property
    def trouble(self) -> str:
        """Reason that nothing can be stored at the moment, "" while all is well."""
        return self._outage.trouble

    async def prepare(self) -> None:
        """Create the tables, or bring those of an older release up to date. Raises `JournalError`."""
        with translated("open"):
            # On its own first: a journal that must not be touched is not even locked.
            async with self._engine.connect() as connection:
                await connection.run_sync(tables.check_format)
            async with self._engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    # Two that start at one time must not both create tables.
                    await connection.execute(select(func.pg_advisory_xact_lock(func.hashtext("drover-journal"))))
                await connection.run_sync(tables.bring_up_to_date)

    async def fingerprints(self) -> dict[str, int]:
        """Return the fingerprints that the last epoch left for the next one to compare (`farm_secrets`)."""
        query = select(tables.meta).where(tables.meta.c.name.startswith(_MARK, autoescape=True))
        with translated("read"):
            async with self._engine.connect() as connection:
                return {row.name.removeprefix(_MARK): row.value for row in await connection.execute(query)}

    async def take_over(self, fingerprints: Mapping[str, int] | None = None) -> int:
        """Begin an epoch: from now on every earlier writer is fenced out. Returns the epoch. Raises `JournalError`.

        `fingerprints`, of at most 50 characters and 31 bits, replace those of the last epoch.
        """
        mine = tables.meta.c.name == "epoch"
        with translated("open"):
            async with self._engine.begin() as connection:
                await connection.execute(sa.update(tables.meta).where(mine).values(value=tables.meta.c.value + 1))
                self._epoch = (await connection.execute(select(tables.meta.c.value).where(mine))).scalar_one()
                self._identity = await tables.identity(connection)
                if fingerprints is not None:
                    await connection.execute(
                        delete(tables.meta).where(tables.meta.c.name.startswith(_MARK, autoescape=True))
                    )
                    rows = [{"name": f"{_MARK}{name}", "value": value} for name, value in fingerprints.items()]
                    await connection.execute(insert(tables.meta), rows)
        return self._epoch

    def snapshot_taken(self, facts: int) -> None:
        """Note that a snapshot now stands for that many facts of the tail."""
        self._tail = max(0, self._tail - facts)

    async def check_epoch(self) -> None:
        """Raise `FencedError` if another has taken over, `JournalError` where the database does not answer."""
        with translated("read"):
            async with self._engine.connect() as connection:
                await self.fence(connection)

    async def fence(self, connection: AsyncConnection) -> None:
        """Check inside a caller's transaction in the same database that this is still the epoch.

        With PostgreSQL no other coordinator can take over before that transaction ends. Raises `FencedError`.
        """
        now = await _epoch_in(connection)
        if now != self._epoch:
            raise self._replaced(now)

    def _replaced(self, now: int | None) -> FencedError:
        return FencedError(
            f"another coordinator has taken over the journal (epoch {now}, this one had {self._epoch}); "
            "this one ends, nothing was written."
        )

    async def load(self) -> AsyncIterator[Loaded]:
        """Yield everything in order, one piece at a time. Must be read to its end before the first `append`.

        Raises `JournalError` where a frame is missing, torn or not understood.
        """
        snapshot = await self.snapshots.newest()
        if snapshot is not None:
            name, self._seq = snapshot
            async for kind, items, body in self.snapshots.parts(name):
                yield decoded(kind, items, body, f"the journal's snapshot {name} is damaged")
        while True:
            query = (
                select(tables.frames)
                .where(tables.frames.c.seq > self._seq)
                .order_by(tables.frames.c.seq)
                .limit(_READ_FRAMES)
            )
            with translated("read"):
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
        loaded = decoded(0, count, body, where)
        self._seq = seq
        self._tail += count
        return loaded

    async def notes(self) -> Mapping[SubmissionId, StoredNote]:
        """Return what was noted for each submission; equal shared parts are one object."""
        with translated("read"):
            async with self._engine.connect() as connection:
                return await read_notes(connection)

    async def encoded(self, facts: Sequence[Fact]) -> list[FrameBody]:
        """Return the frames that `append` stores of these facts; other facts may be appended meanwhile."""
        # One that takes a submission in names all its steps: a mass rebuild's takes a tenth of a second.
        large = len(facts) > INLINE_FACTS or any(
            isinstance(fact, SubmissionAccepted | SubmissionGrew | SubmissionRetried) for fact in facts
        )
        return await asyncio.to_thread(frame_bodies, facts) if large else frame_bodies(facts)

    async def append(
        self,
        facts: Sequence[Fact],
        notes: Mapping[SubmissionId, Note] | None = None,
        encoded: Sequence[FrameBody] | None = None,
    ) -> None:
        """Store durable `facts` and `notes` in one commit, without the notes of submissions that they forget.

        `encoded` is what `encoded` returns of the facts, where the caller has it. Returns when they are safe.

        Waits for a database that is away, and for room on a disk that is full. After any error the caller must stop:
        what is stored is not known.

        Raises:
            FencedError: another coordinator has taken over.
            JournalError: they cannot be stored.
        """
        frames = numbered(await self.encoded(facts) if encoded is None else encoded, self._seq)
        forgotten = [fact.submission for fact in facts if isinstance(fact, SubmissionForgotten)]
        new = {fact.submission for fact in facts if isinstance(fact, SubmissionAccepted)}
        slow = asyncio.get_running_loop().call_later(
            SLOW_S, self._outage.begin, _unwritable("its database does not answer")
        )
        try:
            await self._store(frames, notes or {}, new, forgotten)
        finally:
            slow.cancel()
        self._outage.end()
        self._seq += len(frames)
        self._tail += len(facts)
        if self._tail >= self._awaited:
            self._grown.set()

    async def _store(
        self,
        frames: Sequence[dict[str, Any]],
        notes: Mapping[SubmissionId, Note],
        new: Collection[SubmissionId],
        forgotten: Sequence[SubmissionId],
    ) -> None:
        failed = False

        async def store() -> None:
            # After a loss it is not known whether the last attempt was committed.
            if failed and frames and await self._is_stored(self._seq + len(frames)):
                return
            if len(frames) == 1 and not notes and not forgotten and self._engine.dialect.name == "sqlite":
                if not await store_single_frame(self._engine, frames[0], self._epoch):
                    async with self._engine.connect() as connection:
                        raise self._replaced(await _epoch_in(connection))
                return
            async with self._engine.begin() as connection:
                await self._store_in(connection, frames, notes, new, forgotten)

        def trouble_of(error: Exception) -> str:
            nonlocal failed
            if not isinstance(error, (SQLAlchemyError, OSError)):
                return ""
            # The transaction of a lost connection may still end after its outcome was read.
            late = failed and isinstance(error, IntegrityError)
            failed = True
            return _unwritable(reason(error)) if late or may_pass(error) else ""

        try:
            await retrying(store, self._patience_s, self._outage, trouble_of)
        except (SQLAlchemyError, OSError) as error:
            raise await self._unstorable(error) from None

    async def _store_in(
        self,
        connection: AsyncConnection,
        frames: Sequence[dict[str, Any]],
        notes: Mapping[SubmissionId, Note],
        new: Collection[SubmissionId],
        forgotten: Sequence[SubmissionId],
    ) -> None:
        if frames:
            await connection.execute(insert(tables.frames), frames)
        if notes:
            await write_notes(connection, notes, new)
        if forgotten:
            await forget_notes(connection, forgotten)
        # Last: SQLite is locked for writing by now, and sees what is.
        await self.fence(connection)

    async def _unstorable(self, error: SQLAlchemyError | OSError) -> JournalError:
        """Return what to raise where waiting does not help, or has not helped. Raises `FencedError`."""
        if isinstance(error, IntegrityError):
            # A frame that is there already is another coordinator's.
            await self.check_epoch()
        return journal_error("write", error)

    async def _is_stored(self, last: int) -> bool:
        async with self._engine.begin() as connection:
            await self.fence(connection)
            found = (await connection.execute(select(func.max(tables.frames.c.seq)))).scalar_one_or_none() or 0
        if found not in (self._seq, last):
            raise JournalError(
                f"the journal ends at frame {found} where {self._seq} or {last} was expected: its database has lost "
                "what it had confirmed (is synchronous_commit off?); start again to go on from there."
            )
        return bool(found == last)


async def _epoch_in(connection: AsyncConnection) -> int | None:
    """Return the epoch, which stays until the transaction ends."""
    query = select(tables.meta.c.value).where(tables.meta.c.name == "epoch").with_for_update(read=True)
    return (await connection.execute(query)).scalar_one_or_none()


def _unwritable(why: str) -> str:
    return f"the journal cannot be written ({why})"
