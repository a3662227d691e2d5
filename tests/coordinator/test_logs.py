"""Logs keep what builders wrote, whatever order and however often it comes, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.errors import NotFoundError
from coordinator.stores.logs import OPEN_FILES, LogError, LogStore
from workers.wire.messages import LogChunk


@pytest.fixture
async def logs(tmp_path: Path) -> AsyncIterator[LogStore]:
    store = LogStore(tmp_path / "logs", max_bytes=1000)
    yield store
    await store.close()


def chunk(offset: int, data: bytes, step: str = "abc", attempt: int = 1) -> LogChunk:
    return LogChunk(step=step, attempt=attempt, offset=offset, data=data)


async def text(logs: LogStore, step: str = "abc", attempt: int = 1) -> bytes:
    return b"".join([part async for part in logs.read(step, attempt)])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=300), st.lists(st.tuples(st.integers(0, 299), st.integers(1, 100)), max_size=20))
async def test_repeats_of_any_part_give_the_log_once(
    logs: LogStore, data: bytes, repeats: list[tuple[int, int]]
) -> None:
    step = f"s{abs(hash((data, tuple(repeats))))}"
    at = 0
    for start, length in [*repeats, (0, len(data))]:
        known = min(start, at)
        part = data[known : start + length]
        await logs.append([chunk(known, part, step)])
        at = max(at, known + len(part))
    assert await text(logs, step) == data


async def test_a_log_ends_at_its_limit(logs: LogStore) -> None:
    await logs.append([chunk(0, b"x" * 900), chunk(900, b"y" * 900), chunk(1800, b"z")])
    assert await text(logs) == b"x" * 900 + b"y" * 100


async def test_many_logs_keep_few_files_open(logs: LogStore) -> None:
    for round_ in range(2):
        await logs.append([chunk(round_, b"x", f"step{n}") for n in range(OPEN_FILES + 20)])
    assert len(logs._open) == OPEN_FILES
    assert await text(logs, "step0") == b"xx"


async def test_a_tail_is_fit_for_a_terminal(logs: LogStore) -> None:
    await logs.append([chunk(0, b"".join(b"line %d\n" % n for n in range(30)) + b"\x1b[2Jred\r\n\xff\x00 \xc3\xa4\n")])
    tail = logs.tail("abc", 1, lines=3).split("\n")
    assert tail == ["line 29", "?[2Jred", "\N{REPLACEMENT CHARACTER}? ä"]
    assert logs.tail("abc", 2) == ""


async def test_a_follower_gets_what_comes_and_the_end(logs: LogStore) -> None:
    running = True
    parts: list[bytes] = []

    async def follow() -> None:
        async for part in logs.read("abc", 1, lambda: running):
            parts.append(part)  # noqa: PERF401 - what came so far is looked at while it comes

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(follow())
        await asyncio.sleep(0)
        for expected in (b"one", b"two"):
            await logs.append([chunk(sum(map(len, parts)), expected)])
            while not parts or parts[-1] != expected:  # noqa: ASYNC110 - the reader is another task
                await asyncio.sleep(0.001)
        running = False
        logs.wake("abc", 1)
    assert parts == [b"one", b"two"]
    assert logs._followers == {}


@pytest.mark.parametrize("step", ["../../etc/passwd", "/etc/passwd", "", ".", "..", "a/b", "a\0b", "x" * 300])
async def test_no_key_names_a_place_outside_the_logs(logs: LogStore, step: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        await logs.append([chunk(0, b"x", step)])
    assert list(tmp_path.rglob("*.log")) == []  # noqa: ASYNC240 - nothing else runs


async def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the directory should be")
    store = LogStore(tmp_path / "logs", max_bytes=10)
    with pytest.raises(LogError, match=r"cannot write build logs: Not a directory"):
        await store.append([chunk(0, b"x")])
    await store.close()


async def test_an_attempt_that_printed_nothing_has_an_empty_log(logs: LogStore) -> None:
    assert await text(logs, "silent") == b""
