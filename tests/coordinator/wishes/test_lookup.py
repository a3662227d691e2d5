"""Lookup of closures over this cache and upstreams: whole, in order, and no longer than there is time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.errors import IntakeError
from coordinator.plans import lookup
from coordinator.plans.closures import ClosureSurvey, Reach, extents
from coordinator.plans.lookup import Lookup
from infra.cache.cache import Cache
from infra.cache.pulls.closure_search import FoundPath
from infra.cache.pulls.recorded_paths import RECORD_S, RecordedPaths
from infra.cache.pulls.upstream import Upstream
from infra.nix import narinfo
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import hash_part_of
from tests.support.cache import STORE_DIR, open_cache, publish, secret_key, store_path

LOW, HIGH, MIXED, GONE = (store_path(name) for name in ("low", "high", "mixed", "gone"))


class Hands:
    """Another cache's narinfos as an upstream hands them out; it takes `takes_s` of the clock for each question."""

    def __init__(self, cache: Cache, clock: list[float], takes_s: float = 0.0) -> None:
        self.name = "elsewhere"
        self.is_away = self.answers_closures = False
        self.asked: list[str] = []
        self._cache, self._clock, self._takes_s = cache, clock, takes_s

    async def narinfos(self, hash_parts: Collection[str]) -> dict[str, NarInfo]:
        self._clock[0] += self._takes_s
        self.asked += hash_parts
        texts = {part: await self._cache.narinfo(part) for part in hash_parts}
        return {part: narinfo.parse(text, STORE_DIR) for part, text in texts.items() if text is not None}


@asynccontextmanager
async def two(tmp_path: Path) -> AsyncIterator[tuple[Cache, Cache]]:
    """This cache has `low`; another has all, each standing on those before."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    async with open_cache(tmp_path / "here") as here, open_cache(tmp_path / "elsewhere", [secret_key("e-1", 2)]) as far:
        await publish(here, LOW)
        await publish(far, LOW)
        await publish(far, HIGH, references=[LOW])
        await publish(far, MIXED, references=[HIGH, MIXED])
        yield here, far


async def surveyed(here: Cache, *upstreams: Hands, clock: list[float], paths: Collection[str]) -> ClosureSurvey:
    records = RecordedPaths(here, lambda: clock[0])
    survey, _ = await Lookup(here, upstreams, records, "/nix/store", lambda: clock[0]).survey(paths)
    return survey


async def test_a_closure_is_followed_through_caches_and_each_path_is_asked_for_once(tmp_path: Path) -> None:
    clock = [0.0]
    async with two(tmp_path) as (here, far):
        first, second = Hands(here, clock), Hands(far, clock)
        survey = await surveyed(here, first, second, clock=clock, paths=[MIXED, GONE])
    assert {path: each.place for path, each in survey.located.items()} == {LOW: 0, HIGH: 2, MIXED: 2}
    assert survey.absent == {GONE}
    assert sorted(second.asked) == sorted(path[11:43] for path in (MIXED, HIGH, GONE))
    found = extents(survey)
    assert (found[MIXED], found[LOW], found[GONE]) == (Reach.UPSTREAM, Reach.HERE, Reach.ABSENT)


async def test_what_there_was_no_time_for_is_not_known_and_is_not_called_absent(tmp_path: Path) -> None:
    clock = [0.0]
    async with two(tmp_path) as (here, far):
        upstream = Hands(far, clock, takes_s=lookup.BUDGET_S + 1)
        survey = await surveyed(here, upstream, clock=clock, paths=[MIXED])
    assert (set(survey.located), survey.unasked, survey.absent) == ({MIXED}, {HIGH}, set())
    assert extents(survey)[MIXED] is Reach.UNKNOWN


async def test_what_is_recorded_of_an_upstream_counts_as_fetched_from_it_where_it_was_not_asked(tmp_path: Path) -> None:
    clock = [0.0]
    async with two(tmp_path) as (here, far):
        public = Upstream("http://elsewhere", [secret_key("e-1", 2).public], STORE_DIR, lambda: 0.0, mirrored=False)
        texts = [await far.narinfo(hash_part_of(path)) for path in (HIGH, MIXED)]
        infos = [narinfo.parse(text, STORE_DIR) for text in texts if text is not None]
        await RecordedPaths(here, lambda: 0.0).record([FoundPath(info, public) for info in infos])

        async def found(upstream: Hands, at: float = 0.0) -> tuple[ClosureSurvey, list[str]]:
            clock[0] = at
            upstream.name, upstream.asked = "http://elsewhere", []
            return await surveyed(here, upstream, clock=clock, paths=[MIXED, GONE]), upstream.asked

        # The wish is asked for, what it stands on is not.
        survey, asked = await found(Hands(far, clock))
        assert {path: each.place for path, each in survey.located.items()} == {LOW: 0, HIGH: 1, MIXED: 1}
        assert sorted(asked) == sorted(map(hash_part_of, (MIXED, GONE)))
        # Without time to ask, the record counts for the wish too.
        late = Hands(far, clock)
        late.name = "http://elsewhere"
        slow = Hands(here, clock, takes_s=lookup.BUDGET_S + 1)
        survey = await surveyed(here, slow, late, clock=clock, paths=[MIXED])
        assert ({path: each.place for path, each in survey.located.items()}, late.asked) == (
            {LOW: 0, HIGH: 2, MIXED: 2},
            [],
        )
        # An upstream that lacks it by now is believed before its record.
        survey, _ = await found(Hands(here, clock))
        assert (set(survey.located), survey.absent) == (set(), {MIXED, GONE})
        # One that is gone has nothing, and an old record is none.
        gone = Hands(here, clock)
        gone.is_away = True
        survey, _ = await found(gone)
        assert survey.absent == {MIXED, GONE}
        survey, asked = await found(Hands(far, clock), at=RECORD_S + 1)
        assert (set(survey.located), len(asked)) == ({LOW, HIGH, MIXED}, 3)


async def test_more_paths_than_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "MAX_PATHS", 1)
    async with two(tmp_path) as (here, far):
        with pytest.raises(IntakeError, match="more than 1 paths; plan them in parts"):
            await surveyed(here, Hands(far, [0.0]), clock=[0.0], paths=[MIXED, GONE])
