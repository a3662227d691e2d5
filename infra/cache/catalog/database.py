"""The cache's metadata in SQL, and opening it.

    paths         one row per published store path; its bits never change, its object may be repaired
    refs          which path refers to which, by serial; a path that refers to itself has a row that says so
    conflicts     claims that lost: other bits for a path that was published already (not reproducible)
    realisations  what Nix asks for content-addressed outputs, rendered and signed, in both layouts
    roots         what keeps paths: pins, submissions, pushes, leases; `expires_at` null is without end
    root_paths    which paths each root names, by hash part: also paths that are not published (yet)
    deletions     objects that are being deleted (`done_at` null), and for a day those that were
    reign         one row: which coordinator may write (`FencingToken`)
    recorded      narinfos of paths that an upstream has and this cache has not (`pulls.recorded_paths`)

`serial` rises with publication, and a path is published after (or with, and then behind) all that it refers to: by
serial order *is* references first. Collecting garbage keeps that true, since it deletes a path only with all that
refer to it. The schema is made and changed by migrations (`migrate`, `migrations`). Times are Unix seconds.

A writing transaction is exclusive among the writers of one cache, so what is decided inside is decided on the present:
SQLite takes its one write lock at the start (`BEGIN IMMEDIATE`), PostgreSQL an advisory lock for the transaction.
A writer waits LOCK_TIMEOUT_S for it, and PostgreSQL ends the session of one that is paused in the middle of it.
On PostgreSQL a cache may have a schema of its own, the first of the `search_path` that its address names
(`options=-csearch_path%3DNAME`); it is made if there is none.

SQLite runs in WAL mode, so that readers never wait for the writer, with `synchronous=NORMAL`: a killed process loses
nothing, and losing power can lose the newest commits but not corrupt the file. Such a path is simply published again:
the journal's facts are the truth, this is a cache.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from infra.cache.catalog.migrate import migrate, refuse_newer
from infra.cache.errors import CacheFencedError, MetadataBusyError, MetadataError
from infra.database import IDLE_IN_TRANSACTION_MS, PATIENCE_S, POSTGRES_CONNECT, may_pass, reason
from infra.database_work import Ask, Prepared, Work, awaited, in_thread
from infra.retry import Outage, retrying
from infra.sqlite_driver import in_one_trip, sqlite_driver

_T = TypeVar("_T")

#: How long a writer waits for the other writers of its cache.
LOCK_TIMEOUT_S = 10
#: Connections kept for readers and the one writer.
POOL_SIZE = 4
#: How long a reader waits for one of them.
POOL_WAIT_S = 10.0
#: Values in one `IN (…)`. SQLite and PostgreSQL take over 32,000; rendering holds the event loop for some 5 µs each.
MAX_IN = 2_000

_log = logging.getLogger(__name__)

metadata = sa.MetaData()

#: SQLite numbers rows by itself only in a column of exactly the type INTEGER.
_Serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

paths = sa.Table(
    "paths",
    metadata,
    sa.Column("serial", _Serial, primary_key=True, autoincrement=True),
    sa.Column("hash_part", sa.String(32), nullable=False, unique=True),
    sa.Column("store_path", sa.Text, nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("compression", sa.Text, nullable=False),
    sa.Column("file_hash", sa.String(59), nullable=False),
    sa.Column("file_size", sa.BigInteger, nullable=False),
    sa.Column("nar_hash", sa.String(59), nullable=False),
    sa.Column("nar_size", sa.BigInteger, nullable=False),
    sa.Column("deriver", sa.Text, nullable=False),
    sa.Column("ca", sa.Text, nullable=False),
    # Rendered and signed when published: an answer is this text.
    sa.Column("narinfo", sa.LargeBinary, nullable=False),
    sa.Column("published_at", sa.Double, nullable=False),
    # Of the narinfo, to within `roots.TOUCH_RESOLUTION_S`.
    sa.Column("last_used_at", sa.Double, nullable=False, server_default="0"),
    # Not null: nothing keeps it, it counts as absent, and all that refers to it is tombstoned too.
    sa.Column("tombstoned_at", sa.Double),
    sa.Index("paths_by_url", "url", "serial"),
    # By content (`contents`): what a fixed output wants may be here under another name.
    sa.Index("paths_by_ca", "ca", sqlite_where=sa.text("ca <> ''"), postgresql_where=sa.text("ca <> ''")),
    sa.Index("paths_by_nar_hash", "nar_hash"),
    sqlite_autoincrement=True,
)

refs = sa.Table(
    "refs",
    metadata,
    sa.Column("referrer", _Serial, sa.ForeignKey("paths.serial"), primary_key=True, autoincrement=False),
    sa.Column("reference", _Serial, sa.ForeignKey("paths.serial"), primary_key=True, autoincrement=False),
    sa.Index("refs_by_reference", "reference"),
)

conflicts = sa.Table(
    "conflicts",
    metadata,
    sa.Column("serial", _Serial, sa.ForeignKey("paths.serial"), primary_key=True, autoincrement=False),
    sa.Column("nar_hash", sa.String(59), primary_key=True),
    sa.Column("nar_size", sa.BigInteger, nullable=False),
    # The object of the losing bits; it stays as long as the path, so that a person can compare.
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("file_size", sa.BigInteger, nullable=False),
    sa.Column("deriver", sa.Text, nullable=False),
    sa.Column("first_seen_at", sa.Double, nullable=False),
    sa.Column("times", sa.Integer, nullable=False),
    sa.Index("conflicts_by_url", "url", "serial"),
)

realisations = sa.Table(
    "realisations",
    metadata,
    # The first part of its address: `realisations` (Nix 2.4 to 2.34) or `build-trace-v2` (from 2.35).
    sa.Column("layout", sa.String(16), primary_key=True),
    # `sha256:<hex>!<output>` or `<derivation's base name>/<output>`.
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("out_path", sa.Text, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("published_at", sa.Double, nullable=False),
    sa.Index("realisations_by_path", "out_path"),
)

roots = sa.Table(
    "roots",
    metadata,
    sa.Column("id", _Serial, primary_key=True, autoincrement=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    # When a request to keep it last came.
    sa.Column("kept_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.UniqueConstraint("kind", "name"),
    sa.Index("roots_by_expiry", "expires_at"),
    sqlite_autoincrement=True,
)

root_paths = sa.Table(
    "root_paths",
    metadata,
    sa.Column("root", _Serial, sa.ForeignKey("roots.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    sa.Column("hash_part", sa.String(32), primary_key=True),
    sa.Index("root_paths_by_hash_part", "hash_part", "root"),
)

deletions = sa.Table(
    "deletions",
    metadata,
    # Never given twice: it distinguishes a deletion from an earlier one of the same key.
    sa.Column("serial", _Serial, primary_key=True, autoincrement=True),
    sa.Column("url", sa.Text, nullable=False, unique=True),
    # 0 where it is not known.
    sa.Column("file_size", sa.BigInteger, nullable=False),
    sa.Column("done_at", sa.Double),
    sa.Index("deletions_by_end", "done_at"),
    sqlite_autoincrement=True,
)

recorded = sa.Table(
    "recorded",
    metadata,
    sa.Column("hash_part", sa.String(32), primary_key=True),
    sa.Column("store_path", sa.Text, nullable=False),
    # Address of the upstream, whose narinfo it is, with its signatures.
    sa.Column("upstream", sa.Text, nullable=False),
    sa.Column("narinfo", sa.LargeBinary, nullable=False),
    sa.Column("recorded_at", sa.Double, nullable=False),
    sa.Index("recorded_by_time", "recorded_at"),
)

fencing = sa.Table(
    "reign",
    metadata,
    sa.Column("journal", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
)
#: What every writer asks first.
_TOKEN = sa.select(fencing)
_PREPARED_TOKEN = Prepared(lambda _: _TOKEN)
_FENCED = "another coordinator has taken over the cache; nothing was written"


@dataclass(frozen=True, slots=True)
class FencingToken:
    """Right to write: the `epoch` of the journal with the random number `journal`.

    A later epoch of the same journal fences out an earlier one. A cache that is given to another journal has no
    memory of the one before.
    """

    journal: int
    epoch: int


@dataclass(slots=True)
class Database:
    """An open database of metadata: what `reading` and `writing` take."""

    engine: AsyncEngine
    #: Writers of this process wait here, in turn: waiting for the database's own lock is not fair.
    turn: asyncio.Lock
    #: How long a server that is away is waited for, in seconds, where nothing was done yet.
    patience_s: float = 0.0
    #: Whether nothing can be read or written at the moment.
    outage: Outage = field(
        default_factory=lambda: Outage(_log, "what needs it waits", over="the cache's database is back")
    )
    #: Under which every transaction writes; None: no writer is fenced out.
    fence: FencingToken | None = None

    async def close(self) -> None:
        """Close all connections."""
        await self.engine.dispose()


def not_expired(now: float) -> sa.ColumnElement[bool]:
    """Return the condition on `roots` that a root keeps what it names at `now`."""
    return roots.c.expires_at.is_(None) | (roots.c.expires_at > now)


async def open_metadata(url: str, fence: FencingToken | None = None) -> Database:
    """Return a database whose schema is this release's, made or migrated if need be.

    Args:
        url: `sqlite+aiosqlite:///FILE` or `postgresql+psycopg://USER:PASSWORD@HOST/DATABASE`.
        fence: its epoch begins here; from now on earlier ones write nothing.

    Raises:
        CacheFencedError: a later epoch has begun.
        SchemaTooNewError: a newer release wrote it; nothing was touched.
        MetadataBusyError: another process kept it locked.
        MetadataError: it cannot be opened.
    """
    with database_errors():
        database = Database(_engine(url), asyncio.Lock(), fence=fence)
    try:
        async with reading(database) as connection:
            await connection.run_sync(refuse_newer)
            if connection.dialect.name == "sqlite":
                await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            else:
                await _make_schema(connection)
        async with _transaction(database) as connection:
            await connection.run_sync(migrate)
            if fence is not None:
                await _begin_epoch(connection, fence)
    except BaseException:
        await database.close()
        raise
    database.patience_s = PATIENCE_S
    return database


@contextmanager
def database_errors() -> Iterator[None]:
    """Turn what the database raises into a MetadataError of one line."""
    try:
        yield
    except PoolTimeoutError as error:
        raise MetadataBusyError(
            f"the cache's database is busy: all {POOL_SIZE} connections were in use for {POOL_WAIT_S:.0f} s; try again"
        ) from error
    except SQLAlchemyError as error:
        text = reason(error)
        if "database is locked" in text or "lock timeout" in text:
            raise MetadataBusyError(
                f"the cache's database is busy: another writer held its lock for {LOCK_TIMEOUT_S} s; try again"
            ) from error
        raise MetadataError(f"the cache's database failed: {text}") from error


@asynccontextmanager
async def reading(database: Database) -> AsyncIterator[AsyncConnection]:
    """Give a connection to read with; each statement sees one state of the database."""
    engine = database.engine
    if engine.dialect.name == "postgresql":
        # Spares two round trips. (SQLite's connections are in this state anyway, see `_configure_sqlite`.)
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    with database_errors():
        async with AsyncExitStack() as stack:
            yield await _enter(stack, database, engine.connect)


@asynccontextmanager
async def writing(database: Database) -> AsyncIterator[AsyncConnection]:
    """Give a writing transaction, exclusive among the cache's writers; it commits when left without an error.

    Raises `CacheFencedError` where a later epoch than the database's has begun.
    """
    async with _transaction(database) as connection:
        if database.fence is not None and await _current_token(connection) != database.fence:
            raise CacheFencedError(_FENCED)
        yield connection


async def read_by(database: Database, work: Callable[[], Work[_T]], *, small: bool) -> _T:
    """Return what work that only reads gives; where it is `small`, in one trip to SQLite's thread."""
    if not small or database.engine.dialect.name != "sqlite":
        async with reading(database) as connection:
            return await awaited(connection, work())

    def attempt() -> Awaitable[_T]:
        return in_one_trip(database.engine, lambda sqlite: in_thread(sqlite, work()))

    with database_errors():
        return await _patiently(database, attempt, lambda: True)


