"""Resource limits: the one that holds for a step of several submissions, and the end of a build that reached one."""

from __future__ import annotations

from scheduler import facts as f
from scheduler.farm import Farm
from scheduler.model import BuilderId, FailureKind, LeaseId, StepKey
from scheduler.policy import Limits
from scheduler.resource_limits import ResourceLimits, in_force
from tests.scheduler.kit import Scene, broke, cancel, expire, join, step, submit

DEFAULT = ResourceLimits(timeout_s=100, silence_s=0, log_bytes=1000, output_bytes=0)
X = StepKey("x")


def limits_of(scene: Scene, key: str = "x") -> ResourceLimits:
    return scene.farm.limits_of(StepKey(key))


def test_without_a_word_the_farms_defaults_hold() -> None:
    assert in_force([], DEFAULT) == DEFAULT
    assert in_force([None], DEFAULT) == DEFAULT


def test_a_limit_that_a_submission_sets_for_its_root_holds_be_it_shorter_or_longer() -> None:
    assert in_force([ResourceLimits(timeout_s=5, silence_s=3)], DEFAULT) == ResourceLimits(5, 3, 1000, 0)
    assert in_force([ResourceLimits(timeout_s=500)], DEFAULT).timeout_s == 500


def test_of_several_submissions_the_most_generous_holds_field_by_field() -> None:
    short = ResourceLimits(timeout_s=5, output_bytes=10)
    other = ResourceLimits(timeout_s=7, silence_s=1, output_bytes=9)
    assert in_force([short, other], DEFAULT) == ResourceLimits(7, 0, 1000, 10)


def test_a_short_limit_on_a_root_does_not_hold_where_it_is_somebody_elses_dependency() -> None:
    assert in_force([ResourceLimits(timeout_s=5, silence_s=3), None], DEFAULT) == DEFAULT


def test_a_submission_can_only_lower_how_much_log_is_kept() -> None:
    assert in_force([ResourceLimits(log_bytes=10)], DEFAULT).log_bytes == 10
    assert in_force([ResourceLimits(log_bytes=10_000)], DEFAULT).log_bytes == 1000


def test_a_build_takes_as_much_memory_as_anybody_says_it_does() -> None:
    assert in_force([ResourceLimits(memory_bytes=5), None, ResourceLimits(memory_bytes=7)], DEFAULT).memory_bytes == 7


def test_a_build_that_ended_at_a_limit_which_is_higher_by_now_ended_at_none() -> None:
    assert ResourceLimits(timeout_s=0).exceeds(FailureKind.TIMEOUT, 5)
    assert ResourceLimits(silence_s=6).exceeds(FailureKind.SILENCE, 5)
    assert not ResourceLimits(timeout_s=5).exceeds(FailureKind.TIMEOUT, 5)
    assert not ResourceLimits().exceeds(FailureKind.OUTPUT_SIZE, 0)
    assert not ResourceLimits().exceeds(FailureKind.PERMANENT, 5)


def test_a_limit_of_a_root_holds_for_as_long_as_no_other_submission_wants_the_step() -> None:
    scene = Scene(Limits(build=DEFAULT))
    assert limits_of(scene) == DEFAULT
    scene.play(submit("s", ["x"], step("x", "y"), step("y"), limits={"x": ResourceLimits(timeout_s=5)}))
    assert (limits_of(scene).timeout_s, limits_of(scene, "y").timeout_s) == (5, 100)
    # As somebody else's dependency it has the default, as another one's root what that one says.
    scene.play(submit("t", ["top"], step("top", "x"), step("x", "y"), step("y")))
    assert limits_of(scene).timeout_s == 100
    scene.play(cancel("t"))
    assert limits_of(scene).timeout_s == 5
    scene.play(submit("u", ["x"], step("x", "y"), step("y"), limits={"x": ResourceLimits(timeout_s=7)}))
    assert limits_of(scene).timeout_s == 7
    # Its own other roots may stand on it.
    scene.play(cancel("u"), cancel("s"))
    limits = {"x": ResourceLimits(timeout_s=5)}
    scene.play(submit("v", ["x", "top"], step("top", "x"), step("x", "y"), step("y"), limits=limits))
    assert limits_of(scene).timeout_s == 5


def test_limits_outlive_a_restart_and_a_snapshot_and_are_forgotten_with_their_submission() -> None:
    scene = Scene(Limits(build=DEFAULT))
    scene.play(submit("s", ["x"], step("x"), limits={"x": ResourceLimits(timeout_s=5)}))
    scene.restart()
    short = Farm(scene.limits)
    short.replay(scene.farm.snapshot())
    assert limits_of(scene) == short.limits_of(X) == in_force([ResourceLimits(timeout_s=5)], DEFAULT)
    scene.play(cancel("s"), expire("s"))
    assert not scene.farm.state.limits


def test_a_build_that_ended_at_a_limit_is_a_verdict_unless_a_submission_gives_it_more_by_now() -> None:
    for raised in (False, True):
        scene = Scene()
        scene.play(join("b"), submit("s", ["x"], step("x"), limits={"x": ResourceLimits(timeout_s=5)}))
        if raised:
            scene.play(submit("t", ["x"], step("x"), limits={"x": ResourceLimits(timeout_s=50)}))
        facts, _ = scene.play(broke("x", "b", FailureKind.TIMEOUT, message="5 s are over", limit=5))
        if raised:
            [revoked] = [fact for fact in facts if isinstance(fact, f.LeaseRevoked)]
            assert revoked.failure.kind is FailureKind.RETURNED
            assert revoked.failure.message == "its limit was raised while it ran (5 s are over)"
            assert scene.farm.state.steps[X].attempt == 2
        else:
            assert scene.state("x").value == "failed"


def test_the_core_says_which_builder_has_a_lease_and_which_incarnation_of_a_builder_it_holds() -> None:
    scene = Scene()
    scene.play(join("b"), submit("s", ["x"], step("x")))
    builder = BuilderId("b")
    assert [scene.farm.is_held_by(LeaseId(X, attempt), builder) for attempt in (0, 1, 2)] == [False, True, False]
    assert not scene.farm.is_held_by(LeaseId(X, 1), BuilderId("c"))
    assert not scene.farm.is_held_by(LeaseId(StepKey("y"), 1), builder)
    incarnation = scene.farm.state.builders[builder]
    assert incarnation.spec is not None
    assert scene.farm.holds(builder, incarnation.spec.incarnation)
    assert not scene.farm.holds(builder, "another life")
    assert not scene.farm.holds(BuilderId("c"), incarnation.spec.incarnation)
    # Silent, it may come back by itself; lost, it must be greeted again.
    life = incarnation.spec.incarnation
    scene.wake()
    assert scene.farm.holds(builder, life)
    scene.restart()
    assert not scene.farm.holds(builder, life)
