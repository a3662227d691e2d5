"""Publishing, keeping and collecting in any order, interleaved and cut at any step: what is wanted always answers.

Hypothesis drives a real cache (SQLite, a directory). The judge looks only from outside: at narinfos, objects and the
roots that it set itself. Each mutant of the collector must be found out by the same machine.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from infra.cache.cache import Cache
from infra.cache.catalog.database import Database, write_by
from infra.cache.errors import MetadataError
from infra.cache.publishing import publisher
from infra.cache.retention import collector, roots
from infra.cache.retention.collector import CollectPlan
from infra.database_work import Work
from infra.nix import narinfo
from tests.support.cache import STORE_DIR, base_name, open_cache, store_path, uploaded_claim

PATHS = [store_path(f"path-{number}") for number in range(6)]
DAY_S = 86_400.0
GRACE_S = DAY_S
PLAN = CollectPlan(grace_s=GRACE_S, fresh_s=0.0, orphan_s=DAY_S)

numbers = st.integers(0, len(PATHS) - 1)
some = st.sets(numbers, min_size=1, max_size=3)
#: How many steps of the next call go well, and what comes before the one after them.
cuts = st.tuples(st.integers(0, 5), st.sampled_from(["crash", "pin", "lease", "publish"]), numbers) | st.none()


class Crash(BaseException):
    """The process ends here."""


def references(number: int) -> list[str]:
    """Each path refers to itself and to one or two before it, so that closures overlap."""
    return [PATHS[n] for n in {number, number - 1, number // 2} if n >= 0]


class CacheMachine(RuleBasedStateMachine):
    """One cache, its clock, and what was told to be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="drover-gc-"))
        self.runner = asyncio.Runner()
        self.time = time.time()
        #: Root -> (paths, when it ends).
        self.kept: dict[tuple[str, str], tuple[set[int], float]] = {}
        #: When each path was last seen to answer.
        self.seen: dict[str, float] = {}
        self.cut: tuple[int, str, int] | None = None
        self.patches = pytest.MonkeyPatch()
        for module in (collector, roots):
            self.patches.setattr(module, "writing", self.hooked(module.writing))
        self.patches.setattr(publisher, "write_by", self.hooked_work)
        self.runner.run(self.open())

    async def open(self) -> None:
        self.context = open_cache(self.directory, now=lambda: self.time)
        self.cache: Cache = await self.context.__aenter__()
        delete = self.cache.objects.delete

        async def hooked_delete(key: str) -> None:
            await self.step()
            await delete(key)
            await self.step()

        self.cache.objects.delete = hooked_delete  # type: ignore[method-assign]

    def hooked(self, writing: Callable[[Database], Any]) -> Callable[[Database], Any]:
        @asynccontextmanager
        async def stepped(database: Database) -> AsyncIterator[Any]:
            await self.step()
            async with writing(database) as connection:
                yield connection
            await self.step()

        return stepped

    async def hooked_work(self, database: Database, work: Callable[[], Work[Any]], *, small: bool) -> Any:
        await self.step()
        done = await write_by(database, work, small=small)
        await self.step()
        return done

    async def step(self) -> None:
        """Between any two things that are done at once."""
        if self.cut is None:
            return
        left, what, number = self.cut
        if left:
            self.cut = (left - 1, what, number)
            return
        self.cut = None
        if what == "crash":
            raise Crash
        if what == "publish":
            await self.cache.publish([await uploaded_claim(self.cache, PATHS[number], references=references(number))])
        elif what == "pin":
            await self.keep("pin", "between", {number}, DAY_S)
        else:
            await self.lease("between", {number})

    def run(self, work: Callable[[], Awaitable[object]], cut: tuple[int, str, int] | None = None) -> None:
        """Do it, perhaps cut; then what is wanted now and was there before must be there, and nothing dangles."""

        async def judged() -> None:
            before = await self.visible()
            self.cut = cut
            try:
                await work()
            except Crash:
                await self.context.__aexit__(None, None, None)
                self.cut = None
                await self.open()
            self.cut = None
            after = await self.visible()
            lost = {PATHS.index(path) for path in self.wanted(before) - after}
            assert not lost, f"wanted and lost: {lost}"

        self.runner.run(judged())

    def wanted(self, there: set[str]) -> set[str]:
        """Return what of `there` the live roots reach; through a path that is not there nothing can be reached."""
        reach = {PATHS[n] for paths, ends in self.kept.values() if ends > self.time for n in paths} & there
        waiting = list(reach)
        while waiting:
            for reference in references(PATHS.index(waiting.pop())):
                if reference in there and reference not in reach:
                    reach.add(reference)
                    waiting.append(reference)
        return reach

    async def visible(self) -> set[str]:
        """Return the paths that the cache serves; each must be whole, with all that it refers to."""
        told = {path: await self.cache.narinfo(base_name(path)[:32]) for path in PATHS}
        there = {path for path, text in told.items() if text is not None}
        for path in there:
            info = narinfo.parse(told[path] or b"", STORE_DIR)
            assert await self.cache.objects.head(info.stored.url) == info.stored.file_size, f"{path} has no object"
            dangling = {f"{STORE_DIR.path}/{name}" for name in info.path.references} - there
            assert not dangling, f"{path} refers to {dangling}"
            self.seen[path] = self.time
        return there

    async def named(self, paths: set[int]) -> set[str]:
        """Whatever answered within the grace answers again once it is named: it can be tombstoned, but not deleted."""
        recent = {PATHS[n] for n in paths if self.time - self.seen.get(PATHS[n], 0.0) < GRACE_S}
        answered = await self.visible()
        assert recent <= answered, f"named and not back: {recent - answered}"
        return answered

    async def keep(self, kind: str, name: str, paths: set[int], seconds: float) -> None:
        await self.cache.keep(kind, name, [PATHS[n] for n in paths], self.time + seconds)
        self.kept[kind, name] = (paths, self.time + seconds)
        await self.named(paths)

    async def lease(self, holder: str, paths: set[int]) -> None:
        missing = await self.cache.lease(holder, [PATHS[n] for n in paths], DAY_S / 2)
        known, ends = self.kept.get(("lease", holder), (set(), 0.0))
        paths = paths | (known if ends > self.time else set())
        self.kept["lease", holder] = (paths, max(ends, self.time + DAY_S / 2))
        answered = await self.named(paths)
        assert {PATHS[n] for n in paths} - answered <= missing | {PATHS[n] for n in known}

    @rule(numbers=some, cut=cuts)
    def publish(self, numbers: set[int], cut: tuple[int, str, int] | None) -> None:
        async def work() -> None:
            claims = [await uploaded_claim(self.cache, PATHS[n], references=references(n)) for n in sorted(numbers)]
            await self.cache.publish(claims)

        self.run(work, cut)

    @rule(numbers=some, days=st.integers(1, 4), kind=st.sampled_from(["pin", "submission"]), name=st.sampled_from("xy"))
    def name(self, numbers: set[int], days: int, kind: str, name: str) -> None:
        self.run(lambda: self.keep(kind, name, numbers, days * DAY_S))

    @rule(numbers=some, holder=st.sampled_from("vw"))
    def take_a_lease(self, numbers: set[int], holder: str) -> None:
        self.run(lambda: self.lease(holder, numbers))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        kind, name = data.draw(st.sampled_from(sorted(self.kept)))
        del self.kept[kind, name]
        self.run(lambda: self.cache.drop(kind, name))

    @rule(days=st.sampled_from([0.3, 1.1, 2.5]))
    def pass_time(self, days: float) -> None:
        self.time += days * DAY_S

    @rule(cut=cuts)
    def collect(self, cut: tuple[int, str, int] | None) -> None:
        self.run(lambda: self.cache.collect(PLAN), cut)

    @rule()
    def rehearse(self) -> None:
        async def work() -> None:
            before = await self.cache.info()
            await self.cache.collect(CollectPlan(grace_s=GRACE_S, fresh_s=0.0, dry_run=True))
            assert await self.cache.info() == before

        self.run(work)

    @rule()
    def restart(self) -> None:
        async def work() -> None:
            raise Crash

        self.run(work)

    @invariant()
    def nothing_dangles(self) -> None:
        async def look() -> None:
            assert (await self.cache.info()).dangling == 0

        self.runner.run(look())

    def teardown(self) -> None:
        self.runner.run(self.context.__aexit__(None, None, None))
        self.runner.close()
        self.patches.undo()
        shutil.rmtree(self.directory)


