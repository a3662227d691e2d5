"""Rules of the core that a story does not show: bounds, order, impossible inputs, reasons."""

from __future__ import annotations

import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import facts as f
from scheduler import reasons as r
from scheduler.effects import StartBuild
from scheduler.model import BuilderId, FailureKind, Instant, StepKey, StepSpec, SubmissionId, SubmissionRefusedError
from scheduler.policy import Limits, LongestPathFirst
from tests.scheduler.kit import (
    Scene,
    broke,
    builder,
    built,
    cancel,
    either,
    join,
    published,
    recipe,
    report,
    step,
    submit,
)

REPOSITORY = Path(__file__).resolve().parent.parent.parent
INFRA, PERMANENT, RETURNED = FailureKind.INFRASTRUCTURE, FailureKind.PERMANENT, FailureKind.RETURNED


def build(scene: Scene, key: str, by: str = "b", attempt: int = 1) -> None:
    scene.play(built(key, by, attempt))
    scene.play(published(key, attempt))


def why(scene: Scene, key: str) -> r.Reason | None:
    return scene.farm.why(StepKey(key), Instant(scene.now))


def test_a_submission_that_ended_stays_ended_when_its_root_is_lost() -> None:
    scene = Scene()
    scene.play(join("b"))
    scene.play(submit("s1", ["x"], step("x")))
    build(scene, "x")
    # The second submission needs `y`; `x` is only a need of the recipe of `y` that is not in use.
    scene.play(submit("s2", ["y"], either("y", recipe(), recipe("x")), step("x")))
    assert scene.states("x", "y") == ["waiting", "leased"]
    assert scene.farm.ended(SubmissionId("s1"))
    assert not scene.farm.ended(SubmissionId("s2"))
    assert why(scene, "x") == r.NotWanted()


def test_a_submission_is_taken_once_and_a_cancellation_twice_is_nothing() -> None:
    scene = Scene()
    again = submit("s1", ["x"], step("x"))
    scene.play(again)
    assert scene.play(again) == ([], [])
    scene.play(cancel("s1"))
    assert scene.play(cancel("s1")) == ([], [])


@pytest.mark.parametrize(
    ("graph", "named"),
    [
        ((step("x", "y"), step("y", "x")), "circle"),
        ((step("x", "x"),), "circle"),
        ((step("x", "y"),), "y is needed"),
        ((either("x"),), "no recipe"),
    ],
)
def test_an_impossible_graph_is_refused_before_any_fact(graph: tuple[StepSpec, ...], named: str) -> None:
    scene = Scene()
    with pytest.raises(SubmissionRefusedError, match=named):
        scene.play(submit("s1", ["x"], *graph))
    assert not scene.farm.state.steps
    assert not scene.farm.state.submissions


def test_a_circle_through_a_step_that_was_only_held_is_refused() -> None:
    scene = Scene()
    scene.play(submit("s1", ["m"], step("m", "k"), held=["k"]))
    with pytest.raises(SubmissionRefusedError, match="circle"):
        # `m` is known with a recipe that needs `k`; that this one does without is only a way to fall back.
        scene.play(submit("s2", ["k"], step("k", "n"), step("n", "m"), step("m")))
    with pytest.raises(SubmissionRefusedError, match="circle"):
        # What is held now may be lost.
        scene.play(submit("s2", ["n"], step("n", "o"), step("o", "n"), held=["o"]))
    assert "n" not in scene.farm.state.steps
    scene.play(submit("s3", ["k"], step("k", "n"), step("n"), held=[]))


_KEYS = st.sampled_from("abcdef")
_GRAPHS = st.tuples(
    st.lists(
        st.builds(
            lambda key, ways: either(key, *(recipe(*way) for way in ways)),
            _KEYS,
            st.lists(st.sets(_KEYS, max_size=2), min_size=1, max_size=2),
        ),
        unique_by=lambda spec: spec.key,
    ),
    st.sets(_KEYS, max_size=2),
    st.lists(_KEYS, min_size=1, max_size=2),
)


