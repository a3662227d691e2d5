"""The tracker of environments by itself: changes at one time, and what a fault in the middle leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.environment_settings import EnvironmentSettings
from coordinator.environments.coverage import PackageStanding, Way
from coordinator.environments.model import Environment, EnvironmentRevision, SourceKind, TrackedSource
from coordinator.environments.reading import SourceContent
from coordinator.environments.store import EnvironmentStore
from coordinator.environments.tracker import EnvironmentTracker
from coordinator.errors import ConflictError, NotFoundError
from coordinator.wishes.model import Wish, WishedOutput, WishedPaths, WishList, WishSource
from infra.cache.cache import Cache
from infra.cache.catalog.database import FencingToken
from infra.clock import SystemClock
from infra.objects.errors import CacheError
from tests.support.cache import open_cache, store_path
from tests.support.patience import PATIENCE_S

LINUX = "x86_64-linux"
PUSHED = TrackedSource(SourceKind.PUSH)
FILE = TrackedSource(SourceKind.FILE, "/list")
CONTENT = WishList(
    "list",
    WishSource.PATHS,
    (Wish("a", LINUX, WishedPaths((WishedOutput("out", store_path("a")),))),),
    (LINUX,),
)


class NoPackages:
    """A farm that has no package."""

    def __init__(self) -> None:
        #: Names of environments whose packages are brought, and what lets that end.
        self.brought: list[str] = []
        self.ended: list[str] = []
        self.go = asyncio.Event()

    async def bring(self, environment: Environment, revision: EnvironmentRevision, content: WishList) -> None:
        self.brought.append(f"{environment.name}@{revision.number}: {len(content.wishes)}")
        try:
            await self.go.wait()
        finally:
            self.ended.append(environment.name)

    async def standings(self, content: WishList) -> Sequence[PackageStanding]:
        return [PackageStanding(each.system, each.name, Way.LOCAL, "not tried") for each in content.wishes]

    async def resolved(self, content: WishList) -> WishList:
        return content


class SlowFile:
    """A source that is read when `go` is set."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.go = asyncio.Event()

    async def read(self, _source: TrackedSource, _seen: str) -> SourceContent | None:
        self.asked.set()
        await self.go.wait()
        return SourceContent("m", "list", store_path("a").encode())


@asynccontextmanager
async def tracking(
    directory: Path, source: SlowFile, packages: NoPackages | None = None
) -> AsyncIterator[tuple[EnvironmentTracker, Cache]]:
    store = EnvironmentStore.open(f"sqlite+aiosqlite:///{directory}/environments.sqlite3", FencingToken(1, 1))
    try:
        await store.prepare()
        async with open_cache(directory) as cache:
            settings = EnvironmentSettings()
            farm = packages or NoPackages()
            yield EnvironmentTracker(store, cache, farm, source.read, settings, SystemClock()), cache
    finally:
        await store.close()


async def test_a_change_that_began_before_another_owner_came_changes_nothing(tmp_path: Path) -> None:
    async with tracking(tmp_path, SlowFile()) as (tracker, _):
        ours = await tracker.track(Environment("dev", PUSHED, ("ci",), 1.0), None)
        theirs = replace(ours, owners=("other",))
        with pytest.raises(ConflictError, match="other owners meanwhile"):
            await tracker.track(theirs, None)
        await tracker.track(theirs, ours)
        for change in (tracker.push(ours, CONTENT, "m", ""), tracker.roll_back(ours, (), 0)):
            with pytest.raises(ConflictError, match="other owners meanwhile"):
                await change
        assert (await tracker.environment("dev")).owners == ("other",)
        await tracker.forget("dev")
        for gone in (tracker.push(theirs, CONTENT, "m", ""), tracker.look(theirs)):
            with pytest.raises(NotFoundError):
                await gone
        assert await tracker.store.environments() == []


async def test_a_name_that_two_owners_want_at_one_time_is_the_first_ones(tmp_path: Path) -> None:
    source = SlowFile()
    async with tracking(tmp_path, source) as (tracker, _):
        first = asyncio.create_task(tracker.track(Environment("dev", FILE, ("ci",), 1.0), None))
        await source.asked.wait()
        second = asyncio.create_task(tracker.track(Environment("dev", FILE, ("other",), 1.0), None))
        repeat = asyncio.create_task(tracker.track(Environment("dev", FILE, ("ci",), 1.0), None))
        source.go.set()
        assert (await first).owners == ("ci",)
        with pytest.raises(ConflictError, match="other owners meanwhile"):
            await second
        assert (await repeat).owners == ("ci",)


async def test_while_packages_are_brought_for_hours_everything_else_goes_on(tmp_path: Path) -> None:
    packages = NoPackages()
    async with tracking(tmp_path, SlowFile(), packages) as (tracker, _), asyncio.timeout(PATIENCE_S):
        running = asyncio.create_task(tracker.run())
        for name in ("dev", "other"):
            tracked = await tracker.track(Environment(name, PUSHED, (), 1.0), None)
            await tracker.push(tracked, CONTENT, "m", "")
            while (found := await tracker.store.assessment(name)) is None:  # noqa: ASYNC110 - another task makes it
                await asyncio.sleep(0.01)
            assert found.revision == 1
        while len(packages.brought) < 2:  # noqa: ASYNC110 - another task fills it
            await asyncio.sleep(0.01)
        assert sorted(packages.brought) == ["dev@1: 1", "other@1: 1"]
        # Changes of it go on, and a forgotten one is brought no further.
        with pytest.raises(ConflictError, match="nothing to roll back"):
            await tracker.roll_back(await tracker.environment("dev"), (), 0)
        await tracker.push(await tracker.environment("dev"), replace(CONTENT, systems=()), "m2", "")
        await tracker.forget("dev")
        assert packages.ended == ["dev"]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert packages.ended == ["dev", "other"]


async def test_roots_that_a_failed_forgetting_left_are_ended_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tracking(tmp_path, SlowFile()) as (tracker, cache):
        running = asyncio.create_task(tracker.run())
        await tracker.push(await tracker.track(Environment("dev", PUSHED, (), 1.0), None), CONTENT, "m", "")
        assert [root.name for root in await cache.roots()] == ["dev@1"]
        with monkeypatch.context() as patched:
            patched.setattr(cache, "drop", _failing)
            with pytest.raises(CacheError):
                await tracker.forget("dev")
        assert [root.name for root in await cache.roots()] == ["dev@1"]
        tracker.stir("dev")
        async with asyncio.timeout(PATIENCE_S):
            while await cache.roots():  # noqa: ASYNC110 - what is waited for is another task's doing
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _failing(_kind: str, _name: str) -> None:
    raise CacheError("no room")
