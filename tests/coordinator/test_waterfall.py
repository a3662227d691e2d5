"""What the waterfall shows is what ran: tracks never hold two attempts at a time, and buckets lose no second of one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.dialects import sqlite

from coordinator.readmodel.waterfall import Occupancy, assign_tracks, nice_step_s, occupancies
from coordinator.stores.timing_windows import Edges, TimingWindows
from coordinator.stores.timings import LONG_S, AttemptTiming, Outcome, TimingStore
from scheduler.pauses import whole

SINCE, UNTIL, BUCKETS = 50_000.0, 60_000.0, 40
WIDTH_S = (UNTIL - SINCE) / BUCKETS
OUTCOMES: Sequence[Outcome] = ("done", "failed", "lost")
MINE, THEIRS = "a" * 32, "b" * 32

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)).map(lambda span: (span[0], span[0] + span[1])))


@given(SPANS)
def test_attempts_of_one_track_never_overlap_and_no_track_is_there_in_vain(spans: list[tuple[int, int]]) -> None:
    spans.sort()
    tracks = assign_tracks(spans)
    for number in set(tracks):
        own = [span for span, track in zip(spans, tracks, strict=True) if track == number]
        assert all(before[1] <= after[0] for before, after in pairwise(own))
    most = max((sum(begin <= at < max(end, begin + 1) for begin, end in spans) for at, _ in spans), default=0)
    assert max(tracks, default=-1) < most
    # What comes later moves nothing that is there.
    assert assign_tracks(spans[: len(spans) // 2]) == tracks[: len(spans) // 2]


def test_ticks_are_at_round_times() -> None:
    assert [nice_step_s(span, 8) for span in (1.0, 60.0, 3600.0, 90_000.0)] == [0.2, 10.0, 600.0, 21_600.0]


class Ran:
    """Attempts at random: most short, some longer than the look back, some that run, on three workers."""

    def __init__(self) -> None:
        chance = Random(7)
        self.rows: list[AttemptTiming] = []
        for number in range(1_500):
            begin = chance.uniform(SINCE - 3 * LONG_S, UNTIL + 1_000)
            took = chance.choice([chance.expovariate(0.01), chance.uniform(LONG_S, 4 * LONG_S), 20_000.0])
            row = AttemptTiming(f"s{number}", 1, worker=f"w{number % 3}", leased_at=begin, name=f"n{number}")
            if number % 50:
                row.ended_at, row.outcome = begin + took, chance.choice(OUTCOMES)
                row.wanted_by = chance.choice([MINE, f"{THEIRS},{MINE}", THEIRS, None])
            self.rows.append(row)

    def within(self) -> list[AttemptTiming]:
        return [row for row in self.rows if begin_of(row) <= UNTIL and (row.ended_at or UNTIL) >= SINCE]

    def busy_s(self, worker: str, kind: str, bucket: int) -> float:
        low, high = SINCE + bucket * WIDTH_S, SINCE + (bucket + 1) * WIDTH_S
        return sum(
            max(0.0, min(row.ended_at, high) - max(begin_of(row), low))
            for row in self.rows
            if row.ended_at is not None and row.worker == worker and kind_of(row) == kind
        )


def begin_of(row: AttemptTiming) -> float:
    assert row.leased_at is not None
    return row.leased_at


def kind_of(row: AttemptTiming) -> str | None:
    return row.outcome if MINE in (row.wanted_by or "") else "other"


@pytest.fixture(params=["sqlite", "postgresql"])
async def windows(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TimingWindows]:
    file = f"sqlite+aiosqlite:///{tmp_path}/timings.sqlite3"
    store = TimingStore.open(file if request.param == "sqlite" else request.getfixturevalue("postgres_url"))
    try:
        await store.prepare()
        await store.save(Ran().rows)
        yield TimingWindows(store)
    finally:
        await store.close()


async def test_buckets_of_any_window_hold_each_second_of_all_attempts(windows: TimingWindows) -> None:
    ran = Ran()
    ended = [row for row in ran.within() if row.ended_at is not None]
    assert await windows.count(SINCE, UNTIL, 100_000) == len(ended)
    assert await windows.count(SINCE, UNTIL, 10) > 10
    begins, ends = await windows.edges(SINCE, UNTIL, BUCKETS, MINE)
    found = whole(occupancies(begins, ends, BUCKETS, WIDTH_S))
    assert set(found) == {"w0", "w1", "w2"}
    for worker, kinds in found.items():
        assert set(kinds) == {*OUTCOMES, "other"}
        for kind, occupied in kinds.items():
            expected = [ran.busy_s(worker, kind, bucket) for bucket in range(BUCKETS)]
            assert occupied.busy_s == pytest.approx(expected, abs=1e-3)
    assert sum(each.attempts for kinds in found.values() for each in kinds.values()) == len(ended)
    failed = sum(kind_of(row) == "failed" and SINCE <= (row.ended_at or 0) < UNTIL for row in ended)
    assert sum(sum(kinds["failed"].ended) for kinds in found.values()) == failed


async def test_each_attempt_of_a_window_is_found_also_one_that_began_long_before(windows: TimingWindows) -> None:
    rows = Ran().within()
    found = await windows.attempts(SINCE, UNTIL, len(rows))
    running = await windows.running(UNTIL, len(rows))
    assert {each.step for each in found} == {row.step for row in rows if row.ended_at is not None}
    assert {each.step for each in running} == {row.step for row in rows if row.ended_at is None}
    assert [begin_of(each) for each in found] == sorted(begin_of(each) for each in found)
    assert len(await windows.attempts(SINCE, UNTIL, 5)) == 5


async def test_a_window_is_found_by_indexes_alone(tmp_path: Path) -> None:
    store = TimingStore.open(f"sqlite+aiosqlite:///{tmp_path}/timings.sqlite3")
    try:
        await store.prepare()
        for statement in TimingWindows(store).statements(SINCE, UNTIL, BUCKETS, MINE):
            sql = statement.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
            plan = [str(row[3]) for row in await store.answers(text(f"EXPLAIN QUERY PLAN {sql}"))]
            assert any("INDEX attempt_timings_" in line for line in plan), plan
            assert not any(line.startswith("SCAN") for line in plan), plan
    finally:
        await store.close()


def test_what_began_before_a_window_fills_it_until_its_end() -> None:
    begins, ends = [Edges(0, "w", "done", 1, 0.0)], [Edges(2, "w", "done", 1, 25.0)]
    found: dict[str, dict[str, Any]] = whole(occupancies(begins, ends, 4, 10.0))
    assert found == {"w": {"done": Occupancy([10.0, 10.0, 5.0, 0.0], [0, 0, 1, 0], 1)}}
