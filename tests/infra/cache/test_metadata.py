"""Opening the metadata: made, migrated, shared with nobody, refused, each with one sentence."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.engine import Connection

from infra.cache.catalog import database as metadata_module
from infra.cache.catalog.database import Database, FencingToken, metadata, open_metadata, paths, reading, writing
from infra.cache.catalog.migrate import VERSION_TABLE
from infra.cache.errors import CacheFencedError, MetadataBusyError, MetadataError, SchemaTooNewError
from tests.support.cache import open_cache, publish, store_path
from tests.support.ports import free_port
from tests.support.servers import MortalPostgres


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = await open_metadata(database_url)
    yield opened
    await opened.close()


async def test_the_migrations_make_what_is_declared(database: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": False}
        )
        return list(compare_metadata(context, metadata))

    async with reading(database) as connection:
        assert await connection.run_sync(differences) == []


async def test_a_database_of_a_newer_release_is_not_touched(tmp_path: Path) -> None:
    async with open_cache(tmp_path):
        pass
    file = tmp_path / "cache.sqlite"
    with sqlite3.connect(file) as newer:
        newer.execute("UPDATE cache_revision SET version_num = '0099'")
        newer.execute("DROP TABLE conflicts")
    newer.close()
    before = file.read_bytes()
    with pytest.raises(SchemaTooNewError, match="0099"):
        async with open_cache(tmp_path):
            pass
    assert file.read_bytes() == before
    file.write_bytes(b"this is no database, it is a text of more than a hundred bytes" * 10)
    with pytest.raises(MetadataError, match="not a database"):
        async with open_cache(tmp_path):
            pass


async def test_a_newer_release_is_noticed_on_postgresql_too(postgres_url: str) -> None:
    database = await open_metadata(postgres_url)
    async with writing(database) as connection:
        await connection.exec_driver_sql("UPDATE cache_revision SET version_num = '0099'")
    await database.close()
    with pytest.raises(SchemaTooNewError, match="0099"):
        await open_metadata(postgres_url)


async def test_caches_with_schemas_of_their_own_share_nothing(tmp_path: Path, postgres_url: str) -> None:
    path = store_path("a")
    other = f"{postgres_url}&options=-csearch_path%3Dcache_team1"
    async with (
        open_cache(tmp_path, database_url=postgres_url) as first,
        open_cache(tmp_path, database_url=other) as second,
    ):
        await publish(first, path)
        assert await first.missing([path]) == set()
        assert await second.missing([path]) == {path}
    async with open_cache(tmp_path, database_url=other) as again:
        assert await again.missing([path]) == {path}


async def test_what_is_decided_in_a_writing_transaction_is_decided_on_the_present(database_url: str) -> None:
    """Two processes, as two sets of connections: each adds one to what it reads, and none is lost."""
    first, second = await open_metadata(database_url), await open_metadata(database_url)

    async def count(database: Database) -> None:
        for _ in range(10):
            async with writing(database) as connection:
                seen = (await connection.execute(sa.select(sa.func.count()).select_from(paths))).scalar_one()
                name = store_path(str(seen))
                values = dict.fromkeys(("url", "compression", "file_hash", "nar_hash", "deriver", "ca"), "")
                await connection.execute(
                    paths.insert().values(
                        **values,
                        hash_part=name[11:43],
                        store_path=name,
                        file_size=1,
                        nar_size=1,
                        narinfo=b"",
                        published_at=time.time(),
                    )
                )

    await asyncio.gather(count(first), count(second), count(first))
    async with reading(first) as connection:
        assert (await connection.execute(sa.select(sa.func.count()).select_from(paths))).scalar_one() == 30
    await first.close()
    await second.close()


async def test_a_coordinator_of_an_earlier_epoch_writes_nothing_any_more(database_url: str) -> None:
    first, second = FencingToken(journal=7, epoch=1), FencingToken(journal=7, epoch=2)
    old, new = await open_metadata(database_url, first), await open_metadata(database_url, second)
    with pytest.raises(CacheFencedError, match="has taken over the cache; nothing was written"):
        async with writing(old):
            pytest.fail("it must not come so far")
    with pytest.raises(CacheFencedError):
        await open_metadata(database_url, first)
    async with writing(new):
        pass
    # Another journal knows nothing of the epochs of the first.
    other = await open_metadata(database_url, FencingToken(journal=8, epoch=1))
    for database in (old, new):
        with pytest.raises(CacheFencedError):
            async with writing(database):
                pass
        await database.close()
    async with writing(other):
        pass
    await other.close()


async def test_a_writer_that_is_paused_in_a_transaction_does_not_hold_up_the_next(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata_module, "IDLE_IN_TRANSACTION_MS", 500)
    paused, next_one = await open_metadata(postgres_url), await open_metadata(postgres_url)

    async def pause() -> None:
        async with writing(paused) as connection:
            async with writing(next_one):
                pass
            await connection.execute(sa.select(1))

    with pytest.raises(MetadataError):
        await pause()
    await paused.close()
    await next_one.close()


async def test_a_database_that_is_locked_or_absent_says_so_in_one_sentence(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata_module, "LOCK_TIMEOUT_S", 1)
    holder, waiter = await open_metadata(database_url), await open_metadata(database_url)
    async with writing(holder):
        with pytest.raises(MetadataBusyError, match="another writer held its lock for 1 s; try again"):
            async with writing(waiter):
                pass
    async with writing(waiter):
        pass
    await holder.close()
    await waiter.close()
    port, before = free_port(), set(threading.enumerate())
    for absent in (
        f"sqlite+aiosqlite:///{tmp_path}/none/cache.sqlite",
        f"postgresql+psycopg://user:hunter2@127.0.0.1:{port}/none",
    ):
        with pytest.raises(MetadataError, match="the cache's database failed: ") as caught:
            await open_metadata(absent)
        assert "\n" not in str(caught.value)
        assert "hunter2" not in str(caught.value)
    # The driver's thread for the file that could not be opened sends its last word to this loop.
    while set(threading.enumerate()) - before:  # noqa: ASYNC110 - a thread's end sends nothing
        await asyncio.sleep(0.01)


async def test_a_server_that_is_away_is_waited_for(mortal_postgres: MortalPostgres) -> None:
    database = await open_metadata(mortal_postgres.server.url(mortal_postgres.server.create_database()))

    async def count() -> int:
        # One after the other: as many that read and then want to write would wait for each other's connections.
        async with writing(database):
            pass
        async with reading(database) as connection:
            return int((await connection.execute(sa.select(sa.func.count()).select_from(paths))).scalar_one())

    assert await count() == 0
    await asyncio.to_thread(mortal_postgres.kill)
    counting = [asyncio.create_task(count()) for _ in range(4)]
    while "is away" not in database.outage.trouble:  # noqa: ASYNC110 - what is waited for is another program's doing
        await asyncio.sleep(0.02)
    await asyncio.to_thread(mortal_postgres.start)
    assert await asyncio.gather(*counting) == [0] * 4
    assert not database.outage.trouble
    await database.close()


async def test_an_address_that_is_none_is_a_typed_error() -> None:
    for address in ("", "nonsense", "mysql://host/x"):
        with pytest.raises(MetadataError):
            await open_metadata(address)
