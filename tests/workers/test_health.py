"""A worker that cannot build well says so by itself, and says so no longer once it can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import fill, small_disk
from workers.agent import health
from workers.agent.agent import Agent
from workers.agent.health import Room, too_little
from workers.agent.settings import WorkerSettings
from workers.wire.messages import Failed, Hello, Report, Succeeded

from .conftest import AgentHarness, ReportReader, drv, order

MIB = 1 << 20
#: The disk of a worker in these tests.
DISK_MIB = 96


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(health, "TRIAL_AGAIN_S", 0.3)
    monkeypatch.setattr(health, "FULL_BYTES", 2 * MIB)


@pytest.fixture
def disk(root: Path) -> Iterator[Path]:
    """The directory of worker `one`, on a small disk of its own."""
    with small_disk(root / "one", DISK_MIB) as place:
        yield place


async def _until_unfit(reader: ReportReader, words: str) -> None:
    await reader.until(
        lambda: bool(reader.batches) and words in reader.batches[-1].unfit and bool(reader.batches[-1].unfit)
    )


async def _until_fit(reader: ReportReader) -> None:
    await reader.until(lambda: bool(reader.batches) and not reader.batches[-1].unfit)


def _reason(report: Report) -> str:
    assert isinstance(report.result, Failed), report.result
    return report.result.reason


async def test_a_worker_that_cannot_build_says_so_from_the_start_and_recovers_by_itself(
    bench: AgentHarness, root: Path
) -> None:
    broken = root / "broken"
    daemon = root / "nix-daemon"
    daemon.write_text(
        f'#!/bin/sh\nif [ -e {broken} ]; then set -- "$@" --option sandbox-paths /no/such/file; fi\n'
        'exec nix-daemon "$@"\n'
    )
    daemon.chmod(0o755)
    broken.touch()
    agent = Agent(
        WorkerSettings(name="one", state_dir=root / "state", store=str(root / "store"), slots=1, nix_daemon=str(daemon))
    )
    async with agent:
        hello = Hello.model_validate(await agent.hello(bench.farm.dump()))
        assert "a trial build fails" in hello.unfit
        assert "/no/such/file" in hello.unfit
        broken.unlink()
        reader = ReportReader(agent)
        await _until_fit(reader)
        [report] = await reader.build(order(drv("works", "echo > $out")))
        assert isinstance(report.result, Succeeded)


async def test_a_build_that_breaks_with_its_machine_puts_the_machine_to_the_test(bench: AgentHarness) -> None:
    reader = await bench.agent(trial_every_s=100_000)
    [report] = await reader.build(order(drv("unsuited", "echo > $out", system="m68k-linux")))
    assert _reason(report) == "infrastructure"
    # The next trial is a day away, but for the doubt; it succeeds, so the worker stays fit.
    trials = bench.root / "one" / "store" / "nix" / "store"
    assert len(list(trials.glob("*-drover-canary-plain"))) == 1
    await reader.until(lambda: len(list(trials.glob("*-drover-canary-plain"))) == 2)
    assert not reader.batches[-1].unfit


async def test_a_worker_whose_disk_runs_low_takes_no_work_until_there_is_room(bench: AgentHarness, disk: Path) -> None:
    reader = await bench.agent(min_free_mb=32, collect_garbage=False)
    await reader.hear(0.1)
    assert not reader.batches[-1].unfit
    fill(disk / "rubbish", leave_mib=20)
    await _until_unfit(reader, "less than 32 MiB are free on the disk of")
    (disk / "rubbish").unlink()
    await _until_fit(reader)


async def test_a_store_of_the_workers_own_makes_room_by_itself(bench: AgentHarness, disk: Path) -> None:
    reader = await bench.agent(min_free_mb=48)
    large = order(drv("large", "head -c 60000000 /dev/urandom > $out"))
    [report] = await reader.build(large)
    assert isinstance(report.result, Succeeded)
    [output] = report.result.outputs
    assert (disk / "store" / output.path.lstrip("/")).exists()
    await _until_unfit(reader, "MiB are free")
    await _until_fit(reader)
    assert not (disk / "store" / output.path.lstrip("/")).exists()
    # The coordinator takes nothing for there that was.
    assert reader.batches[-1].collections >= 1


@pytest.mark.parametrize(
    ("name", "after"),
    [("fails", "exit 1"), ("tidies-up", "sleep 1; rm -f $out; exit 1")],
)
@pytest.mark.usefixtures("disk")
async def test_a_build_that_runs_into_a_full_disk_is_not_to_blame(bench: AgentHarness, name: str, after: str) -> None:
    reader = await bench.agent(min_free_mb=0)
    greedy = order(drv(name, f"head -c {2 * DISK_MIB * MIB} /dev/zero > $out || {{ {after}; }}"))
    [report] = await reader.build(greedy)
    assert _reason(report) == "disk_low"
    assert isinstance(report.result, Failed)
    assert "the worker's disk is full" in report.result.message
    [after_it] = await reader.build(order(drv("small", "echo > $out")))
    assert isinstance(after_it.result, Succeeded)


@pytest.mark.usefixtures("disk")
async def test_a_failure_on_a_disk_with_room_is_the_packages_own(bench: AgentHarness) -> None:
    reader = await bench.agent(min_free_mb=0)
    [report] = await reader.build(order(drv("wrong", "echo 'No space left on device'; exit 1")))
    assert _reason(report) == "permanent"


def test_few_inodes_are_as_bad_as_few_bytes() -> None:
    place = Path("/store")
    low = too_little([Room(place, 1, 1 << 40, 0.5), Room(place, 2, 1 << 40, 0.001)], MIB)
    assert low is not None
    assert low[0].device == 2
    assert "less than 1% of the inodes are free on the disk of /store; make room" in low[1]
    assert too_little([Room(place, 1, MIB, 1.0)], MIB) is None
