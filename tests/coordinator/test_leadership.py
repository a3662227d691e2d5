"""Two coordinators and one PostgreSQL: one works, the other stands by, and nobody writes out of turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest
from aiohttp import ClientSession

from coordinator.config import Settings
from coordinator.journal import FencedError, Journal
from coordinator.leadership import LeadershipLostError, SessionLock, open_leadership
from coordinator.main import Ready, serve
from infra.database import open_engine
from scheduler.facts import Fact, StepHeld
from scheduler.model import StepKey
from tests.coordinator.test_engine import ScriptedWorker
from tests.support.servers import PostgresServer

PATIENCE_S = 60.0
BEAT_S = 0.05
APPENDS = 25


@asynccontextmanager
async def _candidate(url: str, *, patience_s: float = 5.0) -> AsyncIterator[tuple[Journal, SessionLock]]:
    engine = open_engine(url)
    journal = Journal(engine, patience_s=patience_s)
    await journal.prepare()
    lock = open_leadership(engine, patience_s=patience_s, beat_s=BEAT_S)
    assert isinstance(lock, SessionLock)
    try:
        yield journal, lock
    finally:
        await lock.release()
        await engine.dispose()


async def _stored(url: str) -> list[Fact]:
    engine = open_engine(url)
    try:
        return [fact async for piece in Journal(engine).load() for fact in piece.facts]
    finally:
        await engine.dispose()


def _end_sessions(server: PostgresServer, url: str) -> None:
    """As a restart of the server does to them."""
    name = url.partition("@/")[2].partition("?")[0]
    with psycopg.connect(server.conninfo("postgres"), autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))


async def test_the_second_waits_and_takes_over_when_the_first_ends(postgres_url: str) -> None:
    async with _candidate(postgres_url) as (_, first), _candidate(postgres_url) as (_, second):
        await first.acquire(lambda: pytest.fail("nobody was there"))
        waits = asyncio.Event()
        taking = asyncio.create_task(second.acquire(waits.set))
        async with asyncio.timeout(PATIENCE_S):
            await waits.wait()
            assert not taking.done()
            await first.release()
            await taking


async def test_a_leader_whose_session_is_lost_goes_on_where_nobody_took_over(
    postgres_url: str, postgres_server: PostgresServer
) -> None:
    async with _candidate(postgres_url) as (journal, lock):
        await lock.acquire(lambda: None)
        await journal.take_over()
        await journal.append([StepHeld(StepKey("a"))])
        holding = asyncio.create_task(lock.hold(journal))
        for key in ("b", "c", "d"):
            await asyncio.to_thread(_end_sessions, postgres_server, postgres_url)
            await journal.append([StepHeld(StepKey(key))])
        await asyncio.sleep(BEAT_S * 4)
        assert not holding.done()
        holding.cancel()
        assert await _stored(postgres_url) == [StepHeld(StepKey(key)) for key in "abcd"]


async def test_a_leader_whose_place_was_taken_ends(postgres_url: str, postgres_server: PostgresServer) -> None:
    async with _candidate(postgres_url, patience_s=0.3) as (old, lock), _candidate(postgres_url) as (new, other):
        await lock.acquire(lambda: None)
        await old.take_over()
        waits = asyncio.Event()
        taking = asyncio.create_task(other.acquire(waits.set))
        await waits.wait()
        holding = asyncio.create_task(lock.hold(old))
        await asyncio.to_thread(_end_sessions, postgres_server, postgres_url)
        # One of the two gets the lock; where it is the old one, nothing has happened yet.
        async with asyncio.timeout(PATIENCE_S):
            while not taking.done() and not holding.done():
                await asyncio.to_thread(_end_sessions, postgres_server, postgres_url)
                await asyncio.sleep(BEAT_S)
            await taking
            await new.take_over()
            with pytest.raises((FencedError, LeadershipLostError)):
                await holding
        with pytest.raises(FencedError):
            await old.append([StepHeld(StepKey("late"))])


async def test_appends_wait_for_a_database_that_is_away_and_are_stored_once(
    postgres_url: str, postgres_server: PostgresServer
) -> None:
    """Connections are ended all the while: whatever an append was doing then, it is stored once and in order."""
    async with _candidate(postgres_url, patience_s=30.0) as (journal, _):
        await journal.take_over()
        over = asyncio.Event()

        async def disturb() -> None:
            while not over.is_set():
                await asyncio.to_thread(_end_sessions, postgres_server, postgres_url)
                await asyncio.sleep(0.03)

        disturbing = asyncio.create_task(disturb())
        for n in range(APPENDS):
            await journal.append([StepHeld(StepKey(f"k{n}"))])
        over.set()
        await disturbing
        assert await _stored(postgres_url) == [StepHeld(StepKey(f"k{n}")) for n in range(APPENDS)]


async def test_a_second_coordinator_says_that_it_stands_by_until_the_first_has_ended(
    tmp_path: Path, postgres_url: str
) -> None:
    def settings(name: str) -> Settings:
        return Settings(
            state_dir=tmp_path / name,
            port=0,
            object_store_url=(tmp_path / "objects").as_uri(),
            journal_database_url=postgres_url,
            derivations_database_url=postgres_url,
        )

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        stops = [asyncio.Event(), asyncio.Event(), asyncio.Event()]
        ready: asyncio.Queue[Ready] = asyncio.Queue()
        waiting: asyncio.Queue[str] = asyncio.Queue()

        def start(number: int) -> asyncio.Task[None]:
            return group.create_task(
                serve(
                    settings(str(number)),
                    ScriptedWorker().start,
                    ready=ready.put_nowait,
                    stop=stops[number],
                    standing_by=waiting.put_nowait,
                )
            )

        first = start(0)
        await ready.get()
        start(1)
        url = await waiting.get()
        async with ClientSession() as web:
            while True:
                async with web.get(f"{url}/healthz") as answer:
                    assert (answer.status, await answer.json()) == (503, {"status": "standby"})
                    break
            async with web.get(f"{url}/api/v1/farm") as answer:
                assert answer.status == 503
                assert "stands by" in (await answer.json())["error"]["message"]
        third = start(2)
        await waiting.get()
        stops[2].set()
        await third
        stops[0].set()
        await first
        assert (await ready.get()).url == url
        async with ClientSession() as web, web.get(f"{url}/healthz") as answer:
            assert answer.status == 200
        stops[1].set()
