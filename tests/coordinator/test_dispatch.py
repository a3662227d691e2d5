"""Orders for workers are bounded in bytes: few large derivations fill a call, and calls share memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from coordinator.engine.dispatch import SENDING_BYTES, SENDING_COST, START_BYTES, Dispatch
from coordinator.stores.derivation_records import Kind, NewDerivation, Node
from coordinator.stores.derivations import SMALL_ORDERS_BYTES, DerivationStore
from scheduler.effects import FetchAhead, StartBuild
from scheduler.events import Event
from scheduler.model import BuilderId, LeaseId, StepKey
from scheduler.resource_limits import ResourceLimits
from tests.support.cache import open_cache
from tests.support.patience import PATIENCE_S
from workers.wire.fleet import Sink
from workers.wire.messages import InputHint, Lease, LeaseOrder, Output

MIB = 1024 * 1024


class NotingFleet:
    """The fleet port: notes the attempts and bytes of each call, and the memory that calls hold meanwhile."""

    def __init__(self) -> None:
        self.trouble = ""
        self.calls: list[tuple[str, list[int], int]] = []
        self.held: list[int] = []
        #: Hints, each with the number of calls before it.
        self.hints: list[tuple[str, InputHint, int]] = []
        self.dispatch: Dispatch | None = None
        self.called = asyncio.Event()

    async def run(self, sink: Sink) -> None:
        raise NotImplementedError(sink)

    async def start_many(self, worker: str, orders: Sequence[LeaseOrder]) -> None:
        size = sum(len(order.derivation) for order in orders)
        self.calls.append((worker, [order.attempt for order in orders], size))
        assert self.dispatch is not None
        self.held.append(self.dispatch.budget.held)
        self.called.set()
        await asyncio.sleep(0)

    async def cancel(self, worker: str, leases: Sequence[Lease]) -> None:
        raise NotImplementedError(worker, leases)

    async def drain(self, worker: str, *, on: bool) -> None:
        raise NotImplementedError(worker, on)

    async def fetch_ahead(self, worker: str, hint: InputHint) -> None:
        self.hints.append((worker, hint, len(self.calls)))
        self.called.set()

    async def provide(self, worker: str, paths: Sequence[str], token: str) -> tuple[Output, ...]:
        raise NotImplementedError(worker, paths, token)


class Desk:
    """Dispatch over a real database of derivations that nobody verified."""

    def __init__(self, dispatch: Dispatch, derivations: DerivationStore, fleet: NotingFleet) -> None:
        self.dispatch = dispatch
        self.fleet = fleet
        self._derivations = derivations
        self._attempt = 0

    async def start(self, worker: str, step: str, recipe: int = 0) -> StartBuild:
        self._attempt += 1
        return StartBuild(LeaseId(StepKey(step), self._attempt), BuilderId(worker), recipe)

    async def add(self, step: str, *sizes: int) -> None:
        """Store a step with a recipe of each size."""
        for index, size in enumerate(sizes):
            drv = f"{step}-{index}.drv"
            node = Node(drv, StepKey(step), Kind.FIXED, "x86_64-linux", (), (("out", f"/nix/store/{step}"),), ())
            await self._derivations.add([NewDerivation(node, bytes(32), (), b"x" * size)])
            await self._derivations.add_members([(StepKey(step), index, drv)])

    async def sent(self, orders: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while sum(len(attempts) for _, attempts, _ in self.fleet.calls) < orders:
                await self.fleet.called.wait()
                self.fleet.called.clear()


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(open_cache(tmp_path))
        derivations = DerivationStore.open(f"sqlite+aiosqlite:///{tmp_path}/derivations.sqlite3")
        stack.push_async_callback(derivations.close)
        await derivations.prepare()

        async def post(events: Sequence[Event]) -> None:
            raise AssertionError(events)

        fleet = NotingFleet()
        fleet.dispatch = Dispatch(fleet, cache, derivations, lambda _: ResourceLimits(), post, takes_hints="w".__eq__)
        running = asyncio.ensure_future(fleet.dispatch.run())
        try:
            yield Desk(fleet.dispatch, derivations, fleet)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_a_call_has_bounded_bytes_and_a_larger_order_goes_alone(desk: Desk) -> None:
    await desk.add("small", 1000)
    await desk.add("medium", 6 * MIB)
    # Its other recipe is never read.
    await desk.add("large", 6 * MIB, START_BYTES + MIB)
    steps = [("small", 0), ("medium", 0), ("medium", 0), ("medium", 0), ("large", 1), ("small", 0), ("large", 0)]
    desk.dispatch.submit([await desk.start("w", step, recipe) for step, recipe in steps])
    await desk.sent(len(steps))
    assert [attempts for _, attempts, _ in desk.fleet.calls] == [[1, 2, 3], [4], [5], [6, 7]]
    assert all(size <= START_BYTES or len(attempts) == 1 for _, attempts, size in desk.fleet.calls)


async def test_large_orders_of_all_workers_share_memory_and_small_ones_do_not_wait_for_it(desk: Desk) -> None:
    await desk.add("small", 1000)
    size = SENDING_BYTES // SENDING_COST // 4
    await desk.add("large", size)
    for worker in "abcdefgh":
        desk.dispatch.submit([await desk.start(worker, "large")])
    async with desk.dispatch.budget.acquire("somebody", SENDING_BYTES):
        desk.dispatch.submit([await desk.start("quick", "small")])
        await desk.sent(1)
        assert [worker for worker, _, _ in desk.fleet.calls] == ["quick"]
    await desk.sent(9)
    assert size * SENDING_COST <= max(desk.fleet.held) <= SENDING_BYTES
    assert desk.dispatch.budget.peak <= SENDING_BYTES


async def test_the_newest_hint_goes_behind_the_starts_and_only_to_a_worker_that_takes_hints(desk: Desk) -> None:
    await desk.add("small", 1000)
    await desk.add("huge", SMALL_ORDERS_BYTES + 1)
    for worker in ("older", "w"):
        hints = [FetchAhead(StepKey(step), 0, BuilderId(worker)) for step in ("huge", "small")]
        desk.dispatch.submit([hints[0], await desk.start(worker, "small"), hints[1]])
    await desk.sent(2)
    while not desk.fleet.hints:
        await desk.fleet.called.wait()
        desk.fleet.called.clear()
    # What the coordinator does not know any more, or would take much memory for, is no hint, and no trouble.
    for step in ("forgotten", "huge"):
        desk.dispatch.submit([FetchAhead(StepKey(step), 0, BuilderId("w"))])
        desk.dispatch.submit([await desk.start("w", "small")])
        await desk.sent(1)
    [(worker, hint, after)] = desk.fleet.hints
    assert (worker, hint.step) == ("w", "small")
    assert [worker for worker, _, _ in desk.fleet.calls[:after]].count("w") == 1
