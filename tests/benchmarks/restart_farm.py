"""The coordinator of `bench restart`: the real one, as a program that can be killed, over an agent that is there.

    python -m tests.benchmarks.restart_farm seed  PLAN     submit, write some builds, print "seeded"
    python -m tests.benchmarks.restart_farm serve PLAN     start on what is there, print "ready", wait to be killed

The worker is a stand-in: it takes leases at once and lists in its first greeting those that it holds, as an agent does
that outlived a coordinator. The submission goes through real intake; the builds that have happened are facts of the
real core in the real journal, with a snapshot that the coordinator's own process makes. Their outputs are in no cache,
because thousands of publications would take minutes and no start looks for them. PLAN is JSON, see `Plan`.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Final

import uvloop
from pydantic import BaseModel, ConfigDict

from coordinator.api.requests import RootRequest, SubmitRequest
from coordinator.api.sent_streams import encode_derivations
from coordinator.caches import housekeeping
from coordinator.caches.housekeeping import SUBMISSION
from coordinator.config import Settings
from coordinator.engine.compaction import Compactor
from coordinator.intake.submissions import Submissions
from coordinator.journal.codec import Evidence, encode_evidence
from coordinator.journal.journal import Journal
from coordinator.journal.takeover import lead_journal
from coordinator.main import Coordinator, open_coordinator
from infra.nix.hashing import sha256_text
from infra.nix.narinfo import NarInfo, StoredNar
from infra.nix.path_info import PathInfo
from infra.objects.compression import nar_key
from scheduler import events as e
from scheduler.effects import StartBuild
from scheduler.farm import Farm
from scheduler.model import BuilderId, BuilderSpec, Instant, LeaseId, StepKey
from tests.support.graphs import Made, Maker
from tests.support.local_fleet import no_workers
from workers.wire.fleet import Fleet, Sink, WorkerConnected, WorkerSpoke
from workers.wire.grades import IsolationGrade
from workers.wire.messages import (
    PROTOCOL_VERSION,
    AgentEvent,
    Batch,
    HeldLease,
    Hello,
    InputHint,
    Lease,
    LeaseOrder,
    Output,
    Stage,
)

LAYERS: Final = 100
NEEDS: Final = 3
WORKER: Final = "stand-in"
INCARNATION: Final = "1"
SYSTEM: Final = "x86_64-linux"
#: Builds in one append.
REPORTED: Final = 64
#: Seconds between two heartbeats, and to wait for housekeeping.
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
    #: Address of an empty database of PostgreSQL for all that the coordinator stores; empty: SQLite.
    database_url: str = ""

    @property
    def settings(self) -> Settings:
        """Settings of the coordinator."""
        return Settings(
            state_dir=self.state_dir,
            port=0,
            journal_database_url=self.database_url,
            derivations_database_url=self.database_url,
            cache_database_url=self.database_url,
            timings_database_url=self.database_url,
        )

    @property
    def leases_file(self) -> Path:
        """What the worker holds, as it keeps it on its own disk."""
        return self.state_dir / "stand-in.json"


class Leases(BaseModel):
    """Leases as the worker keeps them on its own disk."""

    held: dict[str, int] = {}


class StandIn:
    """One worker that is reached at once, as a fleet. It keeps what it holds."""

    def __init__(self, plan: Plan) -> None:
        #: Step -> attempt, oldest first.
        self._held = Leases.model_validate_json(plan.leases_file.read_bytes()).held
        self._capacity = len(self._held) + plan.held
        self.trouble = ""

    async def run(self, sink: Sink) -> None:
        """See `Fleet`."""
        await sink(WorkerConnected(self.hello()))
        while True:
            await sink(WorkerSpoke(WORKER, self.batch(0, ())))
            await asyncio.sleep(HEARTBEAT_S)

    def hello(self) -> Hello:
        return Hello(
            protocol=PROTOCOL_VERSION,
            worker=WORKER,
            incarnation=INCARNATION,
            systems=(SYSTEM,),
            emulated=(),
            features=(),
            mandatory_features=(),
            slots=self._capacity,
            capacity=self._capacity,
            isolation=IsolationGrade(level="A"),
            nix_version="2.8.0",
            leases=self._leases(),
        )

    def batch(self, last: int, events: Sequence[AgentEvent]) -> Batch:
        return Batch(
            incarnation=INCARNATION, last=last, events=tuple(events), capacity=self._capacity, leases=self._leases()
        )

    def let_go(self, step: str) -> None:
        self._held.pop(step, None)

    async def start_many(self, worker: str, orders: Sequence[LeaseOrder]) -> None:  # noqa: ARG002
        """See `Fleet`."""
        for order in orders:
            self._held[order.step] = order.attempt

    async def cancel(self, worker: str, leases: Sequence[Lease]) -> None:  # noqa: ARG002
        """See `Fleet`."""
        for lease in leases:
            self._held.pop(lease.step, None)

    async def drain(self, worker: str, *, on: bool) -> None:
        """See `Fleet`."""

    async def fetch_ahead(self, worker: str, hint: InputHint) -> None:
        """See `Fleet`."""

    async def provide(self, worker: str, paths: Sequence[str], token: str) -> tuple[Output, ...]:  # noqa: ARG002
        """See `Fleet`."""
        return ()

    def _leases(self) -> tuple[HeldLease, ...]:
        return tuple(HeldLease(step=step, attempt=number, stage=Stage.BUILDING) for step, number in self._held.items())


class PastBuilds:
    """Builds of the stand-in that a journal is to hold: decided by the core, appended in batches."""

    def __init__(self, journal: Journal, plan: Plan) -> None:
        self._journal = journal
        self._plan = plan
        self._farm = Farm()
        self._running: deque[LeaseId] = deque()
        self.built: list[LeaseId] = []

    async def write(self) -> dict[str, int]:
        """Write them all, with a snapshot between; return what the worker still holds."""
        async for piece in self._journal.load():
            self._farm.replay(piece.facts)
        self._farm.resume(_now())
        spec = BuilderSpec(BuilderId(WORKER), INCARNATION, frozenset({SYSTEM}))
        await self._append(e.BuilderJoined(spec, self._plan.held))
        await self._build(self._plan.before)
        await Compactor(self._plan.settings.database_url("journal"), self._journal).snapshot()
        await self._build(self._plan.after)
        return {lease.step: lease.attempt for lease in self._running}

    async def _build(self, count: int) -> None:
        while count > 0 and self._running:
            leases = [self._running.popleft() for _ in range(min(REPORTED, count, len(self._running)))]
            count -= len(leases)
            self.built += leases
            await self._append(*(e.BuildSucceeded(lease, BuilderId(WORKER), _evidence(lease.step)) for lease in leases))
            await self._append(*(e.OutputsPublished(lease) for lease in leases))

    async def _append(self, *events: e.Event) -> None:
        facts, effects = self._farm.handle_many(events, _now())
        self._running.extend(effect.lease for effect in effects if isinstance(effect, StartBuild))
        await self._journal.append([fact for fact in facts if fact.durable])


def _now() -> Instant:
    return Instant(time.time())


def _evidence(step: StepKey) -> bytes:
    digest = sha256_text(sha256(step.encode()).digest())
    stored = StoredNar(nar_key(digest, "zstd"), "zstd", digest, 120)
    output = Output.of("out", NarInfo(PathInfo(f"/nix/store/{step}", digest, 200), stored))
    return encode_evidence(Evidence((output,), "A"))


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


async def submit(coordinator: Coordinator, steps: int, *, priority: int = 0) -> str:
    """Submit a layered graph; returns the submission's id."""
    everything, roots = await asyncio.to_thread(layered, steps)

    async def pieces() -> AsyncIterator[bytes]:
        for piece in encode_derivations((made.name, made.data) for made in everything):
            yield piece

    await coordinator.intake.add_derivations(pieces())
    wanted = tuple(RootRequest(attr=made.name, drv=made.drv) for made in roots)
    submissions = Submissions(coordinator.engine, coordinator.views, coordinator.intake)
    await submissions.submit(SubmitRequest(roots=wanted, label="bench", priority=priority))
    (row,) = coordinator.views.submissions_after("", 1)
    return row.id


