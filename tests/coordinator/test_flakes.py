"""Is it the package or the machine: records of recipes and of workers, and what is said of them."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from coordinator.api.flakes import (
    RecipeRecordView,
    failure_sentence,
    flake_sentence,
)
from coordinator.api.models import StepChanged, StepStatus
from coordinator.cli.history import story_lines
from coordinator.cli.reasons import why_lines
from coordinator.cli.rendering import step_lines, summary_lines
from coordinator.readmodel import recipe_records
from coordinator.readmodel.flakes import newest_records
from coordinator.readmodel.recipe_records import RecipeRecords
from coordinator.readmodel.rows import StepRow
from coordinator.stores.timings import AttemptEnds, AttemptTiming, TimingsError, TimingStore
from infra.clock import SystemClock
from infra.database import open_engine
from scheduler.model import StepKey
from tests.coordinator.conftest import OpenFarm
from tests.coordinator.test_timings import opened
from tests.coordinator.test_web import browser_of

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


async def test_a_failure_of_what_succeeded_before_says_so_wherever_one_looks(
    open_farm: OpenFarm,
) -> None:
    async with open_farm() as farm:
        submitted = await farm.submit('{ it = run "tool-1.0" "exit 7"; }', "it")
        key, now = submitted.roots[0].step, SystemClock().now()
        store = TimingStore.open(farm.settings.database_url("timings"))
        await store.prepare()
        # Of an earlier life of the step, whose result the cache has lost since.
        await store.save(
            [ended(key, 0, "other", "done", now - 100, name="tool-1.0", package="tool", system="x86_64-linux")]
        )
        await store.close()
    said = "failed here, succeeded 1 of 2 times with the same recipe"
    record = RecipeRecordView(attempts=2, succeeded=1, flaky=False)
    async with open_farm("one") as farm, browser_of(farm) as browser:
        seen = [event.step for event in await farm.watch(submitted.id) if isinstance(event, StepChanged)]
        assert seen[-1].state is StepStatus.FAILED
        assert seen[-1].record == record
        assert [step.record for step in await farm.client.steps(submitted.id, (StepStatus.FAILED,))] == [record]
        assert any(said in line for line in why_lines(await farm.client.why(key), now))
        assert any(said in line for line in step_lines(await farm.client.step("tool"), now))
        assert story_lines(await farm.client.step(key), await farm.client.timeline(key))[-1] == said
        failed = await farm.client.steps(submitted.id, (StepStatus.FAILED,))
        assert any(said in line for line in summary_lines(await farm.client.submission(submitted.id), failed, now))
        await browser.log_in()
        for address in (f"/submissions/{submitted.id}", f"/steps/{key}"):
            assert f"It {said}." in (await browser.get(address))[1]


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
    package = ["attempt_timings_package"]
    assert found == [["sqlite_autoindex_attempt_timings_1"], package, package], plans
    assert not any("SCAN attempt_timings" in plan for plan in plans), plans
