"""The simulated farm: seeds that once failed, a fixed set, a fresh set, and mutants that the fixed set must kill."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scheduler import (
    builder_rules,
    builders,
    decide,
    failures,
    farm,
    forsaken,
    react,
    records,
    snapshot,
    state,
    step_rules,
    succession,
    wanted,
)
from scheduler import facts as f
from scheduler.effects import Effect, PublishOutputs
from scheduler.model import FailureKind, Instant, SubmissionId
from tests.scheduler.sim_play import play

FIXED = range(1000)
FRESH = 200
MUTANT = range(150)
REGRESSIONS = Path(__file__).parent / "regressions.txt"


def test_seeds_that_once_failed_hold() -> None:
    lines = [line for line in REGRESSIONS.read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        play(int(line.split()[0]))


@pytest.mark.parametrize("block", range(4))
def test_fixed_seeds_hold(block: int) -> None:
    for seed in FIXED[block::4]:
        play(seed)


def test_fresh_seeds_hold() -> None:
    base = random.SystemRandom().randrange(10**9)
    print(f"fresh seeds from {base}: ./run sim --start {base} --seeds {FRESH}")
    for seed in range(base, base + FRESH):
        play(seed)


def test_a_seed_gives_the_same_journal_twice() -> None:
    assert play(7).journal == play(7).journal


def _nothing(*_args: object, **_kwargs: object) -> Iterator[f.Fact]:
    return iter(())


def _forget_all(self: decide.Decider, submission: SubmissionId, now: Instant) -> Iterator[f.Fact]:
    """Forget a submission that still runs."""
    if submission in self._state.submissions or submission in self._state.withdrawn:
        yield f.SubmissionForgotten(submission, now)


def _forget_failures(self: decide.Decider, submission: SubmissionId, now: Instant) -> Iterator[f.Fact]:
    state = self._state
    roots = state.submissions.get(submission) or state.withdrawn.get(submission, ())
    if roots and not any(submission in root.roots for root in roots):
        yield f.SubmissionForgotten(submission, now)
        while state.references.unreferenced:
            yield f.StepsForgotten(tuple(state.references.unreferenced))


def _without_floor(state: state.FarmState) -> Iterator[f.Fact]:
    return (replace(fact, floor=0) if isinstance(fact, f.FarmRestored) else fact for fact in snapshot.tell_all(state))


def _all_sealed(state: state.FarmState) -> Iterator[f.Fact]:
    return (
        replace(fact, open=False, members=()) if isinstance(fact, f.SubmissionRestored) else fact
        for fact in snapshot.tell_all(state)
    )


def _without_order(state: state.FarmState) -> Iterator[f.Fact]:
    for fact in snapshot.tell_all(state):
        if isinstance(fact, f.StepRestored) and fact.past is not None:
            yield replace(fact, past=replace(fact.past, follows=()))
        else:
            yield fact


def _publish(_state: state.FarmState, fact: f.StepBuilt) -> tuple[Effect, ...]:
    return (PublishOutputs(fact.lease, fact.evidence),)


MUTANTS: tuple[tuple[str, Any, str, Any], ...] = (
    ("nobody is quarantined", builder_rules.BuilderRules, "judge", _nothing),
    ("known failures are built again", decide, "is_known_failure", lambda *_: False),
    ("a builder in quarantine is given work", records.Builder, "willing", property(lambda self: self.spec is not None)),
    ("a snapshot forgets trials and leases", snapshot, "_past", lambda _: None),
    ("verdicts are retried", step_rules.StepRules, "_end", step_rules.StepRules.retry),
    ("what is known to fail dooms nobody", step_rules.StepRules, "doom", _nothing),
    ("attempts begin anew", state.FarmState, "next_attempt", lambda _, step: step.attempt + 1),
    ("a snapshot forgets the attempts of what is forgotten", farm, "tell_all", _without_floor),
    ("what still runs is forgotten", decide.Decider, "_expired", _forget_all),
    (
        "the hastiest submission says how long a step waits",
        forsaken.Forsaken,
        "_limit",
        lambda self, *_: self._shortest(),
    ),
    ("what grows does not sink what it stands on", wanted.WantedSteps, "_spread", _nothing),
    ("a fall-back of what may grow is not noted", wanted.WantedSteps, "_fall_in", lambda *_: None),
    ("a snapshot forgets what may grow", farm, "tell_all", _all_sealed),
    ("known failures are forgotten", decide.Decider, "_expired", _forget_failures),
    ("what follows a lease outlives it", farm, "handing_back", lambda *_: ()),
    ("what follows others is published at once", farm, "REACTIONS", {**react.REACTIONS, f.StepBuilt: _publish}),
    ("what follows a build takes a place of its own", builders, "is_follower", lambda _: False),
    ("many follow one build", succession.SuccessionRules, "_has_follower", lambda *_: False),
    ("builders that cannot get leases early", succession, "_takes", lambda builder: bool(builder.spec)),
    ("a snapshot forgets what follows what", farm, "tell_all", _without_order),
)


@pytest.mark.parametrize(("target", "name", "mutation"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_a_mutant_dies(target: Any, name: str, mutation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, name, mutation)
    for seed in MUTANT:
        try:
            play(seed)
        except Exception:  # noqa: BLE001  whatever it breaks on, it is dead
            return
    pytest.fail("the mutant survived")


def test_a_builder_killed_from_outside_without_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    row = failures.CONSEQUENCES[FailureKind.INFRASTRUCTURE]
    table = {**failures.CONSEQUENCES, FailureKind.KILLED: row}
    monkeypatch.setattr(step_rules, "CONSEQUENCES", table)

    def play_all() -> None:
        for seed in FIXED:
            play(seed)

    with pytest.raises(AssertionError, match="this kind is not retried so often"):
        play_all()
