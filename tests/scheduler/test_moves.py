"""Moves of running builds: when one begins anew on a faster builder, and what bounds that."""

from __future__ import annotations

import pytest

from scheduler import facts as f
from scheduler import moves
from scheduler.effects import CancelBuild, StartBuild
from scheduler.events import BuilderLost
from scheduler.model import BuilderId, FailureKind, LeaseId, StepKey, StepSpec, StepState
from scheduler.policy import Limits
from tests.scheduler.kit import LINUX, Scene, broke, builder, built, join, lease, report, step, submit
from tests.scheduler.test_memory import asking, machine
from tests.scheduler.test_placement import holders, measured, scene, work

LATE_S = 600.0


def on_slow(spec: StepSpec, **speeds: float) -> Scene:
    """A farm where `x`, by `spec`, runs on `slow`, and `fast` has just become idle after ten seconds."""
    farm = scene(slow=1.0, fast=4.0, **speeds)
    farm.play(submit("s", ["quick", "top"], work(step("quick"), 200), spec, work(step("top", "x"), 1)))
    assert holders(farm) == {"quick": "fast", "x": "slow"}
    farm.at(10.0).play(built("quick", "fast"))
    return farm


def wake_until(farm: Scene, end: float, *leases: LeaseId) -> None:
    """Let the farm wake itself until an instant, while builders go on as they are."""
    while (at := farm.farm.deadline()) is not None and at < end:
        farm.wake()
        if holders(farm).get("x") != "slow":
            return
        farm.play(report("slow", 1, *leases))


def test_a_build_that_takes_twice_what_was_expected_moves_to_a_faster_builder_that_idles() -> None:
    farm = on_slow(work(step("x"), 2))
    wake_until(farm, LATE_S, lease("x"))
    assert holders(farm)["x"] == "fast"
    # Twice two minutes, and what was expected at first of the rest would not have been worth a move.
    assert farm.now == 240.0
    [revoked] = [fact for fact in farm.journal if isinstance(fact, f.LeaseRevoked)]
    assert (revoked.builder, revoked.moved) == ("slow", True)
    assert "fast is faster" in revoked.failure.message


@pytest.mark.parametrize(("hours", "holder"), [(1, "fast"), (3, "slow")])
def test_a_late_build_is_not_taken_to_need_more_than_four_hours_yet(hours: int, holder: str) -> None:
    farm = scene(slow=1.0, fast=1.6)
    farm.play(submit("s", ["quick", "x"], work(step("quick"), 400), work(step("x"), 2)))
    assert holders(farm) == {"quick": "fast", "x": "slow"}
    # Three more hours here and two and a half there; or four here and more than four there.
    farm.at(3600.0 * hours).play(report("slow", 1, lease("x")), report("fast", 1, lease("quick")))
    farm.play(built("quick", "fast"))
    assert holders(farm)["x"] == holder


@pytest.mark.parametrize(("speed", "holder"), [(1.3, "slow"), (1.36, "slow"), (1.5, "fast")])
def test_a_late_build_moves_where_all_of_it_takes_the_faster_builder_less_than_three_times_what_it_has_taken(
    speed: float, holder: str
) -> None:
    farm = scene(slow=1.0, fast=speed)
    farm.play(submit("s", ["quick", "x"], work(step("quick"), 400), work(step("x"), 2)))
    assert holders(farm) == {"quick": "fast", "x": "slow"}
    # Four times ten minutes there: 29.4 of them at a speed of 1.36, which is less than 30 here, but not by a twentieth.
    farm.at(600.0).play(report("slow", 1, lease("x")), report("fast", 1, lease("quick")))
    farm.play(built("quick", "fast"))
    assert holders(farm)["x"] == holder


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_build_whose_inputs_the_cache_has_lost_stays_where_they_are(is_lost: bool) -> None:
    farm = scene(slow=1.0, fast=4.0)
    farm.play(submit("s", ["quick", "x"], work(step("quick"), 200), work(step("x", "low"), 2), held=["low"]))
    assert holders(farm) == {"quick": "fast", "x": "slow"}
    if is_lost:
        # No builder of the farm can build it anew.
        farm.play(submit("t", ["low"], step("low", system="arm")))
    farm.at(300.0).play(report("slow", 1, lease("x")), report("fast", 1, lease("quick")))
    farm.play(built("quick", "fast"))
    assert holders(farm)["x"] == ("slow" if is_lost else "fast")


def test_the_old_lease_is_stopped_and_the_new_one_begun_in_one_call() -> None:
    farm = on_slow(work(step("x"), 2))
    _, effects = farm.at(LATE_S).play(report("slow", 1, lease("x")))
    assert effects == [
        CancelBuild(lease("x"), BuilderId("slow")),
        StartBuild(lease("x", 2), BuilderId("fast"), 0),
    ]
    # What the old one still reports counts for nothing, whatever it is.
    farm.play(built("x", "slow"), broke("x", "slow", FailureKind.PERMANENT))
    assert farm.state("x") is StepState.LEASED
    farm.play(built("x", "fast", 2))
    assert farm.state("x") is StepState.PUBLISHING


