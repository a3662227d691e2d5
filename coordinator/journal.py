"""The journal: durable facts in SQL, appended in one commit per batch, read back in order.

Rules:
1. Facts are stored before anything acts on them. `append` returns after the commit and raises if there was none.
2. A row ("frame") holds the facts of one batch, at most `FRAME_FACTS`; `seq` has no gaps; a CRC guards each body.
3. What cannot be understood stops the start with one sentence; nothing is skipped, repaired or overwritten.
4. `notes` (what people called a submission) go into the same commit as the submission's facts.

SQLite runs in WAL mode with `synchronous=NORMAL`: a commit survives the death of the process at any moment, because it
lies in the operating system by then; a power cut may lose the last moments, never the order or the consistency. That is
the right trade: publishing is idempotent, workers keep reports until acknowledged, and a full sync for each batch costs
more than all other work of the coordinator together.

Snapshots come later: they will be frames of another table that `load` starts from.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from sqlalchemy import Column, Integer, LargeBinary, MetaData, String, Table, event, insert, inspect, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from coordinator.codec import FACTS_VERSION, CodecError, decode_facts, encode_facts
from coordinator.errors import CoordinatorError
from scheduler.facts import Fact
from scheduler.model import SubmissionId

#: Facts in one frame; a larger batch becomes several frames of one commit.
FRAME_FACTS = 4096
#: Frames read from the database at one time.
_READ_FRAMES = 64

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
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("facts", Integer, nullable=False),
    Column("crc", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
)
_notes = Table(
    "journal_notes",
    _metadata,
    Column("submission", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)


class JournalError(CoordinatorError):
    """The journal cannot be read or written; the coordinator must not go on."""

    code: ClassVar[str] = "journal"


class StateDirBusyError(CoordinatorError):
    """Another coordinator owns the state directory."""

    code: ClassVar[str] = "state_dir_busy"


class StateLock:
    """The right to use a state directory, held by one process at a time and given back by its death."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "lock"
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Take the lock. Raises `StateDirBusyError` that names the holder's process id."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(f"cannot use the state directory {self._path.parent}: {error.strerror}.") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise StateDirBusyError(
                f"{self._path.parent} is in use by another drover (process {holder}); "
                "stop that one or choose another --state-dir."
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back. The file stays: removing it would let two holders lock two files of one name."""
        os.close(self._descriptor)


def database_engine(url: str) -> AsyncEngine:
    """Return an engine for `url`; SQLite gets WAL, `synchronous=NORMAL`, foreign keys and a busy time of 10 s."""
    engine = create_async_engine(url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine.sync_engine, "connect")
        def configure(connection: Any, _record: object) -> None:
            cursor = connection.cursor()
            for pragma in ("busy_timeout=10000", "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

    return engine


class Journal:
    """One journal in one database. Not safe for two writers: the state lock, later the epoch, sees to that."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._seq = 0

    async def prepare(self) -> None:
        """Create the tables, or check that those there are of this version. Raises `JournalError`."""
        with _translated("open"):
            async with self._engine.connect() as connection:
                version = await connection.run_sync(_read_version)
            if version is not None and version != FACTS_VERSION:
                raise JournalError(
                    f"the journal was written by another version of drover (format {version}, this one reads "
                    f"{FACTS_VERSION}); start the newer version. Nothing was changed."
                )
            if version is None:
                async with self._engine.begin() as connection:
                    await connection.run_sync(_metadata.create_all)
                    await connection.execute(insert(_meta).values(name="facts_version", value=FACTS_VERSION))

    async def load(self) -> AsyncIterator[tuple[Fact, ...]]:
        """Yield all facts in order, one frame at a time. Must be read to its end before the first `append`.

        Raises `JournalError` where a frame is missing, torn or not understood.
        """
        while True:
            query = select(_frames).where(_frames.c.seq > self._seq).order_by(_frames.c.seq).limit(_READ_FRAMES)
            with _translated("read"):
                async with self._engine.connect() as connection:
                    rows = (await connection.execute(query)).all()
            for row in rows:
                yield self._frame(row.seq, row.facts, row.crc, row.body)
            if len(rows) < _READ_FRAMES:
                return

    def _frame(self, seq: int, count: int, crc: int, body: bytes) -> tuple[Fact, ...]:
        where = f"the journal is damaged at frame {seq}"
        if seq != self._seq + 1:
            raise JournalError(f"{where}: frame {self._seq + 1} is missing; restore the database from a backup.")
        if zlib.crc32(body) != crc:
            raise JournalError(f"{where}: its checksum does not match; restore the database from a backup.")
        try:
            facts = decode_facts(body)
        except CodecError as error:
            raise JournalError(f"{where}: {error}") from None
        if len(facts) != count:
            raise JournalError(f"{where}: it holds {len(facts)} facts instead of {count}.")
        self._seq = seq
        return facts

    async def notes(self) -> Mapping[SubmissionId, bytes]:
        """Return what was noted for each submission."""
        with _translated("read"):
            async with self._engine.connect() as connection:
                rows = (await connection.execute(select(_notes))).all()
        return {SubmissionId(row.submission): row.body for row in rows}

    async def append(self, facts: Sequence[Fact], notes: Mapping[SubmissionId, bytes] | None = None) -> None:
        """Store durable `facts` and `notes` in one commit; returns when they are safe. Raises `JournalError`.

        After an error the caller must stop: whether the commit took place is not known.
        """
        frames = []
        for start in range(0, len(facts), FRAME_FACTS):
            part = facts[start : start + FRAME_FACTS]
            body = encode_facts(part)
            self._seq += 1
            frames.append({"seq": self._seq, "facts": len(part), "crc": zlib.crc32(body), "body": body})
        with _translated("write"):
            async with self._engine.begin() as connection:
                if frames:
                    await connection.execute(insert(_frames), frames)
                if notes:
                    rows = [{"submission": name, "body": body} for name, body in notes.items()]
                    await connection.execute(insert(_notes), rows)


def _read_version(connection: Connection) -> int | None:
    if not inspect(connection).has_table(_meta.name):
        return None
    value = connection.execute(select(_meta.c.value).where(_meta.c.name == "facts_version")).scalar_one_or_none()
    if value is None:
        raise JournalError("the journal does not say its version; restore the database from a backup.")
    return int(value)


@contextlib.contextmanager
def _translated(verb: str) -> Iterator[None]:
    """Turn database errors into one sentence without statement and parameters."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or type(error).__name__
        raise JournalError(f"cannot {verb} the journal: {cause}; the farm stops so that nothing is lost.") from None
    except OSError as error:
        raise JournalError(f"cannot {verb} the journal: {error.strerror}; the farm stops.") from None
