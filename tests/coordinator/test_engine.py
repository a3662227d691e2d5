"""The engine beside workers that lie, repeat themselves or do not answer, and a journal that fails.

The worker here is a script on the fleet port; everything else is real.
"""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from coordinator.api.models import StepStatus, SubmissionState
from coordinator.api.requests import SubmitRequest
from coordinator.client.errors import RefusedError
from coordinator.config import ConfigError, Settings
from coordinator.engine.inbox import LARGE_STEPS
from coordinator.journal.codec import StoredNote
from coordinator.journal.errors import JournalError
from coordinator.main import Ready
from coordinator.run import serve
from infra.nix.nar import NarData, NarFile, write_events
from infra.objects.nar_writer import upload_nar
from infra.objects.store import open_object_store
from scheduler.ended_leases import LATE_S
from scheduler.events import SubmissionCancelled, SubmissionReceived
from scheduler.model import Recipe, Requirements, StepKey, StepSpec, SubmissionId, SubmissionRefusedError
from tests.coordinator.conftest import OpenedFarm, OpenFarm
from tests.support.cache import narinfo_of
from tests.support.patience import PATIENCE_S
from workers.wire.fleet import (
    Fleet,
    FleetError,
    FleetEvent,
    Sink,
    WorkerConnected,
    WorkerGone,
    WorkerSilent,
    WorkerSpoke,
)
from workers.wire.grades import IsolationGrade
from workers.wire.messages import (
    AgentEvent,
    Batch,
    Failed,
    FarmInfo,
    HeldLease,
    Hello,
    InputHint,
    Lease,
    LeaseOrder,
    LogChunk,
    Output,
    Report,
    Stage,
    StageChange,
    Succeeded,
)

ONE = 'rec { one = run "one" "echo > $out"; two = run "two" "echo ${one} > $out"; }'


class ManualClock:
    """Goes on only when it is told to."""

    def __init__(self) -> None:
        self.time = 1_700_000_000.0

    def now(self) -> float:
        return self.time


class ScriptedWorker:
    """The fleet port with one worker, `w`, that does what a test says."""

    def __init__(self) -> None:
        self.orders: list[LeaseOrder] = []
        self.cancelled: list[Lease] = []
        self.unreachable = False
        self.trouble = ""
        self.info = FarmInfo(cache_url="", public_keys=(), object_store_url="")
        self._sink: asyncio.Future[Sink] | None = None
        self._last = 0

    @asynccontextmanager
    async def start(self, info: FarmInfo) -> AsyncIterator[Fleet]:
        self.info = info
        self._sink = asyncio.get_running_loop().create_future()
        yield self

    async def run(self, sink: Sink) -> None:
        assert self._sink is not None
        self._sink.set_result(sink)
        await asyncio.Event().wait()

    async def start_many(self, worker: str, orders: Sequence[LeaseOrder]) -> None:
        assert worker == "w"
        if self.unreachable:
            raise FleetError("no answer")
        self.orders.extend(orders)

    async def cancel(self, worker: str, leases: Sequence[Lease]) -> None:
        if worker == "w":
            self.cancelled.extend(leases)

    async def drain(self, worker: str, *, on: bool) -> None:
        raise FleetError(f"{worker} cannot drain {on}")

    async def fetch_ahead(self, worker: str, hint: InputHint) -> None:
        raise FleetError(f"{worker} takes no hints such as {hint.step}")

    async def provide(self, worker: str, paths: Sequence[str], token: str) -> tuple[Output, ...]:
        raise FleetError(f"{worker} has none of {paths} for {token}")

    async def tell(self, event: FleetEvent) -> None:
        assert self._sink is not None
        await (await self._sink)(event)

    async def hello(
        self,
        incarnation: str = "1",
        leases: tuple[HeldLease, ...] = (),
        isolation: IsolationGrade | None = IsolationGrade(level="A"),  # noqa: B008 - it is frozen
        *,
        name: str = "w",
        systems: tuple[str, ...] = ("x86_64-linux",),
        network: bool = True,
    ) -> None:
        hello = Hello(
            protocol=1, worker=name, incarnation=incarnation, systems=systems, emulated=(), features=(),
            mandatory_features=(), slots=1, capacity=1, nix_version="2.8", leases=leases,
            isolation=isolation, network=network,
        )  # fmt: skip
        await self.tell(WorkerConnected(hello))

    async def speak(
        self,
        *events: AgentEvent,
        holds: Sequence[LeaseOrder] = (),
        incarnation: str = "1",
        isolation: IsolationGrade | None = None,
        name: str = "w",
    ) -> None:
        self._last += len(events)
        leases = tuple(HeldLease(step=o.step, attempt=o.attempt, stage=Stage.BUILDING) for o in holds)
        batch = Batch(
            incarnation=incarnation, last=self._last, events=events, capacity=1, leases=leases, isolation=isolation
        )
        await self.tell(WorkerSpoke(name, batch))

    async def upload(self, path: str, text: bytes = b"made") -> Output:
        async def nar() -> AsyncIterator[bytes]:
            yield b"".join(write_events([NarFile(b"", executable=False, size=len(text)), NarData(text)]))

        made = await upload_nar(open_object_store(self.info.object_store_url), nar())
        return Output.of("out", narinfo_of(path, made))


