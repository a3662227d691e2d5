"""The coordinator of `bench observability`: the real one, with one submission over an agent that is a stand-in.

    python -m tests.benchmarks.observability_farm PLAN

PLAN is a `restart_farm.Plan`. Says where it answers as one line of JSON (`Place`), once the submission is in and some
of it is built. Then `build N` on standard input builds N more and is answered with the time of their report, by the
clock that all processes of a machine share.
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
from coordinator.main import open_coordinator
from infra.nix.nar import NarData, NarFile, write_events
from infra.objects.nar_writer import upload_nar
from infra.objects.store import ObjectStore, open_object_store
from tests.benchmarks.restart_farm import HEARTBEAT_S, REPORTED, WORKER, Leases, Plan, StandIn, submit
from tests.support.cache import narinfo_of
from workers.wire.fleet import Fleet, Sink, WorkerConnected, WorkerSpoke
from workers.wire.messages import FarmInfo, LeaseOrder, Output, Report, Succeeded

#: Watchers that the bench opens, and some for others.
WATCHERS: Final = 2_100
#: Seconds after which a client that takes nothing is left; 300 would keep the bench waiting.
UNREAD_S: Final = 5.0
#: Seconds after which a worker that has nothing to build looks for orders again.
ORDERS_WITHIN_S: Final = 0.02


class Place(BaseModel):
    """Where the coordinator is, and what it has."""

    model_config = ConfigDict(frozen=True)

    url: str
    token_file: Path
    submission: str
    pid: int


class BuildingStandIn(StandIn):
    """A stand-in that builds what `build` asks for: its outputs lie in the object store, and are published."""

    def __init__(self, plan: Plan, objects: ObjectStore) -> None:
        plan.leases_file.write_text(Leases().model_dump_json())
        super().__init__(plan)
        self._objects = objects
        self._orders: dict[str, int] = {}
        self._asked = asyncio.Event()
        self._reached = asyncio.Event()
        self._left = 0
        self._last = 0

    async def run(self, sink: Sink) -> None:
        """See `Fleet`."""
        await sink(WorkerConnected(self.hello()))
        while True:
            reports = await self._reports()
            self._last += len(reports)
            await sink(WorkerSpoke(WORKER, self.batch(self._last, reports)))
            self._left -= len(reports)
            if not self._left:
                self._reached.set()
                self._asked.clear()
            if not reports:
                with suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_S if not self._left else ORDERS_WITHIN_S):
                        await (self._asked.wait() if not self._left else asyncio.sleep(ORDERS_WITHIN_S))

    async def build(self, count: int) -> None:
        """Build so many more, and return once they are reported."""
        self._left += count
        self._reached.clear()
        self._asked.set()
        await self._reached.wait()

    async def start_many(self, worker: str, orders: Sequence[LeaseOrder]) -> None:
        """See `Fleet`."""
        await super().start_many(worker, orders)
        self._orders.update({order.step: order.attempt for order in orders})

    async def _reports(self) -> list[Report]:
        now = time.time()
        reports = []
        for step in list(self._orders)[: min(REPORTED, self._left)]:
            nar = await upload_nar(self._objects, _nar(step))
            output = Output.of("out", narinfo_of(f"/nix/store/{step}", nar))
            reports.append(
                Report(
                    step=step, attempt=self._orders.pop(step), started_at=now, building_at=now, built_at=now,
                    ended_at=now, result=Succeeded(outputs=(output,)),
                )
            )  # fmt: skip
            self.let_go(step)
        return reports


async def _nar(step: str) -> AsyncIterator[bytes]:
    text = step.encode()
    yield b"".join(write_events([NarFile(b"", False, len(text)), NarData(text)]))


async def _commands() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def main(plan: Plan) -> None:
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
        await submit(coordinator, plan.steps)
        await agents[0].build(plan.before)
        (row,) = coordinator.views.submissions_after("", 1)
        ready = coordinator.ready
        place = Place(url=ready.url, token_file=ready.token_file, submission=row.id, pid=os.getpid())
        print(place.model_dump_json(), flush=True)
        commands = await _commands()
        while line := await commands.readline():
            began = time.monotonic()
            await agents[0].build(int(line.split()[1]))
            print(began, flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Plan.model_validate_json(sys.argv[1])))
