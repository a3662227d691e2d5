"""Owners and submissions on one worker that builds with real Nix: who gets how much of it, and who gives way."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.api.models import StepStatus, SubmissionState, SubmissionView
from coordinator.api.requests import SubmitRequest
from coordinator.config import OwnerSettings, Settings
from tests.coordinator.conftest import OpenedFarm, OpenFarm
from tests.coordinator.test_origins import TOKENS, client_of

WEIGHTS = {"ci": 3, "people": 1}
#: Leases that one report may bring, whose order their times do not show.
AT_ONCE = 4


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    owners = []
    for name, weight in WEIGHTS.items():
        file = tmp_path / name
        file.write_text(TOKENS[name])
        file.chmod(0o600)
        owners.append(OwnerSettings(name=name, tokens=(str(file),), weight=weight))
    return Settings(state_dir=tmp_path / "farm", port=0, owners=tuple(owners))


async def submitted(farm: OpenedFarm, owner: str, text: str, *attrs: str, **more: object) -> SubmissionView:
    roots = await farm.evaluate(text, *attrs)
    async with client_of(farm.coordinator, owner) as client:
        return await client.submit(SubmitRequest.model_validate({"roots": roots, **more}))


async def drained(farm: OpenedFarm) -> None:
    """Keep the worker from builds until all have been submitted."""
    await farm.until(lambda: farm.coordinator.views.workforce.counts()["online"] == 1)
    await farm.client.drain("one", on=True)


async def test_two_owners_share_a_worker_by_weight_however_many_submissions_each_sends(open_farm: OpenFarm) -> None:
    names = {"ci": [f"ci-{number}" for number in range(36)], "people": [f"people-{number}" for number in range(12)]}
    attrs = " ".join(f'{name} = run "{name}" "echo > $out";' for name in (*names["ci"], *names["people"]))
    async with open_farm("one") as farm:
        await drained(farm)
        views = [await submitted(farm, "people", f"{{ {attrs} }}", *names["people"])]
        views += [
            await submitted(farm, "ci", f"{{ {attrs} }}", *part)
            for part in (names["ci"][at : at + 3] for at in range(0, 36, 3))
        ]
        await farm.client.drain("one", on=False)
        attempts = []
        for view in views:
            assert (await farm.ended(view.id)).state is SubmissionState.SUCCEEDED
            attempts += await farm.client.submission_timeline(view.id)
        assert sum(each.outcome != "returned" for each in attempts) == 48, "each was built once"
        # A worker hands back what waits for a busy slot for too long: that was granted, and is granted again.
        granted = [each.name for each in sorted(attempts, key=lambda each: each.leased_at or 0.0)]
        order = [name.partition("-")[0] for name in dict.fromkeys(granted)]
        again = len(granted) - len(order)
        for count in range(1, 41):
            of_ci = order[:count].count("ci")
            assert abs(of_ci - count * 3 / 4) <= AT_ONCE + again, (count, order)


async def test_a_newer_submission_takes_the_place_of_an_older_one_and_what_only_that_wanted_is_not_built(
    open_farm: OpenFarm,
) -> None:
    text = '{ a = run "a" "echo > $out"; b = run "b" "echo > $out"; c = run "c" "echo > $out"; }'
    async with open_farm("one") as farm:
        await drained(farm)
        old = await submitted(farm, "ci", text, "a", "b", branch="main")
        other = await submitted(farm, "people", text, "b", branch="main")
        new = await submitted(farm, "ci", text, "b", "c", branch="main", supersede=True)
        await farm.client.drain("one", on=False)
        assert (await farm.ended(old.id)).superseded_by == new.id
        assert (await farm.ended(new.id)).state is SubmissionState.SUCCEEDED
        assert (await farm.ended(other.id)).state is SubmissionState.SUCCEEDED
        assert farm.states(old.id) == {"a": StepStatus.ABANDONED, "b": StepStatus.DONE}
        assert await farm.client.timeline(farm.key_of("a")) == []


async def test_the_first_failure_ends_a_submission_that_asks_for_it_and_no_other(open_farm: OpenFarm) -> None:
    text = """{
      bad = run "bad" "exit 1";
      late = run "late" "echo > $out";
      after = runOn "riscv64-linux" {} "after" "echo > $out";
    }"""
    async with open_farm("one") as farm:
        await drained(farm)
        hasty = await submitted(farm, "ci", text, "bad", "after", fail_fast=True)
        patient = await submitted(farm, "people", text, "bad", "late")
        await farm.client.drain("one", on=False)
        ended = await farm.ended(hasty.id)
        assert (ended.state, ended.counts.failed, ended.counts.abandoned) == (SubmissionState.FAILED, 1, 1)
        ended = await farm.ended(patient.id)
        assert (ended.state, ended.counts.failed, ended.counts.done) == (SubmissionState.FAILED, 1, 1)