def report(order: LeaseOrder, result: Succeeded | Failed) -> Report:
    return Report(
        step=order.step, attempt=order.attempt, started_at=1, building_at=1, built_at=2, ended_at=2, result=result
    )


async def started(farm: OpenedFarm, worker: ScriptedWorker, count: int = 1) -> LeaseOrder:
    """Wait until that many orders have reached the worker; returns the last."""
    await farm.until(lambda: len(worker.orders) >= count)
    return worker.orders[-1]


def output_path(farm: OpenedFarm, order: LeaseOrder) -> str:
    return farm.coordinator.views.step_view(farm.coordinator.views.step(order.step)).outputs["out"]


async def test_a_report_is_acknowledged_only_when_what_follows_is_in_the_journal(open_farm: OpenFarm) -> None:
    worker = ScriptedWorker()
    async with open_farm(fleet=worker.start) as farm:
        submitted = await farm.submit(ONE, "one")
        await worker.hello()
        order = await started(farm, worker)
        output = await worker.upload(output_path(farm, order))
        await worker.speak(report(order, Succeeded(outputs=(output,))))
        with sqlite3.connect(farm.settings.state_dir / "journal.sqlite3") as database:
            frames = [body for (body,) in database.execute("SELECT body FROM journal_frames")]
        database.close()
        assert any(b'"step-built"' in frame for frame in frames)
        assert (await farm.ended(submitted.id)).state is SubmissionState.SUCCEEDED


async def test_an_order_carries_the_derivation_and_its_resolved_inputs(open_farm: OpenFarm) -> None:
    worker = ScriptedWorker()
    async with open_farm(fleet=worker.start) as farm:
        submitted = await farm.submit(ONE, "two")
        await worker.hello()
        one = await started(farm, worker)
        path = output_path(farm, one)
        await worker.speak(report(one, Succeeded(outputs=(await worker.upload(path),))))
        two = await started(farm, worker, 2)
        assert (two.drv_path, two.inputs, two.attempt) == (submitted.roots[0].drv, (path,), 1)
        assert two.derivation.startswith(b"Derive(")


async def test_a_worker_cannot_publish_a_path_that_is_no_output_of_its_step(open_farm: OpenFarm) -> None:
    worker = ScriptedWorker()
    async with open_farm(fleet=worker.start) as farm:
        submitted = await farm.submit(ONE, "two")
        await worker.hello()
        order = await started(farm, worker)
        other = submitted.roots[0].outputs["out"]
        await worker.speak(report(order, Succeeded(outputs=(await worker.upload(other),))))
        await farm.until(lambda: farm.states(submitted.id)["one"] is StepStatus.READY)
        assert await farm.coordinator.cache.missing([other]) == {other}


