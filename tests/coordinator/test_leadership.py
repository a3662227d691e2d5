"""Two coordinators and one PostgreSQL: one works, the other stands by, and nobody writes out of turn."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiohttp import ClientSession

from coordinator.config import CacheSettings, Settings
from coordinator.journal.errors import FencedError
from coordinator.journal.journal import Journal
from coordinator.journal.leadership import LeadershipLostError, SessionLock, open_leadership
from coordinator.main import Ready
from coordinator.run import serve
from coordinator.security.farm_secrets import SuccessionError
from infra.database import open_engine
from infra.nix.signing import generate
from scheduler.facts import Fact, StepCached
from scheduler.model import StepKey
from tests.coordinator.test_engine import ScriptedWorker
from tests.support.patience import PATIENCE_S
from tests.support.servers import PostgresServer
from workers.ray_transport.access import make_token_file

BEAT_S = 0.05
APPENDS = 25


@asynccontextmanager
async def _candidate(url: str, *, patience_s: float = PATIENCE_S) -> AsyncIterator[tuple[Journal, SessionLock]]:
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


async def _nobody() -> None:
    pytest.fail("nobody was there")


def _setting(event: asyncio.Event) -> Callable[[], Awaitable[None]]:
    async def waits() -> None:
        event.set()

    return waits


def _end_sessions(server: PostgresServer, url: str) -> None:
    """As a restart of the server does to them."""
    name = url.partition("@/")[2].partition("?")[0]
    with psycopg.connect(server.conninfo("postgres"), autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))


async def test_the_second_waits_and_takes_over_when_the_first_ends(postgres_url: str) -> None:
    async with _candidate(postgres_url) as (_, first), _candidate(postgres_url) as (_, second):
        await first.acquire(_nobody)
        waits = asyncio.Event()
        taking = asyncio.create_task(second.acquire(_setting(waits)))
        async with asyncio.timeout(PATIENCE_S):
            await waits.wait()
            assert not taking.done()
            await first.release()
            await taking


async def test_a_leader_whose_session_is_lost_goes_on_where_nobody_took_over(
    postgres_url: str, postgres_server: PostgresServer
) -> None:
    async with _candidate(postgres_url) as (journal, lock):
        await lock.acquire(_nobody)
        await journal.take_over()
        await journal.append([StepCached(StepKey("a"))])
        holding = asyncio.create_task(lock.hold(journal))
        for key in ("b", "c", "d"):
            await asyncio.to_thread(_end_sessions, postgres_server, postgres_url)
            await journal.append([StepCached(StepKey(key))])
        await asyncio.sleep(BEAT_S * 4)
        assert not holding.done()
        holding.cancel()
        assert await _stored(postgres_url) == [StepCached(StepKey(key)) for key in "abcd"]


async def test_a_leader_whose_place_was_taken_ends(postgres_url: str, postgres_server: PostgresServer) -> None:
    async with _candidate(postgres_url, patience_s=0.3) as (old, lock), _candidate(postgres_url) as (new, other):
        await lock.acquire(_nobody)
        await old.take_over()
        waits = asyncio.Event()
        taking = asyncio.create_task(other.acquire(_setting(waits)))
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
            await old.append([StepCached(StepKey("late"))])


async def test_appends_wait_for_a_database_that_is_away_and_are_stored_once(
    postgres_url: str, postgres_server: PostgresServer
) -> None:
    """Connections are ended all the while: whatever an append was doing then, it is stored once and in order."""
    async with _candidate(postgres_url, patience_s=PATIENCE_S) as (journal, _):
        await journal.take_over()
        over = asyncio.Event()
        stored = 0

        async def disturb() -> None:
            pause_s, seen = 0.03, stored
            while not over.is_set():
                await asyncio.to_thread(_end_sessions, postgres_server, postgres_url)
                # A machine that is too busy to store anything in between gets longer.
                pause_s, seen = (2 * pause_s if stored == seen else 0.03), stored
                await asyncio.sleep(pause_s)

        disturbing = asyncio.create_task(disturb())
        for n in range(APPENDS):
            await journal.append([StepCached(StepKey(f"k{n}"))])
            stored += 1
        over.set()
        await disturbing
        assert await _stored(postgres_url) == [StepCached(StepKey(f"k{n}")) for n in range(APPENDS)]


class Candidates:
    """Coordinators on one database, with state directories of their own."""

    def __init__(self, root: Path, url: str, group: asyncio.TaskGroup) -> None:
        self._root = root
        self._url = url
        self._group = group
        self.ready: asyncio.Queue[Ready] = asyncio.Queue()
        self.waiting: asyncio.Queue[str] = asyncio.Queue()

    def start(self, name: str, **told: Any) -> tuple[asyncio.Task[None], asyncio.Event]:
        running, stop = self._serve(name, told)
        return self._group.create_task(running), stop

    def _serve(self, name: str, told: dict[str, Any]) -> tuple[Coroutine[Any, Any, None], asyncio.Event]:
        shared = {f"{part}_database_url": self._url for part in ("journal", "derivations", "cache")}
        places = {"secrets_dir": self._root / "secrets", "object_store_url": (self._root / "objects").as_uri()}
        settings = Settings.model_validate(
            {**places, **shared, **told, "state_dir": self._root / name, "port": 0},
        )
        stop = asyncio.Event()
        running = serve(
            settings,
            ScriptedWorker().start,
            ready=self.ready.put_nowait,
            stop=stop,
            standing_by=self.waiting.put_nowait,
        )
        return running, stop

    async def refused(self, name: str, **told: Any) -> str:
        """Start one that must not stand by, or begin; returns what it says."""
        running, _ = self._serve(name, told)
        with pytest.raises(SuccessionError) as caught:
            await running
        return str(caught.value)


async def test_a_second_coordinator_says_that_it_stands_by_until_the_first_has_ended(
    tmp_path: Path, postgres_url: str
) -> None:
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        candidates = Candidates(tmp_path, postgres_url, group)
        first, stop_first = candidates.start("0")
        began = await candidates.ready.get()
        _, stop_second = candidates.start("1")
        url = await candidates.waiting.get()
        async with ClientSession() as web:
            async with web.get(f"{url}/healthz") as answer:
                assert (answer.status, await answer.json()) == (503, {"status": "standby"})
            async with web.get(f"{url}/api/v1/farm") as answer:
                assert answer.status == 503
                assert "stands by" in (await answer.json())["error"]["message"]
        third, stop_third = candidates.start("2")
        await candidates.waiting.get()
        stop_third.set()
        await third
        stop_first.set()
        await first
        now = await candidates.ready.get()
        assert (now.url, now.public_keys) == (url, began.public_keys)
        async with ClientSession() as web, web.get(f"{url}/healthz") as answer:
            assert answer.status == 200
        stop_second.set()


async def test_a_coordinator_of_another_farm_names_what_differs_instead_of_standing_by(
    tmp_path: Path, postgres_url: str
) -> None:
    secrets = tmp_path / "secrets"
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        candidates = Candidates(tmp_path, postgres_url, group)
        ray = {"ray_address": "127.0.0.1:1", "ray_token": make_token_file(tmp_path / "ray-token")}
        first, stop_first = candidates.start("0", **ray)
        await candidates.ready.get()
        nothing = await candidates.refused("1", **ray, secrets_dir=None)
        assert "its API token is missing or is not that of the coordinator that works" in nothing
        assert str(tmp_path / "1") in nothing
        assert not (tmp_path / "1" / "cache-key").exists()
        other = tmp_path / "other"
        shutil.copytree(secrets, other)
        (other / "upload-secret").write_text("x" * 40)
        assert "its upload secret is missing or is not" in await candidates.refused("1", **ray, secrets_dir=other)
        shutil.copy(secrets / "upload-secret", other)
        (other / "cache-key").write_text(generate("drover-1", b"k" * 32).reveal())
        assert "its signing key is missing or is not" in await candidates.refused("1", **ray, secrets_dir=other)
        assert "ray_address is not set" in await candidates.refused("1")
        another = ray | {"ray_token": make_token_file(tmp_path / "another-token")}
        assert "its Ray token is missing or is not" in await candidates.refused("1", **another)
        elsewhere = (tmp_path / "elsewhere").as_uri()
        assert "its object store is missing" in await candidates.refused("1", **ray, object_store_url=elsewhere)
        assert "cache_database_url is not set" in await candidates.refused("1", cache_database_url="")
        # One key in common is enough, so that keys can be changed at one after the other.
        rotated = CacheSettings(signing_keys=(str(secrets / "cache-key"), str(tmp_path / "new")))
        (tmp_path / "new").write_text(generate("drover-2", b"n" * 32).reveal())
        (tmp_path / "new").chmod(0o600)
        second, stop_second = candidates.start("2", **ray, cache=rotated)
        await candidates.waiting.get()
        stop_first.set()
        await first
        assert len((await candidates.ready.get()).public_keys) == 2
        stop_second.set()
        await second
        # Nobody is there now, and still no third key is made.
        assert "has a signing key and" in await candidates.refused("3", secrets_dir=None)