@given(st.lists(_GRAPHS, min_size=1, max_size=3))
def test_a_graph_is_taken_exactly_where_it_is_closed_and_its_recipes_in_use_run_in_no_circle(
    graphs: list[tuple[list[StepSpec], set[str], list[str]]],
) -> None:
    scene = Scene()
    for number, (specs, held, roots) in enumerate(graphs):
        known = scene.farm.state.steps
        there = {*known, *held, *(spec.key for spec in specs)}
        asked = {*roots, *(need for spec in specs for each in spec.recipes for need in each.needs)}
        in_use = {spec.key: spec.recipes[0].needs for spec in specs}
        in_use |= {key: each.recipe.needs for key, each in known.items() if each.recipes}
        try:
            TopologicalSorter(in_use).prepare()
            is_sound = asked <= there
        except CycleError:
            is_sound = False
        try:
            scene.play(submit(f"s{number}", roots, *specs, held=held))
        except SubmissionRefusedError:
            assert not is_sound
        else:
            assert is_sound


def test_a_chain_of_any_length_is_taken_doomed_and_abandoned_without_recursion() -> None:
    length = 20_000
    chain = [step(f"n{i}", f"n{i - 1}") if i else step("n0") for i in range(length)]
    scene = Scene()
    scene.farm.handle_many((join("b"), submit("s1", [f"n{length - 1}"], *chain)), Instant(0.0))
    scene.farm.handle(broke("n0", "b", PERMANENT), Instant(1.0))
    assert scene.state(f"n{length - 1}").value == "doomed"
    scene.farm.handle(submit("s2", [f"n{length - 1}"], *chain), Instant(1.5))
    assert scene.farm.ended(SubmissionId("s2"))
    scene.farm.handle(submit("s3", [f"n{length - 1}"], *chain, retry=True), Instant(2.0))
    scene.farm.handle(cancel("s3"), Instant(3.0))
    assert {item.state.value for item in scene.farm.state.steps.values()} == {"abandoned"}


def test_a_ladder_with_exponentially_many_paths_is_walked_once() -> None:
    rungs = [step("a0"), step("b0")]
    for i in range(1, 200):
        rungs += [step(f"a{i}", f"a{i - 1}", f"b{i - 1}"), step(f"b{i}", f"a{i - 1}", f"b{i - 1}")]
    scene = Scene()
    scene.play(submit("s1", ["a199", "b199"], *rungs))
    assert scene.farm.state.steps[StepKey("a0")].depth == 199


def test_a_new_dependent_raises_the_rank_of_work_already_ready() -> None:
    scene = Scene()
    scene.play(submit("s1", ["old", "deep"], step("old"), step("deep")))
    scene.play(submit("s2", ["top"], step("top", "mid"), step("mid", "deep"), step("deep")))
    facts, _ = scene.play(join("b"))
    assert [fact.lease.step for fact in facts if isinstance(fact, f.StepLeased)] == ["deep"]


def test_a_batch_grants_leases_once_after_all_its_events() -> None:
    scene = Scene()
    tall = submit("s2", ["top"], step("top", "base"), step("base"))
    facts, _ = scene.play(join("b"), submit("s1", ["low"], step("low")), tall)
    assert [fact.lease.step for fact in facts if isinstance(fact, f.StepLeased)] == ["base"]


def test_steps_that_no_builder_can_take_stand_in_no_queue_that_a_builder_looks_at() -> None:
    scene = Scene()
    aliens = [step(f"a{i}", system="alien") for i in range(50)]
    scene.play(join("b"))
    scene.play(submit("s1", [item.key for item in aliens], *aliens))
    scene.play(submit("s2", ["x"], step("x")))
    assert scene.state("x").value == "leased"
    looked_at = scene.farm.state.builders[BuilderId("b")].queues
    assert [queue.requirements.system for queue in looked_at] == ["linux"]


def test_a_step_waits_for_another_builder_rather_than_for_the_one_that_just_failed_it() -> None:
    scene = Scene()
    scene.play(join("bad"), submit("s1", ["x"], step("x")))
    scene.play(join("good"), submit("s2", ["y"], step("y")))
    assert scene.farm.state.steps[StepKey("y")].builder == "good"
    scene.play(broke("x", "bad", INFRA))
    scene.wake()
    # `bad` is free and `good` is not.
    assert scene.state("x").value == "ready"
    assert why(scene, "x") == r.BuildersFull((BuilderId("good"),), 1, 1)
    scene.play(built("y", "good"))
    assert scene.farm.state.steps[StepKey("x")].builder == "good"