@pytest.mark.parametrize("lie", ["no object", "wrong size", "no outputs"])
async def test_a_false_claim_is_the_farms_fault_and_is_tried_again(open_farm: OpenFarm, lie: str) -> None:
    worker = ScriptedWorker()
    async with open_farm(fleet=worker.start) as farm:
        submitted = await farm.submit(ONE, "one")
        await worker.hello()
        order = await started(farm, worker)
        true = await worker.upload(output_path(farm, order))
        claims = {
            "no object": (true.model_copy(update={"url": "nar/" + "0" * 52 + ".nar.zst"}),),
            "wrong size": (true.model_copy(update={"nar_size": true.nar_size + 8}),),
            "no outputs": (),
        }
        await worker.speak(report(order, Succeeded(outputs=claims[lie])))
        await farm.until(lambda: farm.states(submitted.id)["one"] is StepStatus.READY)
        assert await farm.coordinator.cache.missing([true.path]) == {true.path}
        assert "; last time: publishing" in (await farm.client.step(order.step)).waiting_for


async def test_what_is_uploaded_is_not_built_again_because_the_store_fails_for_a_while(open_farm: OpenFarm) -> None:
    worker = ScriptedWorker()
    async with open_farm(fleet=worker.start) as farm:
        await worker.hello()
        submitted = await farm.submit(ONE, "one")
        order = await started(farm, worker)
        output = await worker.upload(output_path(farm, order))
        file = farm.coordinator.cache.objects.local_path(output.url)
        assert file is not None
        # A directory in its place cannot be read.
        file.rename(file.with_name("aside"))
        file.mkdir()
        await worker.speak(report(order, Succeeded(outputs=(output,))))
        while not (await farm.client.farm()).troubles:  # noqa: ASYNC110 - what is waited for is another program's doing
            await asyncio.sleep(0.02)
        [trouble] = (await farm.client.farm()).troubles
        assert trouble.startswith(f"publishing of {output.path} failed: ")
        # Nobody else waits for it.
        other = await farm.submit('{ other = run "other" "echo > $out"; }', "other")
        second = await started(farm, worker, 2)
        made = await worker.upload(output_path(farm, second), b"other")
        await worker.speak(report(second, Succeeded(outputs=(made,))))
        assert (await farm.ended(other.id)).state is SubmissionState.SUCCEEDED
        file.rmdir()
        file.with_name("aside").rename(file)
        assert (await farm.ended(submitted.id)).state is SubmissionState.SUCCEEDED
        assert (await farm.client.farm()).troubles == ()
        assert len(worker.orders) == 2


async def test_other_bits_for_a_published_path_leave_the_first_and_the_step_is_done(open_farm: OpenFarm) -> None:
    worker = ScriptedWorker()
    async with open_farm(fleet=worker.start) as farm:
        submitted = await farm.submit(ONE, "one")
        await worker.hello()
        order = await started(farm, worker)
        path = output_path(farm, order)
        first = await worker.upload(path, b"first")
        await farm.coordinator.cache.publish([first.narinfo()])
        await worker.speak(report(order, Succeeded(outputs=(await worker.upload(path, b"second"),))))
        assert (await farm.ended(submitted.id)).state is SubmissionState.SUCCEEDED
        narinfo = await farm.coordinator.cache.narinfo(path.rpartition("/")[2][:32])
        assert narinfo is not None
        assert first.nar_hash.encode() in narinfo


async def test_a_start_that_did_not_get_through_heals_by_heartbeats(open_farm: OpenFarm) -> None:
    worker, clock = ScriptedWorker(), ManualClock()
    worker.unreachable = True
    async with open_farm(fleet=worker.start, clock=clock) as farm:
        submitted = await farm.submit(ONE, "one")
        await worker.hello()
        await farm.until(lambda: farm.states(submitted.id)["one"] is StepStatus.RUNNING)
        worker.unreachable = False
        clock.time += 60
        await worker.speak()
        order = await started(farm, worker)
        assert order.attempt == 1


