"""Submissions take turns: nobody waits for the end of somebody else's mass rebuild, and positions say so."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import reasons as r
from scheduler.effects import StartBuild
from scheduler.events import PriorityAsked, SubmissionReceived
from scheduler.facts import SubmissionBumped
from scheduler.farm import Farm
from scheduler.invariants import check
from scheduler.model import FailureKind, Instant, StepKey, StepSpec, SubmissionId
from scheduler.policy import LongestPathFirst
from scheduler.ready import AGE_TURNS
from scheduler.terms import Terms
from tests.scheduler.kit import Scene, broke, builder, built, cancel, join, lease, step, submit


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


def owned(name: str, owner: str, count: int, *, priority: int = 0) -> SubmissionReceived:
    """A submission of steps that are all ready at once."""
    steps = [step(f"{name}-{number}") for number in range(count)]
    terms = Terms(owner=owner, priority=priority)
    return submit(name, [spec.key for spec in steps], *steps, terms=terms)


def weighted(**weights: int) -> Farm:
    return Farm(policy=LongestPathFirst(weights=weights))


def first_grants(farm: Farm, slots: int, count: int) -> list[str]:
    """Let builds end one after the other until so many are granted; return the owners' letters in order."""
    _, effects = farm.handle(join("b", slots), Instant(0))
    running = [effect for effect in effects if isinstance(effect, StartBuild)]
    order = list(running)
    while running and len(order) < count:
        ended = running.pop(0)
        _, effects = farm.handle(built(ended.lease.step, "b"), Instant(0))
        started = [effect for effect in effects if isinstance(effect, StartBuild)]
        order += started
        running += started
    return [effect.lease.step for effect in order[:count]]


@settings(deadline=None, max_examples=40)
@given(
    first=st.integers(1, 9),
    second=st.integers(1, 9),
    slots=st.integers(1, 4),
    submissions=st.integers(1, 6),
)
def test_owners_that_always_wait_get_leases_by_weight_however_many_submissions_they_have(
    first: int, second: int, slots: int, submissions: int
) -> None:
    farm = weighted(a=first, b=second)
    count = 10 * (first + second)
    for number in range(submissions):
        farm.handle(owned(f"a{number}", "a", count), Instant(0))
    farm.handle(owned("b0", "b", count), Instant(0))
    order = first_grants(farm, slots, count)
    for end in range(1, len(order) + 1):
        granted = sum(key.startswith("a") for key in order[:end])
        # Never more than a lease of each ahead or behind.
        assert abs(granted * second - (end - granted) * first) <= first + second
    check(farm.state)


@settings(deadline=None, max_examples=40)
@given(before=st.integers(0, 40), weight=st.integers(1, 4))
def test_a_newcomer_is_not_paid_back_for_time_in_which_it_did_not_wait(before: int, weight: int) -> None:
    farm = weighted(b=weight)
    farm.handle(owned("a", "a", 200), Instant(0))
    first_grants(farm, 1, before)
    farm.handle(owned("b", "b", 100), Instant(0))
    order = [key for key in first_grants(farm, 1, 12) if key not in {"a", "b"}]
    mine = sum(key.startswith("b") for key in order)
    assert mine <= 12 * weight // (weight + 1) + 1


@settings(deadline=None, max_examples=40)
@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=5), priorities=st.lists(st.integers(-5, 5), min_size=5))
def test_no_step_waits_for_ever_whatever_the_priorities(counts: list[int], priorities: list[int]) -> None:
    farm = weighted(o0=3)
    for number, count in enumerate(counts):
        farm.handle(owned(f"s{number}", f"o{number % 2}", count, priority=priorities[number]), Instant(0))
    assert len(first_grants(farm, 2, sum(counts))) == sum(counts)
    check(farm.state)


def test_a_higher_priority_goes_before_within_an_owner_and_takes_nothing_from_another() -> None:
    farm = weighted()
    for name, owner, priority in (("low", "a", 0), ("high", "a", 2), ("other", "b", 0)):
        farm.handle(owned(name, owner, 20, priority=priority), Instant(0))
    order = first_grants(farm, 1, 20)
    assert [key.split("-")[0] for key in order].count("other") == 10
    assert "low" not in {key.split("-")[0] for key in order}


def test_a_lower_priority_is_served_once_it_has_waited_for_long() -> None:
    farm = weighted()
    farm.handle(owned("low", "a", 2), Instant(0))
    farm.handle(owned("high", "a", 600, priority=1), Instant(0))
    order = first_grants(farm, 1, 602)
    assert order.index("low-0") <= AGE_TURNS + 1


def test_a_submission_that_is_bumped_goes_before_those_that_wait() -> None:
    scene = Scene()
    scene.play(owned("first", "a", 3))
    scene.play(owned("second", "a", 3))
    scene.play(PriorityAsked(SubmissionId("second")))
    scene.play(PriorityAsked(SubmissionId("second")))
    scene.play(PriorityAsked(SubmissionId("unknown"), 3))
    scene.restart()
    assert [key.split("-")[0] for key in first_grants(scene.farm, 1, 4)] == ["second"] * 3 + ["first"]
    assert [fact.priority for fact in scene.journal if isinstance(fact, SubmissionBumped)] == [1]


def test_a_queue_that_comes_late_to_a_builder_is_not_paid_back() -> None:
    farm = weighted()
    farm.handle(owned("a", "a", 200), Instant(0))
    first_grants(farm, 1, 50)
    farm.handle(submit("m", ["mac"], step("mac", system="darwin"), terms=Terms(owner="m")), Instant(0))
    farm.handle(owned("c", "c", 50), Instant(0))
    check(farm.state)
    farm.handle(join(builder("both", "linux", "darwin"), 1), Instant(0))
    assert len({queue.virtual for queue in farm.state.ready.queues.values()}) == 1
    check(farm.state)
