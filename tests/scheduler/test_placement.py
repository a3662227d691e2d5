"""Placement by earliest finish: which builder takes a step, and when one waits although another builder has room."""

from __future__ import annotations

import random
from dataclasses import replace
from heapq import heapify

from scheduler import events as e
from scheduler import facts as f
from scheduler import reasons as r
from scheduler.effects import StartBuild
from scheduler.model import BuilderId, Instant, Requirements, StepKey, StepSpec, StepState
from scheduler.placement import LONGEST_HOLD_S, LOOK_AHEAD, first_of
from scheduler.policy import Limits
from scheduler.records import Lane, OwnerLanes, Queue, Step
from tests.scheduler.kit import LINUX, Scene, builder, built, join, lease, report, step, submit

MINUTE_MS = 60_000
#: Minutes of two steps: on a builder of speed 2 with room after 40 minutes the first ends before 80, when one of speed
#: 1/2 would have built it; the second, with room there after 60, does not.
WAITING = {"first": 40, "second": 38}


def work(spec: StepSpec, minutes: float) -> StepSpec:
    return replace(spec, work_ms=int(minutes * MINUTE_MS))


def measured(system: str, **speeds: float) -> e.SpeedsMeasured:
    return e.SpeedsMeasured(tuple((BuilderId(name), system, speed) for name, speed in speeds.items()))


def scene(**speeds: float) -> Scene:
    """A farm of builders with one slot each, and so fast. None is removed for silence."""
    made = Scene(Limits(lease_ttl_s=1e6))
    made.play(measured(LINUX, **speeds), *(join(name) for name in speeds))
    return made


def holders(scene: Scene) -> dict[str, str]:
    return {key: each.builder for key, each in scene.farm.state.steps.items() if each.builder}


def why(scene: Scene, key: str) -> r.Reason | None:
    return scene.farm.why(StepKey(key), Instant(scene.now))


def test_the_path_that_takes_longest_goes_first_however_few_steps_it_has() -> None:
    farm = scene(only=1.0)
    chain = [work(step("c0"), 1), work(step("c1", "c0"), 1), work(step("c2", "c1"), 1)]
    farm.play(submit("s", ["c2", "long"], *chain, work(step("long"), 10)))
    assert holders(farm) == {"long": "only"}


def test_a_step_goes_to_the_fastest_builder_with_room_whatever_room_others_have() -> None:
    farm = Scene()
    farm.play(join(builder("slow"), 8), join(builder("fast"), 1), measured(LINUX, fast=2.0))
    farm.play(submit("s", ["x"], work(step("x"), 1)))
    assert holders(farm) == {"x": "fast"}


def test_a_long_step_waits_for_the_fast_builder_and_short_ones_fill_the_slow_one() -> None:
    farm = scene(slow=0.5, fast=2.0)
    roots = ["first", "long", "short"]
    farm.play(submit("s", roots, work(step("first"), 40), work(step("long"), 30), work(step("short"), 1)))
    assert holders(farm) == {"first": "fast", "short": "slow"}
    # `first` ends after 20 minutes, `long` then takes 15: that is before the hour that it would take here.
    assert why(farm, "long") == r.WaitsForFaster(BuilderId("fast"), Instant(0.0), Instant(20 * 60.0))
    assert any("long waits for fast" in line for line in farm.lines)
    farm.play(built("short", "slow"))
    assert farm.state("long") is StepState.READY
    farm.at(1200.0).play(report("slow"), built("first", "fast"))
    assert holders(farm)["long"] == "fast"


def test_a_wait_ends_once_it_has_lasted_as_long_as_it_could_gain() -> None:
    farm = scene(slow=1.0, fast=2.0)
    urgent = [work(step("top", "first"), 60), work(step("first"), 20)]
    farm.play(submit("s", ["top", "next"], *urgent, work(step("next"), 22)))
    assert holders(farm) == {"first": "fast"}
    while farm.state("next") is StepState.READY:
        farm.wake()
        farm.play(report("slow"), report("fast", 1, lease("first")))
    # Half of 22 minutes is what the fast builder would save. It should have had room after 10, and is late.
    assert holders(farm)["next"] == "slow"
    assert farm.now == 11 * 60.0


def test_the_second_that_waits_counts_on_the_second_room() -> None:
    farm = scene(slow=1.0, fast=4.0)
    steps = [work(step("first"), 12), work(step("second"), 8), work(step("third"), 6)]
    farm.play(submit("s", ["first", "second", "third"], *steps))
    # `second` would end after 3 + 2 minutes on the fast one; `third` counts on no room of its own there.
    assert holders(farm) == {"first": "fast", "third": "slow"}


