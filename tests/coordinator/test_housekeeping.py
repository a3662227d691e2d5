"""Housekeeping: what a farm keeps, for how long, and what it reports of a cache."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import aiohttp
import pytest

from coordinator.api.models import SubmissionState
from coordinator.api.requests import PinRequest
from coordinator.caches import housekeeping
from coordinator.client.errors import RefusedError
from infra.sqlite_driver import shrink_connections
from tests.coordinator.conftest import OpenedFarm, OpenFarm, waiting_for
from tests.coordinator.test_farm import DIAMOND
from tests.support.patience import PATIENCE_S

DAY_S = 86400.0


@dataclass
class MovableClock:
    """The system's clock, and what the test adds to it."""

    ahead_s: float = 0.0

    def now(self) -> float:
        return time.time() + self.ahead_s


async def published(farm: OpenedFarm, path: str) -> bool:
    url = f"{farm.coordinator.ready.cache_url}/{path.rpartition('/')[2][:32]}.narinfo"
    async with aiohttp.ClientSession() as web, web.get(url) as answer:
        return answer.status == 200


async def outputs(farm: OpenedFarm, submission: str) -> dict[str, str]:
    return {step.name: step.outputs["out"] for step in await farm.client.steps(submission)}


async def test_outputs_of_a_submission_stay_for_its_retention_and_then_go(open_farm: OpenFarm) -> None:
    clock = MovableClock()
    async with open_farm("one", clock=clock) as farm:
        view = await farm.ended((await farm.submit(DIAMOND, "top")).id)
        paths = await outputs(farm, view.id)
        retention_s = farm.settings.cache.retention_days * DAY_S

        clock.ahead_s = retention_s - DAY_S
        kept = await farm.client.collect("default", dry_run=False)
        assert (kept.tombstoned, kept.deleted_paths) == (0, 0)
        assert all([await published(farm, path) for path in paths.values()])

        clock.ahead_s = retention_s + DAY_S
        wish = await farm.client.collect("default", dry_run=True)
        assert wish.tombstoned == len(paths)
        assert all([await published(farm, path) for path in paths.values()])

        gone = await farm.client.collect("default", dry_run=False)
        assert gone.tombstoned == len(paths)
        assert not any([await published(farm, path) for path in paths.values()])

        clock.ahead_s += 30 * DAY_S
        deleted = await farm.client.collect("default", dry_run=False)
        assert deleted.deleted_paths == len(paths)
        assert deleted.deleted_objects > 0
        info = await farm.client.cache("default")
        assert (info.paths, info.file_bytes) == (0, 0)

        again = await farm.ended((await farm.submit(DIAMOND, "top")).id)
        assert (again.state, again.counts.done) == (SubmissionState.SUCCEEDED, len(paths))


async def test_a_running_submission_loses_nothing_to_a_collection(open_farm: OpenFarm) -> None:
    clock = MovableClock()
    text = f"""
      rec {{
        low = run "low" "echo low > $out";
        slow = run "slow" "read x < ${{low}}; {waiting_for("slow")}; :>$out";
        top = run "top" "read x < ${{low}}; read y < ${{slow}}; echo $x > $out";
      }}
    """
    async with open_farm("one", clock=clock) as farm:
        submitted = await farm.submit(text, "top")
        low = (await outputs(farm, submitted.id))["low"]
        await farm.until(lambda: farm.states(submitted.id)["low"].value == "done")
        for _ in range(3):
            clock.ahead_s += 1000 * DAY_S
            await farm.client.collect("default", dry_run=False)
        assert await published(farm, low)
        farm.open_gate("slow")
        assert (await farm.ended(submitted.id)).state is SubmissionState.SUCCEEDED


