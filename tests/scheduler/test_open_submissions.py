"""Submissions that grow: what they count, when they end, and what each root costs."""

from __future__ import annotations

import itertools

import pytest

from scheduler import facts as f
from scheduler.model import FailureKind, Instant, StepKey, SubmissionClosedError, SubmissionId, SubmissionRefusedError
from scheduler.pauses import PAUSE
from scheduler.policy import Limits
from tests.scheduler.kit import (
    Scene,
    broke,
    built,
    cancel,
    either,
    expire,
    grow,
    join,
    published,
    recipe,
    seal,
    step,
    submit,
)

S = SubmissionId("s")
TIMEOUT = FailureKind.TIMEOUT


def build(scene: Scene, key: str, attempt: int = 1) -> None:
    scene.play(built(key, "b", attempt))
    scene.play(published(key, attempt))


def opened() -> Scene:
    scene = Scene()
    scene.play(join("b", 8))
    scene.play(submit("s", [], opens=True))
    return scene


def grew(facts: list[f.Fact]) -> f.SubmissionGrew:
    [fact] = [fact for fact in facts if isinstance(fact, f.SubmissionGrew)]
    return fact


def test_it_ends_when_it_is_sealed_and_not_when_its_steps_are_done() -> None:
    scene = opened()
    assert not scene.farm.ended(S)
    scene.play(grow("s", ["x"], step("x")))
    build(scene, "x")
    assert not scene.farm.ended(S)
    assert scene.play(expire("s"))[0] == []
    facts, _ = scene.play(seal("s"))
    assert facts == [f.SubmissionSealed(S, Instant(0.0))]
    assert scene.farm.ended(S)
    assert scene.play(seal("s"))[0] == []
    facts, _ = scene.play(expire("s"))
    assert f.SubmissionForgotten(S, Instant(0.0)) in facts


def test_a_root_that_fails_does_not_end_it_and_one_that_needs_what_failed_in_it_is_not_tried_again() -> None:
    """A time limit is no verdict for others, but a submission tries a step once, however its roots come."""
    scene = opened()
    scene.play(grow("s", ["a"], step("a", "low"), step("low")))
    scene.play(broke("low", "b", TIMEOUT))
    assert scene.states("a", "low") == ["doomed", "failed"]
    facts, _ = scene.play(grow("s", ["b", "c"], step("b", "low"), step("low"), step("c")))
    assert grew(facts).members == ("c", "b") or grew(facts).members == ("b", "c")
    assert scene.states("b", "low", "c") == ["doomed", "failed", "leased"]
    # Another submission does try it again.
    scene.play(submit("other", ["b"], step("b", "low"), step("low")))
    assert scene.states("b", "low") == ["waiting", "leased"]


def test_the_same_root_again_is_no_change_and_a_batch_with_known_roots_brings_the_new_ones() -> None:
    scene = opened()
    batch = grow("s", ["x", "y"], step("x", "n"), step("y", "n"), step("n"))
    assert len(grew(scene.play(batch)[0]).members) == 3
    assert scene.play(batch)[0] == []
    fact = grew(scene.play(grow("s", ["y", "z", "z"], step("z", "n")))[0])
    assert (fact.roots, fact.members, fact.joined) == (("z",), ("z",), ())
    # An inner step becomes a root without becoming a member twice.
    fact = grew(scene.play(grow("s", ["n"], step("n")))[0])
    assert (fact.roots, fact.members) == (("n",), ())


def test_growth_after_the_end_of_growing_is_refused_unless_it_brings_nothing() -> None:
    scene = opened()
    scene.play(grow("s", ["x"], step("x")))
    scene.play(seal("s"))
    assert scene.play(grow("s", ["x"], step("x")))[0] == []
    for name in ("s", "unknown"):
        with pytest.raises(SubmissionClosedError):
            scene.play(grow(name, ["y"], step("y")))
    scene.play(submit("t", ["x"], step("x"), opens=True))
    scene.play(cancel("t"))
    with pytest.raises(SubmissionClosedError):
        scene.play(grow("t", ["y"], step("y")))
    assert StepKey("y") not in scene.farm.state.steps
    # One that never was open is closed too.
    scene.play(submit("u", ["x"], step("x")))
    with pytest.raises(SubmissionClosedError):
        scene.play(grow("u", ["y"], step("y")))


def test_a_circle_or_a_hole_is_refused_and_harms_nothing_that_is_there() -> None:
    scene = opened()
    scene.play(grow("s", ["x"], step("x")))
    with pytest.raises(SubmissionRefusedError, match="run in a circle"):
        scene.play(grow("s", ["p"], step("p", "q"), step("q", "p")))
    with pytest.raises(SubmissionRefusedError, match="neither known, given nor held"):
        scene.play(grow("s", ["p"], step("p", "q")))
    build(scene, "x")
    scene.play(grow("s", ["p"], step("p", "x")))
    build(scene, "p")
    scene.play(seal("s"))
    assert scene.farm.ended(S)


