"""The builders that were looked at for a step, as a value: where each would end it, and what keeps it from one."""

from __future__ import annotations

from scheduler import events as e
from scheduler.considered import NAMED, Candidate, Considered, Standing
from scheduler.model import FAR_OFF, BuilderId, Instant, StepKey
from scheduler.policy import Limits
from tests.scheduler.kit import LINUX, Scene, builder, join, step, submit
from tests.scheduler.test_placement import holders, measured, scene, why, work


def considered(farm: Scene, key: str) -> Considered:
    return farm.farm.considered(StepKey(key), Instant(farm.now))


def test_a_step_that_waits_for_a_faster_builder_names_both_and_when_each_would_end_it() -> None:
    farm = scene(slow=0.5, fast=2.0)
    steps = [work(step("first"), 40), work(step("long"), 30), work(step("top", "long"), 5)]
    farm.play(submit("s", ["first", "top"], *steps))
    assert holders(farm) == {"first": "fast"}
    found = considered(farm, "long")
    assert (found.work_ms, found.rank_ms, found.count) == (30 * 60_000, 35 * 60_000, 2)
    assert found.candidates == (
        Candidate(BuilderId("fast"), Standing.FULL, 2.0, 1, 1, Instant(20 * 60.0), Instant(35 * 60.0)),
        Candidate(BuilderId("slow"), Standing.FREE, 0.5, 0, 1, Instant(0.0), Instant(60 * 60.0)),
    )
    # What is shown is what was decided by.
    assert found.held is not None
    assert (found.held.builder, found.held.until) == (found.candidates[0].builder, found.candidates[0].room_at)
    running = considered(farm, "first")
    assert running.candidates[0] == Candidate(
        BuilderId("fast"), Standing.HOLDS, 2.0, 1, 1, Instant(0.0), Instant(20 * 60.0)
    )
    # One whose needs are not done is looked at as if they were.
    assert [each.builder for each in considered(farm, "top").candidates] == ["slow", "fast"]


def test_builders_that_get_nothing_say_why_and_come_last() -> None:
    farm = Scene(Limits(lease_ttl_s=1e6))
    farm.play(join("a"), join(builder("elsewhere", "arm")), join("b"), join("c"))
    farm.play(e.BuilderReported(BuilderId("b"), "1", 1, draining=True))
    farm.play(e.BuilderReported(BuilderId("c"), "1", 1, unfit="its disk is full"))
    farm.play(submit("s", ["x", "y"], work(step("x"), 1), work(step("y"), 2)))
    found = considered(farm, "x")
    assert [(each.builder, each.standing) for each in found.candidates] == [
        ("a", Standing.FULL), ("b", Standing.DRAINING), ("c", Standing.QUARANTINED),
    ]  # fmt: skip
    assert [each.ends_at for each in found.candidates] == [Instant(180.0), FAR_OFF, FAR_OFF]


def test_a_builder_that_offers_less_than_it_holds_has_room_only_once_enough_has_ended() -> None:
    farm = Scene(Limits(lease_ttl_s=1e6))
    farm.play(join("a", 3), measured(LINUX, a=1.0))
    steps = [work(step(f"x{minutes}"), minutes) for minutes in (3, 2, 1)]
    farm.play(submit("s", ["x1", "x2", "x3"], *steps))
    leases = tuple(each.lease for each in farm.farm.state.steps.values())
    # Pressure on its machine: what runs goes on.
    farm.play(e.BuilderReported(BuilderId("a"), "1", 1, leases))
    assert len(holders(farm)) == 3
    farm.play(submit("t", ["y"], work(step("y"), 1)))
    (found,) = considered(farm, "y").candidates
    assert (found.leases, found.capacity, found.room_at) == (3, 1, Instant(180.0))
    assert why(farm, "y") is not None


def test_few_of_many_builders_are_named_those_that_end_it_first() -> None:
    speeds = {f"b{number:02}": 1.0 + number / 10 for number in range(40)}
    farm = scene(**speeds)
    farm.play(submit("s", ["x", "y"], work(step("x", "y"), 10), work(step("y"), 10)))
    found = considered(farm, "x")
    assert (len(found.candidates), found.count) == (NAMED, 40)
    assert found.candidates[0].builder == "b38"