async def test_a_pin_keeps_its_closure_and_why_says_so(open_farm: OpenFarm) -> None:
    clock = MovableClock()
    text = 'rec { low = run "low" "echo > $out"; top = run "top" "echo ${low} > $out"; }'
    async with open_farm("one", clock=clock) as farm:
        view = await farm.ended((await farm.submit(text, "top")).id)
        paths = await outputs(farm, view.id)
        await farm.client.pin("default", "release-1", PinRequest(paths=(paths["top"],)))
        clock.ahead_s = 1000 * DAY_S
        for _ in range(2):
            await farm.client.collect("default", dry_run=False)
            clock.ahead_s += 30 * DAY_S
        assert await published(farm, paths["low"])
        why = await farm.client.cache_why("default", paths["low"].rpartition("/")[2])
        pin = next(keeper for keeper in why.keepers if keeper.kind == "pin")
        assert (pin.name, pin.chain) == ("release-1", (paths["top"], paths["low"]))
        assert [root.name for root in await farm.client.cache_roots("default") if root.kind == "pin"] == ["release-1"]

        await farm.client.unpin("default", "release-1")
        await farm.client.collect("default", dry_run=False)
        assert not await published(farm, paths["low"])


async def test_what_naming_the_paths_of_a_large_submission_needed_is_given_back_once(
    open_farm: OpenFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots_then: asyncio.Queue[set[str]] = asyncio.Queue()

    async def shrink() -> None:
        await shrink_connections()
        roots_then.put_nowait({root.name for root in await farm.client.cache_roots("default")})

    monkeypatch.setattr(housekeeping, "shrink_connections", shrink)
    monkeypatch.setattr(housekeeping, "MANY_PATHS", 4)
    monkeypatch.setattr(housekeeping, "GAUGES_S", 0.01)
    async with open_farm() as farm:
        small, first = await farm.submit(DIAMOND, "low"), await farm.submit(DIAMOND, "top")
        async with asyncio.timeout(PATIENCE_S):
            before = await roots_then.get()
            second = await farm.submit(DIAMOND.replace("low", "lower"), "top")
            after = await roots_then.get()
        assert first.id in before
        assert second.id not in before
        assert {small.id, first.id, second.id} <= after


async def test_an_absent_cache_or_pin_and_a_text_that_is_no_path_are_named(open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        with pytest.raises(RefusedError, match="there is no cache 'other'; there are default"):
            await farm.client.cache("other")
        with pytest.raises(RefusedError, match="nothing is pinned as none"):
            await farm.client.unpin("default", "none")
        with pytest.raises(RefusedError, match="is no store path"):
            await farm.client.pin("default", "x", PinRequest(paths=("/etc/passwd",)))
        with pytest.raises(RefusedError, match="a pin is called by letters"):
            await farm.client.pin("default", ".hidden", PinRequest(paths=("/nix/store/" + "0" * 32 + "-x",)))


async def test_verification_finds_a_lost_object_and_says_what_became_of_it(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        view = await farm.ended((await farm.submit(DIAMOND, "top")).id)
        whole = await farm.client.verify("default", full=True, repair=False)
        assert (whole.checked, whole.broken) == (4, 0)
        path = (await outputs(farm, view.id))["low"]
        narinfo = await farm.coordinator.cache.narinfo(path.rpartition("/")[2][:32])
        assert narinfo is not None
        key = next(line[5:] for line in narinfo.decode().splitlines() if line.startswith("URL: "))
        file = farm.coordinator.cache.objects.local_path(key)
        assert file is not None
        file.unlink()
        found = await farm.client.verify("default", full=False, repair=False)
        assert found.broken >= 1
        assert path in {fault.path for fault in found.faults}


async def test_a_path_that_the_cache_lost_is_uploaded_again_by_a_worker_that_built_it(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        view = await farm.ended((await farm.submit(DIAMOND, "top")).id)
        objects = farm.coordinator.cache.objects.local_path("nar")
        assert objects is not None
        lost, changed, *_ = sorted(objects.iterdir())
        lost.unlink()
        changed.write_bytes(bytes(reversed(changed.read_bytes())))
        report = await farm.client.verify("default", full=True, repair=True)
        assert (report.broken, report.repaired, report.hidden) == (2, 2, 0)
        assert {fault.outcome for fault in report.faults} == {"fetched again from a worker"}
        assert (await farm.client.verify("default", full=True, repair=False)).broken == 0
        assert all([await published(farm, path) for path in (await outputs(farm, view.id)).values()])


async def test_signing_anew_with_the_same_keys_changes_nothing(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        view = await farm.ended((await farm.submit(DIAMOND, "top")).id)
        report = await farm.client.resign("default")
        assert (report.narinfos, report.public_keys) == (0, farm.coordinator.ready.public_keys)
        assert all([await published(farm, path) for path in (await outputs(farm, view.id)).values()])
