"""The cache's metadata in SQL, and opening it.

    paths      one row per published store path; immutable but for a repair of its lost object
    refs       which path refers to which, by serial; a path that refers to itself has a row that says so
    conflicts  claims that lost: other bits for a path that was published already (not reproducible)
    cache_schema  the version of all this

`serial` rises with publication, and a path is published after (or with, and then behind) all that it refers to: by
serial order *is* references first. Collecting garbage keeps that true, since it may delete a path only with all that
refer to it. What comes with it (roots, leases, tombstones, generations of objects) goes into tables and columns of its
own; `url` already names the object, so a generation can be part of it.

SQLite runs in WAL mode, so that readers never wait for the writer, with `synchronous=NORMAL`: a killed process loses
nothing, and losing power can lose the newest commits but not corrupt the file. Such a path is simply published again:
the journal's facts are the truth, this is a cache. A writer that finds the file locked waits BUSY_TIMEOUT_MS. The
statements are plain SQL as PostgreSQL has it too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from infra.cache.errors import CacheError, MetadataError, SchemaTooNewError

SCHEMA_VERSION = 1
BUSY_TIMEOUT_MS = 10_000
#: Connections kept for readers and the one writer.
POOL_SIZE = 4
#: How long a reader waits for one of them.
POOL_WAIT_S = 10.0
#: Values in one `IN (…)`; SQLite takes 32,766, PostgreSQL's drivers 32,767.
MAX_IN = 10_000

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
    # Unix seconds.
    sa.Column("published_at", sa.Float, nullable=False),
    sa.Index("paths_by_url", "url"),
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
    # The object of the losing bits; it stays until it is collected, for whoever wants to compare.
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("deriver", sa.Text, nullable=False),
    sa.Column("first_seen_at", sa.Float, nullable=False),
    sa.Column("times", sa.Integer, nullable=False),
)

schema_version = sa.Table("cache_schema", metadata, sa.Column("version", sa.Integer, nullable=False))


async def open_metadata(url: str) -> AsyncEngine:
    """Return an engine on the database `url` (`sqlite+aiosqlite:///FILE`), its tables made if there are none.

    Raises:
        SchemaTooNewError: a newer release wrote it; nothing was touched.
        MetadataError: it cannot be opened.
        CacheError: `cache_schema` is there but says nothing sensible.
    """
    engine = create_async_engine(url, pool_size=POOL_SIZE, max_overflow=0, pool_timeout=POOL_WAIT_S)
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _configure_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
    try:
        async with writing(engine) as connection:
            await connection.run_sync(_prepare)
        if engine.dialect.name == "sqlite":
            async with reading(engine) as connection:
                await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    except BaseException:
        await engine.dispose()
        raise
    return engine


@contextmanager
def database_errors() -> Iterator[None]:
    """Turn what the database raises into a MetadataError of one line."""
    try:
        yield
    except SQLAlchemyError as error:
        # Not the statement and its parameters, which SQLAlchemy would add.
        reason = str(getattr(error, "orig", None) or type(error).__name__).split("\n", 1)[0]
        raise MetadataError(f"the cache's database failed: {reason}") from error


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Give a connection to read with; each statement sees one state of the database."""
    with database_errors():
        async with engine.connect() as connection:
            yield connection


@asynccontextmanager
async def writing(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Give a writing transaction; it commits when left without an error.

    SQLite takes the write lock at its start, so that nothing read in it can be out of date when it writes.
    """
    with database_errors():
        async with engine.execution_options(drover_write=True).begin() as connection:
            yield connection


def _configure_sqlite(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    # The driver must not begin transactions by itself: readers need none, writers want theirs IMMEDIATE.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    if connection.get_execution_options().get("drover_write"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _prepare(connection: Connection) -> None:
    if not sa.inspect(connection).has_table(schema_version.name):
        metadata.create_all(connection)
        connection.execute(schema_version.insert().values(version=SCHEMA_VERSION))
        return
    found = connection.execute(sa.select(schema_version.c.version)).scalars().all()
    if len(found) != 1:
        raise CacheError("the cache's database has no schema version: it is damaged, or not a cache's")
    if found[0] > SCHEMA_VERSION:
        raise SchemaTooNewError(
            f"the cache's database has schema {found[0]}, this release knows {SCHEMA_VERSION}: "
            "start the newer release, or point the cache at another state directory"
        )
