"""Transactions in one trip to SQLite's thread: all or nothing, fenced, and the same as statement by statement."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from infra.cache.catalog.database import POOL_SIZE, FencingToken, open_metadata, read_by, reading, refs, write_by
from infra.cache.errors import CacheFencedError, MetadataError
from infra.cache.publishing.publisher import _INSERT_PATHS, _INSERT_REFS, _PATH_COLUMNS
from infra.database_work import Apart, Ask, Work

#: Only ends a test that hangs.
PATIENCE_S = 30.0


def _row(letter: str) -> dict[str, object]:
    texts = dict.fromkeys(_PATH_COLUMNS, "text")
    return {**texts, "hash_part": letter * 32, "file_size": 1, "nar_size": 1, "narinfo": b"\0n", "published_at": 1.5}


def _inserting(letters: str) -> Work[list[int]]:
    serials = [serial for (serial,) in (yield Ask(_INSERT_PATHS, [_row(letter) for letter in letters]))]
    yield Ask(_INSERT_REFS, [{"referrer": serials[-1], "reference": serial} for serial in serials])
    same: list[int] = yield Apart(1, lambda: serials)
    return same


def _looking() -> Work[list[Any]]:
    return [tuple(row) for row in (yield Ask(sa.select(refs).order_by(refs.c.reference)))]


@pytest.mark.parametrize("small", [True, False])
async def test_work_does_the_same_in_one_trip_and_statement_by_statement(database_url: str, small: bool) -> None:
    database = await open_metadata(database_url, FencingToken(7, 1))
    try:
        first, second = await write_by(database, lambda: _inserting("ab"), small=small)
        assert await read_by(database, _looking, small=small) == [(second, first), (second, second)]

        def failing() -> Work[None]:
            yield from _inserting("c")
            yield Ask(refs.insert().values(referrer=-1, reference=-1))

        with pytest.raises(MetadataError):
            await write_by(database, failing, small=small)
        assert len(await read_by(database, _looking, small=small)) == 2

        later = await open_metadata(database_url, FencingToken(7, 2))
        await later.close()
        with pytest.raises(CacheFencedError):
            await write_by(database, lambda: _inserting("d"), small=small)
        assert len(await read_by(database, _looking, small=small)) == 2
    finally:
        await database.close()


async def test_work_whose_caller_is_cancelled_ends_before_the_next_begins(tmp_path: Path) -> None:
    database = await open_metadata(f"sqlite+aiosqlite:///{tmp_path}/cache.sqlite")
    entered, leave = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow() -> Work[None]:
        yield from _inserting("a")
        loop.call_soon_threadsafe(entered.set)
        yield Apart(1, leave.wait)

    try:
        caller = asyncio.create_task(write_by(database, slow, small=True))
        await entered.wait()
        caller.cancel()
        loop.call_later(0.05, leave.set)
        with pytest.raises(asyncio.CancelledError):
            await caller
        await write_by(database, lambda: _inserting("b"), small=True)
        assert len(await read_by(database, _looking, small=True)) == 2
    finally:
        leave.set()
        await database.close()


async def test_trips_open_the_connections_that_they_lack_and_wait_for_those_that_are_in_use(tmp_path: Path) -> None:
    database = await open_metadata(f"sqlite+aiosqlite:///{tmp_path}/cache.sqlite")
    together = threading.Barrier(3)

    def meeting() -> Work[list[Any]]:
        yield Apart(1, lambda: together.wait(PATIENCE_S))
        return (yield from _looking())

    try:
        async with reading(database) as connection:
            # It stays in the pool, and is opened again by the next one that gets it.
            await connection.invalidate()
        for _ in range(2):
            trips = [read_by(database, meeting, small=True) for _ in range(together.parties)]
            assert await asyncio.gather(*trips) == [[]] * together.parties
        many = 20 * POOL_SIZE
        assert await asyncio.gather(*[read_by(database, _looking, small=True) for _ in range(many)]) == [[]] * many
    finally:
        together.abort()
        await database.close()
