"""A large submission never holds the event loop of a whole coordinator for long, whatever becomes of it.

What holds the loop is one callback. Its length is counted in lines of Python that ran, libraries included, and not in
seconds: a slow machine changes nothing. Work in threads is not counted. `infra.loop_watch` measures the same in
processor time where a farm runs.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest

from coordinator.api.models import StepStatus
from coordinator.api.requests import RootRequest, SubmitRequest
from coordinator.api.sent_streams import encode_derivations, in_thread
from coordinator.intake.submissions import Submissions
from infra import slices
from scheduler import events as e
from scheduler.model import BuilderId, BuilderSpec, Failure, FailureKind, LeaseId
from tests.coordinator.conftest import OpenedFarm, OpenFarm
from tests.support.graphs import Maker

#: Roots, all of which stand on one derivation.
ROOTS = 1_500
#: Lines of one callback: some 4 ms. Without slices a callback here runs through up to 360,000.
LINES = 60_000
#: Blocks of memory that one callback frees, some 100 ns each. Freed in one go, the plan has 17,000 of them.
FREED_BLOCKS = 12_000
BUILDER = BuilderId("b")


@dataclass(slots=True)
class Callbacks:
    """Lines that each callback ran, and blocks of memory that it freed, those that it took in taken off."""

    lines: list[int]
    freed: list[int]


@contextmanager
def counted_callbacks() -> Iterator[Callbacks]:
    """Give what each callback does that the loop of this thread runs in the block."""
    every = Callbacks([], [])
    lines = 0

    def count(_frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    run = asyncio.Handle._run  # noqa: SLF001 - where all callbacks pass

    def counted(handle: asyncio.Handle) -> None:
        nonlocal lines
        lines = 0
        blocks = sys.getallocatedblocks()
        run(handle)
        every.lines.append(lines)
        every.freed.append(blocks - sys.getallocatedblocks())

    before = sys.gettrace()
    asyncio.Handle._run = counted  # type: ignore[method-assign,assignment]  # noqa: SLF001
    sys.settrace(count)
    try:
        yield every
    finally:
        sys.settrace(before)
        asyncio.Handle._run = run  # type: ignore[method-assign]  # noqa: SLF001


async def sent(farm: OpenedFarm) -> tuple[RootRequest, ...]:
    maker = Maker()
    origin = maker.plain("origin")
    tops = [maker.plain(f"top-{number}", [origin]) for number in range(ROOTS)]
    members = ((made.name, made.data) for made in (origin, *tops))
    await farm.client.send_derivations(in_thread(encode_derivations(members)))
    return tuple(RootRequest(attr=f"top-{number}", drv=made.drv) for number, made in enumerate(tops))


async def test_no_callback_is_long_whatever_becomes_of_a_large_submission(
    open_farm: OpenFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices are as short as can be: how many pieces fit into one depends on the machine."""
    monkeypatch.setattr(slices, "SLICE_S", 0.0)
    async with open_farm() as farm:
        wish = SubmitRequest(roots=await sent(farm))
        engine, views = farm.coordinator.engine, farm.coordinator.views
        submissions = Submissions(engine, views, farm.coordinator.intake)
        with counted_callbacks() as callbacks:
            first, second = (await submissions.submit(wish)).id, (await submissions.submit(wish)).id
            await submissions.cancel(first)
            await submissions.cancel(second)
            third = await submissions.submit(wish)
            await engine.offer(e.BuilderJoined(BuilderSpec(BUILDER, "1", frozenset({"x86_64-linux"})), 1))
            [(origin, row)] = third.active.items()
            failure = Failure(FailureKind.PERMANENT, "exit status 1")
            await engine.offer(e.BuildFailed(LeaseId(origin, row.life.attempt), BUILDER, failure))
            assert third.counts[StepStatus.DOOMED] == ROOTS
            await submissions.retry(third.id)
            lease = LeaseId(origin, row.life.attempt)
            # Together: the publisher, which finds nothing to publish, would hand the step back between them.
            await engine.offer(e.BuildSucceeded(lease, BUILDER, b""), e.OutputsPublished(lease))
            assert third.counts[StepStatus.READY] == ROOTS - 1
            await engine.offer(e.BuilderLost(BUILDER, "1", "gone"))
            await submissions.cancel(third.id)
            for submission in (first, second, third.id):
                await engine.offer(e.SubmissionExpired(submission))
            assert views.step_total() == 0
    assert [each for each in callbacks.lines if each > LINES] == []
    assert [each for each in callbacks.freed if each > FREED_BLOCKS] == []


async def test_the_collector_does_not_walk_again_and_again_while_a_large_submission_is_taken_in(
    open_farm: OpenFarm,
) -> None:
    """It holds the interpreter whatever thread it runs in, and so the event loop, for longer the more there is."""
    walks: list[int] = []

    def walked(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            walks.append(info["generation"])

    async with open_farm() as farm:
        wish = SubmitRequest(roots=await sent(farm))
        submissions = Submissions(farm.coordinator.engine, farm.coordinator.views, farm.coordinator.intake)
        gc.callbacks.append(walked)
        try:
            await submissions.submit(wish)
        finally:
            gc.callbacks.remove(walked)
    # One of what is young may come when all is over.
    assert walks in ([], [0])
