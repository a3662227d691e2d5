"""Seeds that must hold, and mutants of the core that the same seeds must kill."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from scheduler import builder_rules, builders, decide, model, placement, records, state, step_rules
from scheduler import facts as f
from tests.scheduler.simulation import play

#: Every seed of the fixed set holds; a mutant has to die within the mutant set.
FIXED = range(150)
MUTANT = range(200)


@pytest.mark.parametrize("block", range(3))
def test_fixed_seeds_hold(block: int) -> None:
    for seed in FIXED:
        if seed % 3 == block:
            play(seed)


def test_seed_9233_refuses_a_circle_that_a_fall_back_closed() -> None:
    play(9233)


def test_a_seed_gives_the_same_journal_twice() -> None:
    assert play(7).facts == play(7).facts


def _nothing(*_args: object, **_kwargs: object) -> Iterator[f.Fact]:
    return iter(())


def _no_verdict(
    self: step_rules.StepRules, step: records.Step, failure: model.Failure, now: model.Instant
) -> Iterator[f.Fact]:
    yield f.LeaseRevoked(step.lease, step.builder, failure, now)


def _fail_alone(
    self: step_rules.StepRules, step: records.Step, failure: model.Failure, now: model.Instant
) -> Iterator[f.Fact]:
    yield f.StepFailed(step.key, step.attempt, step.builder, failure, now)


def _any_attempt(self: state.FarmState, lease: model.LeaseId, where: model.StepState) -> records.Step | None:
    step = self.steps.get(lease.step)
    return step if step is not None and step.state is where else None


def _always_room(self: builders.Builders, builder: records.Builder) -> None:
    if builder.spec is not None:
        self.free[builder.id] = builder


def _drop_slot_count(self: builders.Builders, step: records.Step) -> None:
    self.known[step.builder].leases.pop(step.key)


def _lose_quietly(self: state.FarmState, fact: f.StepLost) -> None:
    step = self.steps[fact.step]
    step.state = model.StepState.WAITING
    self._begin_life(step)


def _none_listed(*_: object) -> Generator[None, None, tuple[model.LeaseId, ...]]:
    yield from ()
    return ()


def _never(*_: object) -> Generator[None, None, bool]:
    yield from ()
    return False


def _always(*_: object) -> Generator[None, None, bool]:
    yield from ()
    return True


def _always_true(*_: object) -> bool:
    return True


#: Name, object, attribute, mutation: each removes one rule of the core.
MUTANTS: tuple[tuple[str, Any, str, Any], ...] = (
    ("any attempt may report", state.FarmState, "lease_holder", _any_attempt),
    ("a failure dooms nobody", step_rules.StepRules, "_fail", _fail_alone),
    ("attempts are not bounded", step_rules.StepRules, "retry", _no_verdict),
    ("unwanted steps run on", step_rules.StepRules, "abandon_orphans", _nothing),
    ("leases are not revoked before other facts", step_rules.StepRules, "stop", _nothing),
    ("what lapsed is not revived", step_rules.StepRules, "revive", _nothing),
    ("a recipe may lead back to its step", step_rules.StepRules, "_leads_back", _never),
    ("silence and back-off never end", decide.Decider, "due", _nothing),
    ("the farm never asks to be woken", decide.Decider, "deadline", lambda _: None),
    ("lost orders are not said again", builder_rules.BuilderRules, "_missing", _none_listed),
    ("leases without a right are left", builder_rules.BuilderRules, "_unknown", _none_listed),
    ("a builder takes what it cannot build", model.BuilderSpec, "offers", lambda *_: True),
    ("capacity is not counted", builders.Builders, "_count_slots", _always_room),
    ("a freed slot is not offered", builders.Builders, "free_slot", _drop_slot_count),
    ("dependents do not hear of a loss", state.FarmState, "_lost", _lose_quietly),
    ("needs are let go of by nobody", state.FarmState, "_release", lambda *_: None),
    ("a lost builder keeps its leases", builder_rules.BuilderRules, "lost", _nothing),
    ("a result in the cache is built all the same", decide.Decider, "_hold", _nothing),
    ("memory is not counted", placement, "has_memory", _always_true),
    ("slots that are offered change nothing", records.Queue, "measure_power", _nothing),
    ("what stands below does not learn of works", state.FarmState, "_retail", _nothing),
    ("every recipe helps", step_rules.StepRules, "_helps", _always),
)


@pytest.mark.parametrize(("target", "name", "mutation"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_a_mutant_dies(
    target: type, name: str, mutation: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, name, mutation)
    for seed in MUTANT:
        try:
            play(seed)
        except Exception:  # noqa: BLE001  whatever it breaks on, it is dead
            return
    pytest.fail("the mutant survived")
