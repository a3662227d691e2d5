"""Long work takes turns slice by slice, and ends however often it was interrupted."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Generator

import pytest

from infra import slices
from infra.slices import SLICE_S, STAND_BACK_S, going_first, in_slices
from tests.support.patience import PATIENCE_S


def burn(seconds: float) -> None:
    end_s = time.thread_time() + seconds
    while time.thread_time() < end_s:
        pass


async def test_all_that_is_under_way_takes_turns_and_the_loop_comes_back_after_each_slice() -> None:
    """Each piece is longer than a slice, so that its length plays no part."""
    order = ""

    def work(name: str) -> Generator[None, None, None]:
        nonlocal order
        for _ in range(3):
            order += name
            burn(1.1 * SLICE_S)
            yield

    async def anybody_else() -> None:
        nonlocal order
        while True:
            order += "-"
            await asyncio.sleep(0)

    other = asyncio.create_task(anybody_else())
    await asyncio.gather(*(in_slices(work(name)) for name in "abc"))
    other.cancel()
    assert order.replace("-", "") == "abcabcabc"
    assert not re.search("[abc][abc]", order)


async def test_work_gives_what_it_returns_and_what_it_raises() -> None:
    def fine() -> Generator[None, None, int]:
        yield
        return 7

    def broken() -> Generator[None, None, None]:
        yield
        raise KeyError("no")

    assert await in_slices(fine()) == 7
    with pytest.raises(KeyError):
        await in_slices(broken())
    # What broke holds no turn.
    assert await in_slices(fine()) == 7


async def test_work_that_can_wait_stands_back_while_something_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "STAND_BACK_S", 60.0)
    order = ""

    def work(name: str) -> Generator[None, None, None]:
        nonlocal order
        for _ in range(3):
            order += name
            burn(1.1 * SLICE_S)
            yield

    async def first() -> None:
        nonlocal order
        with going_first():
            await in_slices(work("f"))
            order += ")"

    waiting = [asyncio.create_task(in_slices(work(name), can_wait=True)) for name in "ab"]
    await first()
    await asyncio.gather(*waiting)
    # One of them may have begun before.
    assert re.fullmatch("a?fff[)][ab]+", order), order
    assert sorted(order.replace(")", "")) == sorted("aaabbbfff")


async def test_work_that_can_wait_has_a_slice_in_turn_however_long_something_goes_first() -> None:
    order = ""

    def work(name: str) -> Generator[None, None, None]:
        nonlocal order
        for _ in range(2):
            order += name
            burn(1.1 * SLICE_S)
            yield

    began = time.monotonic()
    with going_first():
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(in_slices(work(name), can_wait=True) for name in "ab"))
    assert order == "abab"
    assert time.monotonic() - began >= 4 * STAND_BACK_S
