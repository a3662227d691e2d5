"""Blame for a failure: the recipe's, once it fails twice in the same way; the builder's, by what others show."""

from __future__ import annotations

import random

import pytest

from scheduler import facts as f
from scheduler.model import BuilderId, FailureKind, StepKey, StepState
from scheduler.policy import Limits
from tests.scheduler.kit import Scene, broke, built, join, published, report, step, submit

INFRA, LOST, PERMANENT = FailureKind.INFRASTRUCTURE, FailureKind.DAEMON_LOST, FailureKind.PERMANENT


def refuse(scene: Scene, key: str, signature: str = "odd") -> str:
    """End the open lease of a step with a refusal of Nix's; returns who held it. Waits until it may run again."""
    known = scene.farm.state.steps[StepKey(key)]
    holder = known.builder
    assert holder, f"{key} is {known.state}"
    message = f"Nix refuses {key}"
    scene.play(broke(key, holder, INFRA, known.attempt, message, signature=signature))
    while known.state is StepState.READY and known.not_before:
        scene.wake()
        scene.play(*(report(each, 8) for each in scene.farm.state.builders))
    return str(holder)


def quarantined(scene: Scene) -> set[str]:
    return set(scene.farm.state.quarantined)


def test_the_same_refusal_from_a_second_builder_is_the_recipes_fault_and_remembered() -> None:
    scene = Scene()
    scene.play(join("b1"), join("b2"), submit("s1", ["x"], step("x")))
    assert {refuse(scene, "x"), refuse(scene, "x")} == {"b1", "b2"}
    failure = scene.farm.state.steps[StepKey("x")].failure
    assert failure is not None
    assert failure.kind is PERMANENT
    assert failure.message == "Nix refuses x (the same again, on b1 and b2)"
    # Another submission takes it for known.
    scene.play(submit("s2", ["x"], step("x")))
    assert scene.states("x") == ["failed"]


def test_two_different_refusals_are_no_evidence_yet() -> None:
    scene = Scene()
    scene.play(join("b1"), join("b2"), submit("s1", ["x"], step("x")))
    refuse(scene, "x", "one way")
    refuse(scene, "x", "another")
    assert scene.states("x") == ["leased"]
    refuse(scene, "x", "one way")
    assert scene.states("x") == ["failed"]


def test_the_only_builder_is_believed_the_second_time_where_nothing_else_speaks_against_it() -> None:
    scene = Scene()
    scene.play(join("b", 2), submit("s1", ["x"], step("x")))
    refuse(scene, "x")
    refuse(scene, "x")
    assert scene.states("x") == ["failed"]
    assert not quarantined(scene)


def test_the_only_builder_is_not_believed_where_steps_of_several_submissions_fail_on_it() -> None:
    scene = Scene()
    scene.play(join("b", 8), submit("s1", ["x"], step("x")), submit("s2", ["y"], step("y")))
    refuse(scene, "y")
    refuse(scene, "x")
    refuse(scene, "x")
    assert scene.states("x") == ["leased"]
    # The budget of the farm's faults ends it, and then nothing is remembered.
    for _ in range(3):
        refuse(scene, "x")
    failure = scene.farm.state.steps[StepKey("x")].failure
    assert failure is not None
    assert failure.kind is INFRA


def test_a_builder_with_faults_that_no_recipe_can_cause_is_not_believed() -> None:
    scene = Scene()
    scene.play(join("b1", 8), submit("s1", ["x", "y"], step("x"), step("y")))
    scene.play(broke("y", "b1", LOST))
    refuse(scene, "x")
    refuse(scene, "x")
    assert scene.states("x") != ["failed"]


def test_one_step_that_fails_again_and_again_counts_once_against_its_builder() -> None:
    scene = Scene(Limits(quarantine_after=2))
    scene.play(join("b"), submit("s1", ["x"], step("x")))
    for attempt in range(1, 5):
        scene.play(broke("x", "b", LOST, attempt))
        scene.wake()
        scene.play(report("b", 1))
    assert not quarantined(scene)


def test_a_builder_that_fails_what_others_build_is_quarantined_although_one_submission_sent_all_of_it() -> None:
    scene = Scene()
    keys = ["u", "v", "w"]
    scene.play(join("bad", 3), submit("s1", keys, *map(step, keys)))
    scene.play(join("good", 3))
    for key in keys:
        scene.play(broke(key, "bad", INFRA, 1, "no such thing", signature="broken"))
    assert not quarantined(scene)
    while any(scene.farm.state.steps[StepKey(key)].not_before for key in keys):
        scene.wake()
        scene.play(report("bad", 3), report("good", 3))
    for key in keys:
        scene.play(built(key, "good", 2))
    assert quarantined(scene) == {"bad"}


@pytest.mark.parametrize("seed", range(40))
def test_hostile_recipes_quarantine_no_healthy_builder_and_cost_two_attempts_each(seed: int) -> None:
    """Many submissions of refused recipes, between good ones, in any order of endings."""
    chance = random.Random(seed)
    scene = Scene()
    names = [f"b{number}" for number in range(chance.randint(1, 3))]
    scene.play(*(join(name, chance.randint(1, 4)) for name in names))
    bad: dict[str, str] = {}
    for number in range(chance.randint(1, 20)):
        bad[f"bad{number}"] = chance.choice(["one", "two"])
    # One stranger, all in one submission.
    scene.play(submit("hostile", list(bad), *map(step, bad)))
    good = [f"good{number}" for number in range(chance.randint(1, 5))]
    for key in good:
        scene.play(submit(f"by {key}", [key], step(key)))
    steps = scene.farm.state.steps
    attempts = 0
    while any(steps[StepKey(key)].state not in (StepState.DONE, StepState.FAILED) for key in (*good, *bad)):
        running = [held for held in steps.values() if held.state is StepState.LEASED]
        if not running:
            scene.wake()
            scene.play(*(report(name, 4) for name in names))
            continue
        held = chance.choice(running)
        if held.key in bad:
            attempts += 1
            scene.play(broke(held.key, held.builder, INFRA, held.attempt, "Nix refuses", signature=bad[held.key]))
        else:
            scene.play(built(held.key, held.builder, held.attempt), published(held.key, held.attempt))
        assert not quarantined(scene)
    assert all(steps[StepKey(key)].state is StepState.DONE for key in good)
    assert attempts <= 2 * len(bad)


def test_the_failures_that_builders_reported_of_a_step_survive_a_restart() -> None:
    scene = Scene()
    scene.play(join("b1"), join("b2"), submit("s1", ["x"], step("x")))
    facts, _ = scene.play(broke("x", "b1", INFRA, 1, "Nix refuses x", signature="odd"))
    assert any(isinstance(fact, f.LeaseRevoked) for fact in facts)
    scene.restart()
    scene.play(join("b1"), join("b2"))
    while scene.states("x") == ["ready"]:
        scene.wake()
        scene.play(report("b1", 1), report("b2", 1))
    assert scene.farm.state.steps[StepKey("x")].builder == BuilderId("b2")
    refuse(scene, "x")
    assert scene.states("x") == ["failed"]
