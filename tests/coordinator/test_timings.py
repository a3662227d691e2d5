"""The store of timings keeps what it has, forgets what is old, and hurts nothing when it fails."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.engine import timing_writer
from coordinator.engine.timing_writer import TimingWriter
from coordinator.readmodel.timeline import Timelines
from coordinator.stores.timings import AttemptTiming, Measured, TimingsError, TimingStore
from infra.clock import SystemClock
from infra.nix.store_path import package_of
from scheduler.model import Failure, FailureKind
from tests.support.patience import PATIENCE_S

MEASURED = Measured(
    spans=[("build", 4.0, 2.0)],
    phases=[("buildPhase", 4.5, 1.0)],
    landmarks=[(3, "buildPhase")],
    fetches=[("/nix/store/x", "cache", 7, 3.0, 0.5, False)],
)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/timings.sqlite3"
    return str(request.getfixturevalue("postgres_url"))


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[TimingStore]:
    store = TimingStore.open(url)
    try:
        await store.prepare()
        yield store
    finally:
        await store.close()


def row(step: str, **known: Any) -> AttemptTiming:
    return replace(AttemptTiming(step, 1, leased_at=3.0), **known)


async def test_parts_of_an_attempt_come_together_and_nothing_known_is_overwritten_by_ignorance(url: str) -> None:
    whole = row(
        "a", recipe=0, worker="w", ended_at=9.0, outcome="done", peak_memory_bytes=2**40, build_s=2.0, measured=MEASURED
    )
    async with opened(url) as store:
        await store.save([row("a", recipe=0, worker="w"), row("b")])
        await store.save([AttemptTiming("a", 1, ended_at=9.0, outcome="done", measured=MEASURED, build_s=2.0)])
        # A restart folds the facts again and knows no measures.
        await store.save([row("a", recipe=0, worker="w", ended_at=9.0, outcome="done", peak_memory_bytes=2**40)])
    # Another process finds the same; preparing it again changes nothing.
    async with opened(url) as store:
        assert await store.of_steps(["a"]) == [whole]
        assert [found.step for found in await store.of_steps(["b", "a", "none"])] == ["a", "b"]


async def test_attempts_beyond_the_retention_go_and_then_the_oldest_beyond_the_bound(url: str) -> None:
    async with opened(url) as store:
        await store.save([row(f"s{at}", leased_at=float(at)) for at in range(10)])
        assert await store.drop(before=3.0, most=0) == 3
        assert await store.drop(before=3.0, most=5) == 2
        assert await store.drop(before=3.0, most=5) == 0
        left = await store.of_steps([f"s{at}" for at in range(10)])
        assert [found.step for found in left] == ["s5", "s6", "s7", "s8", "s9"]


async def test_a_package_is_found_with_and_without_its_version_newest_first(url: str) -> None:
    done = {"outcome": "done", "system": "x", "package": "hello"}
    async with opened(url) as store:
        await store.save(
            [
                row("a", name="hello-2.12", ended_at=5.0, build_s=3.0, **done),
                row("b", name="hello-2.13", ended_at=6.0, build_s=4.0, **done),
                row("c", name="hello-2.13", ended_at=7.0, build_s=9.0, **(done | {"outcome": "failed"})),
                row("d", name="hello-2.13", **done),
            ]
        )
        assert [found.step for found in await store.of_package("hello", "", 10)] == ["c", "b", "a"]
        assert [found.step for found in await store.of_package("hello-2.12", "x", 10)] == ["a"]
        assert await store.of_package("hello", "other", 10) == []
        # Verdicts on other steps than one, those before a time.
        await store.save([row("e", name="hello-2.14", ended_at=8.0, **(done | {"outcome": "lost"}))])
        for step, before, found in (("c", None, ["b", "a"]), ("x", None, ["c", "b", "a"]), ("x", 6.5, ["b", "a"])):
            last = await store.last_verdicts("hello", "x", step, before, 10)
            assert [(each.step, each.outcome) for each in last] == [
                (each, "failed" if each == "c" else "done") for each in found
            ]
        assert [each.step for each in await store.last_verdicts("hello", "x", "c", None, 1)] == ["b"]
        usual = await store.usual_builds([("hello", "x"), ("none", "x"), ("hello", "y")], 1)
        assert usual[("hello", "x")] == [4.0]
        assert ("none", "x") not in usual


async def test_what_ended_is_counted_by_stretches_of_time_and_outcome(url: str) -> None:
    ends = [(99.9, "done"), (100.0, "done"), (109.9, "failed"), (105.0, "failed"), (119.99, "done"), (120.0, "done")]
    async with opened(url) as store:
        await store.save([row(f"s{at}", ended_at=at, outcome=outcome) for at, outcome in ends])
        await store.save([row("running", leased_at=101.0)])
        assert sorted(await store.ended_between(100.0, 120.0, 10.0)) == [
            (0, "done", 1), (0, "failed", 2), (1, "done", 1),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "package"),
    [("hello-2.12", "hello"), ("gtk+3-dev", "gtk+3-dev"), ("a-b-1.0-doc", "a-b"), ("x", "x"), ("source", "source")],
)
def test_a_package_is_a_name_without_its_version(name: str, package: str) -> None:
    assert package_of(name) == package


async def test_a_database_of_a_newer_release_is_refused_and_not_touched(tmp_path: Path) -> None:
    file = tmp_path / "timings.sqlite3"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE timings_meta (format INTEGER PRIMARY KEY)")
        connection.execute("INSERT INTO timings_meta VALUES (99)")
    with pytest.raises(TimingsError, match="newer version"):
        async with opened(f"sqlite+aiosqlite:///{file}"):
            pass
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("timings_meta",)]


async def test_tables_of_formats_before_get_the_indexes_and_columns_of_this_one(tmp_path: Path) -> None:
    file = tmp_path / "timings.sqlite3"
    async with opened(f"sqlite+aiosqlite:///{file}") as store:
        await store.save([row("a", inputs_s=3.0, features="kvm")])

    def indexes() -> set[str]:
        with closing(sqlite3.connect(file)) as connection:
            return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}

    as_made = indexes()
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE timings_meta SET format = 1")
        for column in ("inputs_s", "upload_s", "features"):
            connection.execute(f"ALTER TABLE attempt_timings DROP COLUMN {column}")
        connection.execute("DROP INDEX attempt_timings_window")
        connection.execute("DROP INDEX attempt_timings_long")
        connection.execute("CREATE INDEX attempt_timings_leased ON attempt_timings (leased_at)")
    async with opened(f"sqlite+aiosqlite:///{file}") as store:
        assert await store.of_steps(["a"]) == [row("a")]
        await store.save([row("a", upload_s=2.0, features="")])
        assert await store.of_steps(["a"]) == [row("a", upload_s=2.0, features="")]
    assert indexes() == as_made


def _lock(file: Path) -> Callable[[], None]:
    connection = sqlite3.connect(file, timeout=0.1)
    connection.execute("BEGIN EXCLUSIVE")
    return connection.close


def _spoil(file: Path) -> Callable[[], None]:
    whole = file.with_name("whole")
    file.rename(whole)
    file.write_bytes(b"this is no database, however long one looks at it" * 100)

    def heal() -> None:
        whole.replace(file)

    return heal


@pytest.mark.parametrize("harm", [_lock, _spoil])
async def test_while_the_database_fails_attempts_wait_are_dropped_and_counted_and_then_kept_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], Callable[[], None]]
) -> None:
    monkeypatch.setattr(timing_writer, "WRITE_EVERY_S", 0.01)
    monkeypatch.setattr(timing_writer, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(timing_writer, "RETRY_LONGEST_S", 0.02)
    monkeypatch.setattr("coordinator.stores.timings.BUSY_TIMEOUT_MS", 20)
    file = tmp_path / "timings.sqlite3"
    async with opened(f"sqlite+aiosqlite:///{file}"):
        pass
    heal = harm(file)
    timelines, store = Timelines(most=100), TimingStore.open(f"sqlite+aiosqlite:///{file}")
    writer = TimingWriter(timelines, store, lambda _: ("hello-1", "x"), SystemClock(), 0, 0)
    task = asyncio.create_task(writer.run())
    try:
        for number in range(150):
            timelines.leased(f"s{number}", 1, 0, "w", 3.0, 1.0, 2.0)
        assert timelines.dropped == 50
        async with asyncio.timeout(PATIENCE_S):
            while not writer.trouble:  # noqa: ASYNC110 - the writer sends no event
                await asyncio.sleep(0.01)
        assert "database of timings failed" in writer.trouble
        heal()
        timelines.revoked("s149", 9.0, Failure(FailureKind.WORKER_LOST, "gone"))
        async with asyncio.timeout(PATIENCE_S):
            while writer.trouble or timelines.waiting:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.wait((task,))
    [kept] = await store.of_steps(["s149"])
    assert (kept.outcome, kept.package) == ("lost", "hello")
    assert timelines.dropped >= 50
    await store.close()


async def test_what_a_reader_could_not_have_written_keeps_the_writer_awake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.stores.timings.BUSY_TIMEOUT_MS", 20)
    file = tmp_path / "timings.sqlite3"
    async with opened(f"sqlite+aiosqlite:///{file}"):
        pass
    timelines, store = Timelines(), TimingStore.open(f"sqlite+aiosqlite:///{file}")
    writer = TimingWriter(timelines, store, lambda _: None, SystemClock(), 0, 0)
    await writer.flush()
    heal = _lock(file)
    timelines.leased("a", 1, 0, "w", 3.0, 1.0, 2.0)
    with pytest.raises(TimingsError):
        await writer.flush()
    assert timelines.changed.is_set()
    heal()
    await writer.flush()
    assert not timelines.changed.is_set()
    assert [found.step for found in await store.of_steps(["a"])] == ["a"]
    await store.close()


async def test_an_attempt_that_no_database_takes_is_dropped_and_keeps_no_other_out(url: str) -> None:
    timelines, store = Timelines(), TimingStore.open(url)
    writer = TimingWriter(timelines, store, lambda _: None, SystemClock(), 0, 0)
    # SQLite holds no such number, PostgreSQL no such text.
    for step, recipe, worker in (("a", 0, "w"), ("bad", 2**70, "w\0"), ("c", 0, "w")):
        timelines.leased(step, 1, recipe, worker, 3.0, 1.0, 2.0)
    await writer.flush()
    assert timelines.dropped == 1
    assert [found.step for found in await store.of_steps(["a", "bad", "c"])] == ["a", "c"]
    await store.close()
