"""Logs keep what builders wrote, whatever order and however often it comes, and nothing else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.errors import NotFoundError
from coordinator.stores.log_archive import LogArchive
from coordinator.stores.logs import OPEN_FILES, LogError, LogStore
from infra.objects.store import LocalObjectStore
from tests.support.patience import PATIENCE_S
from workers.wire.messages import LogChunk


@pytest.fixture
async def logs(tmp_path: Path) -> AsyncIterator[LogStore]:
    store = LogStore(tmp_path / "logs", 1000, archive_in(tmp_path))
    yield store
    await store.close()


def archive_in(directory: Path) -> LogArchive:
    return LogArchive(LocalObjectStore(directory / "objects"), max_bytes=1000)


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
    assert logs.open_files == OPEN_FILES
    assert await text(logs, "step0") == b"xx"


async def test_a_tail_is_fit_for_a_terminal(logs: LogStore) -> None:
    await logs.append([chunk(0, b"".join(b"line %d\n" % n for n in range(30)) + b"\x1b[2Jred\r\n\xff\x00 \xc3\xa4\n")])
    tail = logs.tail("abc", 1, lines=3).split("\n")
    assert tail == ["line 29", "red", "\N{REPLACEMENT CHARACTER} ä"]
    assert logs.tail("abc", 2) == ""


async def test_a_follower_gets_what_comes_and_the_end(logs: LogStore) -> None:
    running = True
    parts: list[bytes] = []

    async def follow() -> None:
        async for part in logs.read("abc", 1, lambda: running):
            parts.append(part)  # noqa: PERF401 - what came so far is looked at while it comes

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        group.create_task(follow())
        await asyncio.sleep(0)
        for expected in (b"one", b"two"):
            await logs.append([chunk(sum(map(len, parts)), expected)])
            while not parts or parts[-1] != expected:  # noqa: ASYNC110 - the reader is another task
                await asyncio.sleep(0.001)
        running = False
        logs.wake("abc", 1)
    assert parts == [b"one", b"two"]
    assert logs.followed == 0


@pytest.mark.parametrize("step", ["../../etc/passwd", "/etc/passwd", "", ".", "..", "a/b", "a\0b", "x" * 300])
async def test_no_key_names_a_place_outside_the_logs(logs: LogStore, step: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        await logs.append([chunk(0, b"x", step)])
    assert list(tmp_path.rglob("*.log")) == []  # noqa: ASYNC240 - nothing else runs


async def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the directory should be")
    store = LogStore(tmp_path / "logs", 10, archive_in(tmp_path))
    with pytest.raises(LogError, match=r"cannot write build logs: Not a directory"):
        await store.append([chunk(0, b"x")])
    await store.close()


async def test_an_attempt_that_printed_nothing_has_an_empty_log(logs: LogStore) -> None:
    assert await text(logs, "silent") == b""


async def archive_all(logs: LogStore, *, keep_tail: bool = False) -> None:
    for log in await logs.local():
        await logs.archive(log, keep_tail=keep_tail)


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


async def test_an_archived_log_is_one_compressed_object_and_reads_as_before(logs: LogStore, tmp_path: Path) -> None:
    await logs.append([chunk(0, b"building\n" * 100)])
    await archive_all(logs)
    assert files_in(tmp_path / "logs") == []
    [packed] = (tmp_path / "objects" / "logs").rglob("*.zst")
    assert packed.stat().st_size < 100
    assert await text(logs) == b"building\n" * 100
    # The copy that the reader made goes again, and nothing is stored a second time.
    before = packed.stat().st_mtime_ns
    await archive_all(logs)
    assert (files_in(tmp_path / "logs"), packed.stat().st_mtime_ns) == ([], before)


async def test_another_coordinator_reads_what_the_first_one_archived(logs: LogStore, tmp_path: Path) -> None:
    await logs.append([chunk(0, b"first\nsecond\n")])
    await archive_all(logs)
    other = LogStore(tmp_path / "elsewhere", 1000, archive_in(tmp_path))
    assert await text(other) == b"first\nsecond\n"
    await other.keep_tail("abc", 1)
    assert other.tail("abc", 1, lines=1) == "second"
    await other.close()


async def test_a_late_chunk_brings_the_log_back_before_it_is_written(logs: LogStore) -> None:
    await logs.append([chunk(0, b"early ")])
    await archive_all(logs)
    await logs.append([chunk(6, b"late")])
    await archive_all(logs)
    assert await text(logs) == b"early late"


async def test_a_log_that_grows_while_it_is_archived_stays(logs: LogStore) -> None:
    await logs.append([chunk(0, b"one ")])
    [seen] = await logs.local()
    await logs.append([chunk(4, b"two")])
    await logs.archive(seen, keep_tail=False)
    assert await text(logs) == b"one two"


async def test_the_last_lines_of_a_failed_attempt_stay_on_the_machine(logs: LogStore, tmp_path: Path) -> None:
    await logs.append([chunk(0, b"a\nb\nboom\n")])
    await archive_all(logs, keep_tail=True)
    assert files_in(tmp_path / "logs") == ["1.tail"]
    assert logs.tail("abc", 1, lines=2) == "b\nboom"
    [tail] = await logs.local()
    await logs.forget_tail(tail)
    assert list((tmp_path / "logs").iterdir()) == []


async def test_an_archived_object_that_is_no_log_is_one_sentence_and_a_bomb_is_cut(
    logs: LogStore, tmp_path: Path
) -> None:
    await logs.append([chunk(0, b"x"), chunk(0, b"y", "bomb")])
    await archive_all(logs)
    for packed in (tmp_path / "objects" / "logs").rglob("*.zst"):
        bomb = "bomb" in str(packed)
        packed.write_bytes(zstandard.compress(b"0" * 10_000_000) if bomb else b"no zstd")
    with pytest.raises(LogError, match=r"cannot read an archived log: .* is no log"):
        await text(logs)
    assert await text(logs, "bomb") == b"0" * 1000


async def test_names_that_object_keys_cannot_have_are_archived_under_others(logs: LogStore) -> None:
    steps = ("abc-file?x=1", "abc-file=3Fx=1")
    await logs.append([chunk(0, step.encode(), step) for step in steps])
    await archive_all(logs)
    assert [(await text(logs, step)).decode() for step in steps] == list(steps)


async def test_old_logs_are_deleted_from_the_archive(logs: LogStore, tmp_path: Path) -> None:
    await logs.append([chunk(0, b"x"), chunk(0, b"y", "new")])
    await archive_all(logs)
    [old] = (tmp_path / "objects" / "logs").rglob("abc/*.zst")
    os.utime(old, (1000, 1000))
    assert await logs.expire(2000) == 1
    assert (await text(logs), await text(logs, "new")) == (b"", b"y")


async def test_a_log_that_is_wanted_while_it_is_archived_stays_for_its_reader(logs: LogStore) -> None:
    await logs.append([chunk(0, b"one")])
    [log] = await logs.local()
    os.utime(log.path, (1000, 1000))
    [seen] = await logs.local()
    path = await logs.file("abc", 1)
    await logs.archive(seen, keep_tail=False)
    assert path is not None
    assert path.read_bytes() == b"one"


async def test_the_last_lines_of_a_failure_are_had_without_keeping_its_log(logs: LogStore, tmp_path: Path) -> None:
    await logs.append([chunk(0, b"boom\n")])
    await archive_all(logs)
    await logs.keep_tail("abc", 1)
    assert (files_in(tmp_path / "logs"), logs.tail("abc", 1)) == (["1.tail"], "boom")
