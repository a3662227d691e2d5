"""Statements of SQLite take one trip to the driver's thread, and say what they said with SQLAlchemy's own adapter."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from infra.database import open_engine
from tests.support.patience import PATIENCE_S


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
