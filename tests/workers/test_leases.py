"""Leases: nothing is lost, nothing is built twice, what waits too long comes back."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import warnings
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_S
from workers.agent import agent
from workers.agent.agent import AgentError
from workers.agent.outbox import CHUNK_BYTES, Outbox
from workers.wire.messages import Batch, Failed, Hello, Stage, Succeeded

from .conftest import AgentHarness, BuilderGate, ReportReader, drv, order

FOREVER = "echo started; while :; do sleep 1; done"


async def _ask(reader: ReportReader, ack: int, max_bytes: int = 1 << 20) -> Batch:
    return Batch.model_validate(await reader.agent.events(ack, max_bytes, 5.0))


async def _until_reported(reader: ReportReader) -> Batch:
    """Ask without ever acknowledging until a report is in the answer."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            batch = await _ask(reader, 0)
            if any(event.kind == "report" for event in batch.events):
                return batch
            await asyncio.sleep(0.05)


async def test_events_that_are_not_acknowledged_are_sent_again(bench: AgentHarness) -> None:
    reader = await bench.agent()
    said = order(drv("said", "echo said; : > $out"))
    await reader.agent.start_many([said.dump()])
    first = await _until_reported(reader)
    again = await _ask(reader, 0)
    assert again.events == first.events
    assert [event.kind for event in first.events if event.kind != "stage"] == ["log", "report"]
    after = Batch.model_validate(await reader.agent.events(first.last, 1 << 20, 0.0))
    assert after.events == ()
    assert after.last == first.last


async def test_an_acknowledgement_of_another_incarnation_forgets_nothing(bench: AgentHarness) -> None:
    reader = await bench.agent()
    said = order(drv("said", ": > $out"))
    await reader.agent.start_many([said.dump()])
    await reader.agent.events(10_000, 1 << 20, 0.0)
    await reader.finish(said)


async def test_a_small_answer_carries_at_least_one_event_and_the_rest_follows(bench: AgentHarness) -> None:
    reader = await bench.agent()
    orders = [order(drv(f"small{number}", f"echo {number}; : > $out")) for number in range(4)]
    await reader.agent.start_many([one.dump() for one in orders])
    async with asyncio.timeout(PATIENCE_S):
        while len(reader.reports) < len(orders):
            batch = await reader.hear(max_bytes=1)
            assert len(batch.events) <= 1
    assert reader.logs == {one.step: b"%d\n" % number for number, one in enumerate(orders)}


async def test_a_repeated_start_is_a_no_op_before_during_and_after_the_build(bench: AgentHarness) -> None:
    reader = await bench.agent()
    once = order(drv("once", "echo ran; : > $out"))
    await reader.agent.start_many([once.dump(), once.dump()])
    await reader.agent.start_many([once.dump()])
    [report] = await reader.finish(once)
    await reader.agent.start_many([once.dump()])
    await reader.hear(0.0)
    await reader.agent.start_many([once.dump()])
    assert (await reader.hear(0.3)).leases == ()
    assert isinstance(report.result, Succeeded)
    assert reader.logs[once.step] == b"ran\n"


async def test_a_lease_is_held_until_its_report_is_in_the_answer(bench: AgentHarness) -> None:
    reader = await bench.agent(slots=1)
    held = order(drv("held", FOREVER))
    await reader.agent.start_many([held.dump()])
    await reader.until(lambda: any(change.stage is Stage.BUILDING for change in reader.stages))
    assert [(lease.step, lease.stage) for lease in reader.batches[-1].leases] == [(held.step, Stage.BUILDING)]
    hello = Hello.model_validate(await reader.agent.hello(bench.farm.dump()))
    assert [lease.step for lease in hello.leases] == [held.step]
    assert hello.incarnation == reader.batches[-1].incarnation
    await reader.agent.cancel([{"step": held.step, "attempt": 1}])
    await reader.finish(held)
    assert reader.batches[-1].leases == ()
    assert reader.batches[-1].capacity == 1


async def test_leases_behind_busy_slots_are_handed_back(bench: AgentHarness) -> None:
    reader = await bench.agent(slots=1)
    busy, behind = order(drv("busy", FOREVER)), order(drv("behind", ": > $out"))
    await reader.agent.start_many([busy.dump(), behind.dump()])
    [returned] = await reader.finish(behind)
    assert isinstance(returned.result, Failed)
    assert returned.result.reason == "returned"
    assert returned.building_at == 0
    assert busy.step not in reader.reports
    await reader.agent.cancel([{"step": busy.step, "attempt": 1}])
    await reader.finish(busy)
    [later] = await ReportReader(reader.agent, ack=reader.ack).build(behind.model_copy(update={"attempt": 2}))
    assert isinstance(later.result, Succeeded)


async def test_a_queued_lease_can_be_cancelled(bench: AgentHarness) -> None:
    reader = await bench.agent(slots=1)
    busy, behind = order(drv("busy", FOREVER)), order(drv("behind", ": > $out"))
    await reader.agent.start_many([busy.dump(), behind.dump()])
    await reader.agent.cancel([{"step": behind.step, "attempt": 1}])
    [cancelled] = await reader.finish(behind)
    assert isinstance(cancelled.result, Failed)
    assert cancelled.result.reason == "cancelled"


