"""Is it the package or the machine: records of recipes and of workers, and what is said of them."""

from __future__ import annotations

import asyncio
import math
import random
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event

from coordinator.api.flakes import (
    RecipeRecordView,
    WorkerRecordView,
    failure_sentence,
    flake_sentence,
    worker_sentence,
)
from coordinator.api.models import StepChanged, StepStatus
from coordinator.cli.history import story_lines
from coordinator.cli.lines import plain
from coordinator.cli.live import Window
from coordinator.cli.reasons import why_lines
from coordinator.cli.rendering import step_lines, summary_lines
from coordinator.cli.top import farm_lines
from coordinator.cli.worker_text import worker_lines
from coordinator.readmodel import recipe_records
from coordinator.readmodel.flakes import FALSE_ALARM, LEAST_FAILED, chance, newest_records, stands_out, worker_records
from coordinator.readmodel.recipe_records import RecipeRecords
from coordinator.readmodel.rows import StepRow
from coordinator.readmodel.worker_records import WorkerRecords
from coordinator.stores.timings import AttemptEnds, AttemptTiming, TimingsError, TimingStore
from coordinator.stores.worker_counts import WorkerCounts, worker_counts
from infra.clock import SystemClock
from infra.database import open_engine
from scheduler.model import StepKey
from tests.coordinator.conftest import OpenFarm
from tests.coordinator.test_timings import opened
from tests.coordinator.test_web import browser_of
from tests.support.patience import PATIENCE_S

Row = tuple[str, str, str, str, float]


def ended(step: str, attempt: int, worker: str, outcome: str, at: float, **known: Any) -> AttemptTiming:
    package = step.rpartition("-")[2]
    told: dict[str, Any] = {"recipe": 0, "name": f"{package}-1.0", "package": package, "system": "x", **known}
    return AttemptTiming(step, attempt, worker=worker, outcome=outcome, leased_at=at, ended_at=at, **told)  # type: ignore[arg-type]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/timings.sqlite3"
    return str(request.getfixturevalue("postgres_url"))


async def test_a_record_counts_what_the_newest_recipe_itself_did_and_a_later_success_makes_it_flaky(url: str) -> None:
    async with opened(url) as store:
        await store.save(
            [
                ended("flaky", 1, "a", "failed", 1.0, reason="permanent"),
                ended("flaky", 2, "a", "retried", 2.0, reason="transient"),
                ended("flaky", 3, "b", "done", 3.0),
                ended("flaky", 4, "a", "lost", 4.0, reason="worker_lost"),
                ended("flaky", 5, "a", "retried", 5.0, reason="disk_low"),
                ended("flaky", 6, "a", "returned", 6.0, reason="returned"),
                ended("broke", 1, "a", "done", 1.0),
                ended("broke", 2, "b", "failed", 2.0, reason="permanent"),
                ended("other", 1, "a", "done", 1.0),
                ended("other", 2, "b", "failed", 2.0, reason="hash_mismatch", recipe=1),
                ended("doomed", 1, "a", "failed", 1.0, reason="dependency"),
                AttemptTiming("broke", 3, leased_at=9.0, recipe=0),
            ]
        )
        ends = await store.ends_of(["flaky", "broke", "other", "doomed", "none"])
    assert newest_records(ends) == {
        "flaky": RecipeRecordView(attempts=3, succeeded=1, flaky=True),
        "broke": RecipeRecordView(attempts=2, succeeded=1, flaky=False),
        "other": RecipeRecordView(attempts=1, succeeded=0, flaky=False),
    }


def test_a_failure_says_that_its_recipe_can_succeed_and_a_step_that_it_is_flaky() -> None:
    flaky = RecipeRecordView(attempts=5, succeeded=3, flaky=True)
    assert failure_sentence(flaky) == ("failed here, succeeded 3 of 5 times with the same recipe: flaky, 40 % fail")
    assert flake_sentence(flaky) == "failed 2 of 5 times with the same recipe: flaky, 40 % fail"
    once = RecipeRecordView(attempts=2, succeeded=1, flaky=False)
    assert failure_sentence(once) == "failed here, succeeded 1 of 2 times with the same recipe"
    never = RecipeRecordView(attempts=4, succeeded=0, flaky=False)
    assert (flake_sentence(once), failure_sentence(never), failure_sentence(None), flake_sentence(None)) == ("",) * 4


