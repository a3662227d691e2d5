"""The store of environments, in both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import insert

from coordinator.environments import tables
from coordinator.environments.coverage import PackageStanding, SystemCoverage, Way, gaps
from coordinator.environments.history import next_revision
from coordinator.environments.model import Environment, PollState, SourceKind, TrackedSource
from coordinator.environments.pointers import SystemPointer
from coordinator.environments.store import (
    CoverageAssessment,
    EnvironmentsError,
    EnvironmentsFencedError,
    EnvironmentStore,
)
from coordinator.wishes.model import (
    Wish,
    WishedAttribute,
    WishedDerivation,
    WishedOutput,
    WishedPaths,
    WishList,
    WishMark,
    WishSource,
)
from infra.cache.catalog.database import FencingToken
from infra.database import open_engine

LINUX, MAC = "x86_64-linux", "aarch64-darwin"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/environments.sqlite3"
    return str(request.getfixturevalue("postgres_url"))


@asynccontextmanager
async def opened(url: str, epoch: int = 1, journal: int = 7) -> AsyncIterator[EnvironmentStore]:
    store = EnvironmentStore.open(url, FencingToken(journal, epoch))
    try:
        await store.prepare()
        yield store
    finally:
        await store.close()


CONTENT = WishList(
    "manifest.lock",
    WishSource.FLOX,
    (
        Wish("a", LINUX, WishedPaths((WishedOutput("out", "/nix/store/a"),), "/nix/store/a.drv", "x#a"), "toolchain"),
        Wish("a", MAC, WishedDerivation("/nix/store/m.drv", ("out",)), marks=frozenset({WishMark.UNFREE})),
        Wish("b", LINUX, WishedAttribute("x", "b")),
    ),
    (LINUX, MAC),
)


async def test_an_environment_is_the_same_after_a_restart_and_leaves_nothing_when_it_is_forgotten(url: str) -> None:
    environment = Environment("dev", TrackedSource(SourceKind.GIT, url="https://x", ref="main"), ("ci",), 1.0)
    other = Environment("other", TrackedSource(SourceKind.PUSH), (), 1.0)
    async with opened(url) as store:
        first = next_revision([], CONTENT, "c1", 2.0)
        assert first is not None
        await store.save(other)
        for number in (1, 1):  # a repeat changes nothing
            assert first.number == number
            await store.add_revision(environment, first, CONTENT)
        await store.save_pointers("dev", [SystemPointer(LINUX, 1, 3.0, 4, (2, 1)), SystemPointer(MAC)])
        found = gaps([PackageStanding(MAC, "a", Way.IMPOSSIBLE, "unfree", "said")], (), 5.0)
        coverage = (SystemCoverage(LINUX, here=1, upstream=1), SystemCoverage(MAC, impossible=1))
        for day in (100, 101, 101):
            await store.save_assessment("dev", CoverageAssessment(1, 5.0, coverage, found), day, 2)
        await store.save_assessment("other", CoverageAssessment(1, 5.0, coverage, ()), 7, 2)
    async with opened(url) as store:
        assert await store.environments() == [environment, other]
        assert await store.revisions("dev") == [first]
        assert await store.contents("dev", [1, 2]) == {1: CONTENT}
        assert (await store.contents("dev", [1]))[1].digest == first.digest
        assert await store.pointers("dev") == {
            LINUX: SystemPointer(LINUX, 1, 3.0, 4, (2, 1)), MAC: SystemPointer(MAC)
        }  # fmt: skip
        assert await store.assessment("dev") == CoverageAssessment(1, 5.0, coverage, found)
        assert [day.day for day in (await store.trend("dev"))[LINUX]] == [100, 101]
        await store.save_assessment("dev", CoverageAssessment(1, 5.0, coverage, found), 102, 2)
        assert [day.day for day in (await store.trend("dev"))[LINUX]] == [101, 102]
        moved = Environment("dev", environment.source, ("ci",), 1.0, PollState(9.0, 8.0, "c2", "gone", 7.0, 2))
        await store.save(moved)
        assert await store.environment("dev") == moved
        await store.forget("dev")
        assert await store.environments() == [other]
        assert await store.environment("dev") is None
        # PostgreSQL takes no text with this.
        assert await store.environment("dev\0") is None
        assert (await store.revisions("dev"), await store.pointers("dev"), await store.trend("dev")) == ([], {}, {})
        assert await store.assessment("dev") is None
        assert await store.assessment("other") is not None


async def test_tables_of_a_newer_release_are_not_touched(url: str) -> None:
    async with opened(url):
        pass
    engine = open_engine(url)
    async with engine.begin() as connection:
        await connection.execute(insert(tables.meta).values(format=tables.FORMAT + 1))
    await engine.dispose()
    with pytest.raises(EnvironmentsError, match="newer version"):
        async with opened(url):
            pass


async def test_a_coordinator_that_was_taken_over_from_writes_nothing_more(url: str) -> None:
    environment = Environment("dev", TrackedSource(SourceKind.PUSH), (), 1.0)
    first = next_revision([], CONTENT, "c1", 2.0)
    assert first is not None
    async with opened(url, 1) as old:
        await old.add_revision(environment, first, CONTENT)
        async with opened(url, 2) as new:
            await new.save_pointers("dev", [SystemPointer(LINUX, 1, 3.0)])
            assessment = CoverageAssessment(1, 5.0, (SystemCoverage(LINUX, here=1),), ())
            for write in (
                old.save(Environment("late", environment.source, (), 1.0)),
                old.save_pointers("dev", [SystemPointer(LINUX, 9, 4.0)]),
                old.save_assessment("dev", assessment, 1, 2),
                old.add_revision(environment, first, CONTENT),
                old.drop_revisions("dev", [1]),
                old.forget("dev"),
            ):
                with pytest.raises(EnvironmentsFencedError, match="another coordinator has taken over"):
                    await write
            with pytest.raises(EnvironmentsFencedError):
                await old.prepare()
            # It may read what there is: that is the new one's.
            assert await old.pointers("dev") == {LINUX: SystemPointer(LINUX, 1, 3.0)}
            assert ([each.name for each in await new.environments()], await new.assessment("dev")) == (["dev"], None)
            assert await new.revisions("dev") == [first]
    # A farm that begins a new journal goes on with its environments.
    async with opened(url, 1, journal=8) as restored:
        await restored.save_pointers("dev", [SystemPointer(MAC)])


async def test_tables_of_the_format_before_get_an_epoch(url: str) -> None:
    engine = open_engine(url)
    async with engine.begin() as connection:
        before = [table for table in tables.metadata.sorted_tables if table is not tables.reign]
        await connection.run_sync(lambda sync: tables.metadata.create_all(sync, before))
        await connection.execute(insert(tables.meta).values(format=1))
    await engine.dispose()
    async with opened(url) as store:
        await store.save_pointers("dev", [SystemPointer(LINUX)])