async def test_a_draining_worker_finishes_what_runs_and_hands_back_the_rest(bench: AgentHarness) -> None:
    reader = await bench.agent(slots=1)
    running = order(drv("running", "echo started; sleep 1; : > $out"))
    await reader.agent.start_many([running.dump()])
    await reader.until(lambda: running.step in reader.logs)
    await reader.agent.drain(True)
    refused = order(drv("refused", ": > $out"))
    [returned] = await reader.build(refused)
    assert isinstance(returned.result, Failed)
    assert returned.result.reason == "returned"
    [finished] = await reader.finish(running)
    assert isinstance(finished.result, Succeeded)
    assert reader.batches[-1].draining
    assert reader.batches[-1].capacity == 0
    await reader.agent.drain(False)
    [again] = await ReportReader(reader.agent, ack=reader.ack).build(refused.model_copy(update={"attempt": 2}))
    assert isinstance(again.result, Succeeded)


async def test_short_builds_raise_the_capacity_beyond_the_slots(bench: AgentHarness) -> None:
    reader = await bench.agent(slots=1)
    assert (await reader.hear(0.0)).capacity == 1
    capacity = 1
    # A busy machine takes its time for the first ones.
    async with asyncio.timeout(PATIENCE_S):
        for number in itertools.count():
            await reader.build(order(drv(f"quick{number}", ": > $out")))
            if (capacity := (await reader.hear(0.0)).capacity) > 1:
                break
    assert capacity <= 9


async def test_a_new_poll_ends_the_one_that_still_waits(bench: AgentHarness) -> None:
    reader = await bench.agent()
    parked = asyncio.create_task(reader.agent.events(0, 1 << 20, 30.0))
    await asyncio.sleep(0.05)
    newer = asyncio.create_task(reader.agent.events(0, 1 << 20, 0.1))
    async with asyncio.timeout(PATIENCE_S):
        assert (await parked)["events"] == []
        assert (await newer)["events"] == []


async def test_an_agent_that_starts_anew_has_another_incarnation_and_sweeps_its_spool(bench: AgentHarness) -> None:
    first = await bench.agent()
    done = order(drv("done", "echo log; : > $out"))
    await first.agent.start_many([done.dump()])
    said = await _until_reported(first)
    await first.agent.close()
    assert (bench.root / "one" / "state" / "spool" / "reports.jsonl").read_bytes()
    second = await bench.agent()
    batch = await _ask_now(second)
    assert batch.events == ()
    assert batch.incarnation != said.incarnation
    assert not (bench.root / "one" / "state" / "spool" / "reports.jsonl").read_bytes()


async def _ask_now(reader: ReportReader) -> Batch:
    return Batch.model_validate(await reader.agent.events(0, 1 << 20, 0.0))


async def test_two_agents_never_share_a_state_directory(bench: AgentHarness) -> None:
    await bench.agent("one")
    with pytest.raises(AgentError, match="another worker uses the state directory"):
        await bench.agent("one")


async def test_leases_outlive_a_coordinator_that_comes_back_under_another_address(
    bench: AgentHarness, gate: BuilderGate
) -> None:
    reader = await bench.agent(slots=1, nix_options=gate.options)
    running = order(drv("running", f"echo started; {gate.WAITS}; : > $out"))
    await reader.agent.start_many([running.dump()])
    await reader.until(lambda: running.step in reader.logs)
    moved = bench.farm.model_copy(update={"cache_url": "http://127.0.0.1:9/cache"})
    hello = Hello.model_validate(await reader.agent.hello(moved.dump()))
    assert [lease.step for lease in hello.leases] == [running.step]
    gate.open()
    [report] = await reader.finish(running)
    assert isinstance(report.result, Succeeded)


async def test_a_builder_waits_while_nobody_takes_its_log(bench: AgentHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Outbox] = []

    def small(directory: Path) -> Outbox:
        made.append(Outbox(directory, max_lease_bytes=4 * CHUNK_BYTES))
        return made[-1]

    monkeypatch.setattr(agent, "Outbox", small)
    reader = await bench.agent(slots=1)
    [outbox] = made
    line = "x" * 999
    loud = order(drv("loud", f"i=0; while [ $i -lt 5000 ]; do echo {line}; i=$((i+1)); done; : > $out"))
    await reader.agent.start_many([loud.dump()])
    async with asyncio.timeout(PATIENCE_S):
        while outbox.has_room((loud.step, loud.attempt)):
            await reader.agent.events(0, 1, 0.01)
    await asyncio.sleep(0.3)
    # One piece more, which had been read already.
    assert outbox.log_bytes <= 5 * CHUNK_BYTES
    await reader.finish(loud)
    assert reader.logs[loud.step] == (line.encode() + b"\n") * 5000


@pytest.mark.parametrize("how", ["the greeting is cancelled", "the worker is closed"])
async def test_a_greeting_that_comes_to_nothing_leaves_no_connection_open(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    asked, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slowly(_host: str) -> tuple[str, ...]:
        loop.call_soon_threadsafe(asked.set)
        go_on.wait(PATIENCE_S)
        return ()

    monkeypatch.setattr(agent, "addresses_of", slowly)
    reader = await bench.agent(greet=False)
    with warnings.catch_warnings(record=True) as left:
        warnings.simplefilter("always")
        greeting = asyncio.create_task(reader.agent.hello(bench.farm.dump()))
        async with asyncio.timeout(PATIENCE_S):
            await asked.wait()
        if how == "the worker is closed":
            await reader.agent.close()
            go_on.set()
        else:
            greeting.cancel()
        with pytest.raises((asyncio.CancelledError, AgentError)):
            await greeting
        go_on.set()
        del greeting
        gc.collect()
    assert [str(each.message) for each in left] == []