def recounted(rows: list[AttemptTiming]) -> list[WorkerCounts]:
    """Count as `worker_counts` promises, by hand."""
    judged = [row for row in rows if row.outcome in {"done", "failed", "retried", "lost"}]
    possible = {(row.step, row.recipe) for row in judged if row.outcome == "done"}
    tries: dict[tuple[str, str], dict[tuple[str, int | None], bool]] = defaultdict(dict)
    for row in judged:
        recipe = (row.step, row.recipe)
        if recipe in possible:
            assert row.package
            assert row.worker
            mine = tries[row.package, row.worker]
            mine[recipe] = mine.get(recipe, False) or row.outcome != "done"
    tried: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for (package, _), recipes in tries.items():
        tried[package] += len(recipes)
        failed[package] += sum(recipes.values())
    found = []
    for worker in sorted({row.worker or "" for row in judged}):
        its = [row for row in judged if row.worker == worker]
        cells = [
            (package, len(recipes), sum(recipes.values()))
            for (package, who), recipes in tries.items()
            if who == worker and tried[package] > len(recipes)
        ]
        found.append(
            WorkerCounts(
                worker,
                len(its),
                sum(row.outcome != "done" for row in its),
                sum(bad for *_, bad in cells),
                sum(failed[package] for package, *_ in cells),
                float(sum(failed[package] * count / tried[package] for package, count, _ in cells)),
            )
        )
    return found


async def test_a_worker_is_compared_at_packages_that_others_tried_and_at_recipes_that_succeeded(url: str) -> None:
    chosen = random.Random(7)
    outcomes = ["done", "done", "done", "failed", "retried", "lost", "returned", "moved", "cancelled"]
    async with opened(url) as store:
        rows: list[AttemptTiming] = []
        for number in range(400):
            step, package = f"{number % 90}", f"p{number % 30}"
            outcome = "failed" if number % 30 == 3 else chosen.choice(outcomes)
            worker = "alone" if number % 30 == 4 else chosen.choice("abc")
            rows.append(ended(f"{step}-{package}", number, worker, outcome, 10.0 + number))
        old = [ended("0-p0", 1000 + number, "old", "failed", 1.0) for number in range(9)]
        await store.save([*rows, *old])
        counts = await worker_counts(store, since=5.0)
        by_hand = recounted(rows)
        assert [each.expected for each in counts] == pytest.approx([each.expected for each in by_hand])
        assert [replace(each, expected=0.0) for each in counts] == [replace(each, expected=0.0) for each in by_hand]
        alone = next(each for each in counts if each.worker == "alone")
        # No other worker has built that package: whatever failed there, nothing is known of the machine.
        assert alone.failed_attempts
        assert (alone.failures, alone.expected) == (0, 0.0)


@given(st.integers(0, 60), st.integers(1, 60), st.floats(0.001, 0.999))
def test_the_bound_is_never_below_the_true_chance(failed: int, failures: int, share: float) -> None:
    """Against the binomial law, which is the widest of those that the bound covers."""
    failed = min(failed, failures)
    terms = (
        math.comb(failures, each) * share**each * (1 - share) ** (failures - each)
        for each in range(failed, failures + 1)
    )
    assert chance(failed, share * failures, failures) >= math.fsum(terms) * (1 - 1e-9)


@given(st.integers(0, 200), st.integers(1, 200), st.floats(0.0, 1.0), st.integers(1, 50))
def test_more_failures_and_a_smaller_share_never_clear_a_worker(
    failed: int, failures: int, share: float, compared: int
) -> None:
    failed = min(failed, failures)
    expected = share * failures
    if stands_out(failed, expected, failures, compared):
        assert failed >= LEAST_FAILED
        assert failed > expected
        assert stands_out(failed, expected / 2, failures, compared)
        assert stands_out(failed, expected, failures, 1)
        assert failed == failures or stands_out(failed + 1, expected, failures, compared)


