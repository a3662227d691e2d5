"""The table of failures, row by row: what the core does when a lease ends with each kind."""

from __future__ import annotations

from itertools import pairwise

import pytest

from scheduler import facts as f
from scheduler.failures import CONSEQUENCES, Course, is_fault
from scheduler.model import FailureKind
from scheduler.policy import Limits
from tests.scheduler.kit import Scene, broke, either, join, lease, recipe, step, submit

K = FailureKind
VERDICTS = [kind for kind in K if CONSEQUENCES[kind].course is Course.END]
FAULTS = [kind for kind in K if is_fault(kind)]


def fail(scene: Scene, key: str, kind: FailureKind) -> list[f.Fact]:
    """End the open lease of a step so; if it is to be tried again, wait until it runs again."""
    running = scene.farm.state.steps[lease(key).step]
    facts, _ = scene.play(broke(key, running.builder, kind, running.attempt))
    if scene.state(key).value == "ready" and running.not_before:
        scene.wake()
    return facts


def test_every_kind_has_a_row_and_no_fault_is_ever_cached_unless_the_build_has_proven_itself_guilty() -> None:
    assert set(CONSEQUENCES) == set(K)
    assert [kind for kind in FAULTS if CONSEQUENCES[kind].cacheable] == [K.KILLED]
    never = {
        K.RETURNED,
        K.INPUT_LOST,
        K.CANCELLED,
        K.SUSPECT,
        K.DEPENDENCY,
        K.NO_WORKER,
        K.TIMEOUT,
        K.SILENCE,
        K.LOG_LIMIT,
        K.OUTPUT_SIZE,
    }
    assert not any(CONSEQUENCES[kind].cacheable for kind in never)
    assert not any(CONSEQUENCES[kind].blames_builder for kind in VERDICTS)


@pytest.mark.parametrize("kind", VERDICTS)
def test_a_verdict_is_never_retried_and_the_next_recipe_takes_over(kind: FailureKind) -> None:
    scene = Scene()
    scene.play(join("b1", 2), join("b2", 2))
    scene.play(submit("s", ["x"], step("x")), submit("u", ["z"], either("z", recipe(), recipe("n")), step("n")))
    said = fail(scene, "x", kind)
    assert any(isinstance(fact, f.StepFailed) for fact in said)
    assert not any(isinstance(fact, f.LeaseRevoked) for fact in said)
    said = fail(scene, "z", kind)
    assert [fact.recipe for fact in said if isinstance(fact, f.StepFellBack)] == [1]
    assert not any(isinstance(fact, f.LeaseRevoked) for fact in said)


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if CONSEQUENCES[kind].tries is None])
def test_a_fault_of_the_farm_is_retried_on_another_builder_within_the_budget(kind: FailureKind) -> None:
    scene = Scene(Limits(attempts=3))
    scene.play(join("b1"), join("b2"), submit("s", ["x"], step("x")))
    holders = []
    while scene.state("x").value == "leased":
        holders.append(scene.farm.state.steps[lease("x").step].builder)
        fail(scene, "x", kind)
    assert len(holders) == 3
    assert all(first != second for first, second in pairwise(holders))
    failure = scene.farm.state.steps[lease("x").step].failure
    assert failure is not None
    assert failure.kind is kind


def test_a_killed_builder_is_tried_elsewhere_once() -> None:
    scene = Scene()
    scene.play(join("b1"), join("b2"), submit("s", ["x"], step("x")))
    first = scene.farm.state.steps[lease("x").step].builder
    fail(scene, "x", K.KILLED)
    assert scene.state("x").value == "leased"
    assert scene.farm.state.steps[lease("x").step].builder != first
    fail(scene, "x", K.KILLED)
    assert scene.state("x").value == "failed"


def test_a_connection_lost_during_the_build_is_the_farms_fault_twice_and_suspect_then() -> None:
    scene = Scene()
    scene.play(join("b1"), join("b2"), submit("s", ["x"], step("x")))
    for _ in range(2):
        fail(scene, "x", K.CONNECTION_LOST)
        assert scene.state("x").value == "leased"
    fail(scene, "x", K.CONNECTION_LOST)
    failure = scene.farm.state.steps[lease("x").step].failure
    assert failure is not None
    assert failure.kind is K.SUSPECT


def test_the_next_recipe_has_a_budget_of_its_own() -> None:
    scene = Scene(Limits(attempts=2))
    scene.play(join("b"), submit("s", ["x"], either("x", recipe(), recipe("n")), step("n"), held=["n"]))
    fail(scene, "x", K.TRANSIENT)
    assert any(isinstance(fact, f.StepFellBack) for fact in fail(scene, "x", K.TRANSIENT))
    fail(scene, "x", K.TRANSIENT)
    assert scene.state("x").value == "leased"
    fail(scene, "x", K.TRANSIENT)
    assert scene.state("x").value == "failed"
