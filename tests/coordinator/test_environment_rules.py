"""Pointers, history and coverage as pure functions: whatever comes, in whatever order."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.api.limits import MAX_TEXT_BYTES
from coordinator.api.plan_models import PlanState, PlanView, UpstreamPlan, WishPlan
from coordinator.environments.coverage import (
    DAY_S,
    PackageStanding,
    SystemCoverage,
    TrendDay,
    Way,
    by_reason,
    covered,
    day_of,
    gaps,
    oldest,
    weekly,
)
from coordinator.environments.history import forgotten, next_revision, rooted
from coordinator.environments.model import EnvironmentRevision
from coordinator.environments.packages import buildable
from coordinator.environments.pointers import MAX_BEFORE, SystemPointer, advanced, rolled_back
from coordinator.environments.standings import WAYS, standings
from coordinator.errors import ConflictError
from coordinator.wishes.model import MAX_NAME, Wish, WishedOutput, WishedPaths, WishList, WishSource

LINUX, MAC = "x86_64-linux", "aarch64-darwin"
#: What happens to an environment: a revision comes, one becomes whole on a system (or is no longer), a rollback.
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("revision"), st.just(LINUX), st.just(0)),
        st.tuples(st.sampled_from(["whole", "broken"]), st.sampled_from([LINUX, MAC]), st.integers(1, 8)),
        st.tuples(st.just("rollback"), st.sampled_from([LINUX, MAC]), st.integers(0, 8)),
    ),
    max_size=40,
)


class PlayedEnvironment:
    """Pointers under any events, each judged."""

    def __init__(self) -> None:
        self.newest = 0
        self.whole: dict[str, set[int]] = {LINUX: set(), MAC: set()}
        self.pointers = {system: SystemPointer(system) for system in self.whole}
        self.held = dict.fromkeys(self.whole, 0)

    def happen(self, what: str, system: str, number: int) -> None:
        if what == "revision":
            self.newest += 1
        elif what == "whole" and number <= self.newest:
            self.whole[system].add(number)
        elif what == "broken":
            self.whole[system].discard(number)
        elif what == "rollback":
            self.roll_back(system, number)
        for each, whole in self.whole.items():
            self.advance(each, whole)

    def roll_back(self, system: str, number: int) -> None:
        before = self.pointers[system]
        try:
            after = rolled_back(before, number, self.whole[system], self.newest, 1.0)
        except ConflictError:
            return
        assert after.revision < before.revision
        assert after.revision in self.whole[system]
        self.pointers[system], self.held[system] = after, self.newest

    def advance(self, system: str, whole: set[int]) -> None:
        before, held = self.pointers[system], self.held[system]
        pointer = self.pointers[system] = advanced(before, whole, 2.0)
        if pointer.revision != before.revision:
            assert pointer.revision in whole
            assert pointer.revision > max(held, before.revision)
        # Of what is whole here, whatever is whole elsewhere, the newest that no rollback holds back.
        assert pointer.revision >= max((one for one in whole if one > held), default=0)
        assert list(pointer.before) == sorted(set(pointer.before), reverse=True)
        assert all(one < pointer.revision for one in pointer.before)
        assert len(pointer.before) <= MAX_BEFORE


@given(EVENTS)
def test_a_pointer_is_only_where_its_system_was_whole_waits_for_no_other_and_is_held_by_a_rollback(
    events: list[tuple[str, str, int]],
) -> None:
    environment = PlayedEnvironment()
    for event in events:
        environment.happen(*event)


@pytest.mark.parametrize(
    ("pointer", "target", "said"),
    [
        (SystemPointer(LINUX), 0, "no revision has been whole"),
        (SystemPointer(LINUX, 3), 0, "was at no revision before 3"),
        (SystemPointer(LINUX, 3, before=(2,)), 3, "leads to a lower one"),
        (SystemPointer(LINUX, 3, before=(1,)), 0, "revision 1 cannot be fetched whole"),
    ],
)
def test_a_rollback_that_leads_nowhere_is_refused_with_a_way_on(pointer: SystemPointer, target: int, said: str) -> None:
    with pytest.raises(ConflictError, match=said):
        rolled_back(pointer, target, {2, 3}, 4, 1.0)


def wishes(*names: str, system: str = LINUX) -> WishList:
    return WishList(
        "list",
        WishSource.PATHS,
        tuple(Wish(name, system, WishedPaths((WishedOutput("out", f"/nix/store/{name}"),))) for name in names),
        (system,),
    )


def test_what_was_before_is_a_new_revision_that_says_so_and_what_is_the_same_is_none() -> None:
    history: list[EnvironmentRevision] = []

    def comes(mark: str, *names: str) -> str | None:
        found = next_revision(history, wishes(*names), mark, 1.0)
        if found is None:
            return None
        history.insert(0, found)
        return f"{found.number} {found.note}".strip()

    assert comes("c1", "a") == "1"
    assert comes("c2", "a") is None
    assert comes("c3", "a", "b") == "2"
    assert comes("c1", "a") == "3 The source moved back to c1, which was revision 1."
    assert comes("c4", "b", "a") == "4 Its packages are those of revision 2 again."
    assert history[0].systems == (LINUX,)


@given(st.sets(st.integers(1, 60)), st.integers(1, 60), st.integers(1, 60), st.integers(1, 8), st.integers(1, 12))
def test_what_pointers_stand_on_is_neither_collected_nor_forgotten_and_history_is_bounded(
    numbers: set[int], at: int, was: int, newest: int, most: int
) -> None:
    pointers = [SystemPointer(LINUX, at, before=(was,)), SystemPointer(MAC)]
    kept = rooted(numbers, pointers, newest)
    gone = forgotten(numbers, kept, most)
    assert {at, was} & numbers <= kept <= numbers
    assert not gone & kept
    assert len(numbers - gone) <= max(most, newest) + 2
    assert max(numbers, default=0) in kept | {0}


STANDINGS = st.lists(
    st.builds(
        PackageStanding,
        st.sampled_from([LINUX, MAC]),
        st.sampled_from("abcdefgh"),
        st.sampled_from(list(Way)),
        st.sampled_from(["failed", "no worker"]),
    ),
    unique_by=lambda each: (each.system, each.package),
)


@given(STANDINGS, STANDINGS)
def test_each_package_counts_once_and_a_gap_keeps_its_age_for_as_long_as_it_is_one(
    first: list[PackageStanding], then: list[PackageStanding]
) -> None:
    coverage = covered(then)
    assert sum(each.total for each in coverage.values()) == len(then)
    for system, each in coverage.items():
        missing = [one for one in then if one.system == system and not one.way.is_fetched]
        assert each.is_whole == (not missing)
        assert (each.percent(each.fetched) == 100.0) == each.is_whole
    before = gaps(first, (), 10.0)
    after = gaps(then, before, 20.0)
    assert len(after) == sum(not each.way.is_fetched for each in then)
    old = {(gap.system, gap.package) for gap in before}
    assert all(gap.since == (10.0 if (gap.system, gap.package) in old else 20.0) for gap in after)
    assert all(min(gap.since for gap in after if gap.system == system) == at for system, at in oldest(after).items())
    assert sum(by_reason(after).values()) == len(after)


def test_almost_all_is_not_a_hundred_percent_and_nothing_is_not_whole() -> None:
    assert SystemCoverage(LINUX, here=99_999, local=1).percent(99_999) == 99.9
    assert not SystemCoverage(LINUX).is_whole


def test_a_trend_has_the_last_day_of_each_week() -> None:
    today = day_of(1000 * DAY_S)
    days = [TrendDay(today - back, SystemCoverage(LINUX, here=back)) for back in (0, 3, 6, 7, 20, 21)]
    assert [each.coverage.here for each in weekly(days, today)] == [21, 20, 7, 0]


def test_a_package_of_any_name_can_be_submitted() -> None:
    target = WishedPaths((WishedOutput("out", "/nix/store/a"),), "/nix/store/a.drv")
    wishes = (Wish("\U0001f600" * MAX_NAME, LINUX, target), Wish("b", LINUX, replace(target, derivation=None)))
    (root,) = buildable(WishList("list", WishSource.PATHS, wishes, (LINUX,))).values()
    assert root.drv == "/nix/store/a.drv"
    assert root.attr == "\U0001f600" * (MAX_TEXT_BYTES // 4)


def test_every_verdict_of_a_plan_is_one_way_and_what_cannot_be_fetched_has_a_reason() -> None:
    assert set(WAYS) == set(get_args(PlanState))
    assert all(bool(reason) != way.is_fetched for way, reason in WAYS.values())


def test_a_failure_names_its_root_cause_and_an_upstream_that_is_away_is_named() -> None:
    wishes = (
        WishPlan(name="a", system=LINUX, state="failed", step="0-a", cause="0-lib", cause_name="lib"),
        WishPlan(name="b", system=MAC, state="no_worker", because="no worker builds for aarch64-darwin"),
        WishPlan(name="c", system=MAC, state="upstream"),
        WishPlan(name="d", system=MAC, state="building", because="no worker builds for aarch64-darwin, so it waits"),
    )
    upstreams = (UpstreamPlan(url="https://a", state="answered", paths=1),)
    plan = PlanView(digest="", wishes=wishes, systems=(), upstreams=upstreams)
    assert list(standings(plan)) == [
        PackageStanding(LINUX, "a", Way.IMPOSSIBLE, "failed", "because lib fails"),
        PackageStanding(MAC, "b", Way.LOCAL, "no worker", "no worker builds for aarch64-darwin"),
        PackageStanding(MAC, "c", Way.UPSTREAM),
        PackageStanding(MAC, "d", Way.LOCAL, "no worker", "no worker builds for aarch64-darwin, so it waits"),
    ]
    away = replace(plan, upstreams=(*upstreams, UpstreamPlan(url="https://b", state="away", paths=0)))
    assert next(standings(away)).detail == "because lib fails; https://b does not answer, so it may be there"