def test_few_failures_blame_nobody_and_a_machine_that_fails_what_others_build_stands_out() -> None:
    assert not stands_out(2, 0.001, 2, 1)
    assert not stands_out(3, 1.5, 3, 2)
    # Half of twenty steps failed on one of two workers, none on the other.
    assert stands_out(10, 5.0, 10, 2)
    # All failed alike: a package that always fails, or a cache that is gone.
    assert not stands_out(500, 500.0, 1000, 2)


def test_among_workers_that_are_alike_none_is_shown_but_by_a_rare_chance() -> None:
    """Packages fail at rates of their own, and workers get them in shares of their own: a naive rate would differ."""
    drawn = random.Random(11)
    shown, farms = 0, 400
    for _ in range(farms):
        workers = {name: drawn.random() for name in "abcdef"}
        counts = {name: [0, 0, 0.0] for name in workers}
        for _ in range(12):
            rate, cells = drawn.random() ** 3, {name: [0, 0] for name in workers}
            for name in drawn.choices(list(workers), list(workers.values()), k=drawn.randrange(1, 40)):
                cells[name][0] += 1
                cells[name][1] += drawn.random() < rate
            tried, failed = (sum(cell[place] for cell in cells.values()) for place in (0, 1))
            for name, (own, bad) in cells.items():
                if 0 < own < tried:
                    of = counts[name]
                    counts[name] = [of[0] + bad, of[1] + failed, of[2] + failed * own / tried]
        records = worker_records(
            WorkerCounts(name, 0, 0, int(bad), int(failures), expected)
            for name, (bad, failures, expected) in counts.items()
        )
        shown += any(record.stands_out for record in records.values())
    assert shown <= farms * FALSE_ALARM


def test_only_a_worker_that_stands_out_is_said_to_fail_more() -> None:
    record = WorkerRecordView(attempts=90, failed_attempts=15, failed=12, failures=14, expected=3.14, stands_out=True)
    assert worker_sentence(record) == (
        "builds fail more often here than elsewhere: 12 of 14 failures of steps that succeeded somewhere, "
        "where one of equals would have 3.1"
    )
    assert worker_sentence(None) == ""


