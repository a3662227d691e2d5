"""Publications that no step waits for are one call of the cache; one that a step waits for begins at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from coordinator.engine import publishing
from coordinator.engine.dispatch import no_losses
from coordinator.engine.publishing import Publications
from coordinator.stores.derivations import DerivationStore, StepInfo
from infra.cache.cache import Cache
from infra.cache.publishing.claims import PublishOutcome
from infra.clock import SystemClock
from scheduler.effects import PublishOutputs
from scheduler.events import Event
from scheduler.model import LeaseId, StepKey
from tests.support.patience import PATIENCE_S


class _Desk:
    """Publications over a store that notes what it is asked about together, and holds its answers back on request."""

    def __init__(self) -> None:
        self.together: list[list[str]] = []
        self.awaited: set[str] = set()
        self.building = True
        self.asked = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()
        self.ended: asyncio.Queue[Event] = asyncio.Queue()
        stubs = cast("tuple[Cache, DerivationStore]", (self, self))
        self.publications = Publications(
            *stubs,
            self._post,
            no_losses,
            SystemClock(),
            lambda *_: None,
            awaited=self.awaited.__contains__,
            building=lambda: self.building,
        )

    async def steps(self, keys: Sequence[StepKey]) -> Mapping[StepKey, StepInfo]:
        self.together.append(list(keys))
        self.asked.set()
        await self.open.wait()
        return {}

    async def publish(self, *_: Any) -> list[PublishOutcome]:
        return []

    async def _post(self, events: Sequence[Event]) -> None:
        for event in events:
            self.ended.put_nowait(event)

    def submit(self, *steps: str) -> None:
        for step in steps:
            self.publications.submit(PublishOutputs(LeaseId(StepKey(step), 1), b""))

    async def until_ended(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(count):
                await self.ended.get()


@asynccontextmanager
async def _serving() -> AsyncIterator[_Desk]:
    desk = _Desk()
    task = asyncio.create_task(desk.publications.run())
    try:
        yield desk
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_what_no_step_waits_for_gathers_until_a_step_waits_or_nothing_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "GATHER_S", 3600.0)
    async with _serving() as desk:
        desk.awaited.update({"c"})
        desk.submit("a", "b")
        await asyncio.sleep(0)
        desk.submit("c")
        await desk.until_ended(3)
        desk.building = False
        desk.submit("d")
        await desk.until_ended(1)
        assert desk.together == [["a", "b", "c"], ["d"]]


async def test_what_comes_while_another_is_published_goes_together_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "GATHER_S", 3600.0)
    async with _serving() as desk:
        desk.awaited.update("abc")
        desk.open.clear()
        desk.submit("a")
        async with asyncio.timeout(PATIENCE_S):
            await desk.asked.wait()
        desk.submit("b", "c")
        await asyncio.sleep(0)
        assert desk.together == [["a"]]
        desk.open.set()
        await desk.until_ended(3)
        assert desk.together == [["a"], ["b", "c"]]


async def test_others_are_waited_for_no_longer_than_a_bounded_time() -> None:
    async with _serving() as desk:
        desk.submit("a")
        await desk.until_ended(1)
        assert desk.together == [["a"]]
