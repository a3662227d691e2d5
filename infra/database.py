"""Databases through SQLAlchemy: one way to open SQLite and PostgreSQL, and to name what went wrong.

Both are first-class. SQLite runs in WAL mode: readers never wait for the writer, and what was committed survives the
death of the process. PostgreSQL may go away and come back (a restart, a failover), a disk that is full may get room:
`may_pass` distinguishes such errors from those that waiting does not heal, and `patiently` repeats what may be
repeated, for a bounded time.

A question about many names sends them as one JSON array that is joined in SQL (`names_table`), since both databases
limit the number of parameters of a statement.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from typing import Any, Final, TypeVar

import orjson
from sqlalchemy import BindParameter, Subquery, Text, bindparam, cast, event, func, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from infra.retry import Outage, retrying
from infra.sqlite_driver import sqlite_driver

#: How long a writer of SQLite waits for another one.
BUSY_TIMEOUT_MS: Final = 10_000
#: Page of SQLite unless another one is asked for: its own default.
PAGE_BYTES: Final = 4096
#: How long the loss of a database is suffered before giving up, in seconds.
PATIENCE_S: Final = 60.0

#: After how long PostgreSQL ends the session of a program that was paused inside a transaction, in milliseconds: what
#: it has locked would hold up the program that takes over from it.
IDLE_IN_TRANSACTION_MS: Final = 20_000

#: Settings of libpq: it notices a dead network within some 20 s instead of hours.
POSTGRES_CONNECT: Final = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
#: SQLSTATE classes and codes that pass: connection exceptions, deadlocks, no resources, shutdown, crash, starting up
#: (PostgreSQL manual, appendix A). 25006 is a server that has become a standby of another, 25P03 the end of a
#: transaction in which this program was paused (`IDLE_IN_TRANSACTION_MS`): nothing of it was written.
_PASSING: Final = ("08", "40", "53", "57P", "25006", "25P03")

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def open_engine(
    url: str, *, synchronous: str = "NORMAL", busy_ms: int = BUSY_TIMEOUT_MS, page_bytes: int = PAGE_BYTES
) -> AsyncEngine:
    """Return an engine for `sqlite+aiosqlite:///FILE` or `postgresql+psycopg://…`; connects to nothing yet.

    `synchronous` is SQLite's: NORMAL may lose the last commits when the power fails (never their order), FULL may not.
    `busy_ms` is how long one of its writers waits for another, `page_bytes` the page of a database that it makes: one
    that is there keeps its own.
    """
    if url.startswith("postgresql"):
        engine = create_async_engine(url, connect_args=POSTGRES_CONNECT, pool_pre_ping=False)
        event.listen(engine.sync_engine, "connect", _configure_postgresql)
        return engine
    engine = create_async_engine(url, module=sqlite_driver())

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        # Before the file has any content.
        pragmas = (
            f"busy_timeout={busy_ms}",
            f"page_size={page_bytes}",
            "journal_mode=WAL",
            f"synchronous={synchronous}",
        )
        for pragma in (*pragmas, "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine


def _configure_postgresql(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_MS}")
    cursor.close()
    connection.commit()


def may_pass(error: BaseException) -> bool:
    """True if the same may work later without a change here; the effect of the failed statement is then unknown."""
    if isinstance(error, IntegrityError):
        return False
    if isinstance(error, DBAPIError):
        cause = error.orig
        state = getattr(cause, "sqlstate", None)
        if state:
            return str(state).startswith(_PASSING)
        if _no_room(cause):
            return True
        # psycopg has no state where the server could not say anything; sqlite3 has none at all.
        module = type(cause).__module__.partition(".")[0]
        return error.connection_invalidated or (module == "psycopg" and type(cause).__name__ == "OperationalError")
    return isinstance(error, (OSError, TimeoutError, PoolTimeoutError))


def _no_room(cause: BaseException | None) -> bool:
    # The file that SQLite's processes share is made larger by writing too.
    full = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
    return getattr(cause, "sqlite_errorcode", None) in full


def reason(error: BaseException) -> str:
    """Return the database's message, in one line, without statement and parameters."""
    cause = getattr(error, "orig", None) or error
    if _no_room(cause):
        return "database or disk is full"
    return (str(cause).strip() or type(cause).__name__).split("\n", 1)[0].removesuffix(".")


async def patiently(call: Callable[[], Awaitable[_Result]], subject: str) -> _Result:
    """Return what `call` gives, repeating it while that may pass, at most `PATIENCE_S`.

    Only for what may be done twice. Raises what `call` raised last.
    """

    def trouble_of(error: Exception) -> str:
        passes = isinstance(error, (SQLAlchemyError, OSError)) and may_pass(error)
        return f"the database fails while {subject}: {reason(error)}" if passes else ""

    return await retrying(call, PATIENCE_S, Outage(_log, "trying again", over="the database answers again"), trouble_of)


def names_table(engine: AsyncEngine | AsyncConnection) -> Subquery:
    """Return a table of one column `value`: the names in the JSON array that the parameter `names` will be."""
    return names_table_of(engine.dialect.name)


@cache
def names_table_of(dialect: str) -> Subquery:
    """Return the table of `names_table` for a kind of database, by the name of SQLAlchemy's dialect."""
    names: BindParameter[str] = bindparam("names", type_=Text)
    if dialect == "postgresql":
        rows = func.jsonb_array_elements_text(cast(names, JSONB)).table_valued("value")
    else:
        rows = func.json_each(names).table_valued("value")
    return select(rows.c.value).subquery("wanted")


def names_parameter(names: Iterable[str]) -> str:
    """Return what to give for the parameter `names` of `names_table`."""
    return orjson.dumps(list(names)).decode()


def insert_or_ignore(engine: AsyncEngine | AsyncConnection, table: str, columns: str) -> str:
    """Return the driver's own statement that inserts rows given as tuples and passes over those that are there.

    For `exec_driver_sql`: with many rows the statement layer costs as much as the database.
    """
    mark = "?" if engine.dialect.name == "sqlite" else "%s"
    marks = ", ".join(mark for _ in columns.split(","))
    return f"INSERT INTO {table} ({columns}) VALUES ({marks}) ON CONFLICT DO NOTHING"  # noqa: S608 - constants only