async def test_a_failure_of_what_succeeded_before_and_a_worker_that_fails_more_are_shown_wherever_one_looks(
    open_farm: OpenFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine may leave a record out; this is about what is shown of one.
    monkeypatch.setattr(recipe_records, "PATIENCE_S", PATIENCE_S)
    async with open_farm() as farm:
        text = '{ it = run "tool-1.0" "exit 7"; odd = run "odd-2" "echo > $out"; }'
        submitted = await farm.submit(text, "it", "odd")
        keys, now = {root.attr: root.step for root in submitted.roots}, SystemClock().now()
        key = keys["it"]
    # Between two lives of the farm: the writer of timings prepares the database too.
    store = TimingStore.open(farm.settings.database_url("timings"))
    await store.prepare()
    # Of an earlier life of the steps, whose results the cache has lost since.
    known = {"name": "tool-1.0", "package": "tool", "system": "x86_64-linux"}
    await store.save([ended(key, 0, "other", "done", now - 100, **known)])
    known = {"name": "odd-2", "package": "odd", "system": "x86_64-linux", "reason": "permanent"}
    await store.save([ended(keys["odd"], 0, "other", "failed", now - 99, **known)])
    for number in range(20):
        tries = [("one", "failed"), ("other", "done")]
        await store.save([ended(f"{number}-lib", at, who, how, now) for at, (who, how) in enumerate(tries)])
    said = "failed here, succeeded 1 of 2 times with the same recipe"
    record = RecipeRecordView(attempts=2, succeeded=1, flaky=False)
    async with open_farm("one") as farm, browser_of(farm) as browser:
        views = farm.coordinator.views
        events = [event.step for event in await farm.watch(submitted.id) if isinstance(event, StepChanged)]
        assert [step.record for step in events if step.state is StepStatus.FAILED] == [record]
        assert [step.record for step in await farm.client.steps(submitted.id, (StepStatus.FAILED,))] == [record]
        assert any(said in line for line in why_lines(await farm.client.why(key), now))
        assert any(said in line for line in step_lines(await farm.client.step("tool"), now))
        assert story_lines(await farm.client.step(key), await farm.client.timeline(key))[-1] == said
        failed = await farm.client.steps(submitted.id, (StepStatus.FAILED,))
        assert any(said in line for line in summary_lines(await farm.client.submission(submitted.id), failed, now))
        await browser.log_in()
        flaky = "failed 1 of 2 times with the same recipe: flaky, 50 % fail"
        odd = await farm.client.step(keys["odd"])
        assert any(flaky in line for line in why_lines(await farm.client.why("odd"), now))
        assert any(flaky in line for line in step_lines(odd, now))
        assert story_lines(odd, await farm.client.timeline(odd.key))[-1] == flaky
        assert f"It {flaky}." in (await browser.get(f"/steps/{odd.key}"))[1]
        for address in (f"/submissions/{submitted.id}", f"/steps/{key}"):
            assert f"It {said}." in (await browser.get(address))[1]

        await WorkerRecords(partial(worker_counts, store), SystemClock(), views.workforce.compared).look()
        [worker] = await farm.client.workers()
        assert worker.record is not None
        assert (worker.record.attempts, worker.record.failed, worker.record.failures) == (22, 21, 22)
        blamed = f"one: {worker_sentence(worker.record)}"
        assert blamed in worker_lines([worker], now)
        lines = [plain(line) for line in farm_lines(await farm.client.activity(), now, Window(250, 40))]
        assert f"! {blamed}" in lines
        assert worker_sentence(worker.record) in (await browser.get("/workers"))[1]
        async with browser.session.get(f"{browser.url}/metrics") as metrics:
            assert 'drover_worker_fails_more{worker="one"} 1.0' in (await metrics.text()).splitlines()
        await store.close()


async def test_a_store_that_fails_or_is_slow_costs_nothing_but_the_record_and_is_asked_once_for_many_readers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recipe_records, "PATIENCE_S", 0.02)
    monkeypatch.setattr(recipe_records, "PAUSE_S", 0.0)
    asked: list[Sequence[str]] = []
    answered = asyncio.Event()

    async def read(steps: Sequence[str]) -> Sequence[AttemptEnds]:
        asked.append(steps)
        if len(asked) == 1:
            raise TimingsError("the database of timings failed: locked.")
        await answered.wait()
        return [AttemptEnds(step, 0, "done", None, 1, 1.0, 1.0, 1) for step in steps]

    records = RecipeRecords(read)
    rows = [StepRow(StepKey(name), StepStatus.FAILED) for name in ("a", "b", "untouched")]
    for row in rows[:2]:
        row.mutable_life().attempt = 2
    await records.fetch(rows)
    assert [records.of(row) for row in rows] == [None] * 3
    await asyncio.gather(*(records.fetch(rows) for _ in range(20)))
    assert asked == [["a", "b"], ["a", "b"]]
    answered.set()
    await records.fetch(rows)
    await records.fetch(rows)
    assert len(asked) == 2
    one = RecipeRecordView(attempts=1, succeeded=1, flaky=False)
    assert [records.of(row) for row in rows] == [one, one, None]
    # It is tried again: what the running attempt will add is not known yet.
    rows[0].state, rows[0].mutable_life().attempt = StepStatus.RUNNING, 3
    assert records.of(rows[0]) == one


async def test_questions_use_an_index_however_many_attempts_there_are(tmp_path: Path) -> None:
    file = tmp_path / "timings.sqlite3"
    statements: list[tuple[str, Any]] = []
    engine = open_engine(f"sqlite+aiosqlite:///{file}")

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        statements.append((statement, parameters))

    store = TimingStore(engine)
    await store.prepare()
    statements.clear()
    await store.ends_of(["a"])
    await worker_counts(store, 5.0)
    await store.of_package("tool", "", 10)
    await store.of_package("tool-1.0", "x", 10)
    await store.close()
    with closing(sqlite3.connect(file)) as connection:
        plans = [
            " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters))
            for statement, parameters in statements
            if statement.startswith(("SELECT", "WITH"))
        ]
    found = [sorted(set(re.findall(r"attempt_timings_\w+|sqlite_autoindex_\w+", plan))) for plan in plans]
    ended_at, package = ["attempt_timings_ended"], ["attempt_timings_package"]
    assert found == [["sqlite_autoindex_attempt_timings_1"], ended_at, package, package], plans
    assert not any("SCAN attempt_timings" in plan for plan in plans), plans
