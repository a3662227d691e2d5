"""A farm whose database of timings is locked, full, gone or away builds on, says so, and recovers by itself."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path

import pytest

from coordinator.client.api_client import ApiClient
from coordinator.client.errors import RefusedError
from coordinator.config import Settings
from coordinator.engine import timing_writer
from coordinator.main import open_coordinator
from tests.coordinator.conftest import OpenedFarm, nix_workers
from tests.coordinator.test_web import Browser, browser_of
from tests.support.disks import fill, small_disk
from tests.support.patience import PATIENCE_S
from tests.support.servers import MortalPostgres

Undo = Callable[[], None]
SENTENCE = "database of timings"


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """Return the file of the database, on a disk of its own."""
    with small_disk(tmp_path / "disk", mib=4) as disk:
        (disk / "database").mkdir()
        yield disk / "database" / "timings.sqlite3"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_writer, "WRITE_EVERY_S", 0.02)
    monkeypatch.setattr(timing_writer, "RETRY_FIRST_S", 0.02)
    monkeypatch.setattr(timing_writer, "RETRY_LONGEST_S", 0.05)
    monkeypatch.setattr("coordinator.stores.timings.BUSY_TIMEOUT_MS", 50)


def locked(file: Path) -> Undo:
    connection = sqlite3.connect(file, timeout=5, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    return connection.close


def full(file: Path) -> Undo:
    filler = file.parent.with_name("filler")
    fill(filler)
    return filler.unlink


def gone(file: Path) -> Undo:
    """Take the directory away too, so that no new file can be made."""
    away = file.parent.with_name("away")
    file.parent.rename(away)
    file.parent.touch()

    def back() -> None:
        file.parent.unlink()
        away.rename(file.parent)

    return back


FarmAt = Callable[[str], AbstractAsyncContextManager[OpenedFarm]]


@pytest.fixture
def farm_at(tmp_path: Path, settings: Settings) -> FarmAt:
    """Start a farm with its timings in this database."""

    @asynccontextmanager
    async def start(url: str) -> AsyncIterator[OpenedFarm]:
        there = settings.model_copy(update={"timings_database_url": url})
        async with (
            open_coordinator(there, nix_workers(tmp_path / "workers", ["one"])) as coordinator,
            ApiClient(coordinator.ready.url, coordinator.ready.token_file.read_text().strip()) as client,
        ):
            yield OpenedFarm(coordinator, client, tmp_path, there)

    return start


async def build(farm: OpenedFarm, name: str) -> None:
    ended = await farm.ended((await farm.submit(f'{{ it = run "{name}-1.0" "echo > $out"; }}', "it")).id)
    assert ended.state == "succeeded", ended


async def troubles(farm: OpenedFarm) -> tuple[str, ...]:
    return (await farm.client.farm()).troubles


async def until_troubled(farm: OpenedFarm, *, wanted: bool) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while any(SENTENCE in each for each in await troubles(farm)) is not wanted:  # noqa: ASYNC110 - another task's doing
            await asyncio.sleep(0.02)


async def until_kept(farm: OpenedFarm, name: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with suppress(RefusedError):
                await farm.client.history(name)
                return
            await asyncio.sleep(0.02)


async def harmed(farm: OpenedFarm, browser: Browser, name: str, harm: Callable[[], Undo]) -> None:
    """Harm the database, and show that the farm builds on, says so everywhere, loses nothing and recovers."""
    before = farm.coordinator.views.timelines.dropped
    undo = await asyncio.to_thread(harm)
    await build(farm, name)
    await until_troubled(farm, wanted=True)
    assert SENTENCE in (await browser.get("/"))[1]
    for _ in range(3):
        with pytest.raises(RefusedError, match=SENTENCE) as refused:
            await farm.client.history(name)
        assert refused.value.http_status == 503
    status, page = await browser.get("/packages/first")
    assert SENTENCE in page, (status, page)
    assert status in {200, 503}
    await asyncio.to_thread(undo)
    await until_troubled(farm, wanted=False)
    assert len((await farm.client.history(name)).systems) == 1
    status, page = await browser.get(f"/packages/{name}")
    assert status == 200
    assert SENTENCE not in page
    assert farm.coordinator.views.timelines.dropped == before


async def test_a_database_of_timings_that_is_locked_full_or_gone_costs_no_build_and_comes_back(
    farm_at: FarmAt, file: Path
) -> None:
    async with farm_at(f"sqlite+aiosqlite:///{file}") as farm, browser_of(farm) as browser:
        await browser.log_in()
        await build(farm, "first")
        await farm.client.history("first")
        for harm in (locked, full, gone):
            await harmed(farm, browser, harm.__name__, partial(harm, file))
        # Who removes the file removes what it held, but nothing of what comes after.
        await asyncio.to_thread(file.unlink)
        await build(farm, "after")
        await until_kept(farm, "after")
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("SELECT package FROM attempt_timings").fetchall() == [("after",)]
        shown = await (await browser.session.get(f"{browser.url}/metrics")).text()
        assert "drover_timings_dropped_total 4.0" in shown


async def test_a_server_of_timings_that_is_killed_costs_no_build_and_comes_back(
    farm_at: FarmAt, mortal_postgres: MortalPostgres
) -> None:
    server = mortal_postgres.server

    def stopped() -> Undo:
        mortal_postgres.kill()
        return mortal_postgres.start

    async with farm_at(server.url(server.create_database())) as farm, browser_of(farm) as browser:
        await browser.log_in()
        await build(farm, "first")
        await farm.client.history("first")
        await harmed(farm, browser, "stopped", stopped)
