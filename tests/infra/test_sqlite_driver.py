"""Statements of SQLite take one trip to the driver's thread, and say what they said with SQLAlchemy's own adapter."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from infra.database import open_engine
from infra.sqlite_driver import shrink_connections
from tests.support.patience import PATIENCE_S

#: Lies in pages of its own, which the C library gives back at once.
LARGE_BYTES = 128 * 1024 * 1024


def memory_bytes() -> int:
    """Return how much memory of its own this process has."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def _table(engine: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    try:
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE things (id INTEGER PRIMARY KEY, name TEXT UNIQUE)"))
        yield engine
    finally:
        await engine.dispose()


async def _story(engine: AsyncEngine) -> list[object]:
    """Everything that statements tell, in a fixed order."""
    told: list[object] = []
    async with _table(engine), engine.begin() as connection:
        inserted = await connection.execute(text("INSERT INTO things (name) VALUES ('a')"))
        told += [inserted.lastrowid, inserted.rowcount]
        many = await connection.execute(text("INSERT INTO things (name) VALUES (:n)"), [{"n": n} for n in "bcd"])
        told.append(many.rowcount)
        returned = await connection.execute(text("INSERT INTO things (name) VALUES ('e') RETURNING id, name"))
        told += [list(returned.keys()), returned.all()]
        changed = await connection.execute(text("UPDATE things SET name = name || '1' WHERE id > 3"))
        told.append(changed.rowcount)
        found = await connection.execute(text("SELECT * FROM things ORDER BY id"))
        told += [list(found.keys()), found.fetchone(), found.fetchmany(2), found.fetchmany(), found.all()]
        told.append((await connection.execute(text("SELECT 1 WHERE 0"))).first())
        for statement in ("INSERT INTO things (name) VALUES ('a')", "SELECT * FROM nothing"):
            with pytest.raises(DBAPIError) as caught:
                await connection.execute(text(statement))
            told += [type(caught.value), type(caught.value.orig), str(caught.value.orig)]
        streamed = await connection.stream(text("SELECT id FROM things ORDER BY id"))
        told.append([row[0] async for row in streamed])
    return told


async def test_rows_counts_and_errors_are_those_of_the_adapter(tmp_path: Path) -> None:
    theirs = await _story(create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'theirs'}"))
    ours = await _story(open_engine(f"sqlite+aiosqlite:///{tmp_path / 'ours'}"))
    assert ours == theirs
    assert IntegrityError in ours


async def test_a_statement_takes_one_trip_and_giving_an_idle_connection_back_none(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path / 'd'}")
    async with _table(engine):
        trips: list[object] = []
        async with engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            execute = driver._execute  # noqa: SLF001 - trips show nowhere else

            async def counting(*arguments: Any) -> Any:
                trips.append(arguments[0])
                return await execute(*arguments)

            driver._execute = counting  # noqa: SLF001 - as above
            await connection.execute(text("SELECT * FROM things"))
        assert len(trips) == 1
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO things (name) VALUES ('a')"))
        # The statement and the commit.
        assert len(trips) == 3
        async with engine.connect() as connection:
            await connection.execute(text("INSERT INTO things (name) VALUES ('b')"))
        # The statement, and the end of a transaction that was not committed.
        assert len(trips) == 5
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT name FROM things"))).scalars().all() == ["a"]


async def test_the_drivers_thread_keeps_neither_a_call_nor_what_it_returned(tmp_path: Path) -> None:
    class Rows:
        pass

    class Call:
        def __call__(self, _connection: sqlite3.Connection) -> Rows:
            return Rows()

    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path / 'd'}")
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        call = Call()
        rows = await driver.trip(call)
        kept = weakref.ref(call), weakref.ref(rows)
        del call, rows
        assert [each() for each in kept] == [None, None]
    await engine.dispose()


async def test_connections_shrink_amidst_a_transaction_and_closed_ones_are_passed_over(tmp_path: Path) -> None:
    engine, closed = (open_engine(f"sqlite+aiosqlite:///{tmp_path / name}") for name in "dc")
    statements: list[str] = []

    @event.listens_for(engine.sync_engine, "connect")
    def trace(connection: Any, _record: object) -> None:
        connection.driver_connection._conn.set_trace_callback(statements.append)  # noqa: SLF001 - as above

    async with closed.connect():
        pass
    await closed.dispose()
    async with _table(engine):
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO things (name) VALUES ('a')"))
            del statements[:]
            await shrink_connections()
            assert statements[-1] == "PRAGMA shrink_memory"
            await connection.execute(text("INSERT INTO things (name) VALUES ('b')"))
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT name FROM things"))).scalars().all() == ["a", "b"]


async def test_a_connection_that_shrinks_lets_go_of_the_parameters_of_its_statements(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path / 'd'}")
    async with engine.connect() as connection:
        query = text("SELECT length(:large)")
        assert (await connection.execute(query, {"large": "x" * LARGE_BYTES})).scalar_one() == LARGE_BYTES
        before = memory_bytes()
        await shrink_connections()
        assert before - memory_bytes() > LARGE_BYTES // 2
    await engine.dispose()


async def test_what_a_cancelled_caller_has_begun_is_not_left_open(tmp_path: Path) -> None:
    """The statement is held up in its thread until its caller has gone and given the connection back."""
    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path / 'd'}", busy_ms=10)
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> int:
        begun.set()
        go_on.wait(30)
        return 1

    @event.listens_for(engine.sync_engine, "connect")
    def teach(connection: Any, _record: object) -> None:
        connection.create_function("hold", 0, hold)

    async with _table(engine):

        async def insert() -> None:
            async with engine.connect() as connection:
                await connection.execute(text("INSERT INTO things (id, name) VALUES (hold(), 'a')"))

        task = asyncio.create_task(insert())
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        go_on.set()
        await asyncio.gather(task, return_exceptions=True)
        async with engine.begin() as connection:
            assert (await connection.execute(text("SELECT name FROM things"))).all() == []
            await connection.execute(text("INSERT INTO things (name) VALUES ('b')"))
    with sqlite3.connect(tmp_path / "d") as database:
        assert database.execute("SELECT name FROM things").fetchall() == [("b",)]
    database.close()


class _Noting(sqlite3.Connection):
    """A connection that notes its end."""

    is_closed = False

    def close(self) -> None:
        super().close()
        self.is_closed = True


async def test_an_opening_that_is_cancelled_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[_Noting] = []
    begun, go_on = threading.Event(), threading.Event()
    connect = sqlite3.connect

    def held_up(file: str, **options: Any) -> sqlite3.Connection:
        begun.set()
        go_on.wait(PATIENCE_S)
        opened.append(connect(file, factory=_Noting, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", held_up)
    before = set(threading.enumerate())
    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path / 'd'}")

    async def use() -> None:
        async with engine.connect():
            pass

    task = asyncio.create_task(use())
    while not begun.is_set():  # noqa: ASYNC110 - a thread's doing
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.wait((task,))
    go_on.set()
    while set(threading.enumerate()) - before:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.001)
    assert [each.is_closed for each in opened] == [True]
    await engine.dispose()