async def _is_kept(coordinator: Coordinator) -> bool:
    return any(root.kind == SUBMISSION for root in await coordinator.cache.roots())


async def seed(plan: Plan) -> tuple[str, list[LeaseId]]:
    """Leave the state directory of a coordinator that was killed while the submission was in flight.

    Returns the submission's id and what has been built.
    """
    plan.state_dir.mkdir(parents=True, exist_ok=True)
    # A root is declared at the next look, which comes once a minute.
    housekeeping.GAUGES_S = 1.0  # type: ignore[misc]
    async with open_coordinator(plan.settings, no_workers) as coordinator:
        submission = await submit(coordinator, plan.steps)
        async with asyncio.timeout(SETTLED_WITHIN_S):
            # A submission in flight is among the roots of the cache.
            while not await _is_kept(coordinator):  # noqa: ASYNC110
                await asyncio.sleep(0.5)
    async with lead_journal(plan.settings, nullcontext(lambda: None), lambda: None) as lead:
        past = PastBuilds(lead.journal, plan)
        held = await past.write()
    plan.leases_file.write_text(Leases(held=held).model_dump_json())
    print("seeded", flush=True)
    return submission, past.built


async def serve(plan: Plan) -> None:
    """Run until killed."""
    fleet: Fleet = StandIn(plan)
    async with open_coordinator(plan.settings, lambda _info: nullcontext(fleet)):
        print("ready", flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run({"seed": seed, "serve": serve}[sys.argv[1]](Plan.model_validate_json(sys.argv[2])))