async def write_by(database: Database, work: Callable[[], Work[_T]], *, small: bool) -> _T:
    """Return what work gives in a transaction as that of `writing`; where it is `small`, in one trip.

    A caller that is cancelled meanwhile does not know whether it took place. Raises as `writing`.
    """
    if not small or database.engine.dialect.name != "sqlite":
        async with writing(database) as connection:
            return await awaited(connection, work())
    begun = False

    def transaction(sqlite: sqlite3.Connection) -> _T:
        nonlocal begun
        sqlite.execute("BEGIN IMMEDIATE")
        begun = True
        result = in_thread(sqlite, _fenced(database.fence, work()))
        sqlite.commit()
        return result

    with database_errors():
        async with database.turn:
            # What breaks later is not repeated, as in `writing`.
            return await _patiently(database, lambda: in_one_trip(database.engine, transaction), lambda: not begun)


def _fenced(fence: FencingToken | None, work: Work[_T]) -> Work[_T]:
    if fence is not None and (yield Ask(_PREPARED_TOKEN)) != [(fence.journal, fence.epoch)]:
        raise CacheFencedError(_FENCED)
    return (yield from work)


@asynccontextmanager
async def _transaction(database: Database) -> AsyncIterator[AsyncConnection]:
    engine = database.engine.execution_options(drover_write=True)
    with database_errors():
        async with database.turn, AsyncExitStack() as stack:
            connection = await _enter(stack, database, engine.begin)
            if connection.dialect.name == "postgresql":
                await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock_key("write"))))
            yield connection