def test_returned_leases_cost_no_attempt_but_are_bounded() -> None:
    scene = Scene(Limits(attempts=2, returns_at_once=1, returns=3))
    scene.play(join("b"), submit("s1", ["x"], step("x")))
    for attempt in range(1, 6):
        scene.play(broke("x", "b", RETURNED, attempt))
        if scene.state("x").value == "ready":
            scene.wake()
    said = [fact for fact in scene.journal if isinstance(fact, f.LeaseRevoked)]
    assert [fact.failure.kind for fact in said] == [RETURNED] * 3 + [INFRA]
    assert scene.state("x").value == "failed"
    kinds = [fact.failure.kind for fact in scene.journal if isinstance(fact, f.StepFailed)]
    assert kinds == [INFRA]


def test_a_recipe_keeps_its_place_whatever_a_later_plan_asks_of_a_builder() -> None:
    scene = Scene()
    scene.play(join(builder("b", features=["network"])), submit("s1", ["x"], step("x")))
    # Planned by a later release: the same derivation, which is no second way.
    asks = recipe(features=["network"])
    facts, _ = scene.play(submit("s2", ["x"], either("x", asks)))
    assert not [fact for fact in facts if isinstance(fact, f.RecipeAdded)]
    # Another derivation that is built from the same is one, and a third one comes behind it.
    scene.play(submit("s3", ["x"], either("x", asks, asks)))
    scene.play(submit("s4", ["x"], either("x", asks, asks, recipe("n")), step("n")))
    added = [fact.recipe for fact in scene.journal if isinstance(fact, f.RecipeAdded)]
    assert added == [asks, recipe("n")]
    fallen = []
    for attempt in (1, 2):
        facts, _ = scene.play(broke("x", "b", PERMANENT, attempt))
        fallen += [fact.recipe for fact in facts if isinstance(fact, f.StepFellBack)]
    assert fallen == [1, 2]


def test_a_recipe_that_leads_back_to_its_step_is_passed_over() -> None:
    scene = Scene()
    loop = either("x", recipe("low"), recipe("top"), recipe("spare"))
    scene.play(join("b"))
    scene.play(submit("s1", ["top"], step("top", "x"), loop, step("low"), step("spare")))
    build(scene, "low")
    facts, _ = scene.play(broke("x", "b", PERMANENT))
    assert [fact.recipe for fact in facts if isinstance(fact, f.StepFellBack)] == [2]


def test_a_revived_step_starts_with_its_first_recipe_unless_that_now_leads_back() -> None:
    scene = Scene(Limits(failure_ttl_s=0))
    graph = (either("x", recipe("y"), recipe()), either("y", recipe(), recipe("x")))
    scene.play(join("b"))
    scene.play(submit("s1", ["x"], *graph))
    # `y` cannot fall back: its other recipe needs `x`, which needs it. So `y` fails, and `x` does without it.
    facts, _ = scene.play(broke("y", "b", PERMANENT))
    assert [type(fact).__name__ for fact in facts][:2] == ["StepFailed", "StepFellBack"]
    scene.play(broke("x", "b", PERMANENT))
    scene.play(submit("s2", ["y"], *graph))
    scene.play(broke("y", "b", PERMANENT, 2))
    # Now `y` stands on `x`, revived with the recipe that does not need `y`.
    revived = [fact for fact in scene.journal if isinstance(fact, f.StepRevived) and fact.step == "x"]
    assert [fact.recipe for fact in revived] == [1]
    build(scene, "x", attempt=2)
    build(scene, "y", attempt=3)
    assert scene.farm.ended(SubmissionId("s2"))


