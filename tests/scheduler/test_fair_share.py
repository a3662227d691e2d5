"""Submissions take turns: nobody waits for the end of somebody else's mass rebuild, and positions say so."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from scheduler import reasons as r
from scheduler.effects import StartBuild
from scheduler.farm import Farm
from scheduler.invariants import check
from scheduler.model import FailureKind, Instant, StepKey, StepSpec
from tests.scheduler.kit import Scene, broke, built, cancel, join, lease, step, submit


def chains(name: str, depths: list[int]) -> tuple[list[str], list[StepSpec]]:
    """One ready step per depth, below a chain of that many others."""
    roots: list[str] = []
    steps: list[StepSpec] = []
    for number, depth in enumerate(depths):
        names = [f"{name}-{number}-{level}" for level in range(depth + 1)]
        roots.append(names[0])
        steps += [step(above, below) for above, below in pairwise(names)]
        steps.append(step(names[-1]))
    return roots, steps


def grants(farm: Farm, running: list[StartBuild]) -> list[StepKey]:
    """Let builds end one after the other until nothing is left; return the steps in the order of their grants."""
    order: list[StepKey] = []
    while running:
        ended = running.pop(0)
        _, effects = farm.handle(built(ended.lease.step, "b", ended.lease.attempt), Instant(1))
        started = [effect for effect in effects if isinstance(effect, StartBuild)]
        order += [effect.lease.step for effect in started]
        running += started
    return order


@given(
    masses=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=5),
    slots=st.integers(1, 4),
    before=st.integers(0, 12),
)
def test_a_submission_of_one_step_is_served_within_a_turn_of_each_other(
    masses: list[list[int]], slots: int, before: int
) -> None:
    farm = Farm()
    running: list[StartBuild] = []
    for number, depths in enumerate(masses):
        roots, steps = chains(f"mass{number}", depths)
        farm.handle(submit(f"mass{number}", roots, *steps), Instant(0))
    _, effects = farm.handle(join("b", slots), Instant(0))
    running += [effect for effect in effects if isinstance(effect, StartBuild)]
    for _ in range(before):
        if running:
            ended = running.pop(0)
            _, effects = farm.handle(built(ended.lease.step, "b"), Instant(0))
            running += [effect for effect in effects if isinstance(effect, StartBuild)]
    _, effects = farm.handle(submit("small", ["one"], step("one")), Instant(0))
    granted = [effect.lease.step for effect in effects if isinstance(effect, StartBuild)]
    while "one" not in granted:
        ended = running.pop(0)
        _, effects = farm.handle(built(ended.lease.step, "b"), Instant(0))
        running += [effect for effect in effects if isinstance(effect, StartBuild)]
        granted += [effect.lease.step for effect in effects if isinstance(effect, StartBuild)]
    assert granted.index(StepKey("one")) <= len(masses)


@given(
    masses=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=5),
    shared=st.integers(0, 3),
    slots=st.integers(1, 3),
)
def test_positions_are_the_order_of_grants(masses: list[list[int]], shared: int, slots: int) -> None:
    farm = Farm()
    common = [step(f"common-{number}") for number in range(shared)]
    for number, depths in enumerate(masses):
        roots, steps = chains(f"mass{number}", depths)
        roots += [spec.key for spec in common]
        farm.handle(submit(f"mass{number}", roots, *steps, *common), Instant(0))
    _, effects = farm.handle(join("b", slots), Instant(0))
    places: dict[StepKey, int] = {}
    for key in farm.state.steps:
        reason = farm.why(key, Instant(0))
        if isinstance(reason, r.BuildersFull):
            places[key] = reason.position
    order = grants(farm, [effect for effect in effects if isinstance(effect, StartBuild)])
    assert order == sorted(places, key=lambda key: places[key])
    assert sorted(places.values()) == list(range(1, len(places) + 1))


def test_a_step_that_is_retried_or_left_by_another_submission_keeps_its_lane() -> None:
    scene = Scene()
    scene.play(join("b"))
    scene.play(submit("s1", ["x", "y"], step("x"), step("y")), submit("s2", ["x", "z"], step("x"), step("z")))
    scene.play(broke("x", "b", FailureKind.RETURNED))
    scene.play(cancel("s1"))
    holder = next(item for item in scene.farm.state.steps.values() if item.builder)
    scene.play(built(holder.key, "b", holder.attempt))
    scene.play(submit("s1", ["y"], step("y"), again=True))
    keys = {holder.key}
    while busy := [item for item in scene.farm.state.steps.values() if item.state == "leased"]:
        keys.add(busy[0].key)
        scene.play(built(busy[0].key, "b", busy[0].attempt))
    assert keys >= {lease("x").step, lease("z").step}
    assert not any(queue.lanes for queue in scene.farm.state.ready.queues.values())


@given(
    shared=st.integers(1, 6),
    submissions=st.integers(1, 12),
    own=st.integers(0, 2),
    most=st.integers(1, 4),
    cancelled=st.sets(st.integers(0, 11)),
)
def test_what_a_grant_looks_at_does_not_grow_with_the_submissions_that_want_a_step(
    shared: int, submissions: int, own: int, most: int, cancelled: set[int]
) -> None:
    farm = Farm()
    farm.state.shares.most = most
    common = [step(f"common-{number}") for number in range(shared)]
    for number in range(submissions):
        mine = [step(f"own-{number}-{each}") for each in range(own)]
        names = [spec.key for spec in (*common, *mine)]
        farm.handle(submit(f"s{number}", names, *common, *mine), Instant(0))
    for number in cancelled:
        if number < submissions - 1:
            farm.handle(cancel(f"s{number}"), Instant(0))
    check(farm.state)
    wanted = {item for item in farm.state.steps.values() if item.queue is not None}
    assert all(len(item.owners) <= most for item in wanted)
    lanes = [lane for queue in farm.state.ready.queues.values() for lane in queue.lanes.values()]
    assert len(lanes) <= most
    # One entry for each step in each lane, however often it was submitted; stale ones are of what was cancelled.
    assert all(len(lane.heap) == len(set(lane.heap)) for lane in lanes)
    _, effects = farm.handle(join("b", 2), Instant(0))
    running = [effect for effect in effects if isinstance(effect, StartBuild)]
    order = [effect.lease.step for effect in running] + grants(farm, running)
    assert sorted(order) == sorted(item.key for item in wanted)
    check(farm.state)
    assert not any(queue.lanes for queue in farm.state.ready.queues.values())