WALK = settings(
    max_examples=10,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
#: More steps than a collection has.
STEPS = 16


def test_wanted_paths_are_always_served_and_no_reference_dangles() -> None:
    run_state_machine_as_test(CacheMachine, settings=WALK)


def interrupt_everywhere(what: str) -> None:
    """Let `what` come before every step of a publication, of tombstoning and of deletion."""
    for step in range(STEPS):
        machine = CacheMachine()
        try:
            everything = set(range(len(PATHS)))
            machine.publish(everything, (step, what, 4))
            machine.publish(everything, None)
            machine.collect((step, what, 5))
            machine.pass_time(1.1)
            machine.collect((step, what, 3))
            machine.nothing_dangles()
            machine.collect(None)
            machine.publish(everything, None)
        finally:
            machine.teardown()


@pytest.mark.parametrize("what", ["crash", "pin", "lease", "publish"])
def test_whatever_comes_between_any_two_steps_loses_nothing(what: str) -> None:
    interrupt_everywhere(what)


async def _revives_nothing(*_: object) -> set[int]:
    return set()


async def _needs_no_look(_self: object, _connection: object, hash_parts: dict[int, str], _counted: object) -> list[int]:
    return sorted(hash_parts, reverse=True)


MUTANTS: dict[str, tuple[object, str, object]] = {
    "naming a path does not bring it back": (roots, "revive", _revives_nothing),
    "a transaction trusts the mark": (collector.Collection, "_unneeded", _needs_no_look),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_collector_that_is_wrong_is_found_out(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[mutant])
    with pytest.raises((AssertionError, BaseExceptionGroup, MetadataError)):
        interrupt_everywhere("pin")
