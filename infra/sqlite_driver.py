"""SQLite's driver under SQLAlchemy, with one trip to its thread for each statement.

`aiosqlite` does every call in a thread of its own, and each trip there and back takes the event loop two rounds.
SQLAlchemy's adapter makes a cursor, executes, fetches all rows and closes the cursor: four trips. A build's report
waits for some forty statements on its way to the next lease, so those trips were a third of what the farm adds to a
build. Here one trip does all four, and returning a connection that is in no transaction takes none.

What a caller sees is as before: rows are fetched whole, errors are those of `sqlite3`, and a statement whose caller is
cancelled goes on in its thread, before whatever is sent to the connection after it. Only `stream` uses the adapter's
own cursor.
"""

from __future__ import annotations

import asyncio
import sqlite3
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, Final, TypeVar

import aiosqlite
from sqlalchemy.dialects.sqlite.aiosqlite import (
    AsyncAdapt_aiosqlite_connection,
    AsyncAdapt_aiosqlite_cursor,
    AsyncAdapt_aiosqlite_dbapi,
)
from sqlalchemy.exc import DBAPIError, MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool, PoolProxiedConnection
from sqlalchemy.util.concurrency import await_only, greenlet_spawn

_T = TypeVar("_T")
#: Rows that `aiosqlite` reads together where rows are streamed: its own default.
_STREAMED_ROWS: Final = 64
#: Prepared statements that a connection of `sqlite3` keeps: its own default.
CACHED_STATEMENTS: Final = 128


