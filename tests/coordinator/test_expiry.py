"""Expiry: core, views and journal forget what ended long ago, and ignore late reports of its leases."""

from __future__ import annotations

import pytest

from coordinator.api.models import StepStatus, SubmissionState
from coordinator.config import LimitSettings
from coordinator.engine.expiry import AT_LEAST_S, DAY_S, Forgetter
from coordinator.errors import NotFoundError
from tests.coordinator.conftest import OpenedFarm, OpenFarm
from tests.coordinator.test_engine import ONE, ManualClock, ScriptedWorker, report, started
from workers.wire.messages import Failed, Succeeded


async def _forget(farm: OpenedFarm, clock: ManualClock, *, days: float = 0, steps: int = 0) -> int:
    """Have the farm forget; returns how many steps it knows then."""
    limits = LimitSettings(history_days=days, history_steps=steps)
    await Forgetter(farm.coordinator.engine, farm.coordinator.views, limits, clock).look()
    return farm.coordinator.views.step_total()


async def test_an_old_submission_is_forgotten_and_what_its_leases_still_say_changes_nothing(
    open_farm: OpenFarm,
) -> None:
    worker, clock = ScriptedWorker(), ManualClock()
    async with open_farm(fleet=worker.start, clock=clock) as farm:
        await worker.hello()
        old = await farm.submit(ONE, "two")
        first = await started(farm, worker)
        await farm.client.cancel(old.id)
        clock.time += 29 * DAY_S
        assert await _forget(farm, clock, days=30) == 2
        clock.time += 2 * DAY_S
        running = await farm.submit('{ other = run "other" "echo > $out"; }', "other")
        assert await _forget(farm, clock, days=30) == 1
        with pytest.raises(NotFoundError):
            farm.coordinator.views.submission(old.id)
        assert set(await farm.coordinator.journal.notes()) == {running.id}

    again = ScriptedWorker()
    async with open_farm(fleet=again.start, clock=clock) as farm:
        assert [row.id for row in farm.coordinator.views.submission_rows()] == [running.id]
        await again.hello("2")
        await started(farm, again)
        await farm.client.cancel(running.id)
        await farm.submit(ONE, "two")
        await again.speak(incarnation="2")
        second = await started(farm, again, 2)
        assert (second.step, second.attempt) == (first.step, first.attempt + 1)
        late = Succeeded(outputs=(await again.upload(f"/nix/store/{first.step}"),))
        await again.speak(report(first, late), holds=(second,), incarnation="2")
        assert farm.coordinator.views.step(second.step).state is StepStatus.RUNNING


async def test_beyond_a_number_of_steps_the_oldest_go_but_what_ended_just_now_and_known_failures_stay(
    open_farm: OpenFarm,
) -> None:
    worker, clock = ScriptedWorker(), ManualClock()
    async with open_farm(fleet=worker.start, clock=clock) as farm:
        await worker.hello()
        submitted = await farm.submit(ONE, "two")
        order = await started(farm, worker)
        await worker.speak(report(order, Failed(reason="permanent", message="exit status 1")))
        await farm.ended(submitted.id)
        clock.time += AT_LEAST_S / 2
        assert await _forget(farm, clock, steps=1) == 2
        clock.time += AT_LEAST_S
        assert await _forget(farm, clock, steps=1) == 1
        again = await farm.submit(ONE, "two")
        assert again.state is SubmissionState.FAILED
        assert len(worker.orders) == 1
        clock.time += 2 * DAY_S
        assert await _forget(farm, clock, steps=1) == 0
