"""Tracked environments in a whole coordinator: revisions, roots, pointers over the cache, coverage, restarts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest

from coordinator.api.environments import CoverageView, EnvironmentView
from coordinator.api.plan_models import PlanView
from coordinator.api.requests import PushSubmissionRequest, RollbackRequest, SubmitRequest, TrackRequest
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import RefusedError
from coordinator.config import OwnerSettings, Settings
from coordinator.environment_settings import EnvironmentSettings
from coordinator.errors import UnavailableError
from coordinator.main import Coordinator, open_coordinator
from coordinator.plans.planner import Planner
from coordinator.wishes.model import WishList
from infra.nix.store_path import base_name_of
from tests.coordinator.conftest import OpenFarm
from tests.support.cache import publish, store_path
from tests.support.local_fleet import no_workers
from tests.support.patience import PATIENCE_S

LINUX, MAC = "x86_64-linux", "aarch64-darwin"

_T = TypeVar("_T")


def lock(*packages: tuple[str, str, str]) -> bytes:
    """Return a Flox lock of packages (name, system, path)."""
    return json.dumps(
        {
            "lockfile-version": 1,
            "manifest": {},
            "packages": [
                {"install_id": name, "system": system, "store_path": path, "priority": 5}
                for name, system, path in packages
            ],
        }
    ).encode()


@dataclass
class EnvironmentFarm:
    """A coordinator without workers, and clients of it."""

    coordinator: Coordinator
    client: ApiClient

    async def push(self, name: str, content: bytes, mark: str = "") -> EnvironmentView:
        return await self.client.push_content(name, content, {"file": "manifest.lock", "mark": mark})

    async def covered(self, name: str, holds: Callable[[CoverageView], bool]) -> CoverageView:
        return await until(lambda: self.client.coverage(name), holds)

    async def stable(self, name: str) -> dict[str, int]:
        return {each.system: each.revision for each in (await self.client.environment(name)).stable}

    async def became(self, name: str, wanted: dict[str, int]) -> None:
        await until(lambda: self.stable(name), lambda found: found == wanted)

    async def file(self, name: str, **headers: str) -> tuple[int, bytes, str]:
        url = f"{self.coordinator.ready.cache_url}/environments/{name}"
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
            return answer.status, await answer.read(), answer.headers.get("ETag", "")

    async def roots(self) -> set[str]:
        return {root.name for root in await self.coordinator.cache.roots() if root.kind == "environment"}


async def until(ask: Callable[[], Awaitable[_T]], holds: Callable[[_T], bool]) -> _T:
    async with asyncio.timeout(PATIENCE_S):
        while not holds(found := await ask()):  # noqa: ASYNC110 - what is waited for is another program's doing
            await asyncio.sleep(0.02)
    return found


@pytest.fixture
def farm_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("CI_TOKEN", "c" * 32)
    monkeypatch.setenv("OTHER_TOKEN", "o" * 32)
    return Settings(
        state_dir=tmp_path / "farm",
        port=0,
        owners=tuple(OwnerSettings(name=name, tokens=(f"env:{name.upper()}_TOKEN",)) for name in ("ci", "other")),
        environments=EnvironmentSettings(
            directories=(tmp_path / "files",), poll_s=0.1, assess_s=0.05, revisions=4, kept_revisions=2
        ),
    )


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[EnvironmentFarm]:
    async with open_coordinator(settings, no_workers) as coordinator:
        token = coordinator.ready.token_file.read_text().strip()
        async with ApiClient(coordinator.ready.url, token) as client:
            yield EnvironmentFarm(coordinator, client)


async def test_stable_moves_for_the_system_that_is_whole_waits_for_no_other_and_rolls_back(
    farm_settings: Settings, tmp_path: Path
) -> None:
    a, b, mac = (store_path(name) for name in ("a", "b", "mac"))
    async with opened(farm_settings) as farm:
        await farm.client.track("dev", TrackRequest(kind="push"))
        assert (await farm.file("dev/stable.json"))[0] == 404
        await publish(farm.coordinator.cache, a)
        view = await farm.push("dev", lock(("a", LINUX, a), ("tool", MAC, mac)), "c1")
        assert [(each.number, each.mark, dict(each.packages)) for each in view.revisions] == [
            (1, "c1", {LINUX: 1, MAC: 1})
        ]
        await farm.became("dev", {LINUX: 1})
        coverage = await farm.covered("dev", lambda found: found.gap_count == 1)
        linux, darwin = sorted(coverage.systems, key=lambda each: each.system, reverse=True)
        assert (linux.here_percent, linux.whole, linux.stable, linux.oldest_gap_at) == (100.0, True, 1, 0.0)
        assert (darwin.here_percent, darwin.whole, darwin.stable) == (0.0, False, 0)
        assert [(gap.package, gap.system) for gap in coverage.gaps] == [("tool", MAC)]
        assert darwin.oldest_gap_at == coverage.gaps[0].since > 0
        # The other follows by itself once it can be fetched.
        await publish(farm.coordinator.cache, mac)
        await farm.became("dev", {LINUX: 1, MAC: 1})
        # The next revision lacks a package on Linux: there alone nothing moves.
        await farm.push("dev", lock(("a", LINUX, b), ("tool", MAC, mac), ("more", MAC, a)), "c2")
        await farm.became("dev", {LINUX: 1, MAC: 2})
        await publish(farm.coordinator.cache, b)
        await farm.became("dev", {LINUX: 2, MAC: 2})
        # Programs and Nix read the same.
        status, body, tag = await farm.file("dev/stable.json")
        assert status == 200
        assert json.loads(body)["systems"][LINUX] | {"moved_at": 0} == {
            "revision": 2, "mark": "c2", "moved_at": 0, "packages": {"a": {"out": b}},
        }  # fmt: skip
        assert (await farm.file("dev/stable.json", **{"If-None-Match": tag}))[0] == 304
        (tmp_path / "stable.nix").write_bytes((await farm.file("dev/stable.nix"))[1])
        assert await in_nix(tmp_path / "stable.nix") == json.loads(body)
        # A rollback holds until there is a newer revision, and says no to what is not whole.
        with pytest.raises(RefusedError, match="leads to a lower one"):
            await farm.client.roll_back("dev", RollbackRequest(systems=(MAC,), to=2))
        await farm.client.roll_back("dev", RollbackRequest(systems=(LINUX,)))
        await farm.covered("dev", lambda found: found.assessed_at > coverage.assessed_at)
        assert await farm.stable("dev") == {LINUX: 1, MAC: 2}
        assert json.loads((await farm.file("dev/stable.json"))[1])["systems"][LINUX]["packages"] == {"a": {"out": a}}
        await farm.push("dev", lock(("a", LINUX, a), ("more", MAC, a)), "c1")
        await farm.became("dev", {LINUX: 3, MAC: 3})
        newest = (await farm.client.environment("dev")).revisions[0]
        assert newest.note == "The source moved back to c1, which was revision 1."


async def in_nix(file: Path) -> Any:
    command = ("nix-instantiate", "--eval", "--strict", "--json", str(file))
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True, timeout=PATIENCE_S)
    return json.loads(done.stdout)


async def test_paths_of_kept_revisions_are_roots_and_history_is_bounded(farm_settings: Settings) -> None:
    paths = [store_path(f"p{number}") for number in range(7)]
    async with opened(farm_settings) as farm:
        await farm.client.track("dev", TrackRequest(kind="push"))
        await publish(farm.coordinator.cache, paths[0])
        await farm.push("dev", lock(("p", LINUX, paths[0])))
        await farm.became("dev", {LINUX: 1})
        for path in paths[1:]:
            await farm.push("dev", lock(("p", LINUX, path)))
        view = await farm.client.environment("dev")
        # The newest four, and what is stable, of which the newest two and what is stable are kept.
        assert [each.number for each in view.revisions] == [7, 6, 5, 4, 1]
        assert await farm.roots() == {"dev@7", "dev@6", "dev@1"}
        assert (await farm.push("dev", lock(("p", LINUX, paths[6])))).revisions[0].number == 7
        why = await farm.coordinator.cache.why(paths[6])
        assert [(each.kind, each.name) for each in why] == [("environment", "dev@7")]
        await farm.client.forget_environment("dev")
        assert await farm.roots() == set()
        with pytest.raises(RefusedError, match="there is no environment 'dev'"):
            await farm.client.environment("dev")


async def test_a_file_is_followed_its_trouble_is_shown_and_changes_nothing(
    farm_settings: Settings, tmp_path: Path
) -> None:
    a, b = store_path("a"), store_path("b")
    file = tmp_path / "files/manifest.lock"
    file.parent.mkdir()
    async with opened(farm_settings) as farm:
        with pytest.raises(RefusedError, match="has none of"):
            await farm.client.track("dev", TrackRequest(kind="file", path=str(file.parent)))
        assert await farm.client.environments() == []
        file.write_bytes(lock(("a", LINUX, a)))
        await publish(farm.coordinator.cache, a)
        await farm.client.track("dev", TrackRequest(kind="file", path=str(file.parent)))
        await farm.became("dev", {LINUX: 1})
        # Truncated, as while an editor writes it.
        whole = lock(("a", LINUX, b))
        file.write_bytes(whole[:40])
        view = await until(lambda: farm.client.environment("dev"), lambda found: bool(found.trouble))
        assert "manifest.lock" in view.trouble
        assert view.trouble_since > 0
        assert [each.number for each in view.revisions] == [1]
        with pytest.raises(RefusedError, match=r"manifest\.lock"):
            await farm.client.look("dev")
        file.write_bytes(whole)
        view = await farm.client.look("dev")
        assert (view.trouble, view.revisions[0].number) == ("", 2)
        with pytest.raises(RefusedError, match="which a push would be undone by"):
            await farm.push("dev", whole)


async def test_owners_change_their_own_environments_and_files_take_the_farms_token(
    farm_settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/manifest.lock").write_bytes(lock(("a", LINUX, store_path("a"))))
    async with (
        opened(farm_settings) as farm,
        ApiClient(farm.coordinator.ready.url, "c" * 32) as ours,
        ApiClient(farm.coordinator.ready.url, "o" * 32) as other,
    ):
        file = TrackRequest(kind="file", path=str(tmp_path / "files"))
        refusals = []
        with pytest.raises(RefusedError, match="with the farm's own token alone"):
            await ours.track("dev", file)
        with pytest.raises(RefusedError, match="must have ci among them"):
            await ours.track("dev", TrackRequest(kind="push", owners=("other",)))
        # What is built for it is the first one's, which none makes another owner.
        shared = await ours.track("dev", TrackRequest(kind="push", owners=("other", "ci")))
        assert shared.owners == ("ci", "other")
        assert (await ours.track("dev", TrackRequest(kind="push"))).owners == ("ci",)
        for change in (
            other.track("dev", TrackRequest(kind="push")),
            other.push_content("dev", lock(("a", LINUX, store_path("a"))), {}),
            other.roll_back("dev", RollbackRequest()),
            other.look("dev"),
            other.forget_environment("dev"),
        ):
            with pytest.raises(RefusedError) as refused:
                await change
            refusals.append(str(refused.value))
        assert all("belongs to ci, not to other" in each for each in refusals), refusals
        assert [each.name for each in await other.environments()] == ["dev"]
        assert (await farm.client.track("dev", file)).owners == ("api",)


async def test_what_is_stable_of_a_name_that_was_forgotten_is_not_that_of_its_next_environment(
    farm_settings: Settings,
) -> None:
    before, after = store_path("a"), store_path("b")
    async with opened(farm_settings) as farm:
        for path in (before, after):
            await publish(farm.coordinator.cache, path)
            await farm.client.track("dev", TrackRequest(kind="push"))
            await farm.push("dev", lock(("a", LINUX, path)))
            await farm.became("dev", {LINUX: 1})
            assert path.encode() in (await farm.file("dev/stable.json"))[1]
            assert path.encode() in (await farm.file("dev/stable.nix"))[1]
            await farm.client.forget_environment("dev")
            assert (await farm.file("dev/stable.json"))[0] == 404
        assert (await farm.file("%00/stable.json"))[0] == 404
        assert await farm.roots() == set()


async def test_a_plan_that_is_refused_or_a_fault_of_ours_costs_one_look_and_no_farm(
    farm_settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = store_path("a")
    plan = Planner.of_list
    faults: list[Exception] = [RuntimeError("ours"), UnavailableError("too many plans are being made.")]

    async def failing(self: Planner, wishes: WishList) -> PlanView:
        if faults:
            raise faults.pop()
        return await plan(self, wishes)

    monkeypatch.setattr(Planner, "of_list", failing)
    async with opened(farm_settings) as farm:
        await publish(farm.coordinator.cache, path)
        await farm.client.track("dev", TrackRequest(kind="push"))
        await farm.push("dev", lock(("a", LINUX, path)))
        await farm.became("dev", {LINUX: 1})
    assert "environment dev cannot be looked at now: too many plans are being made." in caplog.text
    assert "RuntimeError: ours" in caplog.text


#: A coordinator without workers that runs until it is killed.
PROGRAM = """
import asyncio, sys
from coordinator.config import Settings
from coordinator.main import open_coordinator
from tests.support.local_fleet import no_workers