async def test_a_lost_worker_frees_its_steps_and_its_late_report_changes_nothing(open_farm: OpenFarm) -> None:
    worker, clock = ScriptedWorker(), ManualClock()
    async with open_farm(fleet=worker.start, clock=clock) as farm:
        submitted = await farm.submit(ONE, "one")
        await worker.hello()
        first = await started(farm, worker)
        await worker.tell(WorkerSilent("w", "1", "no answer"))
        assert (await farm.client.workers())[0].state == "silent"
        await worker.tell(WorkerGone("w", "1", "killed"))
        assert (await farm.client.workers())[0].state == "gone"
        clock.time += 600
        await worker.hello("2")
        second = await started(farm, worker, 2)
        assert (first.attempt, second.attempt) == (1, 2)
        late = Failed(reason="permanent", message="late")
        await worker.speak(report(first, late), holds=[second], incarnation="2")
        assert farm.states(submitted.id)["one"] is StepStatus.RUNNING


async def test_repeated_and_unasked_log_chunks_change_nothing(open_farm: OpenFarm) -> None:
    worker = ScriptedWorker()
    async with open_farm(fleet=worker.start) as farm:
        await farm.submit(ONE, "one")
        await worker.hello()
        order = await started(farm, worker)

        def chunk(offset: int, data: bytes, step: str = order.step, attempt: int = 1) -> LogChunk:
            return LogChunk(step=step, attempt=attempt, offset=offset, data=data)

        await worker.speak(chunk(0, b"hello "), chunk(0, b"hello "), chunk(3, b"lo wor"), holds=[order])
        await worker.speak(chunk(9, b"ld"), chunk(0, b"x", "../../etc"), chunk(0, b"x", attempt=9), holds=[order])
        stage = StageChange(step=order.step, attempt=1, stage=Stage.BUILDING, phase="check", at=1.0)
        await worker.speak(stage, holds=[order])
        assert b"".join([part async for part in farm.client.log(order.step)]) == b"hello world"
        view = await farm.client.step(order.step)
        assert (view.stage, view.phase, view.worker) == ("building", "check", "w")
        logs = [path.name for path in (farm.settings.state_dir / "logs").rglob("*.log")]
        assert logs == ["1.log"]


async def test_a_worker_sends_of_its_own_leases_only(open_farm: OpenFarm) -> None:
    """Another worker can neither write into a log, nor say where a build is, nor have the cache searched for it."""
    worker, clock = ScriptedWorker(), ManualClock()
    async with open_farm(fleet=worker.start, clock=clock) as farm:
        await farm.submit(ONE, "one")
        await worker.hello()
        order = await started(farm, worker)

        def chunk(offset: int, data: bytes) -> LogChunk:
            return LogChunk(step=order.step, attempt=1, offset=offset, data=data)

        async def log() -> bytes:
            return b"".join([part async for part in farm.client.log(order.step)])

        await worker.hello(name="thief", systems=("none",))
        await worker.speak(chunk(0, b"mine"), holds=[order])
        stage = StageChange(step=order.step, attempt=1, stage=Stage.UPLOADING, phase="stolen", at=1.0)
        lost = Failed(reason="input_missing", message="gone", missing=("/nix/store/" + "0" * 32 + "-x",))
        await worker.speak(chunk(4, b"stolen"), stage, report(order, lost), holds=[order], name="thief")
        assert await log() == b"mine"
        view = await farm.client.step(order.step)
        assert (view.state, view.stage, view.phase) == (StepStatus.RUNNING, "queued", "")
        shown = {row.name: row.leases for row in await farm.client.workers()}
        assert shown == {"w": ((order.step, "building"),), "thief": ()}

        # The end of a lease does not open its log to others, and its own worker has an hour for what it still holds.
        await worker.speak(report(order, Failed(reason="permanent", message="no")), holds=())
        await farm.until(lambda: farm.coordinator.views.step(order.step).state is StepStatus.FAILED)
        await worker.speak(chunk(4, b"stolen"), name="thief")
        await worker.speak(chunk(4, b", late"))
        assert await log() == b"mine, late"
        clock.time += LATE_S + 1
        await worker.speak(chunk(10, b", too late"))
        assert await log() == b"mine, late"


