"""Timings of attempts: folded from facts alike live and replayed, and straight however wrong a worker's clock is."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.journal.codec import decode_facts
from coordinator.readmodel.clock_offsets import ClockOffset, sample_of
from coordinator.readmodel.timeline import Timelines
from coordinator.readmodel.views import Views
from coordinator.stores.timings import AttemptTiming
from scheduler.facts import LeaseRevoked, StepAdded, StepLeased
from scheduler.farm import Farm
from scheduler.model import (
    BuilderId,
    Failure,
    FailureKind,
    Instant,
    LeaseId,
    Recipe,
    Requirements,
    StepKey,
    StepSpec,
)
from workers.wire.measures import BuildPhase, InputFetch, Measures, Span
from workers.wire.messages import Failed, Report, Stage, StageChange

from .test_views import _EVENTS, DrivenViews, Silent, _one

Rows = dict[tuple[str, int], AttemptTiming]


def rows_of(views: Views) -> Rows:
    """All attempts of a read model whose timings nobody takes."""
    return {(row.step, row.attempt): row for row in views.timelines.take(10**6)}


@settings(max_examples=40, deadline=None)
@given(events=_EVENTS)
def test_live_and_replayed_facts_give_the_same_timing_of_every_attempt_and_its_times_are_in_order(
    events: list[tuple[str, int]],
) -> None:
    driven = DrivenViews()
    for what, number in (("join", 0), ("submit", 1), *events):
        _one(driven, what, number)
    live = rows_of(driven.views)
    replayed, core = Views(Silent()), Farm()
    for frame in driven.frames:
        replayed.fold(core.replaying(decode_facts(frame)))
    again = rows_of(replayed)
    # When a step became ready is no durable fact: a replay knows the newest time before it.
    assert {key: replace(row, ready_at=None) for key, row in again.items()} == {
        key: replace(row, ready_at=None) for key, row in live.items()
    }
    leases = {(s.key, s.attempt) for s in driven.farm.state.steps.values() if s.attempt}
    assert leases <= live.keys()
    for key, row in live.items():
        times = [row.submitted_at, row.ready_at, row.leased_at, row.built_at, row.ended_at]
        known = [time for time in times if time is not None]
        assert known == sorted(known), row
        assert row.worker
        assert None not in times[:3], row
        open_ = driven.views.timelines.open_of(key[0])
        if open_ is None or open_.attempt != key[1]:
            assert row.outcome is not None
            assert row.ended_at is not None


def report(now: float, offset: float, *, leased: float) -> Report:
    """Return the report of a lease by an agent whose clock is `offset` before the coordinator's."""
    away = leased - offset
    return Report(
        step="s",
        attempt=1,
        started_at=away + 1,
        building_at=away + 3,
        built_at=away + 9,
        ended_at=now - offset,
        result=Failed(reason="permanent", message="no"),
        measures=Measures(
            spans=(Span(name="inputs", at=away + 1, took_s=2.0), Span(name="build", at=away + 3, took_s=6.0)),
            phases=(BuildPhase(name="buildPhase", at=away + 4, took_s=5.0),),
            fetches=(InputFetch(path="/nix/store/x", source="cache", nar_bytes=7, at=away + 1, took_s=1.5),),
            cpu_s=5.5,
        ),
    )


@settings(max_examples=60, deadline=None)
@given(
    offset=st.floats(-900.0, 900.0),
    jump=st.one_of(st.just(0.0), st.floats(-900.0, 900.0)),
    trips=st.lists(st.tuples(st.floats(0.0, 0.3), st.floats(0.0, 0.3), st.floats(0.0, 10.0)), min_size=1, max_size=40),
)
def test_a_clock_that_is_off_or_jumps_bends_no_timeline(
    offset: float, jump: float, trips: list[tuple[float, float, float]]
) -> None:
    """The agent's clock is the coordinator's less `offset`, and jumps by `jump` in the middle of the polls."""
    clock, now, smallest = ClockOffset(), 10_000.0, 1.0
    for number, (there, back, waited) in enumerate(trips):
        if number == len(trips) // 2:
            offset, smallest = offset + jump, 1.0
        received, answered = now + there - offset, now + there + waited - offset
        arrived = now + there + waited + back
        clock.add(sample_of(now, arrived, received, answered))
        smallest = min(smallest, (there + back) / 2)
        now = arrived + 0.1
    timelines = Timelines()
    leased = now
    timelines.leased("s", 1, 0, "w", leased, leased, leased)
    now = leased + 10.0
    timelines.reported("w", report(now, offset, leased=leased), now, clock.here)
    [row] = timelines.take(10)
    assert row.measured is not None
    [inputs, build] = row.measured.spans
    # A small jump may hide in the round trips of the polls: it is then no larger than these.
    wrong = smallest + (0.0 if abs(jump) > 1.0 else abs(jump)) + 0.05
    assert inputs[1] == pytest.approx(leased + 1, abs=wrong)
    assert build[1] == pytest.approx(leased + 3, abs=wrong)
    assert [took for _, _, took in row.measured.spans] == [2.0, 6.0]
    assert row.build_s == 6.0
    for _, at, took in (*row.measured.spans, *row.measured.phases):
        assert leased <= at <= at + took <= now


