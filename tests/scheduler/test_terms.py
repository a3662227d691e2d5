"""Terms of submissions: deadlines, lineages and failing fast end a submission before its steps do."""

from __future__ import annotations

from scheduler.events import TimePassed
from scheduler.facts import SubmissionWithdrawn
from scheduler.farm import Farm
from scheduler.invariants import check, durable
from scheduler.model import FailureKind, Instant
from scheduler.terms import Terms, Withdrawal
from tests.scheduler.kit import Scene, broke, built, cancel, grow, join, report, seal, step, submit

MAIN = Terms(owner="a", lineage="main")


def endings(scene: Scene) -> list[tuple[str, str, str | None]]:
    """Withdrawals in order: whose, why, by which."""
    found = [fact for fact in scene.journal if isinstance(fact, SubmissionWithdrawn)]
    return [(fact.submission, fact.why.value, fact.by) for fact in found]


def restored(scene: Scene) -> Farm:
    """A farm that begins from a snapshot of the scene's."""
    farm = Farm(scene.limits)
    farm.replay(scene.farm.snapshot())
    assert durable(farm.state) == durable(scene.farm.state)
    check(farm.state)
    return farm


def test_a_newer_one_of_a_lineage_ends_what_only_the_older_needs() -> None:
    scene = Scene()
    scene.play(join("b", 3))
    scene.play(submit("old", ["x", "y"], step("x", "shared"), step("y"), step("shared"), terms=MAIN))
    facts, _ = scene.play(submit("new", ["x"], step("x", "shared"), step("shared"), terms=MAIN, supersedes=True))
    assert facts[0].__class__.__name__ == "SubmissionAccepted"
    assert endings(scene) == [("old", "superseded", "new")]
    assert scene.states("x", "y", "shared") == ["waiting", "abandoned", "leased"]
    scene.restart()
    assert endings(scene) == [("old", "superseded", "new")]
    restored(scene)


def test_others_owners_lineages_and_what_has_ended_are_left_alone() -> None:
    scene = Scene()
    scene.play(join("b", 9))
    for name, terms in (
        ("ended", MAIN),
        ("other owner", Terms(owner="b", lineage="main")),
        ("other branch", Terms(owner="a", lineage="x")),
        ("none", Terms(owner="a")),
    ):
        scene.play(submit(name, [name], step(name), terms=terms))
    scene.play(built("ended", "b"))
    scene.play(broke("none", "b", FailureKind.PERMANENT))
    scene.play(submit("new", ["n"], step("n"), terms=MAIN, supersedes=True))
    scene.play(submit("lone", ["l"], step("l"), terms=Terms(owner="a"), supersedes=True))
    # One that is published by nobody yet has not ended.
    assert endings(scene) == [("ended", "superseded", "new")]


def test_a_deadline_withdraws_what_still_waits_also_after_a_restart_and_whatever_the_clock_does() -> None:
    scene = Scene()
    scene.play(join("b"))
    scene.play(submit("late", ["x"], step("x"), terms=Terms(deadline=Instant(50.0))))
    scene.play(submit("open", [], terms=Terms(deadline=Instant(60.0)), opens=True))
    farm = restored(scene)
    assert farm.deadline() == scene.farm.deadline()
    scene.restart()
    # The clock goes back, and then far ahead.
    scene.now = -1000.0
    scene.play(TimePassed())
    assert endings(scene) == []
    scene.now = 10_000.0
    scene.play(report("b"))
    assert endings(scene) == [("late", "deadline", None), ("open", "deadline", None)]
    assert scene.states("x") == ["abandoned"]


def test_a_deadline_of_what_has_ended_wakes_nobody() -> None:
    scene = Scene()
    scene.play(submit("held", ["x"], held=["x"], terms=Terms(deadline=Instant(5.0))))
    scene.play(submit("gone", ["y"], step("y"), terms=Terms(deadline=Instant(5.0))))
    scene.play(cancel("gone"))
    scene.play(submit("sealed", [], terms=Terms(deadline=Instant(5.0)), opens=True))
    scene.play(seal("sealed"))
    assert scene.farm.deadline() is None
    check(scene.farm.state)


def test_the_first_root_that_fails_or_is_doomed_ends_a_submission_that_fails_fast() -> None:
    scene = Scene()
    scene.play(join("b", 4))
    fast = Terms(fail_fast=True)
    scene.play(submit("fast", ["top", "side"], step("top", "low"), step("low"), step("side"), terms=fast))
    scene.play(submit("slow", ["side"], step("side")))
    scene.play(broke("low", "b", FailureKind.PERMANENT))
    assert endings(scene) == [("fast", "fail_fast", None)]
    # What another wants goes on.
    assert scene.states("top", "low", "side") == ["doomed", "failed", "leased"]
    # What is known to fail fails it at once, and an open one grows no more.
    scene.play(submit("again", ["top", "more"], step("top", "low"), step("low"), step("more"), terms=fast))
    scene.play(submit("open", [], terms=fast, opens=True))
    scene.play(grow("open", ["top"], step("top", "low"), step("low")))
    assert [name for name, _, _ in endings(scene)] == ["fast", "again", "open"]
    restored(scene)


def test_what_failed_fast_can_run_again_and_fails_fast_again() -> None:
    scene = Scene()
    scene.play(join("b", 4))
    steps = (step("x"), step("y"))
    scene.play(submit("fast", ["x", "y"], *steps, terms=Terms(fail_fast=True)))
    scene.play(broke("x", "b", FailureKind.PERMANENT))
    assert scene.states("x", "y") == ["failed", "abandoned"]
    scene.restart()
    scene.play(join("b", 4))
    scene.play(submit("fast", ["x", "y"], *steps, again=True, retry=True))
    assert scene.states("x", "y") == ["leased", "leased"]
    scene.play(broke("x", "b", FailureKind.PERMANENT, 2))
    assert [why for _, why, _ in endings(scene)] == [Withdrawal.FAIL_FAST.value] * 2
    check(scene.farm.state)


def test_one_failure_of_all_that_is_left_is_no_withdrawal() -> None:
    scene = Scene()
    scene.play(join("b"))
    scene.play(submit("fast", ["x"], step("x"), terms=Terms(fail_fast=True)))
    scene.play(broke("x", "b", FailureKind.PERMANENT))
    assert endings(scene) == []
