"""The archiver moves logs of ended attempts, whatever it missed, and loses none while the object store is away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.engine.log_archiver import SETTLE_S, LogArchiver
from coordinator.stores.log_archive import LogArchive
from coordinator.stores.logs import LogStore
from infra.objects.store import LocalObjectStore
from scheduler import events as e
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
from workers.wire.messages import LogChunk

LINUX = Requirements("x86_64-linux")
BUILDER = BuilderId("w")
STEP = StepKey("abc-step")
LEASE = LeaseId(STEP, 1)


class Later:
    """A clock that runs ahead of the files' times by more than the archiver waits."""

    def now(self) -> float:
        return 4e9


@pytest.fixture
def farm() -> Farm:
    """A farm with one step under its first lease."""
    farm = Farm()
    farm.handle(e.SubmissionReceived(SubmissionId("s"), (STEP,), (StepSpec(STEP, (Recipe(LINUX),)),)), Instant(1.0))
    farm.handle(e.BuilderJoined(BuilderSpec(BUILDER, "life", frozenset({"x86_64-linux"})), capacity=1), Instant(2.0))
    return farm


@pytest.fixture
async def logs(tmp_path: Path) -> AsyncIterator[LogStore]:
    """A store with the log of the lease."""
    store = LogStore(tmp_path / "logs", 1000, LogArchive(LocalObjectStore(tmp_path / "objects"), 1000))
    await store.append([LogChunk(step=STEP, attempt=1, offset=0, data=b"one\ntwo\n")])
    yield store
    await store.close()


async def names(logs: LogStore) -> list[str]:
    return [log.path.name for log in await logs.local()]


async def text(logs: LogStore) -> bytes:
    return b"".join([part async for part in logs.read(STEP, 1)])


async def test_the_log_of_a_running_attempt_stays_and_goes_once_it_has_ended(farm: Farm, logs: LogStore) -> None:
    archiver = LogArchiver(logs, farm, Later(), keep_days=0)
    await archiver.sweep()
    assert await names(logs) == ["1.log"]
    farm.handle(e.BuildSucceeded(LEASE, BUILDER, b""), Instant(3.0))
    await archiver.sweep()
    assert await names(logs) == ["1.log"], "it is not yet published"
    farm.handle(e.OutputsPublished(LEASE), Instant(4.0))
    await archiver.sweep()
    assert await names(logs) == []
    assert await text(logs) == b"one\ntwo\n"


async def test_a_lost_attempt_is_archived_too_but_not_while_late_chunks_may_come(farm: Farm, logs: LogStore) -> None:
    farm.handle(e.BuilderLost(BUILDER, "life", "the machine is gone"), Instant(3.0))
    [log] = await logs.local()

    class Soon:
        def now(self) -> float:
            return log.written_at + SETTLE_S - 1

    await LogArchiver(logs, farm, Soon(), keep_days=0).sweep()
    assert await names(logs) == ["1.log"]
    await LogArchiver(logs, farm, Later(), keep_days=0).sweep()
    assert await names(logs) == []


async def test_a_late_repeat_from_the_beginning_leaves_an_archived_log_whole(farm: Farm, logs: LogStore) -> None:
    archiver = LogArchiver(logs, farm, Later(), keep_days=0)
    farm.handle(e.BuilderLost(BUILDER, "life", "the machine is gone"), Instant(3.0))
    await archiver.sweep()
    await logs.append([LogChunk(step=STEP, attempt=1, offset=0, data=b"one\n")], {(STEP, 1)})
    await archiver.sweep()
    assert await text(logs) == b"one\ntwo\n"


async def test_a_failure_keeps_its_last_lines_until_the_step_is_built_again(farm: Farm, logs: LogStore) -> None:
    archiver = LogArchiver(logs, farm, Later(), keep_days=0)
    farm.handle(e.BuildFailed(LEASE, BUILDER, Failure(FailureKind.PERMANENT, "no")), Instant(3.0))
    await archiver.sweep()
    assert await names(logs) == ["1.tail"]
    assert logs.tail(STEP, 1, lines=1) == "two"
    farm.handle(e.RetryAsked(STEP), Instant(4.0))
    await archiver.sweep()
    assert await names(logs) == []


async def test_an_object_store_that_is_away_keeps_logs_here_and_is_shown_until_it_is_back(
    farm: Farm, logs: LogStore, tmp_path: Path
) -> None:
    archiver = LogArchiver(logs, farm, Later(), keep_days=0)
    farm.handle(e.BuildFailed(LEASE, BUILDER, Failure(FailureKind.PERMANENT, "no")), Instant(3.0))
    (tmp_path / "objects").write_text("a file where the store should be")
    await archiver.sweep()
    assert "build logs stay in the state directory" in archiver.trouble
    assert await names(logs) == ["1.log"]
    (tmp_path / "objects").unlink()
    await archiver.sweep()
    assert (archiver.trouble, await names(logs)) == ("", ["1.tail"])