def test_a_builder_that_offers_less_than_it_holds_has_room_once_enough_of_its_leases_have_ended() -> None:
    farm = Scene(Limits(lease_ttl_s=1e6))
    farm.play(measured(LINUX, slow=0.5, fast=2.0), join("fast", 3))
    farm.play(submit("s", ["a", "b", "c"], *(work(step(name), 40 * turn) for turn, name in enumerate("abc", 1))))
    # They should end after 20, 40 and 60 minutes; pressure on its machine leaves it two slots.
    held = [lease(name) for name in "abc"]
    farm.play(report("fast", 2, *held), join("slow"))
    farm.play(submit("t", ["first", "second"], *(work(step(name), minutes) for name, minutes in WAITING.items())))
    assert why(farm, "first") == r.WaitsForFaster(BuilderId("fast"), Instant(0.0), Instant(40 * 60.0))
    # The second counts on the end after that, and would end no earlier there.
    assert holders(farm)["second"] == "slow"
    # With all slots back the first end is room.
    farm.play(report("fast", 3, *held), submit("u", ["third"], work(step("third"), 50)))
    assert farm.state("third") is StepState.READY


def test_builders_of_one_speed_keep_what_they_had_before_speeds_were_known() -> None:
    farm = scene(a=1.5, b=1.5)
    farm.play(submit("s", ["x", "y", "z"], *(work(step(name), 90) for name in "xyz")))
    assert len(holders(farm)) == 2
    assert isinstance(why(farm, "z"), r.BuildersFull)


def test_speed_is_of_a_system_so_that_an_emulated_one_is_used_only_where_that_ends_earlier() -> None:
    farm = Scene()
    both = builder("linux-box", LINUX, "arm")
    farm.play(join(both, 4), join(builder("arm-box", "arm"), 1), measured("arm", **{"linux-box": 0.1}))
    farm.play(submit("s", ["x", "y"], work(step("x", system="arm"), 5), work(step("y", system="arm"), 5)))
    assert holders(farm) == {"x": "arm-box"}
    farm.play(submit("t", ["z"], work(step("z"), 5)))
    assert holders(farm)["z"] == "linux-box"


def test_a_wait_ends_with_the_builder_that_it_is_for_whose_speed_is_known_when_it_comes_back() -> None:
    farm = scene(slow=1.0, fast=8.0)
    farm.play(submit("s", ["x", "y"], work(step("x"), 60), work(step("y"), 50)))
    assert holders(farm) == {"x": "fast"}
    farm.play(e.BuilderLost(BuilderId("fast"), "1", "gone"))
    assert "y" in holders(farm) or "x" in holders(farm)
    farm.play(join("fast"))
    assert farm.farm.state.builders[BuilderId("fast")].speed(LINUX) == 8.0
    farm.play(measured(LINUX, slow=2.0))
    assert farm.farm.state.builders[BuilderId("fast")].speed(LINUX) == 1.0


def test_works_and_tails_survive_a_restart_and_speeds_come_anew() -> None:
    farm = scene(slow=1.0, fast=2.0)
    farm.play(submit("s", ["top"], work(step("top", "low"), 3), work(step("low"), 2)))
    farm.restart()
    assert farm.farm.state.steps[StepKey("low")].tail_ms == 5 * MINUTE_MS
    other = Scene()
    other.farm.replay(farm.farm.snapshot())
    assert other.farm.state.steps[StepKey("low")].tail_ms == 5 * MINUTE_MS


