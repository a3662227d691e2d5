"""Memory: what builders have, what steps ask for, and what a step that died of too little asks for then."""

from __future__ import annotations

from dataclasses import replace

from scheduler import events as e
from scheduler import reasons as r
from scheduler.model import BuilderId, BuilderSpec, Failure, FailureKind, Instant, StepKey, StepSpec, StepState
from scheduler.policy import Limits
from tests.scheduler.kit import Scene, builder, built, join, lease, report, step, submit

GIB = 2**30


def asking(spec: StepSpec, gib: float, minutes: float = 1) -> StepSpec:
    return replace(spec, memory_bytes=int(gib * GIB), work_ms=int(minutes * 60_000))


def machine(name: str, gib: float) -> BuilderSpec:
    return replace(builder(name), memory_bytes=int(gib * GIB))


def scene(**gib: float) -> Scene:
    """A farm of builders with four slots each, and so much memory."""
    made = Scene(Limits(lease_ttl_s=1e6))
    made.play(*(join(machine(name, each), 4) for name, each in gib.items()))
    return made


def holders(scene: Scene) -> dict[str, str]:
    return {key: each.builder for key, each in scene.farm.state.steps.items() if each.builder}


def test_no_builder_gets_steps_that_ask_for_more_than_its_machine_has_and_others_fill_its_slots() -> None:
    farm = scene(m=8)
    large = [asking(step(name), 3, minutes=9) for name in ("a", "b", "c")]
    farm.play(submit("s", ["a", "b", "c", "small", "unknown"], *large, asking(step("small"), 1), step("unknown")))
    # `c` keeps the builder: nothing else that asks for memory goes before it, what does not ask for any does.
    assert set(holders(farm)) == {"a", "b", "unknown"}
    reason = farm.farm.why(StepKey("c"), Instant(farm.now))
    assert reason == r.WaitsForMemory(BuilderId("m"), Instant(0.0), Instant(540.0), 3 * GIB)
    farm.play(built("b", "m"))
    assert set(holders(farm)) >= {"a", "c", "unknown", "small"}


def test_a_large_step_gets_its_memory_however_many_small_ones_come() -> None:
    farm = scene(m=8)
    small = [asking(step(f"x{number:02}"), 2) for number in range(40)]
    farm.play(submit("s", ["large", *(each.key for each in small)], *small, asking(step("large"), 7, minutes=0.5)))
    ended = 0
    while "large" not in holders(farm):
        done = next(key for key in holders(farm) if farm.state(key) is StepState.LEASED)
        farm.play(built(done, "m"), e.OutputsPublished(lease(done)))
        ended += 1
        # Its rank is the lowest: once it is its turn, it waits for those that run and no longer.
        assert ended <= len(small)
    urgent = scene(m=8)
    urgent.play(submit("s", [each.key for each in small], *small))
    urgent.play(submit("t", ["large"], asking(step("large"), 7, minutes=60)))
    for done in list(holders(urgent)):
        urgent.play(built(done, "m"))
    assert "large" in holders(urgent)


def test_a_step_that_was_killed_asks_for_twice_its_share_and_waits_for_a_machine_that_has_it() -> None:
    farm = scene(small=4, large=16)
    filler = [asking(step(f"f{number}"), 4, minutes=99) for number in range(4)]
    farm.play(submit("s", [each.key for each in filler], *filler))
    farm.play(submit("t", ["x"], replace(step("x"), work_ms=1000)))
    holder = holders(farm)["x"]
    killed = e.BuildFailed(lease("x"), BuilderId(holder), Failure(FailureKind.KILLED, "killed by signal 9"))
    farm.play(killed)
    asked = {"small": 2 * GIB, "large": 8 * GIB}[holder]
    assert farm.farm.state.steps[StepKey("x")].memory_bytes == asked
    farm.restart()
    assert farm.farm.state.steps[StepKey("x")].memory_bytes == asked
    other = Scene()
    other.farm.replay(farm.farm.snapshot())
    assert other.farm.state.steps[StepKey("x")].memory_bytes == asked


def test_what_asks_for_more_than_any_machine_has_runs_alone_on_the_largest() -> None:
    farm = scene(small=4, large=16)
    farm.play(submit("s", ["x"], asking(step("x"), 99)))
    assert holders(farm) == {"x": "large"}
    farm.play(submit("t", ["y"], asking(step("y"), 5)))
    assert isinstance(farm.farm.why(StepKey("y"), Instant(farm.now)), r.WaitsForMemory)
    farm.play(report("large", 4, lease("x"), unfit="disk"))
    # The largest of those that take steps now.
    assert holders(farm)["y"] == "small"


def test_a_builder_that_does_not_say_what_it_has_takes_all() -> None:
    farm = scene(m=0)
    farm.play(submit("s", ["x", "y"], asking(step("x"), 500), asking(step("y"), 500)))
    assert holders(farm) == {"x": "m", "y": "m"}


def test_a_step_waits_for_no_faster_builder_whose_machine_is_too_small() -> None:
    farm = Scene(Limits(lease_ttl_s=1e6))
    speeds = e.SpeedsMeasured(((BuilderId("quick"), "linux", 8.0), (BuilderId("big"), "linux", 1.0)))
    farm.play(speeds, join(machine("quick", 4), 1), join(machine("big", 16), 2))
    farm.play(submit("s", ["a", "x"], asking(step("a"), 1, minutes=50), asking(step("x"), 8, minutes=40)))
    assert holders(farm) == {"a": "quick", "x": "big"}
