"""A lease of paths ends with its last use, and none that is used ends, whatever the order of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from coordinator.path_leases import LEASE_S, PathLeases
from infra.cache.cache import Cache
from infra.cache.gc import CollectPlan
from infra.cache.metadata import reading, roots
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
    async with reading(cache._database) as connection:
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


async def test_a_lease_that_is_taken_while_it_ends_is_there_afterwards(cache: Cache) -> None:
    leases = PathLeases(cache)
    for _ in range(20):
        leases.give_back(((await leases.take([A]))[0],))
        _, (name, absent) = await asyncio.gather(leases.end(set()), leases.take([A]))
        assert absent == set()
        await cache.collect(AT_ONCE)
        assert await cache.missing([A]) == set()
        leases.give_back((name,))


async def test_what_nobody_comes_back_for_ends_by_its_time_and_leaves_no_row(cache: Cache, clock: Clock) -> None:
    leases = PathLeases(cache)
    await leases.ask([A])
    await leases.end(set())
    assert await rows(cache) == 1
    clock.time += LEASE_S + 1
    await cache.drop_lapsed_leases()
    assert await rows(cache) == 0
