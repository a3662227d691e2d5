"""The outbox alone: order, bounds, repetition."""

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

from tests.support.patience import PATIENCE_S
from workers.agent import outbox as outbox_module
from workers.agent.outbox import CHUNK_BYTES, MEMORY_LOG_BYTES, Outbox, OutboxError
from workers.wire.messages import SMALL_BATCH_BYTES, Failed, Report, Stage, StageChange

KEY = ("step", 1)
OTHER = ("other", 1)
BULK = 1 << 20


@asynccontextmanager
async def opened(directory: Path, **bounds: int) -> AsyncIterator[Outbox]:
    outbox = Outbox(directory, **bounds)
    try:
        yield outbox
    finally:
        await outbox.close()


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


def drain(outbox: Outbox) -> list[dict[str, Any]]:
    """Everything, acknowledged answer by answer."""
    said: list[dict[str, Any]] = []
    while True:
        last, events, _ = outbox.take(BULK)
        if not events:
            return said
        said += events
        outbox.acknowledge(last)


async def test_lines_become_one_chunk_before_their_report(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox") as outbox:
        for number in range(100):
            outbox.log(KEY, b"%d\n" % number)
        outbox.report(report(), within_s=0.0)
        last, events, ended = outbox.take(BULK)
        assert kinds(events) == ["log", "report"]
        assert events[0]["data"] == b"".join(b"%d\n" % number for number in range(100))
        assert ended == {KEY}
        assert outbox.acknowledge(last) == [KEY]
        assert outbox.log_bytes == 0


async def test_lines_of_a_quiet_builder_are_sent_after_a_moment(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox") as outbox:
        outbox.log(KEY, b"waiting for input\n")
        assert outbox.take(BULK)[1] == []
        async with asyncio.timeout(PATIENCE_S):
            await outbox.wait(2 * PATIENCE_S)
        assert kinds(outbox.take(BULK)[1]) == ["log"]


async def test_a_stage_that_is_out_of_date_before_it_was_sent_is_not_sent(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox") as outbox:
        outbox.stage(stage(Stage.FETCHING), within_s=1.0)
        outbox.stage(stage(Stage.BUILDING), within_s=1.0)
        assert [event["stage"] for event in outbox.take(BULK)[1]] == [Stage.BUILDING]
        outbox.stage(stage(Stage.UPLOADING), within_s=1.0)
        outbox.report(report(), within_s=0.0)
        # The sent one is repeated until it is acknowledged; the unsent one has nothing to add to the report.
        assert kinds(outbox.take(BULK)[1]) == ["stage", "report"]


async def test_a_large_log_lies_on_disk_and_comes_back_in_order(tmp_path: Path) -> None:
    keys = [("a/step with any name", 1), ("b", 2)]
    rng = random.Random(7)
    sent: dict[tuple[str, int], bytes] = dict.fromkeys(keys, b"")
    async with opened(tmp_path / "outbox", max_kept_bytes=0) as outbox:
        while outbox.log_bytes < 3 * MEMORY_LOG_BYTES:
            key = rng.choice(keys)
            data = rng.randbytes(rng.randrange(1, 3 * CHUNK_BYTES))
            sent[key] += data
            outbox.log(key, data)
        assert outbox.memory_bytes <= MEMORY_LOG_BYTES
        for key in keys:
            outbox.report(report(key), within_s=0.0)
        assert len(list((tmp_path / "outbox").glob("*.log"))) == 2
        for key in keys:
            assert (
                b"".join(e["data"] for e in drain_copy(outbox) if e["kind"] == "log" and e["step"] == key[0])
                == (sent[key])
            )
        drain(outbox)
        assert not list((tmp_path / "outbox").glob("*.log"))
        assert (outbox.log_bytes, outbox.memory_bytes, outbox.logs) == (0, 0, 0)


async def test_what_was_acknowledged_is_sent_again_in_order_before_what_waits(tmp_path: Path) -> None:
    """A coordinator that takes over gets each running log, and each that ended lately, from its beginning."""
    ended, running = ("ended", 1), ("running", 1)
    texts = {ended: b"", running: b""}
    rng = random.Random(11)
    async with opened(tmp_path / "outbox") as outbox:

        def log(key: tuple[str, int], data: bytes) -> None:
            texts[key] += data
            outbox.log(key, data)

        while len(texts[ended]) < 2 * MEMORY_LOG_BYTES:
            log(ended, rng.randbytes(CHUNK_BYTES + 1))
            log(running, rng.randbytes(1000))
        outbox.report(report(ended), within_s=0.0)
        assert kinds(drain(outbox))[-1] == "report"
        log(running, b"not yet acknowledged")
        outbox.report(report(running), within_s=0.0)
        number = outbox.take(BULK)[0]
        for _ in range(2):
            outbox.send_again()
            assert outbox.acknowledge(number) == [], "that was of the coordinator before"
            events = drain(outbox)
            for key, text in texts.items():
                chunks = [event for event in events if event["kind"] == "log" and event["step"] == key[0]]
                assert [chunk["offset"] for chunk in chunks] == sorted(chunk["offset"] for chunk in chunks)
                assert b"".join(chunk["data"] for chunk in chunks) == text
            assert outbox.log_bytes == 0
        assert outbox.has_room(KEY)


async def test_logs_of_reported_leases_are_kept_for_a_while_and_within_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path / "outbox", max_kept_bytes=2 * CHUNK_BYTES) as outbox:
        for number in range(4):
            key = (f"step{number}", 1)
            outbox.log(key, b"x" * CHUNK_BYTES)
            outbox.report(report(key), within_s=0.0)
            drain(outbox)
        outbox.send_again()
        assert [event["step"] for event in drain(outbox)] == ["step2", "step3"]
        monkeypatch.setattr(outbox_module, "KEEP_S", 0.0)
        outbox.acknowledge(0)
        outbox.send_again()
        assert (drain(outbox), outbox.memory_bytes) == ([], 0)


def drain_copy(outbox: Outbox) -> list[dict[str, Any]]:
    """Everything, without acknowledging."""
    return outbox.take(1 << 30)[1]


async def test_builders_wait_while_too_much_log_is_unacknowledged(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox", max_log_bytes=4 * CHUNK_BYTES) as outbox:
        for _ in range(5):
            outbox.log(KEY, b"x" * CHUNK_BYTES)
        assert not outbox.has_room(KEY)
        assert not outbox.has_room(OTHER)
        last, _, _ = outbox.take(2 * CHUNK_BYTES)
        outbox.acknowledge(last)
        assert not outbox.has_room(KEY)
        waiting = asyncio.create_task(outbox.wait_for_room(KEY))
        drain(outbox)
        assert outbox.has_room(KEY)
        await waiting


async def test_a_noisy_builder_waits_and_the_quiet_one_beside_it_goes_on(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox", max_lease_bytes=4 * CHUNK_BYTES) as outbox:
        outbox.log(OTHER, b"quiet\n")
        for _ in range(5):
            outbox.log(KEY, b"x" * CHUNK_BYTES)
        assert not outbox.has_room(KEY)
        assert outbox.has_room(OTHER)
        waiting = asyncio.create_task(outbox.wait_for_room(KEY))
        drain(outbox)
        assert outbox.has_room(KEY)
        await waiting


async def test_answers_without_log_stay_small(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox") as outbox:
        for number in range(1000):
            outbox.report(report((f"step{number}", 1)), within_s=0.0)
        _, events, _ = outbox.take(BULK)
        assert 1 < len(events) < 1000
        assert len(orjson.dumps(events)) <= SMALL_BATCH_BYTES
        assert len(drain(outbox)) == 1000


async def test_the_file_of_reports_holds_the_unacknowledged_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_REPORTS_BYTES", 1000)
    path = tmp_path / "outbox" / "reports.jsonl"
    async with opened(tmp_path / "outbox") as outbox:
        for number in range(20):
            outbox.report(report((f"step{number}", 1)), within_s=0.0)
        outbox.take(BULK)
        outbox.acknowledge(15)
        steps = [orjson.loads(line)["step"] for line in path.read_bytes().splitlines()]
        assert steps == [f"step{number}" for number in range(15, 20)]
        drain(outbox)
        assert path.read_bytes() == b""


async def test_files_of_an_earlier_worker_are_swept(tmp_path: Path) -> None:
    (tmp_path / "outbox" / "sub").mkdir(parents=True)
    (tmp_path / "outbox" / "old.log").write_text("old")
    async with opened(tmp_path / "outbox"):
        assert [path.name for path in (tmp_path / "outbox").iterdir()] == ["reports.jsonl"]


async def test_a_directory_that_cannot_be_used_is_said_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutboxError, match="cannot use the outbox directory"):
        Outbox(tmp_path / "file" / "outbox")


async def test_reports_are_synced_when_nobody_acknowledges_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "SYNC_S", 0.01)
    synced = asyncio.Event()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(os, "fsync", lambda _: loop.call_soon_threadsafe(synced.set))
    async with opened(tmp_path / "outbox") as outbox:
        outbox.report(report(), within_s=0.0)
        last, _, _ = outbox.take(BULK)
        outbox.acknowledge(last)
        await asyncio.sleep(0.05)
        assert not synced.is_set()
        outbox.report(report(("other", 1)), within_s=0.0)
        async with asyncio.timeout(PATIENCE_S):
            await synced.wait()