def test_what_lay_near_the_top_ranks_deeper_where_a_long_chain_comes_to_stand_on_it() -> None:
    """`Scene` checks depths and owners of all steps after each call."""
    scene = Scene()
    scene.play(submit("s", [], opens=True))
    chain = [step(f"c{number}", f"c{number + 1}") for number in range(5)] + [step("c5", "low")]
    scene.play(grow("s", ["low"], step("low", "lower"), step("lower", "lowest"), step("lowest")))
    scene.play(grow("s", ["c0"], *chain))
    assert scene.farm.state.steps[StepKey("lowest")].depth == 8
    scene.restart()
    scene.play(grow("s", ["d"], step("d", "c0")))
    assert scene.farm.state.steps[StepKey("lowest")].depth == 9


def test_what_no_root_wanted_any_more_is_wanted_again_by_a_later_one() -> None:
    scene = opened()
    scene.play(grow("s", ["a"], step("a", "bad", "spare"), step("bad"), step("spare", "base"), step("base")))
    scene.play(broke("bad", "b", FailureKind.PERMANENT))
    assert scene.states("a", "spare", "base") == ["doomed", "abandoned", "abandoned"]
    fact = grew(scene.play(grow("s", ["b"], step("b", "spare")))[0])
    assert fact.members == ("b", "spare", "base")
    assert fact.before == ("spare", "base")
    assert scene.states("b", "spare", "base") == ["waiting", "waiting", "leased"]


def test_running_again_or_a_new_plan_made_of_fewer_roots_loses_none() -> None:
    scene = opened()
    scene.play(grow("s", ["x"], step("x", "n"), step("n")))
    build(scene, "n")
    scene.play(grow("s", ["y"], step("y", "n")))
    # The cache has lost `n`; the plan was made when `y` had not come.
    facts, _ = scene.play(submit("s", ["x"], step("x", "n"), step("n"), asked_at=1.0, replanned=True))
    [again] = [fact for fact in facts if isinstance(fact, f.SubmissionRetried)]
    assert again.roots == ("x", "y")
    assert not scene.farm.ended(S)
    scene.play(grow("s", ["z"], step("z", "n")))
    scene.play(seal("s"))
    build(scene, "n", 2)
    for root in ("x", "y", "z"):
        scene.play(built(root, "b", scene.farm.state.steps[StepKey(root)].attempt))
        scene.play(published(root, scene.farm.state.steps[StepKey(root)].attempt))
    assert scene.farm.ended(S)


def test_a_restart_from_the_journal_or_a_snapshot_knows_what_it_stands_on() -> None:
    scene = opened()
    source = either("source", recipe("curl"), recipe("mirror"))
    scene.play(grow("s", ["a"], step("a", "source"), source, step("curl"), step("mirror")))
    scene.play(broke("curl", "b", FailureKind.PERMANENT))
    for shorten in (False, True):
        if shorten:
            scene.journal = scene.farm.snapshot()
        scene.restart()
        # The step that a fall-back brought in is a member already.
        fact = grew(scene.play(grow("s", [f"m{shorten}"], step(f"m{shorten}", "mirror")))[0])
        assert fact.members == (f"m{shorten}",)


def test_the_limits_of_a_submissions_later_roots_and_its_wait_hold() -> None:
    scene = Scene(Limits(give_up_s=100.0))
    scene.play(join("b", 1), submit("s", [], opens=True, wait_s=10))
    scene.play(grow("s", ["far"], step("far", system="mac")))
    scene.wake()
    assert scene.state("far").value == "failed"
    assert not scene.farm.ended(S)


def test_a_root_costs_what_is_new_below_it() -> None:
    """Counted in pauses of the core, of which each stands for some hundred steps and edges."""
    size = 20_000
    scene = Scene()
    farm = scene.farm
    base = [step(f"k{number}", *([f"k{number - 1}"] if number % 100 else [])) for number in range(size)]
    farm.handle(submit("s", [spec.key for spec in base[99::100]], *base, opens=True), Instant(0.0))

    def pauses(*events: object) -> int:
        return sum(each is PAUSE for each in farm.handling(events, Instant(1.0)))  # type: ignore[arg-type]

    costs = [pauses(grow("s", [f"new{n}"], step(f"new{n}", f"k{n * 100 + 99}"))) for n in range(5)]
    assert max(costs) < 20
    assert pauses(submit("t", [spec.key for spec in base[99::100]], *base)) > 100
    assert sorted(itertools.chain(farm.state.open)) == ["s"]


def test_a_further_root_of_a_plan_made_anew_revives_what_others_have_left_below_it() -> None:
    """A growth may be lost and its roots come with the next plan: what lapsed below them begins a new life."""
    scene = opened()
    scene.play(submit("gone", ["low"], step("low")))
    scene.play(cancel("gone"))
    scene.play(grow("s", ["x"], step("x")))
    scene.play(submit("s", ["x", "y"], step("x"), step("y", "low"), step("low"), replanned=True))
    assert scene.states("x", "y", "low") == ["leased", "waiting", "leased"]
