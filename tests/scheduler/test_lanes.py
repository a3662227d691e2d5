"""Lanes of ready steps lose what is stale piece by piece, and keep what stands."""

from __future__ import annotations

from itertools import pairwise

from scheduler import facts as f
from scheduler.events import ResultsHeld, WorksEstimated
from scheduler.model import NO_INSTANT, StepKey
from scheduler.pauses import PIECE
from scheduler.ready import FEW_STALE
from tests.scheduler.kit import Scene, cancel, join, step, submit

MANY = 3 * PIECE
KEYS = tuple(StepKey(f"k{number}") for number in range(MANY))


def crowd(*names: str) -> Scene:
    """Let submissions want many ready steps, which no builder takes yet."""
    scene = Scene()
    for name in names:
        scene.play(submit(name, KEYS, *(step(key) for key in KEYS), asked_at=0.0))
    return scene


def entries(scene: Scene) -> list[int]:
    ready = scene.farm.state.ready
    return [len(lane.heap) for queue in ready.queues.values() for lane in queue.lanes.values()]


def test_works_that_are_revised_again_and_again_leave_no_more_stale_entries_than_steps() -> None:
    scene = crowd("a")
    pauses = 0
    for seconds in range(1, 6):
        works = tuple((key, 1000 * seconds + number) for number, key in enumerate(KEYS))
        pauses = sum(1 for _ in scene.farm.handling((WorksEstimated(works),), NO_INSTANT))
        assert entries(scene)[0] <= 3 * MANY
    assert entries(scene) == [MANY]
    assert pauses > MANY / PIECE
    facts, _ = scene.play(join("b", 1))
    assert [fact.lease.step for fact in facts if isinstance(fact, f.StepLeased)] == [KEYS[-1]]


def test_steps_that_leave_from_anywhere_take_their_entries_with_them_in_time() -> None:
    scene = crowd("a")
    scene.play(ResultsHeld(tuple(key for number, key in enumerate(KEYS) if number % 8)))
    standing = len(KEYS[::8])
    assert scene.farm.state.ready.queues[next(iter(scene.farm.state.ready.queues))].standing == standing
    assert entries(scene)[0] <= 3 * standing
    facts, _ = scene.play(join("b", MANY))
    assert {fact.lease.step for fact in facts if isinstance(fact, f.StepLeased)} == set(KEYS[::8])


def test_the_lane_of_a_submission_that_ends_is_freed_piece_by_piece() -> None:
    scene = crowd("a", "b")
    ready = scene.farm.state.ready
    scene.play(cancel("a"))
    left = [len(heap) for heap in ready.discarded]
    assert left == [MANY - PIECE]
    for key in KEYS[:2]:
        scene.play(ResultsHeld((key,)))
    assert ready.discarded == []
    assert entries(scene) == [MANY - 2]


def test_what_is_stale_under_a_top_that_leaves_is_dropped_piece_by_piece() -> None:
    scene = crowd("a")
    gone = (*reversed(KEYS[1:-1]), KEYS[0])
    sizes = [MANY]
    for _ in scene.farm.handling((ResultsHeld(gone),), NO_INSTANT):
        sizes += entries(scene)
    sizes += entries(scene)
    assert sizes[-1] == 1
    assert max(before - after for before, after in pairwise(sizes)) <= 2 * PIECE
    facts, _ = scene.play(join("b", 1))
    assert [fact.lease.step for fact in facts if isinstance(fact, f.StepLeased)] == [KEYS[-1]]


def test_a_lane_whose_top_is_stale_within_one_fact_keeps_its_entries_until_they_are_looked_through() -> None:
    # They leave in this order. The first 33 lie too deep to be dropped at once, the next are the top one after another
    # until only what left before lies there, and the least urgent are the last.
    urgency = [*range(100, 166), *range(199, 165, -1), *range(1, FEW_STALE + 2)]
    keys = KEYS[: len(urgency)]
    above = [step(key, "base") for key in keys]
    scene = Scene()
    scene.play(
        submit("a", keys, step("base", system="aarch64-linux"), *above, asked_at=0.0),
        submit("b", ["other"], step("other")),
    )
    order = [each.key for each in scene.farm.state.steps[StepKey("base")].dependents]
    scene.play(WorksEstimated(tuple((key, 1000 * each) for key, each in zip(order, urgency, strict=True))))
    scene.play(ResultsHeld((StepKey("base"),)))
    assert sorted(entries(scene)) == [1, len(keys)]
    scene.now = 10.0
    facts, _ = scene.play(submit("c", ["base"], step("base", system="aarch64-linux"), asked_at=10.0))
    assert f.StepLost(StepKey("base")) in facts
    facts, _ = scene.play(join("b", 4))
    assert {fact.lease.step for fact in facts if isinstance(fact, f.StepLeased)} == {"other"}