async def test_facts_that_cannot_be_stored_stop_the_coordinator_and_nothing_is_done(
    open_farm: OpenFarm, settings: Settings
) -> None:
    worker = ScriptedWorker()

    async def lose_the_journal() -> None:
        async with open_farm(fleet=worker.start) as farm:
            roots = await farm.evaluate(ONE, "one")
            await worker.hello()
            with sqlite3.connect(settings.state_dir / "journal.sqlite3") as database:
                database.execute("DROP TABLE journal_frames")
            database.close()
            with pytest.raises(RefusedError, match="the coordinator is stopping"):
                await farm.client.submit(SubmitRequest(roots=roots))
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as stopped:
        await lose_the_journal()
    assert stopped.group_contains(JournalError, match="cannot write the journal: no such table")
    assert worker.orders == []


async def test_serve_says_in_one_sentence_why_it_cannot_start(settings: Settings) -> None:
    worker = ScriptedWorker()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = settings.model_copy(update={"port": taken.getsockname()[1]})
        with pytest.raises(ConfigError, match="choose another with --listen"):
            await serve(busy, worker.start, ready=lambda _: None, stop=asyncio.Event())


async def test_serve_answers_until_a_signal_stops_it(settings: Settings) -> None:
    worker, stop = ScriptedWorker(), asyncio.Event()
    urls: list[str] = []

    def ready(farm: Ready) -> None:
        urls.append(farm.url)
        stop.set()

    await serve(settings, worker.start, ready=ready, stop=stop)
    assert urls[0].startswith("http://127.0.0.1:")


async def test_a_graph_that_the_core_refuses_is_refused_alone_and_leaves_no_note(open_farm: OpenFarm) -> None:
    async with open_farm(fleet=ScriptedWorker().start) as farm:
        engine, name = farm.coordinator.engine, SubmissionId("refused")
        known = await farm.submit(ONE, "one")
        # Handed over in one turn with an event that is taken.
        refused, _ = await asyncio.gather(
            engine.submit(SubmissionReceived(name, (StepKey("nowhere"),), ()), StoredNote(b"{}")),
            engine.offer(SubmissionCancelled(SubmissionId(known.id))),
            return_exceptions=True,
        )
        assert isinstance(refused, SubmissionRefusedError)
        assert (await farm.client.submission(known.id)).state is SubmissionState.CANCELLED
        assert set(await farm.coordinator.journal.notes()) == {known.id}


class WatchedNote(StoredNote):
    """A note that says when it is gone."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize("count", [1, LARGE_STEPS + 1])
async def test_an_engine_at_rest_holds_nothing_of_the_last_submission(open_farm: OpenFarm, count: int) -> None:
    async with open_farm(fleet=ScriptedWorker().start) as farm:
        recipes = (Recipe(Requirements("nowhere")),)
        steps = tuple(StepSpec(StepKey(f"{number:032}-step"), recipes) for number in range(count))
        roots = tuple(step.key for step in steps)
        note = WatchedNote(b"{}")
        gone, loop = asyncio.Event(), asyncio.get_running_loop()
        weakref.finalize(note, loop.call_soon_threadsafe, gone.set)
        await farm.coordinator.engine.submit(SubmissionReceived(SubmissionId("last"), roots, steps), note)
        del note, steps
        async with asyncio.timeout(PATIENCE_S):
            await gone.wait()
