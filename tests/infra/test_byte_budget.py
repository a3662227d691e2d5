"""A budget is never exceeded, and a client with many wishes waits its turn like one with a single wish."""

from __future__ import annotations

import asyncio

import pytest

from infra.byte_budget import ByteBudget


async def test_clients_take_turns_and_a_large_wish_is_not_overtaken() -> None:
    budget = ByteBudget(10)
    order: list[str] = []

    async def want(client: str, size: int) -> None:
        async with budget.acquire(client, size):
            order.append(client)
            await asyncio.sleep(0)

    async with budget.acquire("first", 10):
        wishes = [asyncio.ensure_future(want("greedy", 6)) for _ in range(4)]
        await asyncio.sleep(0)
        wishes.append(asyncio.ensure_future(want("modest", 10)))
        await asyncio.sleep(0)
        assert order == []
    await asyncio.gather(*wishes)
    assert order == ["greedy", "modest", "greedy", "greedy", "greedy"]
    assert (budget.held, budget.peak) == (0, 10)


async def test_a_client_that_leaves_the_queue_blocks_no_other() -> None:
    budget = ByteBudget(10)

    async def want(client: str) -> None:
        async with budget.acquire(client, 10):
            pass

    async with budget.acquire("first", 10):
        gone = asyncio.ensure_future(want("gone"))
        stays = asyncio.ensure_future(want("stays"))
        await asyncio.sleep(0)
        gone.cancel()
    await stays
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert budget.held == 0


async def test_a_wish_beyond_the_capacity_takes_all_of_it() -> None:
    budget = ByteBudget(10)
    async with budget.acquire("one", 1_000):
        assert budget.held == 10
