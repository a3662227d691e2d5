"""The loop between a transport and a coordinator: order, acknowledgement, silence, death."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.support.local_fleet import InProcessFleet, LocalCalls
from tests.support.patience import PATIENCE_S
from workers.agent.agent import Agent, AgentError
from workers.agent.settings import WorkerSettings
from workers.ray_transport.actor import AgentHost
from workers.wire import polling
from workers.wire.fleet import (
    FleetError,
    FleetEvent,
    NotKnownError,
    WorkerConnected,
    WorkerGone,
    WorkerSilent,
    WorkerSpoke,
)
from workers.wire.messages import (
    CALLS,
    MAX_EVENTS,
    MAX_HELD,
    MAX_NAME,
    MAX_NAMES,
    MAX_SENTENCE,
    MAX_SLOTS,
    ORDERS,
    PROTOCOL_VERSION,
    Batch,
    CallName,
    FarmInfo,
    Lease,
    LogChunk,
    Report,
    Stage,
    StageChange,
    Succeeded,
    Vitals,
)
from workers.wire.polling import (
    DERIVATION_BYTES_PER_CALL,
    ORDERS_PER_CALL,
    AgentDead,
    AgentRoster,
    AgentUnavailable,
    _portions,
    poll_agent,
)

from .conftest import AgentHarness, drv, order

FARM = FarmInfo(cache_url="http://farm/cache", public_keys=(), object_store_url="file:///objects")
FOREVER = "echo started; while :; do sleep 1; done"


def hello(incarnation: str = "i1", protocol: int = PROTOCOL_VERSION) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "worker": "w",
        "incarnation": incarnation,
        "systems": ["x86_64-linux"],
        "emulated": [],
        "features": [],
        "mandatory_features": [],
        "slots": 1,
        "capacity": 1,
        "nix_version": "2.8.0",
        "leases": [],
    }


def batch(last: int, incarnation: str = "i1") -> dict[str, Any]:
    event = StageChange(step="s", attempt=1, stage=Stage.BUILDING, at=1.0).dump()
    return {"incarnation": incarnation, "last": last, "events": [event], "capacity": 1, "leases": []}


class Script:
    """A transport that answers as written; after the last line the agent is dead."""

    def __init__(self, *lines: dict[str, Any] | Exception) -> None:
        self._lines = list(lines)
        self.acks: list[int] = []

    def _next(self) -> dict[str, Any]:
        line = self._lines.pop(0) if self._lines else AgentDead("the script ended")
        if isinstance(line, Exception):
            raise line
        return line

    async def call(self, name: CallName, *arguments: Any, large: bool = False) -> Any:
        assert not large
        match name, arguments:
            case "hello", (farm,):
                assert farm == FARM.dump()
                return self._next()
            case "events", (ack, max_bytes, wait_s):
                assert max_bytes > 0
                assert wait_s > 0
                self.acks.append(ack)
                return self._next()
            case "drain", (True,):
                return await asyncio.sleep(3600)
        raise NotImplementedError(name)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "RETRY_FIRST_S", 0.001)
    monkeypatch.setattr(polling, "RETRY_LONGEST_S", 0.002)
    monkeypatch.setattr(polling, "GREET_AGAIN_S", 0.001)


async def heard(script: Script) -> list[FleetEvent]:
    said: list[FleetEvent] = []

    async def sink(event: FleetEvent) -> None:
        said.append(event)

    async with asyncio.timeout(PATIENCE_S):
        await poll_agent("node", script, FARM, sink)
    return said


def names(events: list[FleetEvent]) -> list[str]:
    return [type(event).__name__.removeprefix("Worker") for event in events]


async def test_batches_are_sent_in_order_and_acknowledged_with_the_next_call() -> None:
    script = Script(hello(), batch(3), batch(7))
    said = await heard(script)
    assert names(said) == ["Connected", "Spoke", "Spoke", "Gone"]
    assert script.acks == [0, 3, 7]
    assert said[-1] == WorkerGone("w", "i1", "the script ended")


async def test_an_agent_that_the_farm_takes_for_another_life_of_it_is_greeted_again() -> None:
    script = Script(hello(), batch(3), hello(), batch(3))
    said: list[FleetEvent] = []

    async def sink(event: FleetEvent) -> None:
        said.append(event)
        if names(said) == ["Connected", "Spoke"]:
            raise NotKnownError("an earlier life was greeted after this one")

    async with asyncio.timeout(PATIENCE_S):
        await poll_agent("node", script, FARM, sink)
    assert names(said) == ["Connected", "Spoke", "Connected", "Spoke", "Gone"]
    # What was refused was not acknowledged.
    assert script.acks == [0, 0, 3]


async def test_what_a_newer_agent_says_besides_is_passed_over() -> None:
    chunk = LogChunk(step="s", attempt=1, offset=0, data=b"x").dump() | {"colour": "red"}
    later = batch(9) | {"mood": "good", "vitals": {"load": 0.5, "noise": 3}, "events": [chunk]}
    said = await heard(Script(hello() | {"shoe_size": 43}, later))
    assert names(said) == ["Connected", "Spoke", "Gone"]
    assert isinstance(spoke := said[1], WorkerSpoke)
    assert (spoke.batch.last, spoke.batch.vitals, len(spoke.batch.events)) == (9, Vitals(load=0.5), 1)


async def test_sides_of_different_protocols_refuse_each_other_in_one_sentence() -> None:
    """Whatever else the other one says: it may be nothing that we can read."""
    other = PROTOCOL_VERSION + 1
    refused = (await heard(Script({"protocol": other, "says": "hi"}, hello())))[0]
    sentence = f"the agent speaks protocol {other}, this coordinator {PROTOCOL_VERSION}; update the older one"
    assert refused == WorkerSilent("node", "", sentence)
    agent = Agent(WorkerSettings.model_validate({"name": "w", "state_dir": "/x", "store": "/y"}))
    with pytest.raises(AgentError, match=f"the coordinator speaks protocol {other}, worker w {PROTOCOL_VERSION}; up"):
        await agent.hello({"protocol": other, "says": "hi"})


def test_what_a_newer_coordinator_says_besides_is_passed_over() -> None:
    assert FarmInfo.model_validate(FARM.dump() | {"weather": "fine"}) == FARM
    wanted = order(drv("any", ":"), silence_s=7)
    assert ORDERS.validate_python((wanted.dump() | {"weather": "fine"},)) == (wanted,)


async def test_a_batch_whose_sink_failed_is_never_acknowledged() -> None:
    script = Script(hello(), batch(3), batch(7))

    async def sink(event: FleetEvent) -> None:
        if names([event]) == ["Spoke"]:
            raise RuntimeError("the journal is full")

    with pytest.raises(RuntimeError, match="journal"):
        await poll_agent("node", script, FARM, sink)
    assert script.acks == [0]


async def test_silence_is_reported_once_and_a_repeated_greeting_keeps_the_place() -> None:
    away = AgentUnavailable("no answer")
    script = Script(hello(), batch(3), away, away, away, hello(), batch(5))
    said = await heard(script)
    assert names(said) == ["Connected", "Spoke", "Silent", "Connected", "Spoke", "Gone"]
    assert said[2] == WorkerSilent("w", "i1", "no answer")
    assert script.acks == [0, 3, 3, 5]


async def test_a_new_incarnation_is_greeted_and_starts_from_nothing() -> None:
    script = Script(hello("i1"), batch(3, "i1"), batch(1, "i2"), hello("i2"), batch(1, "i2"))
    said = await heard(script)
    assert names(said) == ["Connected", "Spoke", "Connected", "Spoke", "Gone"]
    assert script.acks == [0, 3, 0, 1]


@pytest.mark.parametrize(
    "answer",
    [
        {"worker": "w"},
        hello(protocol=PROTOCOL_VERSION + 1),
        hello() | {"slots": MAX_SLOTS + 1},
        hello() | {"capacity": -1},
        hello() | {"features": ["f"] * (MAX_NAMES + 1)},
        hello() | {"worker": "w" * (MAX_NAME + 1)},
        hello() | {"unfit": "u" * (MAX_SENTENCE + 1)},
        hello() | {"leases": [{"step": "s", "attempt": 1, "stage": "building"}] * (MAX_HELD + 1)},
    ],
)
async def test_an_agent_that_cannot_be_understood_is_silent(answer: dict[str, Any]) -> None:
    said = await heard(Script(answer, hello()))
    assert names(said) == ["Silent", "Connected", "Gone"]


@pytest.mark.parametrize(
    "answer",
    [
        {"incarnation": "i1", "last": 9},
        batch(9) | {"events": batch(9)["events"] * (MAX_EVENTS + 1)},
        batch(9) | {"capacity": MAX_HELD + 1},
    ],
)
async def test_an_answer_that_cannot_be_read_is_not_acknowledged(answer: dict[str, Any]) -> None:
    script = Script(hello(), answer, hello(), batch(1))
    assert names(await heard(script)) == ["Connected", "Silent", "Connected", "Spoke", "Gone"]
    assert script.acks == [0, 0, 1]


async def test_an_agent_that_was_never_reached_and_dies_is_gone_under_its_nodes_name() -> None:
    assert await heard(Script(AgentDead("node lost"))) == [WorkerGone("node", "", "node lost")]


async def test_a_call_without_answer_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "CALL_DEADLINE_S", 0.01)
    roster = AgentRoster(FARM)
    connected = asyncio.Event()
    hold = asyncio.Event()

    async def sink(event: FleetEvent) -> None:
        connected.set()
        await hold.wait()

    task = asyncio.create_task(roster.serve("node", Script(hello()), sink))
    await connected.wait()
    assert list(roster.workers) == ["w"]
    with pytest.raises(FleetError, match="did not answer `drain`"):
        await roster.drain("w", on=True)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert not roster.workers
    with pytest.raises(FleetError, match="not connected"):
        await roster.cancel("w", [Lease(step="s", attempt=1)])


class Listener:
    """A sink that wakes whoever waits for something."""

    def __init__(self) -> None:
        self.said: list[FleetEvent] = []
        self._more = asyncio.Condition()

    async def __call__(self, event: FleetEvent) -> None:
        async with self._more:
            self.said.append(event)
            self._more.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S), self._more:
            await self._more.wait_for(condition)

    def connected(self) -> set[str]:
        return {event.hello.worker for event in self.said if isinstance(event, WorkerConnected)}

    def reports(self) -> dict[str, Report]:
        return {
            event.step: event
            for spoke in self.said
            if isinstance(spoke, WorkerSpoke)
            for event in spoke.batch.events
            if isinstance(event, Report)
        }


async def test_a_fleet_in_this_process_builds_on_all_of_its_agents(bench: AgentHarness) -> None:
    one, two = await bench.agent("one", slots=1, greet=False), await bench.agent("two", slots=1, greet=False)
    fleet = InProcessFleet(bench.farm, [one.agent, two.agent])
    listener = Listener()
    serving = asyncio.create_task(fleet.run(listener))
    await listener.until(lambda: listener.connected() == {"one", "two"})
    first, second = order(drv("first", "echo 1 > $out")), order(drv("second", FOREVER))
    await fleet.start_many("one", [first])
    await fleet.start_many("two", [second])
    await listener.until(lambda: first.step in listener.reports())
    await fleet.cancel("two", [Lease(step=second.step, attempt=1)])
    await listener.until(lambda: second.step in listener.reports())
    assert isinstance(listener.reports()[first.step].result, Succeeded)
    await fleet.drain("one", on=True)
    with pytest.raises(FleetError):
        await fleet.start_many("three", [first])
    await two.agent.close()
    await listener.until(lambda: any(isinstance(event, WorkerSilent) for event in listener.said))
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving


async def test_a_coordinator_that_was_replaced_moves_nothing_any_more(bench: AgentHarness) -> None:
    reader = await bench.agent(slots=1)
    running, wanted = order(drv("running", FOREVER)), order(drv("wanted", ": > $out"))
    old, new = LocalCalls(reader.agent, 0), LocalCalls(reader.agent, 2)
    await old.call("start_many", [running.dump()])
    await new.call("hello", bench.farm.model_copy(update={"epoch": 2}).dump())
    arguments: dict[CallName, tuple[Any, ...]] = {
        "hello": (bench.farm.dump(),),
        "start_many": ([wanted.dump()],),
        "cancel": ([{"step": running.step, "attempt": 1}],),
        "events": (10_000, 1 << 20, 0.0),
        "drain": (True,),
        "provide": ([], ""),
        "fetch_ahead": ({"step": wanted.step, "inputs": []},),
    }
    assert set(arguments) == set(CALLS)
    for name, said in arguments.items():
        with pytest.raises(AgentUnavailable, match="follows a later coordinator"):
            await old.call(name, *said)
    batch = Batch.model_validate(await new.call("events", 0, 1 << 20, PATIENCE_S))
    assert [lease.step for lease in batch.leases] == [running.step]
    assert not batch.draining
    assert batch.events
    await new.call("cancel", [{"step": running.step, "attempt": 1}])


async def test_a_coordinator_that_takes_over_gets_running_logs_from_their_beginning(bench: AgentHarness) -> None:
    told = await bench.agent(slots=1)
    running = order(drv("running", FOREVER))
    old, new = LocalCalls(told.agent, 0), LocalCalls(told.agent, 2)
    await old.call("start_many", [running.dump()])

    async def first_chunk(calls: LocalCalls) -> tuple[int, LogChunk]:
        ack = 0
        async with asyncio.timeout(PATIENCE_S):
            while True:
                batch = Batch.model_validate(await calls.call("events", ack, 1 << 20, 5.0))
                ack = batch.last
                for event in batch.events:
                    if isinstance(event, LogChunk):
                        return ack, event

    ack, chunk = await first_chunk(old)
    assert (chunk.offset, chunk.data) == (0, b"started\n")
    await old.call("events", ack, 1 << 20, 0.0)
    await new.call("hello", bench.farm.model_copy(update={"epoch": 2}).dump())
    assert (await first_chunk(new))[1] == chunk
    await new.call("cancel", [{"step": running.step, "attempt": 1}])


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_answered_by_the_agent_and_carried_by_the_actor(name: CallName) -> None:
    assert inspect.iscoroutinefunction(getattr(Agent, name))
    assert inspect.iscoroutinefunction(getattr(AgentHost, name))


def test_large_derivations_go_to_a_worker_one_call_each_and_small_ones_together() -> None:
    small = order(drv("small", ": > $out"))
    large = small.model_copy(update={"derivation": bytes(DERIVATION_BYTES_PER_CALL)})
    sizes = [len(part) for part in _portions([small] * (ORDERS_PER_CALL + 1) + [large, large] + [small])]
    assert sizes == [ORDERS_PER_CALL, 1, 1, 1, 1]
    assert not list(_portions([]))