def test_a_known_build_moves_as_soon_as_that_ends_it_earlier_and_not_where_it_does_not() -> None:
    farm = on_slow(work(step("x"), 20))
    # A quarter of twenty minutes there, nineteen of them here after the least that a build runs.
    wake_until(farm, LATE_S, lease("x"))
    assert (holders(farm)["x"], farm.now) == ("fast", moves.LEAST_RUN_S)
    farm = scene(slow=1.0, fast=1.5)
    farm.play(submit("s", ["quick", "x"], work(step("quick"), 200), work(step("x"), 20)))
    assert holders(farm) == {"quick": "fast", "x": "slow"}
    # 13 minutes there, and eight here.
    farm.at(720.0).play(built("quick", "fast"), report("slow", 1, lease("x")))
    assert holders(farm)["x"] == "slow"


def test_what_is_ready_goes_before_what_could_move() -> None:
    farm = on_slow(work(step("x"), 2))
    farm.play(submit("t", ["y"], work(step("y"), 1)))
    assert holders(farm) == {"quick": "fast", "x": "slow", "y": "fast"}
    farm.at(LATE_S).play(report("slow", 1, lease("x")))
    assert holders(farm)["x"] == "slow"


def test_the_longest_path_moves_first() -> None:
    farm = Scene()
    farm.play(measured("linux", slow=1.0, fast=4.0), join("slow", 2))
    steps = [work(step("short"), 10), work(step("x"), 10), work(step("top", "x"), 10)]
    farm.play(submit("s", ["short", "top"], *steps))
    assert holders(farm) == {"short": "slow", "x": "slow"}
    farm.at(100.0).play(join("fast", 1), report("slow", 2, lease("short"), lease("x")))
    assert holders(farm) == {"short": "slow", "x": "fast"}


def test_the_room_that_a_move_leaves_is_granted_at_once() -> None:
    farm = Scene(Limits(lease_ttl_s=1e6))
    farm.play(measured(LINUX, slow=1.0, fast=4.0), join(builder("slow", features=["old"])))
    farm.play(submit("s", ["x", "y"], work(step("x"), 20), work(step("y", features=["old"]), 10)))
    assert holders(farm) == {"x": "slow"}
    farm.at(100.0).play(join("fast"), report("slow", 1, lease("x")))
    assert holders(farm) == {"x": "fast", "y": "slow"}


def test_a_build_does_not_move_to_the_builder_on_which_it_failed() -> None:
    farm = Scene(Limits(lease_ttl_s=1e6))
    farm.play(measured(LINUX, slow=1.0, fast=4.0), join("fast"))
    farm.play(submit("s", ["x"], work(step("x"), 60)))
    farm.play(join("slow"), broke("x", "fast", FailureKind.INFRASTRUCTURE))
    while not holders(farm):
        farm.wake()
    assert holders(farm) == {"x": "slow"}
    farm.at(farm.now + 200.0).play(report("slow", 1, lease("x", 2)), report("fast", 1))
    assert holders(farm) == {"x": "slow"}


def test_a_build_moves_so_often_in_one_life_and_no_more() -> None:
    names = ["m0", "m1", "m2", "m3", "m4"]
    farm = Scene(Limits(lease_ttl_s=1e6))
    farm.play(measured("linux", **{name: 2.0**n for n, name in enumerate(names)}), join("m0"))
    farm.play(submit("s", ["x"], work(step("x"), 6000)))
    for number, name in enumerate(names[1:], 1):
        farm.at(100.0 * number).play(join(name))
    assert holders(farm) == {"x": names[moves.MOVES]}
    # The loss of a builder begins no new life, nor does a restart.
    farm.play(BuilderLost(BuilderId(names[moves.MOVES]), "1", "gone"))
    farm.restart()
    assert farm.farm.state.steps[StepKey("x")].moves == moves.MOVES


def test_nothing_moves_to_a_machine_without_the_memory_that_it_asks_for() -> None:
    farm = Scene()
    farm.play(measured("linux", small=4.0, large=1.0), join(machine("large", 16)))
    farm.play(submit("s", ["x"], asking(step("x"), 8, minutes=60)))
    farm.play(join(machine("small", 4)))
    farm.at(100.0).play(report("large", 1, lease("x")), report("small", 1))
    assert holders(farm) == {"x": "large"}


@pytest.mark.parametrize("speed", [1.0, 1.1])
def test_nothing_moves_to_a_builder_that_is_hardly_faster(speed: float) -> None:
    farm = Scene()
    farm.play(measured("linux", slow=1.0, fast=speed), join("slow"))
    farm.play(submit("s", ["x"], work(step("x"), 60)))
    farm.play(join("fast"))
    farm.at(100.0).play(report("slow", 1, lease("x")), report("fast", 1))
    assert holders(farm) == {"x": "slow"}


@pytest.mark.parametrize(("taken_s", "holder"), [(1700.0, "fast"), (1850.0, "slow")])
def test_a_build_as_expected_moves_where_that_ends_it_earlier_by_a_twentieth(taken_s: float, holder: str) -> None:
    farm = Scene(Limits(lease_ttl_s=1e6))
    farm.play(measured("linux", slow=1.0, fast=1.5), join("slow"))
    farm.play(submit("s", ["x"], work(step("x"), 100)))
    # 4,000 s there; here 4,300 or 4,150.
    farm.at(taken_s).play(join("fast"), report("slow", 1, lease("x")))
    assert holders(farm) == {"x": holder}