@settings(max_examples=100, deadline=None)
@given(offset=st.floats(-900.0, 900.0), asleep=st.floats(-900.0, 900.0), when=st.floats(0.5, 9.5))
def test_a_clock_that_jumps_in_the_middle_of_a_build_bends_no_duration_and_turns_no_order(
    offset: float, asleep: float, when: float
) -> None:
    """The worker's machine sleeps in its build (its clock falls behind); below 0 the coordinator's does.

    A clock of either only adds monotonic time, so this is how they come to jump against each other.
    """
    clock, leased = ClockOffset(), 10_000.0

    def here(awake: float) -> float:
        return leased + awake + (max(0.0, asleep) if awake >= when else 0.0)

    def away(awake: float) -> float:
        return leased - offset + awake + (max(0.0, -asleep) if awake >= when else 0.0)

    for second in range(-5, 11):
        clock.add(sample_of(here(second), here(second) + 0.002, away(second + 0.001), away(second + 0.001)))
    timelines = Timelines()
    timelines.leased("s", 1, 0, "w", leased, leased, leased)
    stretches = (("inputs", 1.0, 2.0), ("build", 3.0, 4.0), ("pack", 7.0, 1.0), ("upload", 8.0, 2.0))
    inside = (("unpackPhase", 3.5, 0.5), ("buildPhase", 4.0, 3.0))
    measures = Measures(
        spans=tuple(Span(name=name, at=away(at), took_s=took) for name, at, took in stretches),
        phases=tuple(BuildPhase(name=name, at=away(at), took_s=took) for name, at, took in inside),
    )
    sent = report(leased + 10.0, 0.0, leased=leased).model_copy(
        update={"building_at": away(3.0), "built_at": away(7.0), "measures": measures}
    )
    now = here(10.0) + 0.5
    timelines.reported("w", sent, now, clock.here)
    [row] = timelines.take(9)
    assert row.measured is not None
    assert row.build_s == 4.0
    for found, true in ((row.measured.spans, stretches), (row.measured.phases, inside)):
        assert [(name, took) for name, _, took in found] == [(name, took) for name, _, took in true]
        for (_, at, took), (_, following, _) in pairwise(found):
            assert leased <= at <= at + took <= following + 1e-6
        assert found[-1][1] + found[-1][2] <= now + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    at=st.one_of(st.floats(), st.floats(-1e12, 1e12)),
    took=st.one_of(st.floats(), st.floats(-1e6, 1e6)),
    count=st.integers(-(2**70), 2**70),
)
def test_times_and_bytes_that_a_worker_reports_stay_inside_its_lease_and_can_be_stored(
    at: float, took: float, count: int
) -> None:
    timelines = Timelines()
    timelines.leased("s", 1, 0, "w", 100.0, 90.0, 95.0)
    wild = report(200.0, 0.0, leased=100.0)
    assert wild.measures is not None
    measures = wild.measures.model_copy(
        update={
            "spans": (Span(name="build", at=at, took_s=took),),
            "phases": (BuildPhase(name="p", at=at, took_s=took, line=count), BuildPhase(name="q", at=at, took_s=took)),
            "fetches": (InputFetch(path="/nix/store/x", source="cache", nar_bytes=count, at=at, took_s=took),),
            "peak_memory_bytes": count,
            "cpu_s": took,
            "more_fetches_bytes": count,
        }
    )
    timelines.reported("w", wild.model_copy(update={"measures": measures}), 200.0, lambda away: away)
    [row] = timelines.take(1)
    assert row.measured is not None
    for _, began, lasted in (*row.measured.spans, *row.measured.phases):
        assert 100.0 <= began <= began + lasted <= 200.0 + 1e-6
    assert all(0 < line < 2**60 for line, _ in row.measured.landmarks)
    assert row.peak_memory_bytes is None or 0 <= row.peak_memory_bytes < 2**60
    assert row.cpu_s is None or row.cpu_s >= 0


