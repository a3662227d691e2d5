"""The coordinator of `bench restart`: the real one, as a program that can be killed, over an agent that is there.

    python -m tests.benchmarks.restart_farm seed  PLAN     submit, build some, say "seeded", wait to be killed
    python -m tests.benchmarks.restart_farm serve PLAN     start on what is there, say "ready", wait to be killed

Only the worker is a stand-in: it takes leases at once and says on its first greeting which ones it holds, as an agent
does that outlived a coordinator. What it reports as built lies in the real object store and is verified, signed and
published. PLAN is JSON, see `Plan`.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Final

import uvloop
from pydantic import BaseModel, ConfigDict

from coordinator.api.requests import RootRequest, SubmitRequest
from coordinator.api.streams import encode_derivations
from coordinator.caches.housekeeping import SUBMISSION
from coordinator.config import Settings
from coordinator.engine.compaction import SNAPSHOT_FACTS
from coordinator.intake.submissions import Submissions
from coordinator.main import Coordinator, open_coordinator
from infra.nix.nar import NarData, NarFile, write_events
from infra.objects.nar_writer import upload_nar
from infra.objects.store import ObjectStore, open_object_store
from tests.support.cache import narinfo_of
from tests.support.graphs import Made, Maker
from workers.wire.fleet import Fleet, Sink, WorkerConnected, WorkerSpoke
from workers.wire.grades import IsolationGrade
from workers.wire.messages import (
    PROTOCOL_VERSION,
    AgentEvent,
    Batch,
    FarmInfo,
    HeldLease,
    Hello,
    Lease,
    LeaseOrder,
    Output,
    Report,
    Stage,
    Succeeded,
)

LAYERS: Final = 100
NEEDS: Final = 3
WORKER: Final = "stand-in"
INCARNATION: Final = "1"
#: Builds reported in one batch.
REPORTED: Final = 64
#: Seconds between two heartbeats, and to wait for snapshot and housekeeping.
HEARTBEAT_S: Final = 1.0
SETTLED_WITHIN_S: Final = 300.0


class Plan(BaseModel):
    """Contents of a state directory to make."""

    model_config = ConfigDict(frozen=True)

    state_dir: Path
    steps: int
    #: Builds before the snapshot and after it.
    before: int
    after: int
    #: Leases that the worker holds when the coordinator is killed; afterwards it takes as many again.
    held: int

    @property
    def settings(self) -> Settings:
        """Settings of the coordinator."""
        return Settings(state_dir=self.state_dir, port=0)


class Leases(BaseModel):
    """Leases as the worker keeps them on its own disk."""

    held: dict[str, int] = {}


class StandIn:
    """One worker that is reached at once, as a fleet. It builds only what `build` tells it to."""

    def __init__(self, plan: Plan, objects: ObjectStore) -> None:
        self._file = plan.state_dir / "stand-in.json"
        self._objects = objects
        #: Step -> attempt, oldest first.
        self._held = Leases.model_validate_json(self._file.read_bytes()).held if self._file.exists() else {}
        self._orders: dict[str, LeaseOrder] = {}
        self._capacity = len(self._held) + plan.held
        self._more = asyncio.Event()
        self._wanted = 0
        self._built = 0
        self._reached = asyncio.Event()
        self._last = 0
        self.trouble = ""

    async def run(self, sink: Sink) -> None:
        """See `Fleet`."""
        hello = Hello(
            protocol=PROTOCOL_VERSION,
            worker=WORKER,
            incarnation=INCARNATION,
            systems=("x86_64-linux",),
            emulated=(),
            features=(),
            mandatory_features=(),
            slots=self._capacity,
            capacity=self._capacity,
            isolation=IsolationGrade(level="A"),
            nix_version="2.8.0",
            leases=self._leases(),
        )
        await sink(WorkerConnected(hello))
        while True:
            said = await self._reports()
            await sink(WorkerSpoke(WORKER, self._batch(said)))
            self._built += len(said)
            if self._built >= self._wanted:
                self._reached.set()
                self._more.clear()
            if not said:
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        await self._more.wait()
                except TimeoutError:
                    pass

    async def build(self, count: int) -> None:
        """Build so many more, and return once they are reported."""
        self._wanted += count
        self._reached.clear()
        self._more.set()
        await self._reached.wait()

    def save(self) -> None:
        """Write down what is held."""
        self._file.write_text(Leases(held=self._held).model_dump_json())

    async def start_many(self, worker: str, orders: Sequence[LeaseOrder]) -> None:  # noqa: ARG002
        """See `Fleet`."""
        for order in orders:
            self._held[order.step] = order.attempt
            self._orders[order.step] = order
        if self._built < self._wanted:
            self._more.set()

    async def cancel(self, worker: str, leases: Sequence[Lease]) -> None:  # noqa: ARG002
        """See `Fleet`."""
        for lease in leases:
            self._held.pop(lease.step, None)

    async def drain(self, worker: str, *, on: bool) -> None:
        """See `Fleet`."""

    async def provide(self, worker: str, paths: Sequence[str], token: str) -> tuple[Output, ...]:  # noqa: ARG002
        """See `Fleet`."""
        return ()

    def _leases(self) -> tuple[HeldLease, ...]:
        return tuple(HeldLease(step=step, attempt=number, stage=Stage.BUILDING) for step, number in self._held.items())

    def _batch(self, said: Sequence[AgentEvent]) -> Batch:
        self._last += len(said)
        return Batch(
            incarnation=INCARNATION,
            last=self._last,
            events=tuple(said),
            capacity=self._capacity,
            leases=self._leases(),
        )

    async def _reports(self) -> list[Report]:
        """Finish some of the builds that are wanted."""
        count = min(REPORTED, self._wanted - self._built, len(self._orders))
        now = time.time()
        reports = []
        for step in list(self._orders)[:count]:
            del self._orders[step]
            path = f"/nix/store/{step}"
            nar = await upload_nar(self._objects, _nar(step))
            output = Output.of("out", narinfo_of(path, nar))
            reports.append(
                Report(
                    step=step,
                    attempt=self._held.pop(step),
                    started_at=now,
                    building_at=now,
                    built_at=now,
                    ended_at=now,
                    result=Succeeded(outputs=(output,)),
                )
            )
        return reports


async def _nar(step: str) -> AsyncIterator[bytes]:
    text = step.encode()
    yield b"".join(write_events([NarFile(b"", False, len(text)), NarData(text)]))


def layered(steps: int, seed: int = 1) -> tuple[list[Made], list[Made]]:
    """Derivations in 100 layers, each with three inputs in the layer below, and those that nothing needs."""
    chance = random.Random(seed)
    maker = Maker()
    everything: list[Made] = []
    below: list[Made] = []
    used: set[str] = set()
    for layer in range(LAYERS):
        here = []
        for index in range(steps // LAYERS):
            inputs = chance.sample(below, NEEDS) if below else []
            used.update(each.drv for each in inputs)
            paths = " ".join(each.outputs["out"] for each in inputs)
            name = f"package-{layer}-{index}.{chance.randint(0, 99)}"
            here.append(maker.plain(name, inputs, buildInputs=paths, buildPhase="runHook preBuild\n" * 8))
        everything += here
        below = here
    return everything, [made for made in everything if made.drv not in used]


async def _submit(coordinator: Coordinator, steps: int) -> None:
    everything, roots = layered(steps)

    async def pieces() -> AsyncIterator[bytes]:
        for piece in encode_derivations((made.name, made.data) for made in everything):
            yield piece

    await coordinator.intake.add_derivations(pieces())
    wanted = tuple(RootRequest(attr=made.name, drv=made.drv) for made in roots)
    submissions = Submissions(coordinator.engine, coordinator.views, coordinator.intake)
    await submissions.submit(SubmitRequest(roots=wanted, label="bench"))


async def _is_kept(coordinator: Coordinator) -> bool:
    return any(root.kind == SUBMISSION for root in await coordinator.cache.roots())


async def main(mode: str, plan: Plan) -> None:
    """Run until killed."""
    plan.state_dir.mkdir(parents=True, exist_ok=True)
    agent: StandIn | None = None

    def fleet(info: FarmInfo) -> AbstractAsyncContextManager[Fleet]:
        nonlocal agent
        agent = StandIn(plan, open_object_store(info.object_store_url))
        return nullcontext(agent)

    async with open_coordinator(plan.settings, fleet) as coordinator:
        assert agent is not None
        if mode == "seed":
            await _submit(coordinator, plan.steps)
            await agent.build(plan.before)
            async with asyncio.timeout(SETTLED_WITHIN_S):
                # A submission in flight has a snapshot behind it, and is among the roots of the cache.
                while coordinator.journal.tail >= SNAPSHOT_FACTS or not await _is_kept(coordinator):  # noqa: ASYNC110
                    await asyncio.sleep(0.5)
            await agent.build(plan.after)
            # The last reports are published and their successors leased.
            await asyncio.sleep(HEARTBEAT_S)
            agent.save()
        print("seeded" if mode == "seed" else "ready", flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1], Plan.model_validate_json(sys.argv[2])))
