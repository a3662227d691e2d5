"""Ends of builds pass a large submission in the engine: they are safe, shown and acted on before it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest

from coordinator.api.models import StepStatus, SubmissionState
from coordinator.engine import engine as engine_module
from coordinator.engine.engine import ends_any, members_of
from coordinator.engine.inbox import INBOX_MESSAGES, LARGE_STEPS, EngineInbox, EngineMessage
from coordinator.errors import UnavailableError
from coordinator.journal.errors import JournalError
from coordinator.journal.journal import Journal
from infra.slices import in_slices
from scheduler.events import OutputsPublished, SubmissionCancelled, SubmissionReceived, TimePassed
from scheduler.facts import Fact
from scheduler.farm import Farm
from scheduler.model import Instant, LeaseId, Recipe, Requirements, StepKey, StepSpec, SubmissionId
from tests.coordinator.conftest import OpenedFarm, OpenFarm
from tests.coordinator.test_engine import ONE, ManualClock, ScriptedWorker, output_path, report, started
from tests.support.patience import PATIENCE_S
from workers.wire.messages import LeaseOrder, Succeeded

STEPS = 2 * LARGE_STEPS
#: Seconds after which a lease that its worker does not name is sent again.
LONG_S = 60.0
ELSEWHERE = Requirements("riscv64-linux")


def large(name: str) -> SubmissionReceived:
    keys = [StepKey(f"{name}-{number}") for number in range(STEPS)]
    steps = tuple(StepSpec(key, (Recipe(ELSEWHERE, tuple(keys[:1]) if key != keys[0] else ()),)) for key in keys)
    return SubmissionReceived(SubmissionId(name), tuple(keys[1:]), steps)


class HeldUp:
    """Holds the engine up in the turn of a large submission, until it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()
        if where == "decided":
            monkeypatch.setattr(engine_module, "in_slices", self._in_slices)
        elif where == "shown":
            monkeypatch.setattr(engine_module.Engine, "_show_part", self._showing(engine_module.Engine._show_part))  # noqa: SLF001
        else:
            monkeypatch.setattr(Journal, "encoded", self._encoding(Journal.encoded))

    async def _in_slices(self, work: Generator[object, None, Any], *, can_wait: bool = False) -> Any:
        task = asyncio.current_task()
        if task is not None and task.get_name() == "large submission" and not self.reached.is_set():
            next(work)
            await self._wait()
        return await in_slices(work, can_wait=can_wait)

    def _encoding(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        async def encoded(journal: Journal, facts: Sequence[Fact]) -> Any:
            if len(facts) > STEPS:
                await self._wait()
            return await encode(journal, facts)

        return encoded

    def _showing(self, show: Callable[..., Any]) -> Callable[..., Any]:
        async def shown(engine: Any, facts: Sequence[Fact], start: int) -> None:
            await show(engine, facts, start)
            if not self.reached.is_set():
                await self._wait()

        return shown

    async def _wait(self) -> None:
        self.reached.set()
        await self.go_on.wait()


async def built_beside(
    farm: OpenedFarm, worker: ScriptedWorker, held_up: HeldUp, clock: ManualClock
) -> tuple[str, asyncio.Task[None]]:
    """Have a long build end while the engine is held up; returns its submission, and the task of the large one."""
    await worker.hello()
    submitted = await farm.submit(ONE, "two")
    order = await started(farm, worker)
    taking = asyncio.create_task(farm.coordinator.engine.submit(large("large")))
    await held_up.reached.wait()
    clock.time += LONG_S
    await worker.speak(holds=[order])
    await worker.speak(await success(farm, worker, order))
    await farm.until(lambda: farm.states(submitted.id)["one"] is StepStatus.DONE)
    assert not taking.done()
    assert farm.coordinator.views.find("large") is None
    return submitted.id, taking


async def success(farm: OpenedFarm, worker: ScriptedWorker, order: LeaseOrder) -> Any:
    return report(order, Succeeded(outputs=(await worker.upload(output_path(farm, order)),)))


@pytest.mark.parametrize("where", ["decided", "encoded", "shown"])
async def test_a_build_ends_and_the_next_begins_while_a_large_submission_is_taken_in(
    open_farm: OpenFarm, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Leases are granted while it stands on nothing, and else as soon as it is in."""
    worker, held_up, clock = ScriptedWorker(), HeldUp(monkeypatch, where), ManualClock()
    async with open_farm(fleet=worker.start, clock=clock) as farm:
        submission, taking = await built_beside(farm, worker, held_up, clock)
        if where == "decided":
            order = await started(farm, worker, 2)
        else:
            assert len(worker.orders) == 1
            held_up.go_on.set()
            order = await started(farm, worker, 2)
        held_up.go_on.set()
        await taking
        await worker.speak(await success(farm, worker, order))
        assert (await farm.ended(submission)).state is SubmissionState.SUCCEEDED
        counts = (await farm.client.submission("large")).counts
        assert (counts.total, counts.ready, counts.waiting) == (STEPS, 1, STEPS - 1)
    async with open_farm(fleet=worker.start) as farm:
        assert (await farm.client.submission("large")).counts == counts
        assert (await farm.client.submission(submission)).state is SubmissionState.SUCCEEDED


def test_of_a_submission_that_is_being_shown_no_step_ends_before_it_is() -> None:
    """It would count as done before the submission came, and as done since after a replay."""
    facts, _ = Farm().handle(large("large"), Instant(1.0))
    members = members_of(facts)
    assert len(members) == STEPS
    own, other = (OutputsPublished(LeaseId(StepKey(step), 1)) for step in ("large-7", "another"))
    assert ends_any([TimePassed(), own], members)
    assert not ends_any([TimePassed(), other], members)


async def test_where_the_facts_of_what_passes_cannot_be_stored_the_submission_is_refused_with_it(
    open_farm: OpenFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, held_up = ScriptedWorker(), HeldUp(monkeypatch, "encoded")
    append = Journal.append

    async def broken(journal: Journal, facts: Sequence[Fact], *more: Any) -> None:
        if held_up.reached.is_set():
            raise JournalError("the disk is gone")
        await append(journal, facts, *more)

    monkeypatch.setattr(Journal, "append", broken)
    with pytest.RaisesGroup(pytest.RaisesExc(JournalError, match="the disk is gone")):
        async with open_farm(fleet=worker.start) as farm:
            await worker.hello()
            await farm.submit(ONE, "one")
            order = await started(farm, worker)
            taking = asyncio.create_task(farm.coordinator.engine.submit(large("large")))
            await held_up.reached.wait()
            with pytest.raises(UnavailableError):
                await worker.speak(await success(farm, worker, order))
            with pytest.raises(UnavailableError):
                await taking
            await asyncio.Event().wait()


async def test_a_submission_behind_facts_that_cannot_be_stored_is_refused_too(
    open_farm: OpenFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ScriptedWorker()

    async def broken(_journal: Journal, _facts: Sequence[Fact], *_more: Any) -> None:
        raise JournalError("the disk is gone")

    with pytest.RaisesGroup(pytest.RaisesExc(JournalError, match="the disk is gone")):
        async with open_farm(fleet=worker.start) as farm:
            submitted = await farm.submit(ONE, "one")
            monkeypatch.setattr(Journal, "append", broken)
            engine = farm.coordinator.engine
            cancelling = asyncio.create_task(engine.offer(SubmissionCancelled(SubmissionId(submitted.id))))
            taking = asyncio.create_task(engine.submit(large("large")))
            # No `wait_for`, which in Python 3.11 loses the cancelling of this task where `each` has just ended.
            for each in (cancelling, taking):
                with pytest.raises(UnavailableError):
                    await each
            await asyncio.Event().wait()


async def test_the_inbox_is_bounded_and_gives_what_passes_in_order() -> None:
    inbox = EngineInbox()
    plain = [EngineMessage((TimePassed(),)) for _ in range(INBOX_MESSAGES - 1)]
    for message in plain:
        await inbox.put(message)
    passing = EngineMessage(())
    await inbox.put(passing)
    late = asyncio.create_task(inbox.put(EngineMessage((large("large"),), submission=large("large"))))
    await asyncio.sleep(0)
    assert not late.done()
    assert inbox.take_where(lambda message: not message.events, 64) == [passing]
    await late
    assert inbox.take(10) == plain[:10]
    assert inbox.take_where(lambda message: message in (plain[12], plain[11]), 1) == [plain[11]]
    submission = inbox.take_submission()
    assert submission is not None
    assert submission.is_large
    assert inbox.take_submission() is None
    assert inbox.take_all() == [plain[10], *plain[12:]]
    await asyncio.wait_for(inbox.filled(0.0), PATIENCE_S)
