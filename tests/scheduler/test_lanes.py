"""Lanes of ready steps lose what is stale piece by piece, and keep what stands."""

from __future__ import annotations

from scheduler import facts as f
from scheduler.events import ResultsHeld, WorksEstimated
from scheduler.model import NO_INSTANT, StepKey
from scheduler.pauses import PIECE
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
