"""A lease of paths ends with its last use, and none that is used ends, whatever the order of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest
import sqlalchemy as sa

from coordinator.stores import path_leases
from coordinator.stores.path_leases import LEASE_S, PathLeases
from infra.cache.cache import Cache
from infra.cache.catalog.database import reading, roots
from infra.cache.retention.collector import CollectPlan
from tests.support.cache import open_cache, publish, store_path

A, B = store_path("a"), store_path("b")
AT_ONCE = CollectPlan(fresh_s=0.0, grace_s=0.0)


class Clock:
    """Time that a test moves."""

    time = 1_000_000.0

    def now(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def cache(tmp_path: Path, clock: Clock) -> AsyncIterator[Cache]:
    async with open_cache(tmp_path, now=clock.now) as opened:
        for path in (A, B):
            await publish(opened, path)
        yield opened


async def rows(cache: Cache) -> int:
    async with reading(cache.database) as connection:
        return int((await connection.execute(sa.select(sa.func.count()).select_from(roots))).scalar_one())


async def test_equal_paths_share_a_lease_that_lasts_until_its_last_user_needs_it_no_more(cache: Cache) -> None:
    leases = PathLeases(cache)
    assert await leases.ask([A, B]) == set()
    one, _ = await leases.take([B, A])
    two, _ = await leases.take([A, B])
    assert (one, await leases.answered([A, B]), await leases.answered([A, B])) == (two, (one,), ())
    assert await rows(cache) == 1
    leases.attach("first", (one, one))
    leases.attach("second", (two,))
    await leases.end({"first", "second"})
    await leases.end({"second"})
    await cache.collect(AT_ONCE)
    assert await cache.missing([A, B]) == set()
    await leases.end(set())
    assert await rows(cache) == 0


class WatchedLock(asyncio.Lock):
    """Says when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted = asyncio.Event()

    async def acquire(self) -> Literal[True]:
        if self.locked():
            self.wanted.set()
        return await super().acquire()


async def test_a_lease_that_is_taken_while_it_ends_is_there_afterwards(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = WatchedLock()
    leases = PathLeases(cache, ending)
    leases.give_back(((await leases.take([A]))[0],))
    release = cache.release
    taking: list[asyncio.Task[tuple[str, set[str]]]] = []

    async def taken_before(name: str) -> None:
        # It is taken at the worst moment: its end is decided, and not yet done.
        taking.append(asyncio.create_task(leases.take([A])))
        wanted = asyncio.create_task(ending.wanted.wait())
        await asyncio.wait((*taking, wanted), return_when=asyncio.FIRST_COMPLETED)
        wanted.cancel()
        await release(name)

    monkeypatch.setattr(cache, "release", taken_before)
    await leases.end(set())
    _, absent = await taking[0]
    assert absent == set()
    await cache.collect(AT_ONCE)
    assert await cache.missing([A]) == set()


async def test_a_lease_that_no_submission_takes_ends_by_its_time_and_leaves_no_row(cache: Cache, clock: Clock) -> None:
    leases = PathLeases(cache)
    await leases.ask([A])
    await leases.end(set())
    assert await rows(cache) == 1
    clock.time += LEASE_S + 1
    await cache.drop_lapsed_leases()
    assert await rows(cache) == 0


@pytest.mark.parametrize(("bound", "most"), [("MAX_QUESTIONS", 5), ("MAX_QUESTION_PATHS", 10)])
async def test_questions_without_a_submission_are_bounded_and_the_oldest_end_first(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    monkeypatch.setattr(path_leases, bound, most)
    leases = PathLeases(cache)
    used, _ = await leases.take([A])
    await leases.ask([A])
    for number in range(20):
        await leases.ask([B, store_path(f"other-{number}")])
        assert await rows(cache) <= 6
    # What is used stays though its question is over; the newest question is there, and the oldest are not.
    assert await leases.answered([A]) == ()
    assert await leases.answered([B, store_path("other-0")]) == ()
    [newest] = await leases.answered([B, store_path("other-19")])
    leases.give_back([newest])
    await leases.end(set())
    await cache.collect(AT_ONCE)
    assert await cache.missing([A]) == set()
    leases.give_back([used])


async def test_a_repeated_question_is_no_longer_the_oldest(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_leases, "MAX_QUESTIONS", 2)
    leases = PathLeases(cache)
    for paths in ([A], [B], [A], [A, B]):
        await leases.ask(paths)
    assert await leases.answered([B]) == ()
    assert await leases.answered([A]) == await leases.answered([A]) != ()
