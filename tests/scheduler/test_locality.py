"""Inputs that builders have: what is remembered of them, for how long, and what follows for placement."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from scheduler import events as e
from scheduler.considered import Candidate
from scheduler.locality import LEAST_BYTES, MOST_PLACES, USUAL_RATE, WORTH_S
from scheduler.model import BuilderId, Instant, StepKey, StepSpec
from scheduler.policy import Limits
from tests.scheduler.kit import LINUX, Scene, builder, built, join, lease, lost, published, report, step, submit
from tests.scheduler.test_placement import holders, measured, work

GIB = 1 << 30
#: Seconds in which one GiB is fetched.
GIB_S = GIB / USUAL_RATE


def large(spec: StepSpec, gib: float = 1.0) -> StepSpec:
    return replace(spec, output_bytes=int(gib * GIB))


def farm_with(*builders: str, slots: int = 4) -> Scene:
    """A farm in which the first builder has made the step `big`, of a GiB."""
    farm = Scene(Limits(lease_ttl_s=1e6))
    farm.play(join(builders[0], slots), submit("s", ["big"], large(step("big"))))
    farm.play(built("big", builders[0]), *(join(name, slots) for name in builders[1:]))
    farm.play(published("big"))
    return farm


def candidates(farm: Scene, key: str) -> dict[str, Candidate]:
    return {each.builder: each for each in farm.farm.considered(StepKey(key), Instant(farm.now)).candidates}


def lease_one(farm: Scene, name: str, *needs: str) -> str:
    """Return the builder that a new step with these needs goes to."""
    farm.play(submit(f"of {name}", [name], work(step(name, *needs), 1), held=needs))
    return holders(farm)[name]


def test_a_step_goes_where_its_inputs_are_although_others_have_more_room() -> None:
    farm = farm_with("a", "b")
    assert [lease_one(farm, name, "big") for name in "xyz"] == ["a", "a", "a"]
    # What needs nothing large goes to the emptiest, as ever.
    assert lease_one(farm, "other") == "b"
    # One of which the inputs were on their way is where they are, too.
    assert [lease_one(farm, name, "big") for name in ("v", "w")] == ["a", "b"]
    farm.play(built("x", "a"), built("other", "b"))
    assert candidates(farm, "w")["a"].here_bytes == GIB
    assert lease_one(farm, "u", "big") == "b"


def test_what_fetches_are_worth_counts_beside_speed() -> None:
    farm = farm_with("slow", "fast")
    farm.play(measured(LINUX, slow=1.0, fast=2.0))
    # Fetching takes 21 s; the fast one gains 15 s of half a minute, and an hour of two.
    farm.play(submit("t", ["short"], work(step("short", "big"), 0.5), held=["big"]))
    farm.play(submit("u", ["long"], work(step("long", "big"), 120), held=["big"]))
    assert holders(farm) == {"short": "slow", "long": "fast"}
    # Where the network is fast it is as if nothing had to be fetched.
    farm.play(e.SpeedsMeasured(((BuilderId("fast"), LINUX, 2.0),), ((BuilderId("fast"), 10 * GIB),)))
    assert lease_one(farm, "next", "big") == "fast"


def test_a_wait_for_a_faster_builder_counts_what_it_would_fetch() -> None:
    farm = farm_with("slow", "fast", slots=1)
    farm.play(measured(LINUX, slow=1.0, fast=2.0))
    farm.play(submit("t", ["busy"], work(step("busy"), 0.5)))
    assert holders(farm) == {"busy": "fast"}
    # It would have room in 15 s and build for 30; to fetch takes 21 s, and the slow one needs 60 s.
    farm.play(submit("u", ["next"], work(step("next", "big"), 1), held=["big"]))
    assert holders(farm)["next"] == "slow"


@pytest.mark.parametrize("how", ["anew", "collects", "silent", "lost"])
def test_what_a_builder_had_is_forgotten_when_it_starts_anew_deletes_something_or_leaves(how: str) -> None:
    farm = farm_with("a", "b")
    assert lease_one(farm, "x", "big") == "a"
    farm.play(built("x", "a"), published("x"))
    if how == "anew":
        farm.play(join(builder("a", incarnation="2"), 4))
    elif how == "collects":
        farm.play(e.BuilderReported(BuilderId("a"), "1", 4, collections=1))
    elif how == "lost":
        farm.play(lost("a"), join("a", 4))
    else:
        farm.at(2e6).play(report("b", 4))
        farm.play(report("a", 4))
    assert not candidates_of_new(farm)["a"].here_bytes
    # The same count again is the same collection.
    if how == "collects":
        lease_one(farm, "z", "big")
        farm.play(e.BuilderReported(BuilderId("a"), "1", 4, (lease("z"),), collections=1))
        assert any(each.here_bytes for each in candidates_of_new(farm, "again").values())


def candidates_of_new(farm: Scene, name: str = "new") -> dict[str, Candidate]:
    """Return the builders for a step above the large one that no builder may take yet."""
    farm.play(submit(f"of {name}", [name], step(name, "big", "never"), step("never", system="none"), held=["big"]))
    return candidates(farm, name)


def test_small_inputs_and_those_that_many_have_decide_nothing() -> None:
    farm = farm_with("a", "b")
    farm.play(submit("t", ["small"], replace(step("small"), output_bytes=LEAST_BYTES - 1)))
    farm.play(built("small", holders(farm)["small"]), published("small"))
    assert not farm.farm.state.steps[StepKey("small")].places
    many = [f"m{number:02}" for number in range(MOST_PLACES + 1)]
    wide = farm_with(*many, slots=1)
    for number, _ in enumerate(many):
        lease_one(wide, f"x{number}", "big")
    assert len(wide.farm.state.steps[StepKey("big")].places) == 1
    # Builders that are gone are no longer counted among the many.
    few = farm_with("a", "b")
    for number in range(3 * MOST_PLACES):
        few.play(join(builder("a", incarnation=f"again {number}"), 1), report("b", 0))
        lease_one(few, f"x{number}", "big")
        few.play(built(f"x{number}", "a"), published(f"x{number}"))
    assert candidates_of_new(few)["a"].here_bytes == GIB


def test_sizes_are_those_that_were_built_else_those_that_were_expected_and_survive_a_restart() -> None:
    farm = Scene()
    farm.play(submit("s", ["x", "y"], large(step("x", "h"), 2), large(step("y"), 3), held=["h"]))
    received = submit("t", ["z"], step("z", "k"), held=["k"])
    farm.play(replace(received, held_bytes=((StepKey("k"), GIB),)))
    farm.play(join("a", 9))
    farm.play(replace(built("x", "a"), output_bytes=7), built("y", "a"))

    def sizes(scene: Scene) -> dict[str, int]:
        return {key: each.output_bytes for key, each in scene.farm.state.steps.items()}

    assert sizes(farm) == {"x": 7, "y": 3 * GIB, "h": 0, "z": 0, "k": GIB}
    before = sizes(farm)
    farm.restart()
    assert sizes(farm) == before
    other = Scene()
    other.farm.replay(farm.farm.snapshot())
    assert sizes(other) == before


def test_every_step_goes_to_a_builder_that_should_end_it_first_by_a_count_of_its_own() -> None:
    """Steps at random over builders at random; what each has is counted here anew, by the order of what happened."""
    for seed in range(20):
        chance = random.Random(seed)
        slots = {f"b{number}": chance.randrange(1, 4) for number in range(chance.randrange(2, 6))}
        farm = Scene(Limits(lease_ttl_s=1e6))
        farm.play(*(join(name, count) for name, count in slots.items()))
        has: dict[str, set[str]] = {name: set() for name in slots}
        sizes: dict[str, int] = {}
        running: dict[str, str] = {}
        for number in range(40):
            name, needs = f"s{number}", chance.sample(sorted(sizes), min(len(sizes), chance.randrange(4)))
            free = [each for each in slots if list(running.values()).count(each) < slots[each]]
            spec = replace(step(name, *needs), output_bytes=chance.choice((0, 1000, LEAST_BYTES, GIB // 3, GIB)))
            farm.play(submit(name, [name], spec, held=needs))
            at = holders(farm)[name]
            counted = [need for need in needs if sizes[need] >= LEAST_BYTES]
            lacks = {each: sum(sizes[need] for need in counted if need not in has[each]) for each in free}
            assert lacks[at] / USUAL_RATE <= min(lacks.values()) / USUAL_RATE + WORTH_S
            has[at].update(counted)
            running[name] = at
            while running and (len(running) == sum(slots.values()) or chance.random() < 0.4):
                ended = chance.choice(sorted(running))
                farm.play(built(ended, running[ended]), published(ended))
                sizes[ended] = farm.farm.state.steps[StepKey(ended)].output_bytes
                has[running.pop(ended)].add(ended)
