"""The watchdog sees what holds the event loop by computing, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import time

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


async def test_waiting_and_other_threads_are_no_stall() -> None:
    with LoopWatch() as watch:
        time.sleep(0.1)  # noqa: ASYNC251 - what other programs do to the loop on a busy machine
        await asyncio.to_thread(compute, 0.2)
    assert watch.longest_s < STALL_S
