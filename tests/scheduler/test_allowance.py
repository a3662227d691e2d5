"""Cost of failing attempts: an allowance of each submission, beyond which its own next tries wait their turn."""

from __future__ import annotations

import random

import pytest

from scheduler import facts as f
from scheduler.farm import Farm
from scheduler.model import FailureKind, Instant, StepKey, StepState, SubmissionId
from scheduler.policy import Limits
from scheduler.reasons import BacksOff, RetriesSpent
from tests.scheduler.kit import Scene, broke, built, expire, join, published, report, step, submit

INFRA = FailureKind.INFRASTRUCTURE
HOUR_S = 3600.0
FEW = Limits(retries_per_hour=4)


def fail_all(scene: Scene, until: float) -> list[tuple[float, str]]:
    """Fail every lease of a `bad` step, each time in a new way, until then; return when which was begun anew."""
    begun: list[tuple[float, str]] = []
    steps = scene.farm.state.steps
    while True:
        for held in [each for each in steps.values() if each.state is StepState.LEASED]:
            if held.attempt > 1:
                begun.append((scene.now, held.key))
            failure = broke(held.key, held.builder, INFRA, held.attempt, "odd", signature=f"{held.key} {held.attempt}")
            scene.play(failure)
        waits = scene.farm.state.ready.delayed
        if not waits or waits[0][0] > until:
            return begun
        scene.wake()
        scene.play(report("b", 100))


def bad(count: int) -> list[str]:
    return [f"bad{number}" for number in range(count)]


def test_beyond_the_allowance_next_tries_wait_their_turn_and_everything_else_goes_on() -> None:
    scene = Scene(FEW)
    scene.play(join("b", 100), submit("s", bad(10), *map(step, bad(10))))
    tries = fail_all(scene, 1800.0)
    # The second try of each was free, four more were paid for at once, and one each 900 s came by.
    assert 10 + 4 <= len(tries) <= 10 + 4 + 2
    waiting = next(key for key in bad(10) if scene.state(key) is StepState.READY)
    reason = scene.farm.why(StepKey(waiting), Instant(scene.now))
    assert isinstance(reason, RetriesSpent)
    assert reason.submission == "s"
    assert reason.until > scene.now
    scene.play(submit("other", ["good"], step("good")))
    assert scene.states("good") == ["leased"]
    # Another submission's first failures back off as ever.
    scene.play(broke("good", "b", INFRA, 1))
    assert isinstance(scene.farm.why(StepKey("good"), Instant(scene.now)), BacksOff)
    scene.play(report("b", 100))
    scene.wake()
    scene.play(report("b", 100))
    scene.play(built("good", "b", 2), published("good", 2))
    assert scene.states("good") == ["done"]


def test_one_fault_of_the_farm_that_hits_all_that_runs_costs_nothing() -> None:
    scene = Scene(FEW)
    scene.play(join("b", 100), submit("s", bad(50), *map(step, bad(50))))
    scene.play(*(broke(key, "b", INFRA, 1) for key in bad(50)))
    assert not scene.farm.state.paid_until


def test_a_spent_allowance_survives_a_restart_and_a_snapshot_and_is_forgotten_with_its_submission() -> None:
    scene = Scene(FEW)
    scene.play(join("b", 100), submit("s", bad(3), *map(step, bad(3))))
    fail_all(scene, 60.0)
    paid = dict(scene.farm.state.paid_until)
    assert list(paid) == ["s"]
    scene.restart()
    assert scene.farm.state.paid_until == paid
    restored = Farm(FEW)
    restored.replay(scene.farm.snapshot())
    assert restored.state.paid_until == paid
    scene.play(join("b", 100))
    fail_all(scene, 10 * HOUR_S)
    assert set(scene.states(*bad(3))) == {"failed"}
    scene.play(expire("s"))
    assert not scene.farm.state.paid_until


def test_a_journal_without_payers_opens() -> None:
    scene = Scene(Limits(retries_per_hour=0))
    scene.play(join("b", 100), submit("s", bad(3), *map(step, bad(3))))
    fail_all(scene, 10.0)
    assert all(not fact.payer for fact in scene.journal if isinstance(fact, f.LeaseRevoked))
    assert SubmissionId("s") not in scene.farm.state.paid_until


@pytest.mark.parametrize("seed", range(20))
def test_no_hour_has_more_tries_than_two_allowances_beyond_the_second_of_each_step(seed: int) -> None:
    chance = random.Random(seed)
    allowance = chance.randint(1, 12)
    scene = Scene(Limits(retries_per_hour=allowance))
    keys = bad(chance.randint(1, 15))
    scene.play(join("b", 100), submit("s", keys, *map(step, keys)))
    tries = fail_all(scene, 100 * HOUR_S)
    assert set(scene.states(*keys)) == {"failed"}, "it ends all the same"
    seen: set[str] = set()
    paid = [at for at, key in tries if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
    for begin in paid:
        assert sum(begin <= at < begin + HOUR_S for at in paid) <= 2 * allowance + 1