class _Trips(aiosqlite.Connection):
    """The driver's connection, which can do anything in its thread in one trip."""

    #: A trip whose caller did not wait for its end may still be under way.
    unsure: bool = False

    def __init__(self, connector: Callable[[], sqlite3.Connection]) -> None:
        #: Of the thread alone.
        self._opened: sqlite3.Connection | None = None

        def opening() -> sqlite3.Connection:
            self._opened = connector()
            return self._opened

        super().__init__(opening, _STREAMED_ROWS)

    def stop(self) -> asyncio.Future[Any] | None:
        """End the thread, which closes first what it has opened: a caller that was cancelled meanwhile never got it."""
        self._tx.put_nowait((None, self._close_opened))
        return super().stop()

    def _close_opened(self) -> None:
        if self._opened is not None:
            self._opened.close()

    async def trip(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do work in the thread, after all that was sent there before; what it raises is raised here."""
        before, self.unsure = self.unsure, True
        # The thread holds the last call and what it returned until the next one, which may be the rows of a large
        # submission for hours: here both are emptied.
        given, results = [work], list[_T]()
        try:
            execute: Any = self._execute
            await execute(lambda: results.append(given.pop()(self._conn)))
        except Exception:
            self.unsure = before
            raise
        self.unsure = before
        return results.pop()

    async def shrink(self) -> None:
        """Have SQLite give back what it keeps for speed; what else is under way is not disturbed."""

        def work() -> None:
            # Prepared statements are kept with their last parameters, which may be lists of 100,000 paths: these take
            # their places.
            for number in range(CACHED_STATEMENTS):
                self._conn.execute(f"SELECT {number}").close()
            self._conn.execute("PRAGMA shrink_memory").close()

        execute: Any = self._execute
        await execute(work)


class _SqliteCursor(AsyncAdapt_aiosqlite_cursor):
    """A cursor whose statement is executed and fetched in one trip."""

    __slots__ = ("_description", "_last_row", "_row_count")

    def __init__(self, connection: _SqliteConnection) -> None:
        self._adapt_connection = connection
        self._connection = connection._connection  # noqa: SLF001 - the adapter's own parts are one program
        self._rows = deque()
        self._description: Any = None
        self._row_count = -1
        self._last_row: int | None = None

    @property
    def description(self) -> Any:
        """See PEP 249, as all others."""
        return self._description

    @property
    def rowcount(self) -> int:
        """Rows that the statement changed, -1 where it changes none."""
        return self._row_count

    @property
    def lastrowid(self) -> Any:
        """Number of the row that was inserted last."""
        return self._last_row

    async def _async_soft_close(self) -> None:
        """Do nothing: the statement's own cursor is closed already."""

    def fetchmany(self, size: int | None = None) -> Any:
        """Take some rows, one where no number is named."""
        return super().fetchmany(size or 1)

    def close(self) -> None:
        """Drop the rows that were not taken."""
        self._rows.clear()

    async def _execute_async(self, operation: Any, parameters: Any) -> None:
        given = () if parameters is None else (parameters,)
        await self._run(lambda cursor: cursor.execute(operation, *given))

    async def _executemany_async(self, operation: Any, seq_of_parameters: Any) -> None:
        await self._run(lambda cursor: cursor.executemany(operation, seq_of_parameters))

    async def _run(self, begin: Callable[[sqlite3.Cursor], object]) -> None:
        def work(connection: sqlite3.Connection) -> tuple[list[Any], Any, int, int | None]:
            with closing(connection.cursor()) as cursor:
                begin(cursor)
                rows = cursor.fetchall() if cursor.description else []
                return rows, cursor.description, cursor.rowcount, cursor.lastrowid

        async with self._adapt_connection._execute_mutex:  # noqa: SLF001 - as above
            rows, self._description, self._row_count, self._last_row = await _trips(self._connection).trip(work)
            self._rows = deque(rows)


class _SqliteConnection(AsyncAdapt_aiosqlite_connection):
    """The adapter's connection with such cursors."""

    __slots__ = ()

    _cursor_cls: Any = _SqliteCursor

    def rollback(self) -> None:
        """Roll back; no trip where no transaction can be open."""
        driver = _trips(self._connection)
        if driver.unsure or driver.in_transaction:
            super().rollback()
            # It ends after all that was sent before it.
            driver.unsure = False


class _SqliteModule(AsyncAdapt_aiosqlite_dbapi):
    """Stand-in for the driver's module in the eyes of SQLAlchemy."""

    def connect(self, database: str, **options: Any) -> _SqliteConnection:
        """Open a file."""
        driver = _Trips(lambda: sqlite3.connect(database, **options))
        # A program must not wait for a connection that it left open.
        driver._thread.daemon = True  # noqa: SLF001 - no public switch; the adapter sets it so too
        _drivers.add(driver)
        return _SqliteConnection(self, await_only(_opened(driver)))


#: Those of this process that are open, and some that were.
_drivers: weakref.WeakSet[_Trips] = weakref.WeakSet()


async def shrink_connections() -> None:
    """Have all connections to SQLite give back what they keep for speed: 40 MB after a submission of 100,000 steps."""
    for driver in list(_drivers):
        # It may be closed, or its statement fails, of which its user learns anyway.
        with suppress(ValueError, sqlite3.Error):
            await driver.shrink()


async def _opened(driver: _Trips) -> Any:
    return await driver


def _trips(connection: Any) -> _Trips:
    found: _Trips = connection
    return found


async def in_one_trip(engine: AsyncEngine, work: Callable[[sqlite3.Connection], _T]) -> _T:
    """Do work with one of the pool's connections in its thread, in one trip; a transaction that it leaves is undone.

    The connection comes from the pool itself: SQLAlchemy's own around it costs twice as much as the trip.

    Raises:
        DBAPIError: SQLite failed, as for statements of SQLAlchemy.
    """

    def whole(sqlite: sqlite3.Connection) -> _T:
        try:
            return work(sqlite)
        finally:
            if sqlite.in_transaction:
                sqlite.rollback()

    with _wrapped_errors():
        pooled = await _checked_out(engine.sync_engine.pool)
        driver = _trips(pooled.driver_connection)
        try:
            result = await driver.trip(whole)
        except BaseException:
            # What is cancelled again has to give it back too: the trip may be under way.
            await asyncio.shield(asyncio.create_task(greenlet_spawn(pooled.close)))
            raise
        # Its thread has ended all that it was sent, and left no transaction: giving it back waits for nothing.
        pooled.close()
    return result


async def _checked_out(pool: Pool) -> PoolProxiedConnection:
    try:
        return pool.connect()
    except MissingGreenlet:
        # None is idle: one has to be opened, or waited for.
        return await greenlet_spawn(pool.connect)


@contextmanager
def _wrapped_errors() -> Iterator[None]:
    """Raise errors of SQLite as SQLAlchemy does for its own calls; the parameters are no part of what people read."""
    try:
        yield
    except sqlite3.Error as error:
        raise DBAPIError.instance("", None, error, sqlite3.Error) from error


def sqlite_driver() -> _SqliteModule:
    """Return what `create_async_engine` takes as `module` for `sqlite+aiosqlite:///FILE`."""
    return _SqliteModule(aiosqlite, sqlite3)
