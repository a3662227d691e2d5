"""Reports of lost inputs are verified; what is lost is built again, and neither attempts nor workers pay for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.api.models import StepStatus, SubmissionState, SubmissionView
from tests.coordinator.conftest import OpenedFarm, OpenFarm
from tests.coordinator.test_engine import ONE, ScriptedWorker, output_path, report, started
from workers.wire.fleet import FleetError
from workers.wire.messages import Failed, LeaseOrder, Output, Succeeded


class Worker(ScriptedWorker):
    """A scripted worker that has nothing in its store."""

    async def provide(self, worker: str, _paths: Sequence[str], _token: str) -> tuple[Output, ...]:
        raise FleetError(f"{worker} has nothing")

    async def build(self, farm: OpenedFarm, count: int, text: bytes = b"made") -> tuple[LeaseOrder, Output]:
        """Build the order with this number; return it and its output."""
        order = await started(farm, self, count)
        output = await self.upload(output_path(farm, order), text)
        await self.speak(report(order, Succeeded(outputs=(output,))))
        return order, output

    async def misses(self, order: LeaseOrder, *paths: str) -> None:
        """Report that inputs cannot be had."""
        failed = Failed(reason="input_missing", message=f"{paths[0]} is not in the farm's cache", missing=paths)
        await self.speak(report(order, failed))


@asynccontextmanager
async def leased(
    open_farm: OpenFarm,
) -> AsyncGenerator[tuple[OpenedFarm, Worker, SubmissionView, Output, LeaseOrder]]:
    """A farm that has built and published `one`, whose worker holds the lease of `two` above it."""
    worker = Worker()
    async with open_farm(fleet=worker.start) as farm:
        await worker.hello()
        submitted = await farm.submit(ONE, "two")
        _, one = await worker.build(farm, 1)
        yield farm, worker, submitted, one, await started(farm, worker, 2)


def object_of(farm: OpenedFarm, output: Output) -> Path:
    file = farm.coordinator.cache.objects.local_path(output.url)
    assert file is not None
    return file


async def test_a_lost_input_is_built_again_and_the_step_that_waits_goes_on(open_farm: OpenFarm) -> None:
    async with leased(open_farm) as (farm, worker, submitted, one, two):
        object_of(farm, one).unlink()
        await worker.misses(two, one.path)
        again, _ = await worker.build(farm, 3)
        assert (output_path(farm, again), again.attempt) == (one.path, 2)
        last, _ = await worker.build(farm, 4)
        assert (last.step, last.attempt) == (two.step, 2)
        assert (await farm.ended(submitted.id)).state is SubmissionState.SUCCEEDED
        [told] = await farm.client.workers()
        assert told.state == "online"


async def test_an_input_that_the_core_knew_only_as_held_is_built_again(open_farm: OpenFarm) -> None:
    worker = Worker()
    async with open_farm(fleet=worker.start) as farm:
        await worker.hello()
        first = await farm.submit(ONE, "one")
        _, one = await worker.build(farm, 1)
        await farm.ended(first.id)
    worker = Worker()
    # A journal that begins anew knows no step; the cache holds `one`, at which the plan ends.
    for file in (farm.settings.state_dir).glob("journal.sqlite3*"):
        file.unlink()
    async with open_farm(fleet=worker.start) as farm:
        await worker.hello()
        submitted = await farm.submit(ONE, "two")
        two = await started(farm, worker, 1)
        object_of(farm, one).unlink()
        await worker.misses(two, one.path)
        again, _ = await worker.build(farm, 2)
        assert output_path(farm, again) == one.path
        await worker.build(farm, 3)
        ended = await farm.ended(submitted.id)
        assert (ended.state, ended.counts.done) == (SubmissionState.SUCCEEDED, 2)


@pytest.mark.parametrize("lie", ["it is there", "it is none of the step's"])
async def test_a_worker_cannot_make_the_farm_forget_a_path(open_farm: OpenFarm, lie: str) -> None:
    async with leased(open_farm) as (farm, worker, submitted, one, two):
        named = one.path if lie == "it is there" else f"/nix/store/{'0' * 32}-other"
        await worker.misses(two, named)
        await farm.until(lambda: farm.states(submitted.id)["two"] is StepStatus.READY)
        assert "is not in the farm's cache" in (await farm.client.step(two.step)).waiting_for
        assert await farm.coordinator.cache.missing([one.path]) == set()
        assert farm.states(submitted.id)["one"] is StepStatus.DONE


async def test_a_reference_that_is_lost_before_publishing_is_waited_for(open_farm: OpenFarm) -> None:
    async with leased(open_farm) as (farm, worker, submitted, one, two):
        output = await worker.upload(output_path(farm, two), b"stands on one")
        refers = output.model_copy(update={"references": (one.path.rpartition("/")[2],)})
        object_of(farm, one).unlink()
        assert (await farm.coordinator.cache.verify(repair=True)).hidden == 1
        await worker.speak(report(two, Succeeded(outputs=(refers,))))
        again, _ = await worker.build(farm, 3)
        assert output_path(farm, again) == one.path
        last = await started(farm, worker, 4)
        assert (last.step, last.attempt) == (two.step, 2)
        await worker.speak(report(last, Succeeded(outputs=(refers,))))
        assert (await farm.ended(submitted.id)).state is SubmissionState.SUCCEEDED
