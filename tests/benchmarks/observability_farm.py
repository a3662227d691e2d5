"""The coordinator of `bench observability`: the real one, with one submission over an agent that is a stand-in.

    python -m tests.benchmarks.observability_farm build PLAN
    python -m tests.benchmarks.observability_farm seed  PLAN
    python -m tests.benchmarks.observability_farm serve PLAN

PLAN is a `restart_farm.Plan`. `build` says where it answers as one line of JSON (`Place`), once the submission is in
and and some of it is built. Then `build N` on standard input builds N more and is answered with the time at which it
was asked, by the clock that all processes of a machine share, and their steps.

`seed` leaves a state directory as `restart_farm` does, with the timings of as many attempts as there are steps; `serve`
starts on it and says where it answers.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from pathlib import Path
from typing import Final

import uvloop
from pydantic import BaseModel, ConfigDict

from coordinator.config import LimitSettings
from coordinator.http import connections
from coordinator.main import Coordinator, open_coordinator
from coordinator.stores.timings import AttemptTiming, Measured, TimingStore
from infra.nix.nar import NarData, NarFile, write_events
from infra.nix.store_path import package_of
from infra.objects.nar_writer import upload_nar
from infra.objects.store import ObjectStore, open_object_store
from tests.benchmarks.restart_farm import HEARTBEAT_S, REPORTED, SYSTEM, WORKER, Leases, Plan, StandIn, seed, submit
from tests.support.cache import narinfo_of
from workers.wire.fleet import Fleet, Sink, WorkerConnected, WorkerSpoke
from workers.wire.messages import FarmInfo, LeaseOrder, Output, Report, Succeeded

#: Watchers that the bench opens, and some for others.
WATCHERS: Final = 2_100
#: Seconds after which a client that takes nothing is left; 300 would keep the bench waiting.
UNREAD_S: Final = 5.0
#: Workers of the seeded timings, slots of each, and rows of one transaction.
TIMED_WORKERS: Final = 40
TIMED_SLOTS: Final = 16
SAVED: Final = 2_000
#: Seconds after which a worker that has nothing to build looks for orders again.
ORDERS_WITHIN_S: Final = 0.02
#: Builds whose outputs it has before they are asked for.
PREPARED: Final = 8


class Place(BaseModel):
    """Where the coordinator is, and what it has."""

    model_config = ConfigDict(frozen=True)

    url: str
    token_file: Path
    submission: str
    pid: int


class BuildingStandIn(StandIn):
    """A stand-in that builds what `build` asks for: its outputs lie in the object store, and are published.

    The outputs of what it may be asked for are made before, so that a report costs the coordinator and nothing else.
    Steps of other submissions it builds only where they would leave it none of its own.
    """

    def __init__(self, plan: Plan, objects: ObjectStore) -> None:
        plan.leases_file.write_text(Leases().model_dump_json())
        super().__init__(plan)
        self._objects = objects
        #: Steps that `build` may mean; None while those are all.
        self.own: frozenset[str] | None = None
        self._orders: dict[str, int] = {}
        #: Outputs that lie in the object store, by step.
        self._outputs: dict[str, Output] = {}
        self._asked = asyncio.Event()
        self._reached = asyncio.Event()
        self._left = 0
        self._last = 0
        self._built: list[str] = []

    async def run(self, sink: Sink) -> None:
        """See `Fleet`."""
        await sink(WorkerConnected(self.hello()))
        # Beside the reports: its threads are those of the coordinator, which a crowd keeps busy.
        preparing = asyncio.create_task(self._prepare())
        try:
            await self._report_to(sink)
        finally:
            preparing.cancel()

    async def _report_to(self, sink: Sink) -> None:
        while True:
            own = self._ready(self._own_orders())[: min(REPORTED, self._left)]
            reports = [self._report(step) for step in own or self._in_the_way()]
            self._last += len(reports)
            await sink(WorkerSpoke(WORKER, self.batch(self._last, reports)))
            self._left -= len(own)
            self._built += own
            if not self._left:
                self._reached.set()
                self._asked.clear()
            if not reports:
                with suppress(TimeoutError):
                    async with asyncio.timeout(ORDERS_WITHIN_S if self._left or self._lacks() else HEARTBEAT_S):
                        await (self._asked.wait() if not self._left else asyncio.sleep(ORDERS_WITHIN_S))

    async def build(self, count: int) -> list[str]:
        """Build so many more, and return them once they are reported."""
        self._left += count
        self._built = []
        self._reached.clear()
        self._asked.set()
        await self._reached.wait()
        return self._built

    async def start_many(self, worker: str, orders: Sequence[LeaseOrder]) -> None:
        """See `Fleet`."""
        await super().start_many(worker, orders)
        self._orders.update({order.step: order.attempt for order in orders})

    def _own_orders(self) -> list[str]:
        return [step for step in self._orders if self.own is None or step in self.own]

    def _lacks(self) -> bool:
        return len(self._own_orders()) < PREPARED < len(self._orders)

    def _ready(self, steps: Sequence[str]) -> list[str]:
        return [step for step in steps if step in self._outputs]

    async def _prepare(self) -> None:
        """Make the outputs of what may be asked for next, and of one that may be in the way."""
        while True:
            wanted = self._own_orders()[: max(PREPARED, min(REPORTED, self._left))]
            for step in [*wanted, *self._others()[:1]]:
                if step in self._orders and step not in self._outputs:
                    nar = await upload_nar(self._objects, _nar(step))
                    self._outputs[step] = Output.of("out", narinfo_of(f"/nix/store/{step}", nar))
            await asyncio.sleep(ORDERS_WITHIN_S)

    def _others(self) -> list[str]:
        return [step for step in self._orders if self.own is not None and step not in self.own]

    def _in_the_way(self) -> list[str]:
        """Return another submission's step that is to be built so that one of its own may come, if that is needed."""
        return self._ready(self._others())[:1] if not self._left and self._lacks() else []

    def _report(self, step: str) -> Report:
        now = time.time()
        self.let_go(step)
        return Report(
            step=step, attempt=self._orders.pop(step), started_at=now, building_at=now, built_at=now, ended_at=now,
            result=Succeeded(outputs=(self._outputs.pop(step),)),
        )  # fmt: skip


