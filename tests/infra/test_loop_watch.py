"""The watchdog sees what holds the event loop by computing, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
import weakref
from contextlib import suppress

import pytest

from infra.loop_watch import STALL_S, LoopWatch


def compute(seconds: float) -> None:
    end_s = time.thread_time() + seconds
    while time.thread_time() < end_s:
        pass


async def test_a_callback_that_computes_is_counted_and_its_place_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slices: list[float] = []
    watch = LoopWatch()
    watch.on_slice = slices.append
    with caplog.at_level(logging.WARNING), watch:
        for _ in range(2):
            compute(0.2)
            await asyncio.sleep(0.02)
    assert watch.stalls == 2
    assert watch.longest_s >= 0.2
    assert [each for each in caplog.messages if "test_loop_watch.py:compute" in each] == caplog.messages[:1]
    assert [each >= 0.2 for each in slices] == [True, True]


class Large:
    """Stands for a graph of 100,000 nodes."""


def compute_with_something_large(made: list[weakref.ref[Large]]) -> None:
    large = Large()
    made.append(weakref.ref(large))
    compute(0.2)


async def test_what_a_callback_knew_that_held_the_loop_is_let_go_of(caplog: pytest.LogCaptureFixture) -> None:
    made: list[weakref.ref[Large]] = []
    with caplog.at_level(logging.WARNING), LoopWatch():
        compute_with_something_large(made)
        assert any("test_loop_watch.py:compute" in each for each in caplog.messages)
        assert made[0]() is None


async def test_waiting_and_other_threads_are_no_stall() -> None:
    with LoopWatch() as watch:
        time.sleep(0.1)  # noqa: ASYNC251 - what other programs do to the loop on a busy machine
        await asyncio.to_thread(compute, 0.2)
    assert watch.longest_s < STALL_S


async def test_a_loop_at_rest_is_not_woken_and_the_first_stall_after_it_is_seen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING), LoopWatch() as watch:
        before = _switches()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await asyncio.Event().wait()
        # With ticks all the time there were 50.
        assert _switches() - before < 25
        assert watch.longest_s < STALL_S
        compute(0.2)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert (watch.stalls, watch.longest_s >= 0.2) == (1, True)
    assert any("test_loop_watch.py:compute" in each for each in caplog.messages)


def _switches() -> int:
    """Return how often this thread has given the processor up, because it had nothing to do."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
