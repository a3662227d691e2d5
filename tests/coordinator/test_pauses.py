"""No event, however many steps it concerns, keeps core or read model busy for long between two pauses.

Busy is counted in lines of Python that ran, some 50 ns each, and not in seconds: a slow machine changes nothing. What
concerns all steps of the graph here runs some hundred thousand lines, several times the bound.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from coordinator.readmodel.views import Views
from scheduler import events as e
from scheduler.facts import Fact, StepFellBack
from scheduler.farm import Farm
from scheduler.model import (
    BuilderId,
    BuilderSpec,
    Failure,
    FailureKind,
    Instant,
    LeaseId,
    Recipe,
    Requirements,
    StepKey,
    StepSpec,
    SubmissionId,
)
from scheduler.policy import Limits
from scheduler.reasons import PLACED_AT_MOST, BuildersFull
from tests.coordinator.test_views import Silent

#: Steps that stand on one, and are the roots.
WIDE = 1_500
#: Lines between two pauses: some 2 ms here.
LINES = 40_000
#: Lines of one question for a step's place in its queue: some 8 ms here.
LINES_OF_A_PLACE = 100_000
GIVE_UP_S = 100.0

ORIGIN, HELD, BUILDER = StepKey("origin"), StepKey("held"), BuilderId("b")
TOPS = tuple(StepKey(f"top-{number}") for number in range(WIDE))
NEEDS = Requirements("sys")
STEPS = (
    StepSpec(ORIGIN, (Recipe(NEEDS, ()),)),
    *(StepSpec(top, (Recipe(NEEDS, (ORIGIN, HELD)),)) for top in TOPS),
)

#: Steps that stand on each of those.
ROOFS = tuple(StepKey(f"roof-{number}") for number in range(WIDE))
ROOF_STEPS = tuple(StepSpec(roof, (Recipe(NEEDS, (top,)),)) for roof, top in zip(ROOFS, TOPS, strict=True))


class Metered:
    """A farm and its views; counts the lines of each piece of work of what it is told."""

    def __init__(self) -> None:
        self.farm = Farm(Limits(give_up_s=GIVE_UP_S))
        self.views = Views(Silent())
        self.now = 0.0
        #: Event -> lines of the longest piece, and of all.
        self.longest: dict[str, int] = {}
        self.total: dict[str, int] = {}

    def tell(self, name: str, *events: e.Event, later_s: float = 1.0) -> list[Fact]:
        self.now += later_s
        facts: list[Fact] = []

        def call() -> Iterator[object]:
            found, _ = yield from self.farm.handling(events, Instant(self.now))
            facts.extend(found)

        for what, work in (("core", call()), ("views", self.views.folding(facts))):
            pieces = list(lines_of_pieces(work))
            self.longest[f"{name}: {what}"] = max(pieces)
            self.total[f"{name}: {what}"] = sum(pieces)
        return facts


def lines_of_pieces(work: Iterator[object]) -> Iterator[int]:
    lines = 0

    def count(_frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    going_on = True
    while going_on:
        before = sys.gettrace()
        sys.settrace(count)
        try:
            next(work)
        except StopIteration:
            going_on = False
        finally:
            sys.settrace(before)
        yield lines
        lines = 0


def submission(name: str, **how: Any) -> e.SubmissionReceived:
    return e.SubmissionReceived(SubmissionId(name), TOPS, STEPS, (HELD,), **how)


@pytest.fixture(scope="module")
def metered() -> Metered:
    """The life of a mass rebuild, with everything in it that concerns all its steps at once."""
    metered = Metered()
    builder = BuilderSpec(BUILDER, "1", frozenset({"sys"}))
    metered.tell("submitted", submission("first"))
    metered.tell("submitted by another one", submission("second"))
    metered.tell("cancelled", e.SubmissionCancelled(SubmissionId("first")))
    metered.tell("cancelled by all", e.SubmissionCancelled(SubmissionId("second")))
    metered.tell("submitted anew", submission("third"))
    metered.tell("a builder joins", e.BuilderJoined(builder, 1))
    failure = Failure(FailureKind.PERMANENT, "exit status 1")
    metered.tell("all are doomed", e.BuildFailed(LeaseId(ORIGIN, 1), BUILDER, failure))
    metered.tell("submitted and known to fail", submission("fourth"))
    metered.tell("run again", submission("third", again=True, retry_failed=True))
    metered.tell("built", e.BuildSucceeded(LeaseId(ORIGIN, 2), BUILDER, b""))
    # It is given none of the steps that wait, so that what is lost comes first.
    metered.tell("the builder drains", e.BuilderReported(BUILDER, "1", 1, draining=True))
    metered.tell("all are ready", e.OutputsPublished(LeaseId(ORIGIN, 2)))
    metered.tell("a need of all is lost", submission("third", replanned=True))
    metered.tell("the builder is back", e.BuilderReported(BUILDER, "1", 1))
    metered.tell("built again", e.BuildSucceeded(LeaseId(ORIGIN, 3), BUILDER, b""))
    metered.tell("all are ready again", e.OutputsPublished(LeaseId(ORIGIN, 3)))
    metered.tell("no builder is left", e.BuilderLost(BUILDER, "1", "gone"))
    metered.tell("the first are given up", e.TimePassed(), later_s=GIVE_UP_S + 1)
    for number in range(WIDE // 1000 + 1):
        metered.tell(f"more are given up, {number}", e.TimePassed())
    metered.tell("opened", e.SubmissionReceived(SubmissionId("open"), (), (), open=True))
    metered.tell("grown by all", e.SubmissionGrown(SubmissionId("open"), TOPS, STEPS, (HELD,), retry_failed=True))
    metered.tell("grown on top of all", e.SubmissionGrown(SubmissionId("open"), ROOFS, ROOF_STEPS))
    metered.tell("sealed", e.SealAsked(SubmissionId("open")))
    metered.tell("all are held", e.SubmissionReceived(SubmissionId("fifth"), TOPS, STEPS, (*TOPS, HELD)))
    metered.tell("the roofs are held", e.SubmissionReceived(SubmissionId("sixth"), ROOFS, (), ROOFS))
    for name in ("first", "second", "third", "fourth", "fifth", "sixth", "open"):
        metered.tell(f"{name} is forgotten", e.SubmissionExpired(SubmissionId(name)))
    assert not metered.farm.state.steps
    assert not metered.views.step_total()
    return metered


def test_nothing_is_busy_for_long_between_two_pauses(metered: Metered) -> None:
    assert {name: lines for name, lines in metered.longest.items() if lines > LINES} == {}


def test_the_bound_is_no_matter_of_course(metered: Metered) -> None:
    """Without pauses many of these events would break it."""
    assert sum(lines > LINES for lines in metered.total.values()) >= 20


@pytest.mark.parametrize(("wide", "deep"), [(600, 30), (60, 300)])
def test_edges_count_where_few_steps_have_very_many(wide: int, deep: int) -> None:
    """Each of `wide` steps stands on the same `deep` ones: few steps, and some ten thousand edges."""
    metered = Metered()
    hubs = tuple(StepKey(f"hub-{number}") for number in range(deep))
    tops = tuple(StepKey(f"top-{number}") for number in range(wide))
    steps = (
        *(StepSpec(hub, (Recipe(NEEDS, ()),)) for hub in hubs),
        *(StepSpec(top, (Recipe(NEEDS, hubs),)) for top in tops),
    )
    metered.tell("submitted", e.SubmissionReceived(SubmissionId("first"), tops, steps, ()))
    metered.tell("submitted again", e.SubmissionReceived(SubmissionId("second"), tops, steps, ()))
    metered.tell("cancelled", e.SubmissionCancelled(SubmissionId("second")))
    metered.tell("a builder joins", e.BuilderJoined(BuilderSpec(BUILDER, "1", frozenset({"sys"})), 1))
    failure = Failure(FailureKind.PERMANENT, "exit status 1")
    metered.tell("all are doomed", e.BuildFailed(LeaseId(hubs[0], 1), BUILDER, failure))
    again = e.SubmissionReceived(SubmissionId("first"), tops, steps, (), again=True, retry_failed=True)
    metered.tell("run again", again)
    metered.tell("cancelled by all", e.SubmissionCancelled(SubmissionId("first")))
    for name in ("first", "second"):
        metered.tell(f"{name} is forgotten", e.SubmissionExpired(SubmissionId(name)))
    assert not metered.farm.state.steps
    assert {name: lines for name, lines in metered.longest.items() if lines > LINES} == {}


@pytest.mark.parametrize(
    ("steps", "submissions"), [(20_000, 1), (PLACED_AT_MOST, 1), (PLACED_AT_MOST // 20, 20), (700, 60)]
)
def test_the_place_of_one_step_in_a_queue_is_no_matter_of_the_queues_length(steps: int, submissions: int) -> None:
    """It is read while a view is rendered, in one piece; the lanes of many submissions hold the same steps."""
    farm = Farm()
    graph = tuple(StepSpec(StepKey(f"step-{number}"), (Recipe(NEEDS, ()),)) for number in range(steps))
    roots = tuple(spec.key for spec in graph)
    for number in range(submissions):
        farm.handle(e.SubmissionReceived(SubmissionId(f"s{number}"), roots, graph), Instant(1))
    farm.handle(e.BuilderJoined(BuilderSpec(BUILDER, "1", frozenset({"sys"})), 1), Instant(2))
    reasons = []

    def asking() -> Iterator[None]:
        reasons.append(farm.why(roots[-1], Instant(3)))
        yield

    assert max(lines_of_pieces(asking())) <= LINES_OF_A_PLACE
    [reason] = reasons
    assert isinstance(reason, BuildersFull)
    assert reason.ready == steps - 1
    assert reason.position == (reason.ready if steps * submissions <= PLACED_AT_MOST else 0)


def test_a_fall_back_looks_at_all_that_is_below_it_with_pauses() -> None:
    """Both ways: a recipe that leads back to its step is passed over, the next one is good."""
    metered = Metered()
    low = tuple(StepKey(f"low-{number}") for number in range(6 * WIDE))
    broken, other, top, back, hub = (StepKey(name) for name in ("broken", "other", "top", "back", "hub"))
    recipes = (Recipe(NEEDS, (broken,)), Recipe(NEEDS, (back,)), Recipe(NEEDS, (hub,)))
    steps = (
        *(StepSpec(key, (Recipe(NEEDS, (before,)),)) for before, key in itertools.pairwise((*low, hub))),
        StepSpec(low[0], (Recipe(NEEDS, ()),)),
        *(StepSpec(key, (Recipe(NEEDS, ()),)) for key in (broken, other)),
        StepSpec(back, (Recipe(NEEDS, (hub, top)),)),
        StepSpec(top, recipes),
    )
    metered.tell("submitted", e.SubmissionReceived(SubmissionId("first"), (top, back), steps))
    metered.tell("a builder joins", e.BuilderJoined(BuilderSpec(BUILDER, "1", frozenset({"sys"})), 2))
    failure = Failure(FailureKind.PERMANENT, "exit status 1")
    facts = metered.tell("a need fails", e.BuildFailed(LeaseId(broken, 1), BUILDER, failure))
    assert [(fact.step, fact.recipe) for fact in facts if isinstance(fact, StepFellBack)] == [(top, 2)]
    assert metered.total["a need fails: core"] > LINES
    assert {name: lines for name, lines in metered.longest.items() if lines > LINES} == {}