async def _nar(step: str) -> AsyncIterator[bytes]:
    text = step.encode()
    yield b"".join(write_events([NarFile(b"", False, len(text)), NarData(text)]))


async def _commands() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def seed_with_timings(plan: Plan) -> None:
    """Leave a state directory whose timings have an attempt for each step: of the built ones, some more than one."""
    began = time.time()
    submission, built = await seed(plan)
    store = TimingStore.open(plan.settings.database_url("timings"))
    try:
        await store.prepare()
        rows = _timings(submission, [str(lease.step) for lease in built], plan.steps, began, time.time())
        for first in range(0, len(rows), SAVED):
            await store.save(rows[first : first + SAVED])
    finally:
        await store.close()


def _timings(submission: str, steps: Sequence[str], count: int, since: float, until: float) -> list[AttemptTiming]:
    """Make attempts that keep the slots of `TIMED_WORKERS` workers busy; what comes round again had failed before."""
    slots = TIMED_WORKERS * TIMED_SLOTS
    each_s = (until - since) * slots / count
    rows = []
    for number in range(count):
        turn, slot = divmod(number, slots)
        step = steps[number % len(steps)]
        leased_at = since + turn * each_s
        again = number + len(steps) < count
        name = step.partition("-")[2]
        rows.append(
            AttemptTiming(
                step=step, attempt=2 - again if number >= len(steps) or again else 1, recipe=0, name=name,
                package=package_of(name), system=SYSTEM, worker=f"builder-{slot // TIMED_SLOTS}", isolation="A",
                submitted_at=since, ready_at=leased_at - each_s / 2, leased_at=leased_at,
                built_at=leased_at + 0.8 * each_s, ended_at=leased_at + 0.9 * each_s,
                outcome="retried" if again else "done", reason="infrastructure" if again else None,
                build_s=0.7 * each_s, cpu_s=0.6 * each_s, peak_memory_bytes=100 << 20, output_bytes=200,
                wanted_by=submission,
                measured=Measured(spans=[("inputs", leased_at, 0.1 * each_s), ("build", leased_at, 0.7 * each_s)]),
            )
        )  # fmt: skip
    return rows


async def serve_seeded(plan: Plan) -> None:
    """Run on what `seed` left until killed."""
    fleet: Fleet = StandIn(plan)
    async with open_coordinator(plan.settings, lambda _info: nullcontext(fleet)) as coordinator:
        print(_place(coordinator).model_dump_json(), flush=True)
        await asyncio.get_running_loop().create_future()


def _place(coordinator: Coordinator) -> Place:
    (row,) = coordinator.views.submissions_after("", 1)
    ready = coordinator.ready
    return Place(url=ready.url, token_file=ready.token_file, submission=row.id, pid=os.getpid())


async def build(plan: Plan) -> None:
    """Run until standard input ends."""
    plan.state_dir.mkdir(parents=True, exist_ok=True)
    agents: list[BuildingStandIn] = []

    def fleet(info: FarmInfo) -> AbstractAsyncContextManager[Fleet]:
        agents.append(BuildingStandIn(plan, open_object_store(info.object_store_url)))
        return nullcontext(agents[0])

    connections.UNREAD_S = UNREAD_S  # type: ignore[misc]
    connections.raise_descriptor_limit()
    settings = plan.settings.model_copy(update={"limits": LimitSettings(watchers=WATCHERS, connections=8192)})
    async with open_coordinator(settings, fleet) as coordinator:
        # Before those of others: they would take all slots, of which the stand-in never gives one back.
        submission = await submit(coordinator, plan.steps, priority=1)
        agents[0].own = frozenset(coordinator.views.submission(submission).members)
        await agents[0].build(plan.before)
        print(_place(coordinator).model_dump_json(), flush=True)
        commands = await _commands()
        while line := await commands.readline():
            began = time.monotonic()
            built = await agents[0].build(int(line.split()[1]))
            print(began, *built, flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        modes = {"build": build, "seed": seed_with_timings, "serve": serve_seeded}
        runner.run(modes[sys.argv[1]](Plan.model_validate_json(sys.argv[2])))
