"""A worker whose disk is full is not the package's fault: the build goes elsewhere, the worker rests and returns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler import facts
from scheduler.model import FailureKind
from tests.e2e.faults.conftest import FarmUnderFault, MakeFarm
from tests.support.disks import fill, small_disk

pytestmark = pytest.mark.e2e

DISK_MIB = 128
FLOOR_MIB = 24


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """All that the worker `small` keeps, on a small disk of its own."""
    with small_disk(tmp_path / "farm" / "workers" / "small", DISK_MIB) as place:
        yield place


def test_a_full_disk_moves_the_build_and_rests_the_worker(disk: Path, hurt: MakeFarm) -> None:
    one = hurt("small", "large", slots=1, min_free_mb=FLOOR_MIB)
    file = one.graph(
        f"""
        greedy = step "greedy" [ ] "/bin/busybox head -c {2 * DISK_MIB}000000 /dev/zero > $out || exit 1";
        modest = step "modest" [ ] ":";
        """
    )
    assert one.farm.drover("drain", "large").returncode == 0
    greedy = one.submit(file, "greedy")
    one.until(lambda: "disk" in _step(one, greedy)["waiting_for"])
    assert one.farm.drover("drain", "large", "--off").returncode == 0
    view = one.ended(greedy)
    assert view["state"] == "succeeded"

    one.until(lambda: _worker(one, "small")["state"] == "online")
    fill(disk / "rubbish", leave_mib=FLOOR_MIB // 2)
    one.until(lambda: f"less than {FLOOR_MIB} MiB are free" in _worker(one, "small")["reason"])
    assert _worker(one, "small")["state"] == "quarantined"
    modest = one.ended(one.submit(file, "modest"))
    assert modest["state"] == "succeeded"
    (disk / "rubbish").unlink()
    one.until(lambda: _worker(one, "small")["state"] == "online")

    one.can_be_fetched(view)
    assert one.farm.stop() == 0
    one.nothing_ran_twice_without_a_reason()
    # More than one where the other worker came back later than the back-off ended.
    assert {(fact.builder, fact.failure.kind) for fact in one.ended_early()} == {("small", FailureKind.DISK_LOW)}
    modest_ran_on = [f.builder for f in one.journal() if isinstance(f, facts.StepLeased) and "modest" in f.lease.step]
    assert modest_ran_on == ["large"]


def _worker(one: FarmUnderFault, name: str) -> dict[str, Any]:
    [worker] = [worker for worker in one.farm.api("workers") if worker["name"] == name]
    return dict(worker)


def _step(one: FarmUnderFault, submission: str) -> dict[str, Any]:
    [step] = one.farm.api(f"submissions/{submission}/steps")
    return dict(step)
