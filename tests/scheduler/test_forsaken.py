"""A build that no builder can take is given up in time: once, not while such a builder is known, restarts or not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler import facts as f
from scheduler.farm import Farm
from scheduler.forsaken import LOOK_AGAIN_S, STALE_ENTRIES
from scheduler.model import FailureKind, Instant, StepKey
from scheduler.policy import Limits
from scheduler.reasons import NoBuilderJoined
from tests.scheduler.kit import Scene, builder, cancel, either, expire, join, lost, recipe, report, step, submit

LIMITS = Limits(give_up_s=100.0, lease_ttl_s=10_000.0)
MAC = "aarch64-darwin"


def given_up(facts: list[f.Fact]) -> list[StepKey]:
    return [x.step for x in facts if isinstance(x, f.StepFailed) and x.failure.kind is FailureKind.NO_WORKER]


def test_time_alone_gives_up_what_no_builder_offers_and_a_sentence_says_what_to_do() -> None:
    scene = Scene(LIMITS)
    scene.play(join("b"))
    scene.play(submit("s", ["top"], step("top", "x"), step("x", system=MAC, features=["big"])))
    facts, _ = scene.wake()
    assert (scene.now, given_up(facts)) == (100.0, [StepKey("x")])
    assert scene.states("x", "top") == ["failed", "doomed"]
    failure = scene.farm.state.steps[StepKey("x")].failure
    assert failure is not None
    assert failure.message == (
        f"no worker could take it for 100 s (no worker offers the system {MAC}):"
        f" start a worker for {MAC} with big, then submit it again"
    )


def test_a_step_that_was_given_up_waits_anew_when_it_is_retried_and_runs_where_a_worker_has_come() -> None:
    scene = Scene(LIMITS)
    scene.play(submit("s", ["x"], step("x")))
    scene.wake()
    scene.at(150).play(submit("s", ["x"], step("x"), again=True, retry=True))
    assert scene.farm.deadline() == 250.0
    scene.play(join("b"))
    assert scene.state("x").value == "leased"


def test_each_step_has_its_own_time_and_a_builder_that_was_there_starts_it_anew() -> None:
    scene = Scene(LIMITS)
    scene.play(submit("s1", ["x"], step("x")))
    scene.at(50).play(submit("s2", ["y"], step("y")))
    scene.at(60).play(join("b", 0))
    assert scene.farm.deadline() is not None
    scene.at(500).play(report("b", 0))
    assert scene.states("x", "y") == ["ready", "ready"], "a full builder is a builder"
    scene.at(600).play(lost("b"))
    scene.at(650).play(submit("s3", ["z"], step("z")))
    scene.at(700).play(report("b", 0))
    assert scene.states("x", "y", "z") == ["failed", "failed", "ready"]


def test_another_recipe_that_a_builder_can_take_is_tried_before_the_step_is_given_up() -> None:
    scene = Scene(LIMITS)
    scene.play(join("b"), submit("s", ["x"], either("x", recipe(system=MAC), recipe())))
    scene.at(100).play(report("b"))
    assert scene.state("x").value == "leased"


def test_without_a_limit_nothing_is_given_up() -> None:
    scene = Scene(Limits(lease_ttl_s=1e9))
    scene.play(join("b", 0), submit("s", ["x"], step("x", system=MAC)))
    scene.at(1e8).play(report("b", 0))
    assert scene.state("x").value == "ready"


def test_the_most_patient_of_the_submissions_that_stand_on_a_step_says_how_long_it_waits() -> None:
    scene = Scene(LIMITS)
    scene.play(submit("hasty", ["a"], step("a", "x"), step("x"), wait_s=30))
    scene.play(submit("plain", ["b"], step("b", "y"), step("y")))
    scene.at(10).play(submit("patient", ["c"], step("c", "x"), step("x"), wait_s=200))
    assert given_up(scene.at(199).play(report("nobody"))[0]) == [StepKey("y")]
    assert scene.farm.deadline() == 200.0
    assert given_up(scene.wake()[0]) == [StepKey("x")]


def test_a_submission_may_wait_for_ever_or_shorter_than_a_farm_that_would() -> None:
    scene = Scene(Limits(lease_ttl_s=1e9))
    scene.play(submit("s", ["x"], step("x")), submit("hasty", ["y"], step("y"), wait_s=30))
    assert given_up(scene.at(30).play(report("nobody"))[0]) == [StepKey("y")]
    scene = Scene(LIMITS)
    scene.play(submit("s", ["x"], step("x"), wait_s=0), submit("t", ["x"], step("x")))
    scene.at(1e8).play(report("nobody"))
    assert (scene.state("x").value, scene.farm.deadline()) == ("ready", None)


def test_a_step_waits_no_longer_for_the_sake_of_a_submission_that_is_gone() -> None:
    for limits in (LIMITS, Limits(lease_ttl_s=1e9)):
        scene = Scene(limits)
        scene.play(submit("patient", ["a"], step("a", "x"), step("x"), wait_s=0))
        scene.at(50).play(submit("hasty", ["b"], step("b", "x"), step("x"), wait_s=30))
        scene.at(300).play(report("nobody"))
        assert scene.state("x").value == "ready"
        scene.at(301).play(cancel("patient"))
        while scene.state("x").value == "ready":
            scene.wake()
        assert scene.now <= 301 + LOOK_AGAIN_S


def test_the_wait_limit_of_a_submission_is_kept_where_it_runs_again_and_by_a_snapshot() -> None:
    scene = Scene(LIMITS)
    scene.play(submit("s", ["x"], step("x"), wait_s=30), submit("gone", ["y"], step("y"), wait_s=7))
    scene.play(cancel("gone"))
    assert given_up(scene.at(30).play(report("nobody"))[0]) == [StepKey("x")]
    scene.play(submit("s", ["x"], step("x"), again=True, retry=True))
    assert given_up(scene.at(60).play(report("nobody"))[0]) == [StepKey("x")]
    scene.restart()
    short = Farm(LIMITS)
    short.replay(scene.farm.snapshot())
    assert short.state.wait_limits == scene.farm.state.wait_limits == {"s": 30, "gone": 7}
    scene.play(expire("s"), expire("gone"))
    assert not scene.farm.state.wait_limits


def test_a_step_that_waits_for_a_builder_says_until_when() -> None:
    scene = Scene(LIMITS)
    scene.at(5).play(submit("s", ["a", "x"], step("a"), step("x"), wait_s=30), submit("t", ["x"], step("x"), wait_s=0))
    assert [scene.farm.why(StepKey(key), Instant(6)) for key in "ax"] == [
        NoBuilderJoined(Instant(35)),
        NoBuilderJoined(),
    ]


def test_steps_that_come_and_go_without_end_leave_no_entries_behind() -> None:
    scene = Scene(LIMITS)
    scene.play(join("b", 0), submit("s", ["x"], step("x")))
    most = 0
    for _ in range(3 * STALE_ENTRIES):
        scene.farm.handle_many([lost("b")], Instant(0.0))
        scene.farm.handle_many([join("b", 0)], Instant(0.0))
        most = max(most, len(scene.farm._decider._forsaken._heap))  # noqa: SLF001 - a bound on memory that nothing else shows
    assert most <= 2 * STALE_ENTRIES


@given(st.lists(st.tuples(st.integers(1, 120), st.sampled_from(["join", "lose", "restart", "wake"])), max_size=30))
def test_a_step_is_given_up_exactly_once_and_never_while_a_capable_builder_is_known(
    moves: list[tuple[int, str]],
) -> None:
    scene = Scene(LIMITS)
    scene.play(submit("s", ["x"], step("x")))
    alone_since, here = 0.0, False
    ended = 0
    for wait, move in moves:
        scene.at(scene.now + wait)
        if move == "restart":
            scene.restart()
            assert scene.state("x").value == "failed" or scene.farm.deadline() == 0.0
            alone_since, here = scene.now, False
        # Whatever comes, what is due by then is said first by the clock.
        facts = scene.play(report("nobody"))[0]
        if move == "join" and not here:
            facts += scene.play(join(builder("b"), 0))[0]
        elif move == "lose" and here:
            facts += scene.play(lost("b"))[0]
        gone = len(given_up(facts))
        due = not here and not ended and scene.now - alone_since >= LIMITS.give_up_s
        assert gone == due
        ended += gone
        if move == "join":
            here = True
        elif move == "lose" and here:
            alone_since, here = scene.now, False
    assert ended <= 1
