"""Early leases: where a step follows its needs, and where it waits for them as ever."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler import facts as f
from scheduler import invariants
from scheduler import reasons as r
from scheduler.effects import CancelBuild, PublishOutputs, StartBuild
from scheduler.events import Event, SpeedsMeasured
from scheduler.farm import Farm
from scheduler.model import BuilderId, BuilderSpec, FailureKind, Instant, StepKey, StepSpec
from scheduler.succession import EARLY_PER_PLACE
from tests.scheduler.kit import Scene, broke, builder, built, cancel, join, lease, lost, published, report, step, submit

CHAIN = (step("c", "b"), step("b", "a"), step("a"))
ONE = builder("one", successors=True)


def leased(scene: Scene, *events: Event) -> list[str]:
    facts, _ = scene.play(*events)
    invariants.check(scene.farm.state)
    return [f"{fact.lease.step} {fact.builder}" for fact in facts if isinstance(fact, f.StepLeased)]


def farm_of(*specs: BuilderSpec, room: int = 1) -> Scene:
    scene = Scene()
    scene.play(*(join(spec, room) for spec in specs))
    return scene


def test_a_chain_needs_no_pause_and_each_result_is_published_after_what_it_refers_to() -> None:
    scene = farm_of(ONE)
    assert leased(scene, submit("s", ["c"], *CHAIN)) == ["a one", "b one"]
    assert leased(scene, built("a", "one")) == ["c one"]
    assert scene.play(built("b", "one"))[1] == []
    _, effects = scene.play(published("a"))
    assert [str(effect.lease.step) for effect in effects if isinstance(effect, PublishOutputs)] == ["b"]


def test_a_builder_that_does_not_say_that_it_can_gets_no_early_lease() -> None:
    scene = farm_of(builder("one"))
    assert leased(scene, submit("s", ["c"], *CHAIN)) == ["a one"]
    assert leased(scene, built("a", "one")) == []
    assert leased(scene, published("a")) == ["b one"]


def test_what_is_ready_goes_before_what_would_follow_and_finds_no_place_taken_that_is_free() -> None:
    scene = farm_of(ONE, room=2)
    assert leased(scene, submit("s", ["b"], *CHAIN[1:])) == ["a one", "b one"]
    # The second place is free although three leases are open in the end: `b` has none of its own.
    assert leased(scene, submit("t", ["x", "y"], step("x"), step("y"))) == ["x one"]
    # What is ready takes the next place, not what follows `x`.
    assert leased(scene, submit("u", ["z"], step("z", "x"), step("x"))) == []
    assert leased(scene, built("x", "one")) == ["y one"]


def test_one_step_follows_each_lease_and_others_once_there_is_room() -> None:
    scene = farm_of(ONE, room=2)
    both = [step(key, "a") for key in ("p", "q", "w")]
    assert leased(scene, submit("s", ["p", "q", "w"], *both, step("a"))) == ["a one", "p one"]
    assert leased(scene, built("a", "one")) == ["q one"]
    assert leased(scene, published("a")) == []
    assert leased(scene, built("p", "one")) == ["w one"]


@pytest.mark.parametrize(("fast_is_free", "follows"), [(True, False), (False, True)])
def test_a_faster_builder_with_room_takes_the_step_once_it_is_ready(fast_is_free: bool, follows: bool) -> None:
    scene = farm_of(ONE, builder("fast", "linux", "mac", successors=True))
    scene.play(
        SpeedsMeasured(tuple((BuilderId(name), "linux", speed) for name, speed in (("one", 1.0), ("fast", 1.2))))
    )
    if not fast_is_free:
        scene.play(submit("busy", ["x"], step("x", system="mac")))
    else:
        scene.play(report("fast", 0))
    small = replace(step("b", "a"), work_ms=10)
    scene.play(submit("s", ["a"], replace(step("a"), work_ms=10)))
    assert scene.farm.state.steps[StepKey("a")].builder == "one"
    scene.play(report("fast", 1), submit("t", ["b"], small, replace(step("a"), work_ms=10)))
    scene.play(built("a", "one"))
    assert (scene.states("b") == ["leased"]) is follows


def test_needs_at_several_builders_or_of_an_earlier_incarnation_are_not_followed() -> None:
    scene = farm_of(ONE, builder("two", successors=True))
    joined = (step("j", "a", "k"), step("a"), step("k"))
    assert leased(scene, submit("s", ["j"], *joined)) == ["a one", "k two"]
    assert leased(scene, built("a", "one"), built("k", "two")) == []
    assert leased(scene, published("k")) == []
    scene = farm_of(ONE)
    joined = (step("j", "a", "k"), step("a"), step("k"))
    assert leased(scene, submit("s", ["j"], *joined)) == ["a one"]
    assert leased(scene, built("a", "one")) == ["k one", "j one"]
    scene.at(5).play(join(replace(ONE, incarnation="2")))
    assert scene.states("j", "a", "k") == ["waiting", "publishing", "ready"]
    # `k` is built again, and `j` would follow `a` too, of which this incarnation knows nothing.
    assert scene.at(60).wake()[0]
    assert scene.states("j", "a", "k") == ["waiting", "publishing", "leased"]


def asks(spec: StepSpec, memory_bytes: int) -> StepSpec:
    return replace(spec, memory_bytes=memory_bytes)


def test_a_step_takes_the_place_of_its_need_only_where_its_memory_fits_there() -> None:
    large = replace(ONE, memory_bytes=10)
    scene = farm_of(large, room=2)
    assert leased(scene, submit("s", ["b"], asks(step("b", "a"), 8), asks(step("a"), 4))) == ["a one"]
    # The memory of a build that has ended is free, and what follows it has it from its beginning on.
    assert leased(scene, built("a", "one")) == ["b one"]
    scene = farm_of(large, room=2)
    assert leased(scene, submit("s", ["b"], asks(step("b", "a"), 4), asks(step("a"), 8))) == ["a one", "b one"]
    assert scene.farm.state.builders[BuilderId("one")].memory_bytes == 8


def test_every_end_of_a_need_ends_what_follows_it_first_and_costs_it_nothing() -> None:
    ends: tuple[Event, ...] = (
        *(broke("a", "one", kind) for kind in (FailureKind.PERMANENT, FailureKind.RETURNED, FailureKind.DISK_LOW)),
        lost("one"),
        cancel("s"),
        submit("other", ["a"], held=["a"]),
    )
    for end in ends:
        scene = farm_of(ONE)
        scene.play(submit("s", ["c"], *CHAIN))
        facts, effects = scene.play(end)
        invariants.check(scene.farm.state)
        follower = scene.farm.state.steps[StepKey("b")]
        assert (follower.faults, follower.returns, follower.avoid) == (0, 0, ""), end
        ended = [fact.lease.step for fact in facts if isinstance(fact, f.LeaseRevoked)]
        assert ended[0] == "b", end
        assert CancelBuild(lease("b"), ONE.id) in effects, end


def test_what_a_worker_could_not_begin_early_costs_nothing_and_begins_when_it_is_ready() -> None:
    scene = farm_of(ONE)
    scene.play(submit("s", ["c"], *CHAIN))
    assert leased(scene, broke("b", "one", FailureKind.RETURNED)) == []
    assert leased(scene, built("a", "one")) == ["b one", "c one"]
    scene.play(broke("b", "one", FailureKind.RETURNED, 2))
    assert scene.states("b", "c") == ["waiting", "waiting"]
    assert scene.farm.state.steps[StepKey("b")].returns == 0
    assert leased(scene, published("a")) == ["b one", "c one"]


def test_a_builder_goes_ahead_of_what_is_published_only_so_far() -> None:
    scene = farm_of(ONE)
    keys = [f"n{number:02}" for number in range(3 * EARLY_PER_PLACE)]
    steps = [step(key, *keys[number - 1 : number]) for number, key in enumerate(keys)]
    scene.play(submit("s", [keys[-1]], *steps))
    for key in keys:
        if scene.states(key) != ["leased"]:
            break
        scene.play(built(key, "one"))
        invariants.check(scene.farm.state)
    assert scene.states(*keys).count("publishing") == EARLY_PER_PLACE + 1
    # Each that is published makes room for one more, which is looked for when something is built or leased.
    for key in keys:
        if scene.states(key) == ["leased"]:
            scene.play(built(key, "one"))
        scene.play(published(key))
    assert set(scene.states(*keys)) == {"done"}


def test_a_restart_amidst_a_chain_hands_out_the_same_orders_again() -> None:
    scene = farm_of(ONE)
    for event in (submit("s", ["c"], *CHAIN), built("a", "one"), built("b", "one")):
        scene.play(event)
    assert scene.states("a", "b", "c") == ["publishing", "publishing", "leased"]
    again = Farm()
    again.replay(scene.farm.snapshot())
    assert invariants.durable(again.state) == invariants.durable(scene.farm.state)
    invariants.check(again.state)
    b, c = lease("b"), lease("c")
    for effects in (again.resume(Instant(10.0)), scene.restart()):
        assert StartBuild(c, BuilderId("one"), 0, (b,)) in effects
        assert PublishOutputs(lease("a"), b"evidence") in effects
        assert len(effects) == 2


def test_a_step_that_follows_says_what_it_waits_for() -> None:
    scene = farm_of(ONE)
    scene.play(submit("s", ["c"], *CHAIN))
    one, a, b = BuilderId("one"), StepKey("a"), StepKey("b")
    assert scene.farm.why(b, Instant(0.0)) == r.FollowsSteps(one, 1, (a,), built=False)
    scene.play(built("a", "one"))
    assert scene.farm.why(b, Instant(0.0)) is None
    scene.play(built("b", "one"))
    assert scene.farm.why(b, Instant(0.0)) == r.FollowsSteps(one, 1, (a,), built=True)


def test_a_builder_that_drains_or_was_in_quarantine_gets_no_early_lease() -> None:
    scene = farm_of(ONE)
    assert leased(scene, report(ONE.id, 1, draining=True), submit("s", ["b"], *CHAIN[1:])) == []