async def _enter(
    stack: AsyncExitStack,
    database: Database,
    connecting: Callable[[], AbstractAsyncContextManager[AsyncConnection]],
) -> AsyncConnection:
    """Connect, waiting for a server that is away. What breaks later is not repeated: the caller knows what it did."""

    async def connect() -> AsyncConnection:
        return await stack.enter_async_context(connecting())

    return await _patiently(database, connect, lambda: True)


async def _patiently(database: Database, call: Callable[[], Awaitable[_T]], repeatable: Callable[[], bool]) -> _T:
    """Return what a call gives, waiting for a server that is away as long as the call may be repeated."""

    def trouble_of(error: Exception) -> str:
        passes = isinstance(error, SQLAlchemyError) and may_pass(error) and not isinstance(error, PoolTimeoutError)
        wait = passes and database.patience_s and repeatable()
        return f"a cache's database is away ({reason(error)})" if wait else ""

    return await retrying(call, database.patience_s, database.outage, trouble_of)


async def _current_token(connection: AsyncConnection) -> FencingToken | None:
    row = (await connection.execute(_TOKEN)).one_or_none()
    return None if row is None else FencingToken(row.journal, row.epoch)


async def _begin_epoch(connection: AsyncConnection, new: FencingToken) -> None:
    now = await _current_token(connection)
    if now is not None and now.journal == new.journal and now.epoch > new.epoch:
        raise CacheFencedError("another coordinator has taken over the cache; nothing was written")
    await connection.execute(fencing.delete())
    await connection.execute(fencing.insert().values(journal=new.journal, epoch=new.epoch))