def test_every_step_that_does_not_run_has_a_reason() -> None:
    scene = Scene()
    steps = (
        step("top", *(f"n{i}" for i in range(7))),
        *(step(f"n{i}") for i in range(7)),
        step("alien", system="riscv"),
        step("test", features=["gpu", "kvm"]),
        step("mac", system="darwin"),
    )
    scene.play(submit("s1", ["top", "alien", "test", "mac"], *steps))
    assert why(scene, "n0") == r.NoBuilderJoined()
    scene.play(join(builder("b", "linux", features=["kvm"])))
    scene.play(join(builder("m", "darwin", features=["big"], mandatory=["big"])))
    assert {key: why(scene, key) for key in ("top", "n1", "alien", "test", "mac")} == {
        "top": r.WaitsForSteps(7, tuple(StepKey(f"n{i}") for i in range(5))),
        "n1": r.BuildersFull((BuilderId("b"),), 1, 6),
        "alien": r.NoBuilderOffersSystem("riscv"),
        "test": r.NoBuilderOffersFeatures("linux", ("gpu",)),
        "mac": r.OnlyReservedBuilders((BuilderId("m"),)),
    }
    assert why(scene, "n0") is None
    assert [(wanted.system, reason) for wanted, reason in scene.farm.unserved().items()] == [
        ("darwin", why(scene, "mac")),
        ("linux", why(scene, "test")),
        ("riscv", why(scene, "alien")),
    ]
    scene.play(broke("n0", "b", INFRA))
    reason = why(scene, "n0")
    assert isinstance(reason, r.BacksOff)
    # Asked when its time has come and nothing has happened yet, as a page may be.
    assert scene.farm.why(StepKey("n0"), Instant(reason.until + 1)) == reason
    assert reason.until == scene.farm.state.steps[StepKey("n0")].not_before


def test_builders_that_take_nothing_are_a_reason() -> None:
    scene = Scene(Limits(quarantine_after=1))
    scene.play(join("b", 2, draining=True), submit("s1", ["x", "y"], step("x"), step("y")))
    assert why(scene, "x") == r.BuildersDraining((BuilderId("b"),))
    scene.play(report("b", 1, unfit="no disk"))
    reason = why(scene, "x")
    assert isinstance(reason, r.BuildersQuarantined)
    assert (reason.builders, reason.reason) == (("b",), "no disk")
    assert reason.until == scene.farm.deadline()
    scene.play(report("b", 2))
    assert scene.states("x", "y") == ["leased", "ready"]
    assert why(scene, "y") == r.LimitReached((BuilderId("b"),), 1, 1)
    scene.play(broke("x", "b", PERMANENT))
    assert why(scene, "x") == r.KnownToFail(StepKey("x"), Instant(0.0), Instant(24 * 3600.0))


def test_a_step_is_not_kept_from_its_builder_for_the_sake_of_one_that_takes_nothing() -> None:
    scene = Scene()
    scene.play(join("b"), submit("s1", ["x"], step("x")))
    scene.play(join("idle", draining=True))
    scene.play(broke("x", "b", INFRA))
    scene.wake()
    assert scene.farm.state.steps[StepKey("x")].builder == "b"


def test_a_builder_with_less_capacity_than_leases_gets_no_more_and_loses_none() -> None:
    scene = Scene()
    scene.play(join("b", 2), submit("s1", ["x", "y", "z"], step("x"), step("y"), step("z")))
    scene.play(report("b", 0))
    scene.play(built("x", "b"))
    assert scene.states("x", "y", "z") == ["publishing", "leased", "ready"]
    _, effects = scene.play(report("b", 2))
    assert [effect.lease.step for effect in effects if isinstance(effect, StartBuild)] == ["z"]


@given(failures=st.integers(min_value=1, max_value=10_000), key=st.text(min_size=1, max_size=40))
def test_back_off_doubles_with_jitter_up_to_its_cap(failures: int, key: str) -> None:
    policy = LongestPathFirst(back_off_first_s=1.0, back_off_most_s=300.0)
    whole = min(300.0, 2.0 ** min(failures - 1, 32))
    assert whole / 2 <= policy.back_off_s(StepKey(key), failures) < whole


def test_the_journal_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = "from tests.scheduler.simulation import play\nprint([repr(f) for f in play(3).facts if f.durable])"

    def run(seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout

    first = run("1")
    assert len(first) > 1000
    assert run("2") == first