def test_phases_are_landmarks_of_the_log_where_their_lines_are_known_and_rise() -> None:
    timelines = Timelines()
    timelines.leased("s", 1, 0, "w", 100.0, 90.0, 95.0)
    found = report(200.0, 0.0, leased=100.0)
    assert found.measures is not None
    lines = {"a": 1, "b": 7, "back": 3, "cut": 0, "c": 8}
    phases = tuple(BuildPhase(name=name, at=104.0, took_s=1.0, line=line) for name, line in lines.items())
    measures = found.measures.model_copy(update={"phases": phases})
    timelines.reported("w", found.model_copy(update={"measures": measures}), 200.0, lambda away: away)
    [row] = timelines.take(1)
    assert row.measured is not None
    assert row.measured.landmarks == [(1, "a"), (7, "b"), (8, "c")]


def test_reports_of_another_attempt_or_worker_change_nothing_and_a_repeat_changes_nothing_more() -> None:
    timelines = Timelines()
    timelines.leased("s", 2, 0, "w", 100.0, 90.0, 95.0)
    first = report(200.0, 0.0, leased=100.0)
    timelines.reported("w", first, 200.0, lambda at: at)
    timelines.reported("other", first.model_copy(update={"attempt": 2}), 200.0, lambda at: at)
    [row] = timelines.take(9)
    assert row.measured is None
    own = first.model_copy(update={"attempt": 2})
    timelines.reported("w", own, 200.0, lambda at: at)
    before = copy.deepcopy(timelines.take(9))
    timelines.reported("w", own, 200.0, lambda at: at)
    assert timelines.take(9) == before


def test_an_attempt_whose_worker_is_lost_ends_with_what_it_had_sent_until_then() -> None:
    timelines = Timelines()
    timelines.leased("s", 1, 0, "w", 100.0, 90.0, 95.0)

    def stage(stage: Stage, at: float, phase: str = "") -> None:
        change = StageChange(step="s", attempt=1, stage=stage, phase=phase, at=at)
        timelines.stage("w", change, at, lambda away: away, isolation="B")

    stage(Stage.FETCHING, 101.0)
    stage(Stage.BUILDING, 103.0)
    stage(Stage.BUILDING, 104.0, "unpackPhase")
    stage(Stage.BUILDING, 105.0, "buildPhase")
    timelines.revoked("s", 130.0, Failure(FailureKind.WORKER_LOST, "it went away"))
    [row] = timelines.take(9)
    assert (row.outcome, row.reason, row.ended_at) == ("lost", "worker_lost", 130.0)
    assert row.isolation == "B", "also of an attempt that gave no result"
    assert row.measured is not None
    assert row.measured.cut
    assert row.measured.spans == [("inputs", 101.0, 2.0), ("build", 103.0, 27.0)]
    assert row.measured.phases == [("unpackPhase", 104.0, 1.0), ("buildPhase", 105.0, 25.0)]


@pytest.mark.parametrize(("moved", "outcome"), [(True, "moved"), (False, "cancelled")])
def test_an_attempt_that_moves_to_a_faster_worker_is_not_taken_for_one_that_is_no_longer_wanted(
    moved: bool, outcome: str
) -> None:
    views, key, builder = Views(Silent()), StepKey("x"), BuilderId("slow")
    lease, why = LeaseId(key, 1), Failure(FailureKind.CANCELLED, "fast is faster")
    views.fold(
        [
            StepAdded(StepSpec(key, (Recipe(Requirements("sys")),))),
            StepLeased(lease, builder, 0, Instant(3.0)),
            LeaseRevoked(lease, builder, why, Instant(0.0), at=Instant(9.0), moved=moved),
        ]
    )
    assert [(row.outcome, row.message) for row in rows_of(views).values()] == [(outcome, "fast is faster")]


def test_beyond_its_bound_the_fold_drops_the_oldest_attempt_and_counts_it() -> None:
    timelines = Timelines(most=3)
    for number in range(5):
        timelines.leased(f"s{number}", 1, 0, "w", 3.0, 1.0, 2.0)
    assert timelines.dropped == 2
    assert [row.step for row in timelines.take(9)] == ["s2", "s3", "s4"]
    nowhere = Timelines(most=0)
    nowhere.leased("s", 1, 0, "w", 3.0, 1.0, 2.0)
    assert (nowhere.take(9), nowhere.dropped) == ([], 0)


def test_times_that_an_older_journal_lacks_are_not_known() -> None:
    timelines = Timelines()
    timelines.leased("s", 1, 0, "w", 3.0, 0.0, 0.0)
    timelines.revoked("s", 0.0, Failure(FailureKind.TRANSIENT, "a\0b"))
    [row] = timelines.take(9)
    assert (row.submitted_at, row.ready_at, row.ended_at) == (None, None, None)
    assert (row.outcome, row.message) == ("retried", "ab")
    assert replace(row, outcome=None) != row