def lock_key(purpose: str) -> sa.ColumnElement[int]:
    """Return the key of an advisory lock of this cache's schema (PostgreSQL), for one purpose."""
    return sa.func.hashtextextended(f"drover cache {purpose} " + sa.func.current_schema(), 0)


def chunked(values: Sequence[_T], size: int = MAX_IN) -> Iterable[Sequence[_T]]:
    """Cut `values` into parts that one statement takes."""
    return (values[start : start + size] for start in range(0, len(values), size))


def _engine(url: str) -> AsyncEngine:
    sized = {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": POOL_WAIT_S}
    driver = sa.make_url(url).drivername
    if driver not in {"sqlite+aiosqlite", "postgresql+psycopg"}:
        raise MetadataError(
            f"a cache's database is sqlite+aiosqlite:///FILE or postgresql+psycopg://HOST/NAME, not {driver}://…"
        )
    if driver == "sqlite+aiosqlite":
        engine = create_async_engine(url, **sized, module=sqlite_driver())
        event.listen(engine.sync_engine, "connect", _configure_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine
    # Asked before use whether it lives: a server that was restarted costs a reconnection, not an error.
    engine = create_async_engine(url, **sized, pool_pre_ping=True, connect_args=POSTGRES_CONNECT)
    event.listen(engine.sync_engine, "connect", _configure_postgresql)
    return engine


def _configure_sqlite(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    # The driver must not begin transactions by itself: readers need none, writers want theirs IMMEDIATE.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={LOCK_TIMEOUT_S * 1000}", "synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    if connection.get_execution_options().get("drover_write"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _configure_postgresql(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
    cursor.execute(f"SET idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_MS}")
    cursor.close()
    connection.commit()


async def _make_schema(connection: AsyncConnection) -> None:
    """Make the schema that the connection's `search_path` names first, if there is none of it."""
    if (await connection.execute(sa.select(sa.func.current_schema()))).scalar_one() is None:
        search_path = (await connection.exec_driver_sql("SHOW search_path")).scalar_one()
        name = str(search_path).split(",")[0].strip().strip('"')
        await connection.execute(sa.schema.CreateSchema(name, if_not_exists=True))