async def main():
    async with open_coordinator(Settings.model_validate_json(sys.argv[1]), no_workers) as coordinator:
        print(coordinator.ready.url, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_after_kill_9_in_the_middle_everything_goes_on(farm_settings: Settings) -> None:
    paths = [store_path(f"p{number}") for number in range(20)]
    command = (sys.executable, "-c", PROGRAM, farm_settings.model_dump_json())
    program = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    answered = 0
    try:
        assert program.stdout is not None
        url = (await program.stdout.readline()).decode().strip()
        token = (farm_settings.secrets / "api-token").read_text().strip()
        async with ApiClient(url, token) as client:
            await client.track("dev", TrackRequest(kind="push"))
            pushing = asyncio.create_task(client.push_content("dev", lock(("p", LINUX, paths[0])), {}))
            for path in paths[1:]:
                answered = (await pushing).revisions[0].number
                pushing = asyncio.create_task(client.push_content("dev", lock(("p", LINUX, path)), {}))
                if path == paths[12]:
                    # In the middle of one.
                    await asyncio.sleep(0)
                    os.kill(program.pid, signal.SIGKILL)
                    break
            pushing.cancel()
            await asyncio.gather(pushing, return_exceptions=True)
    finally:
        if program.returncode is None:
            program.kill()
        await program.wait()
    async with opened(farm_settings) as farm:
        newest = (await farm.client.environment("dev")).revisions[0].number
        assert newest in {answered, answered + 1}
        await until(farm.roots, lambda found: found == {f"dev@{newest}", f"dev@{newest - 1}"})
        await publish(farm.coordinator.cache, paths[newest - 1])
        await farm.became("dev", {LINUX: newest})
        name = base_name_of(paths[newest - 1])
        assert name.encode() in (await farm.file("dev/stable.nix"))[1]


async def test_what_the_farm_knows_to_build_is_submitted_for_the_owner_and_released(
    open_farm: OpenFarm,
) -> None:
    async with open_farm("one") as farm:
        good, bad = await farm.evaluate(
            '{ good = run "env-good" "echo > $out"; bad = run "env-bad" "exit 3"; }', "good", "bad"
        )
        await farm.client.track("dev", TrackRequest(kind="push"))
        unknown = f"{store_path('env-unknown')}.drv"
        with pytest.raises(RefusedError, match=r"this farm does not have .*env-unknown\.drv"):
            await farm.client.push_content("dev", unknown.encode(), {"file": "list"})
        await farm.client.push_content("dev", good.drv.encode(), {"file": "list"})
        await until(
            lambda: farm.client.environment("dev"),
            lambda found: {each.system: each.revision for each in found.stable} == {LINUX: 1},
        )
        (submission,) = await farm.client.submissions()
        assert (submission.label, submission.owner) == ("environment dev", "api")
        # The roots of a submission are a content too; its commit is the mark. A failure is a gap with its root cause.
        both = await farm.client.submit(SubmitRequest(roots=(good, bad), commit="c2"))
        await farm.ended(both.id)
        view = await farm.client.push_submission("dev", PushSubmissionRequest(submission=both.id))
        assert (view.revisions[0].number, view.revisions[0].mark) == (2, "c2")
        coverage = await until(lambda: farm.client.coverage("dev"), lambda found: found.revision == 2)
        assert [(gap.package, gap.reason, gap.detail) for gap in coverage.gaps] == [
            ("bad", "failed", "its own build fails")
        ]
        (system,) = coverage.systems
        assert (system.here_percent, system.impossible_percent, system.stable) == (50.0, 50.0, 1)
