"""When a submission ends and what bounds that: the arithmetic, over graphs of every shape."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.readmodel.estimate import PATH_NAMED, BuildPace, Estimate, Expected, Outlook, estimating, rest_of
from scheduler.model import Requirements
from scheduler.pauses import Pause, whole
from tests.coordinator.test_pauses import LINES, lines_of_pieces

LINUX, DARWIN = Requirements("x86_64-linux"), Requirements("aarch64-darwin")
ME, OTHER = "me", "other"


@dataclass(eq=False)
class Step:
    """A step of a made-up graph; `seconds` None: it has no history."""

    name: str
    seconds: float | None = 1.0
    needs: tuple[Step, ...] = ()
    kind: Requirements = LINUX
    holders: tuple[str, ...] = (ME,)
    depth: int = field(default=0)

    def __post_init__(self) -> None:
        todo = [(need, 1) for need in self.needs]
        while todo:
            step, depth = todo.pop()
            if step.depth < depth:
                step.depth = depth
                todo += [(need, depth + 1) for need in step.needs]


def look(step: Step) -> Outlook[str]:
    rest = None if step.seconds is None else Expected(step.seconds, step.seconds)
    return Outlook(step.holders, step.kind, rest)


def working(steps: list[Step], slots: Mapping[Requirements, int]) -> Generator[Pause, None, dict[str, Estimate[Step]]]:
    return estimating(steps, look, lambda kind: slots.get(kind, 0), (ME, "somebody without open steps"))


def estimate(steps: list[Step], linux: int = 2, darwin: int = 1) -> Estimate[Step]:
    return whole(working(steps, {LINUX: linux, DARWIN: darwin}))[ME]


def chain(*seconds: float | None) -> list[Step]:
    steps: list[Step] = []
    for number, each in enumerate(seconds):
        steps.append(Step(f"s{number}", each, tuple(steps[-1:])))
    return steps


def test_a_chain_ends_after_the_sum_of_its_steps_however_many_workers_there_are() -> None:
    for slots in (1, 2, 100):
        found = estimate(chain(5, 60, 7), linux=slots)
        assert (found.sooner_s, found.bound) == (72, "path")
        assert found.later_s == pytest.approx(72)
        assert ([step.name for step in found.path], found.path_s, found.path_steps) == (["s0", "s1", "s2"], 72, 3)


def test_steps_beside_each_other_are_bounded_by_the_workers_of_their_kind() -> None:
    found = estimate([Step(f"s{number}", 10) for number in range(20)], linux=4)
    assert (found.sooner_s, found.bound, found.bound_kind) == (50, "capacity", LINUX)
    assert found.later_s == pytest.approx(57.5)


def test_a_kind_that_nothing_builds_has_no_end_and_is_named() -> None:
    found = estimate([*chain(5, 60), Step("d", 1, kind=DARWIN)], darwin=0)
    assert (found.later_s, found.bound, found.bound_kind) == (None, "no_worker", DARWIN)
    assert found.sooner_s == 65


def test_what_has_no_history_counts_nothing_at_least_and_as_the_others_at_most() -> None:
    found = estimate(chain(10, None, 20), linux=1)
    assert (found.sooner_s, found.unknown) == (30, 1)
    assert found.later_s == pytest.approx(45)
    found = estimate(chain(None, None))
    assert (found.sooner_s, found.later_s, found.bound, found.unknown) == (0, None, "unknown", 2)
    # The longest way there is still named: that is what can be said of it.
    assert [step.name for step in found.path] == ["s0", "s1"]


def test_others_take_their_turns_and_no_more() -> None:
    mine = [Step(f"m{number}", 10) for number in range(4)]
    alone = estimate(mine, linux=1)
    others = [Step(f"o{number}", 1000, holders=(OTHER,)) for number in range(50)]
    beside = estimate([*mine, *others], linux=1)
    assert alone.later_s == pytest.approx(40)
    assert beside.sooner_s == 40
    assert beside.later_s == pytest.approx(80)
    assert (beside.loads[0].holders, beside.steps) == (2, 4)
    few = estimate([*mine, Step("o", 5, holders=(OTHER,))], linux=1)
    assert few.later_s == pytest.approx(45)
    # What both want is done once.
    shared = estimate([Step(f"m{number}", 10, holders=(ME, OTHER)) for number in range(4)], linux=1)
    assert shared.later_s == pytest.approx(40)


KINDS = st.sampled_from([LINUX, DARWIN])
SECONDS = st.one_of(st.none(), st.integers(0, 100_000).map(float))


@st.composite
def graphs(draw: st.DrawFn) -> list[Step]:
    steps: list[Step] = []
    for number in range(draw(st.integers(1, 12))):
        needs = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set[int]()
        holders = draw(st.sampled_from([(ME,), (ME, OTHER)]))
        steps.append(Step(str(number), draw(SECONDS), tuple([steps[need] for need in needs]), draw(KINDS), holders))
    others = draw(st.integers(0, 3))
    return [*steps, *(Step(f"other {number}", draw(SECONDS), (), draw(KINDS), (OTHER,)) for number in range(others))]


def longest(step: Step) -> float:
    return (step.seconds or 0.0) + max(map(longest, step.needs), default=0.0)


@given(graphs(), st.integers(1, 5), st.integers(1, 5))
def test_the_bounds_are_ordered_and_no_end_is_sooner_than_the_longest_path(
    steps: list[Step], linux: int, darwin: int
) -> None:
    found = estimate(steps, linux, darwin)
    mine = [step for step in steps if ME in step.holders]
    assert found.sooner_s >= max(map(longest, mine)) * (1 - 1e-9)
    for kind, slots in ((LINUX, linux), (DARWIN, darwin)):
        work = sum(step.seconds or 0.0 for step in mine if step.kind == kind)
        assert found.sooner_s >= work / slots * (1 - 1e-9)
    assert (found.later_s is None) == (found.unknown == found.steps == len(mine))
    if found.later_s is not None:
        assert found.later_s >= found.sooner_s >= 0
        assert found.later_s >= found.path_s * (1 - 1e-9)
    # Each step of the path needs the one before it.
    assert all(before in after.needs for before, after in zip(found.path, found.path[1:], strict=False))


@given(graphs(), st.integers(1, 5), st.integers(1, 5), KINDS)
def test_one_more_slot_makes_nothing_later(steps: list[Step], linux: int, darwin: int, kind: Requirements) -> None:
    before = estimate(steps, linux, darwin)
    after = estimate(steps, linux + (kind == LINUX), darwin + (kind == DARWIN))
    assert after.sooner_s <= before.sooner_s * (1 + 1e-9)
    if before.later_s is not None:
        assert after.later_s is not None
        assert after.later_s <= before.later_s * (1 + 1e-9)


@given(graphs(), st.data())
def test_a_step_that_takes_longer_makes_nothing_sooner(steps: list[Step], data: st.DataObject) -> None:
    before = estimate(steps)
    known = [step for step in steps if step.seconds is not None]
    if not known:
        return
    longer = data.draw(st.sampled_from(known))
    longer.seconds = (longer.seconds or 0.0) * 2 + 1
    after = estimate(steps)
    assert after.sooner_s >= before.sooner_s * (1 - 1e-9)
    if before.later_s is not None:
        assert after.later_s is not None
        assert after.later_s >= before.later_s * (1 - 1e-9)


@pytest.mark.parametrize("shape", ["deep", "wide", "many submissions"])
def test_no_shape_of_a_graph_is_worked_on_for_long_between_two_pauses(shape: str) -> None:
    """A path of 20,000 steps, 300,000 edges, and steps that 2,000 submissions want in turn."""
    if shape == "deep":
        steps = [Step("s0")]
        for number in range(1, 20_000):
            steps.append(Step.__new__(Step))
            steps[-1].__dict__.update(vars(steps[0]) | {"needs": (steps[-2],), "depth": -number})
    elif shape == "wide":
        hubs = [Step(f"hub {number}") for number in range(60)]
        steps = [*hubs, *(Step(f"top {number}", 1.0, tuple(hubs)) for number in range(5_000))]
    else:
        names = [f"submission {number}" for number in range(2_000)]
        steps = [Step(f"s{number}", 1.0, holders=(ME, *names[: number + 1])) for number in range(2_000)]
    pieces = list(lines_of_pieces(working(steps, {LINUX: 2})))
    assert max(pieces) < LINES
    assert sum(pieces) > LINES
    found = whole(working(steps, {LINUX: 2}))[ME]
    assert len(found.path) == min(found.path_steps, PATH_NAMED)


def test_a_step_takes_by_the_speed_of_its_worker_less_what_it_has_run_and_once_more_where_it_is_late() -> None:
    assert rest_of(None, 2.0, 5.0) == (None, False)
    assert rest_of(Expected(10, 20), 2.0, None) == (Expected(5, 10), False)
    assert rest_of(Expected(10, 20), 0.5, 30.0) == (Expected(0, 10), False)
    assert rest_of(Expected(10, 20), 0.5, 41.0) == (Expected(0, 40), True)
    pace = BuildPace.of([(4, 0.5), (1, 2.0), (0, 9.0)])
    assert (pace.slots, pace.mean, pace.fastest, pace.lead) == (5, 0.8, 2.0, 0.4)
    assert BuildPace.of([(0, 2.0)]) == BuildPace()


def test_the_fastest_worker_may_end_a_path_sooner_and_an_unknown_step_may_take_as_long_as_the_longest() -> None:
    steps = chain(10, None, 20)
    found = whole(estimating(steps, look, lambda _: 1, (ME,), lead=lambda _: 0.5, surprise=lambda count: 100.0 * count))
    # The only slot has 30 s of work.
    assert found[ME].sooner_s == 30
    assert found[ME].later_s == pytest.approx(145)
    found = whole(estimating(steps, look, lambda _: 9, (ME,), lead=lambda _: 0.5))
    assert found[ME].sooner_s == 15
