"""Plans of wishes: which word each gets, what is shared counts once, and a closure counts only whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.plan_models import PlanView, SystemPlan
from coordinator.cli.plan_text import PlanText, fetch_phrase, sentences
from coordinator.intake.forecast import BuildCost, PlannedStep
from coordinator.plans.closures import Closures, ClosureSurvey, LocatedPath, Reach, extents
from coordinator.plans.judging import FarmFacts, KnownFailure, WishFacts, judge
from coordinator.wishes.model import Wish, WishedOutput, WishedPaths, WishList, WishMark, WishSource
from infra.nix.store_path import base_name_of
from scheduler.model import Requirements, StepKey
from tests.support.wishes import store_path

LINUX, MAC = "x86_64-linux", "aarch64-darwin"
KIND = Requirements(LINUX, ())


def path(name: str) -> str:
    return store_path(f"{name}-1")


def key(name: str) -> StepKey:
    return StepKey(base_name_of(path(name)))


def wished(name: str, system: str = LINUX, *marks: WishMark, derivation: bool = True) -> Wish:
    drv = store_path(f"{name}.drv") if derivation else None
    return Wish(name, system, WishedPaths((WishedOutput("out", path(name)),), drv), marks=frozenset(marks))


def located(place: int, *references: str, size: int = 10) -> LocatedPath:
    return LocatedPath(place, size, 2 * size, tuple(map(path, references)))


def planned(
    wishes: Sequence[Wish],
    survey: ClosureSurvey,
    steps: Sequence[PlannedStep] = (),
    *,
    building: frozenset[StepKey] = frozenset(),
    failures: Mapping[StepKey, KnownFailure] = {},
    slots: Mapping[Requirements, int] = {KIND: 2},
    present: frozenset[str] = frozenset(),
) -> PlanView:
    """Judge wishes whose derivations the farm has where there is a step of theirs."""
    graphed = {step.key for step in steps}
    facts = [
        WishFacts(wish, (path(wish.name),), key(wish.name), key(wish.name) in graphed, path(wish.name) in present)
        for wish in wishes
    ]
    farm = FarmFacts(survey, steps, building, failures, slots, present)
    systems = tuple(dict.fromkeys(wish.system for wish in wishes))
    return judge(WishList("x", WishSource.FLOX, tuple(wishes), systems), facts, farm)


def step(name: str, *needs: PlannedStep, build_s: float | None = None, kind: Requirements = KIND) -> PlannedStep:
    return PlannedStep(key(name), name, kind, list(needs), 0, BuildCost(None, build_s, None))


def test_each_wish_gets_the_first_word_that_holds() -> None:
    survey = ClosureSurvey(
        {
            path("here"): located(0, "lib", "here"),
            path("lib"): located(0),
            path("above"): located(1, "lib"),
            path("torn"): located(0, "gone-lib"),
            path("slow"): located(1, "late"),
        },
        unasked={path("late")},
    )
    deep = step("deep")
    steps = [deep, step("doomed", deep), step("base", build_s=60.0)]
    steps += [step("fresh", steps[2], build_s=3600.0), step("wanted"), step("mac", kind=Requirements(MAC, ()))]
    names = ["here", "above", "torn", "slow", "doomed", "fresh", "wanted"]
    wishes = [wished(name) for name in names]
    wishes += [wished("mac", MAC), wished("nowhere", derivation=False), wished("paid", LINUX, WishMark.UNFREE)]
    failures = {key("deep"): KnownFailure(key("deep"), "deep", 17.0)}
    view = planned(wishes, survey, steps, building=frozenset({key("wanted")}), failures=failures)
    assert {each.name: each.state for each in view.wishes} == {
        "here": "here",
        "above": "upstream",
        "torn": "buildable",
        "slow": "unknown",
        "doomed": "failed",
        "fresh": "buildable",
        "wanted": "building",
        "mac": "no_worker",
        "nowhere": "gone",
        "paid": "unfree",
    }
    by_name = {each.name: each for each in view.wishes}
    assert (by_name["here"].paths, by_name["here"].bytes) == (2, 20)
    assert (by_name["doomed"].cause_name, by_name["doomed"].since) == ("deep", 17.0)
    assert (by_name["fresh"].steps, by_name["fresh"].build_s, by_name["fresh"].unknown) == (2, 3660.0, 0)
    assert by_name["mac"].because == f"no worker builds for {MAC}"
    assert view.unfollowed == 1


def test_what_wishes_share_counts_once_and_what_is_on_the_machine_does_not() -> None:
    survey = ClosureSurvey(
        {
            path("a"): located(0, "lib"),
            path("b"): located(1, "lib", "more"),
            path("lib"): located(0, size=100),
            path("more"): located(1),
        }
    )
    lib = step("lib-src", build_s=5.0)
    steps = [lib, step("x", lib, build_s=1.0), step("y", lib)]
    wishes = [wished(name) for name in ("a", "b", "x", "y")]
    (system,) = planned(wishes, survey, steps).systems
    assert (system.here_paths, system.here_bytes, system.upstream_paths, system.upstream_bytes) == (2, 110, 2, 20)
    assert (system.unpacked_bytes, system.steps, system.build_s, system.unknown) == (260, 3, 6.0, 1)
    assert (system.counts, system.slots) == ({"here": 1, "upstream": 1, "buildable": 2}, 2)
    (less,) = planned(wishes, survey, steps, present=frozenset({path("a"), path("y")})).systems
    # With `a` its library is there too.
    assert (less.present, less.here_paths, less.upstream_paths, less.steps) == (2, 0, 2, 2)


@st.composite
def surveys(draw: st.DrawFn) -> ClosureSurvey:
    """Paths with any references, circles included, of which some are nowhere."""
    names = [str(number) for number in range(draw(st.integers(1, 8)))]
    survey = ClosureSurvey()
    for name in names:
        where = draw(st.integers(-2, 2))
        if where >= 0:
            survey.located[path(name)] = located(where, *draw(st.sets(st.sampled_from(names), max_size=3)))
        elif where == -1:
            survey.absent.add(path(name))
        else:
            survey.unasked.add(path(name))
    return survey


@given(surveys())
@settings(max_examples=100, deadline=None)
def test_a_closure_is_as_good_as_its_worst_member(survey: ClosureSurvey) -> None:
    found, closures = extents(survey), Closures(survey.located)
    for each in [*survey.located, *survey.absent, *survey.unasked]:
        reached = {each, *(reference for one in closures.members([each]) for reference in one.references)}
        if reached & survey.absent or reached - survey.located.keys() - survey.unasked:
            expected = Reach.ABSENT
        elif reached & survey.unasked:
            expected = Reach.UNKNOWN
        else:
            expected = Reach(max(min(survey.located[one].place, 1) for one in reached))
        assert found[each] is expected


def test_how_long_fetching_takes_is_said_at_a_known_rate_alone() -> None:
    plan = SystemPlan(system=LINUX, counts={}, present=0, here_paths=2, here_bytes=500 << 20, upstream_paths=1,
                      upstream_bytes=100 << 20, unpacked_bytes=2 << 30)  # fmt: skip
    said = "2 paths from the farm (500.0 MiB) and 1 from upstream (100.0 MiB), 2.0 GiB unpacked"
    assert fetch_phrase(plan, 0.0) == said
    assert fetch_phrase(plan, 5.0) == f"{said}, in about 2m00s at 5 MiB/s"
    text = PlanText(PlanView(digest="", wishes=(), systems=(plan,)), LINUX, str)
    assert sentences(text) == ["how long fetching takes is unknown; --rate says how fast this machine fetches"]
    assert sentences(replace(text, rate_mib=5.0)) == []
