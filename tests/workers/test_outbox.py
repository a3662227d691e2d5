"""The spool alone: order, bounds, repetition."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from workers.agent import outbox as spool_module
from workers.agent.outbox import CHUNK_BYTES, MEMORY_LOG_BYTES, Spool, SpoolError
from workers.wire.messages import SMALL_BATCH_BYTES, Failed, Report, Stage, StageChange

KEY = ("step", 1)
BULK = 1 << 20


@asynccontextmanager
async def opened(directory: Path, **bounds: int) -> AsyncIterator[Spool]:
    spool = Spool(directory, **bounds)
    try:
        yield spool
    finally:
        await spool.close()


def report(key: tuple[str, int] = KEY) -> Report:
    return Report(
        step=key[0],
        attempt=key[1],
        started_at=1.0,
        building_at=2.0,
        built_at=3.0,
        ended_at=4.0,
        result=Failed(reason="permanent", message="no"),
    )


def stage(stage: Stage, phase: str = "") -> StageChange:
    return StageChange(step=KEY[0], attempt=KEY[1], stage=stage, phase=phase, at=1.0)


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["kind"] for event in events]


def drain(spool: Spool) -> list[dict[str, Any]]:
    """Everything, acknowledged answer by answer."""
    said: list[dict[str, Any]] = []
    while True:
        last, events, _ = spool.take(BULK)
        if not events:
            return said
        said += events
        spool.acknowledge(last)


async def test_lines_become_one_chunk_before_their_report(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool") as spool:
        for number in range(100):
            spool.log(KEY, b"%d\n" % number)
        spool.report(report(), within_s=0.0)
        last, events, ended = spool.take(BULK)
        assert kinds(events) == ["log", "report"]
        assert events[0]["data"] == b"".join(b"%d\n" % number for number in range(100))
        assert ended == {KEY}
        assert spool.acknowledge(last) == [KEY]
        assert spool.log_bytes == 0


async def test_lines_of_a_quiet_builder_are_sent_after_a_moment(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool") as spool:
        spool.log(KEY, b"waiting for input\n")
        assert spool.take(BULK)[1] == []
        async with asyncio.timeout(10):
            await spool.wait(30.0)
        assert kinds(spool.take(BULK)[1]) == ["log"]


async def test_a_stage_that_is_out_of_date_before_it_was_sent_is_not_sent(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool") as spool:
        spool.stage(stage(Stage.FETCHING), within_s=1.0)
        spool.stage(stage(Stage.BUILDING), within_s=1.0)
        assert [event["stage"] for event in spool.take(BULK)[1]] == [Stage.BUILDING]
        spool.stage(stage(Stage.UPLOADING), within_s=1.0)
        spool.report(report(), within_s=0.0)
        # The sent one is repeated until it is acknowledged; the unsent one has nothing to add to the report.
        assert kinds(spool.take(BULK)[1]) == ["stage", "report"]


async def test_a_large_log_lies_on_disk_and_comes_back_in_order(tmp_path: Path) -> None:
    keys = [("a/step with any name", 1), ("b", 2)]
    rng = random.Random(7)
    sent: dict[tuple[str, int], bytes] = dict.fromkeys(keys, b"")
    async with opened(tmp_path / "spool") as spool:
        while spool.log_bytes < 3 * MEMORY_LOG_BYTES:
            key = rng.choice(keys)
            data = rng.randbytes(rng.randrange(1, 3 * CHUNK_BYTES))
            sent[key] += data
            spool.log(key, data)
        assert spool.memory_bytes <= MEMORY_LOG_BYTES
        for key in keys:
            spool.report(report(key), within_s=0.0)
        assert len(list((tmp_path / "spool").glob("*.log"))) == 2
        for key in keys:
            assert (
                b"".join(e["data"] for e in drain_copy(spool) if e["kind"] == "log" and e["step"] == key[0])
                == (sent[key])
            )
        drain(spool)
        assert not list((tmp_path / "spool").glob("*.log"))
        assert (spool.log_bytes, spool.memory_bytes, spool.logs) == (0, 0, 0)


def drain_copy(spool: Spool) -> list[dict[str, Any]]:
    """Everything, without acknowledging."""
    return spool.take(1 << 30)[1]


async def test_builders_wait_while_too_much_log_is_unacknowledged(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool", max_log_bytes=4 * CHUNK_BYTES) as spool:
        for _ in range(5):
            spool.log(KEY, b"x" * CHUNK_BYTES)
        assert not spool.room.is_set()
        last, _, _ = spool.take(2 * CHUNK_BYTES)
        spool.acknowledge(last)
        assert not spool.room.is_set()
        drain(spool)
        assert spool.room.is_set()


async def test_answers_without_log_stay_small(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool") as spool:
        for number in range(1000):
            spool.report(report((f"step{number}", 1)), within_s=0.0)
        _, events, _ = spool.take(BULK)
        assert 1 < len(events) < 1000
        assert len(orjson.dumps(events)) <= SMALL_BATCH_BYTES
        assert len(drain(spool)) == 1000


async def test_the_file_of_reports_holds_the_unacknowledged_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "MAX_REPORTS_BYTES", 1000)
    path = tmp_path / "spool" / "reports.jsonl"
    async with opened(tmp_path / "spool") as spool:
        for number in range(20):
            spool.report(report((f"step{number}", 1)), within_s=0.0)
        spool.take(BULK)
        spool.acknowledge(15)
        steps = [orjson.loads(line)["step"] for line in path.read_bytes().splitlines()]
        assert steps == [f"step{number}" for number in range(15, 20)]
        drain(spool)
        assert path.read_bytes() == b""


async def test_what_an_earlier_worker_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "spool" / "sub").mkdir(parents=True)
    (tmp_path / "spool" / "old.log").write_text("old")
    async with opened(tmp_path / "spool"):
        assert [path.name for path in (tmp_path / "spool").iterdir()] == ["reports.jsonl"]


async def test_a_directory_that_cannot_be_used_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="cannot use the spool directory"):
        Spool(tmp_path / "file" / "spool")


async def test_reports_are_synced_when_nobody_acknowledges_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "SYNC_S", 0.01)
    synced = asyncio.Event()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(os, "fsync", lambda _: loop.call_soon_threadsafe(synced.set))
    async with opened(tmp_path / "spool") as spool:
        spool.report(report(), within_s=0.0)
        last, _, _ = spool.take(BULK)
        spool.acknowledge(last)
        await asyncio.sleep(0.05)
        assert not synced.is_set()
        spool.report(report(("other", 1)), within_s=0.0)
        async with asyncio.timeout(10):
            await synced.wait()