def test_what_is_learned_while_steps_wait_orders_them_anew_and_survives_a_restart() -> None:
    farm = scene(only=1.0)
    chain = [work(step("top", "mid"), 1), work(step("mid", "low"), 1), work(step("low"), 1)]
    farm.play(submit("s", ["now", "top", "other"], work(step("now"), 9), *chain, work(step("other"), 5)))
    assert holders(farm) == {"now": "only"}
    # Unknown, done and unchanged ones change nothing.
    estimated = e.WorksEstimated(
        ((StepKey("top"), 30 * MINUTE_MS), (StepKey("no"), 5), (StepKey("other"), 5 * MINUTE_MS))
    )
    facts, _ = farm.farm.handle(estimated, Instant(1.0))
    assert facts == [f.WorksRevised(((StepKey("top"), 30 * MINUTE_MS),))]
    assert [farm.farm.state.steps[StepKey(key)].tail_ms // MINUTE_MS for key in ("top", "mid", "low")] == [30, 31, 32]
    other = Scene()
    other.farm.replay(farm.farm.snapshot())
    assert other.farm.state.steps[StepKey("low")].tail_ms == 32 * MINUTE_MS
    farm.play(built("now", "only"))
    assert "low" in holders(farm)
    # A step that turns out to be short leaves its place to others.
    farm.play(e.WorksEstimated(((StepKey("top"), 1000),)))
    assert farm.farm.state.steps[StepKey("mid")].tail_ms == MINUTE_MS + 1000
    farm.play(built("low", "only"))
    assert "other" in holders(farm)


def test_tails_are_those_of_the_longest_paths_whatever_was_estimated_in_between() -> None:
    chance = random.Random(3)
    names = [f"n{number}" for number in range(60)]
    needs = {name: chance.sample(names[:at], min(at, chance.randrange(4))) for at, name in enumerate(names)}
    farm = Scene()
    farm.play(submit("s", names[-9:], *(step(name, *needs[name]) for name in names)))
    for _ in range(20):
        works = {StepKey(name): chance.randrange(1, 10**6) for name in chance.sample(names, 5)}
        farm.play(e.WorksEstimated(tuple(works.items())))
        for each in farm.farm.state.steps.values():
            above = [other.tail_ms for other in each.dependents]
            assert not each.engaged or each.tail_ms == each.work_ms + max(above, default=0)
        farm.restart()


def test_no_wait_is_longer_than_four_hours() -> None:
    farm = scene(slow=0.01, fast=2.0)
    farm.play(submit("s", ["x", "y"], work(step("x"), 600), work(step("y"), 600)))
    assert holders(farm) == {"x": "fast"}
    farm.at(LONGEST_HOLD_S - 1).play(report("slow"), report("fast", 1, lease("x")))
    assert holders(farm) == {"x": "fast"}
    farm.at(LONGEST_HOLD_S).play(report("slow"), report("fast", 1, lease("x")))
    assert holders(farm)["y"] == "slow"


def test_a_heap_is_read_in_order_without_being_changed() -> None:
    chance = random.Random(7)
    queue = Queue(Requirements(LINUX), BuilderId(""))
    lane = Lane(OwnerLanes("", 1, 0, 0), 0, 0)
    for number in range(200):
        each = Step(StepKey(str(number)), (), number, StepState.READY)
        each.rank = chance.randrange(50)
        # A fifth is stale: granted meanwhile, or put in again with another rank.
        each.queue = queue if chance.random() < 0.8 else None
        lane.heap.append((-each.rank, each.sequence, each))
    heapify(lane.heap)
    before = list(lane.heap)
    live = [entry[2] for entry in sorted(before, key=lambda entry: entry[:2]) if entry[2].queue is queue]
    assert list(first_of(queue, lane)) == live
    assert lane.heap == before


def test_all_that_fit_are_started_at_once_where_builders_differ() -> None:
    farm = Scene()
    farm.play(join(builder("a"), 3), join(builder("b"), 3), measured(LINUX, b=1.1))
    _, effects = farm.farm.handle(
        submit("s", [f"x{n}" for n in range(9)], *(work(step(f"x{n}"), 1) for n in range(9))), Instant(1.0)
    )
    assert sum(isinstance(effect, StartBuild) for effect in effects) == 6


def test_a_step_waits_for_a_faster_builder_only_where_its_path_goes_on_after_all_that_is_ready() -> None:
    others = [work(step(f"other{n}"), 29) for n in range(10)]
    for above, holder in ((0, "slow"), (100, "")):
        farm = scene(slow=0.5, fast=2.0)
        farm.play(submit("s", ["first"], work(step("first"), 40)))
        chain = [work(step("top", "long"), above), work(step("long"), 30)]
        # All that is ready takes both builders 128 minutes; `long` takes the slow one an hour, and then comes `top`.
        farm.play(submit("t", ["top", *(each.key for each in others)], *chain, *others))
        assert holders(farm).get("long", "") == holder
        assert isinstance(why(farm, "long"), r.WaitsForFaster) is not bool(holder)


def test_what_stands_behind_as_many_as_may_wait_begins_where_there_is_room() -> None:
    farm = Scene(Limits(lease_ttl_s=1e6))
    rooms = LOOK_AHEAD + 4
    farm.play(measured(LINUX, slow=0.5, fast=2.0), join("fast", rooms))
    busy = [f"busy{n}" for n in range(rooms)]
    farm.play(submit("s", busy, *(work(step(name), 20) for name in busy)))
    farm.play(join("slow", 1))
    # Each would end after 25 minutes on the fast one and after an hour on the slow one; all of them take it 14.
    names = [f"x{n}" for n in range(LOOK_AHEAD + 3)]
    farm.play(submit("t", names, *(work(step(name), 30) for name in names)))
    assert [name for name in names if name in holders(farm)] == [names[LOOK_AHEAD]]
    assert holders(farm)[names[LOOK_AHEAD]] == "slow"
    assert isinstance(why(farm, names[LOOK_AHEAD - 1]), r.WaitsForFaster)
