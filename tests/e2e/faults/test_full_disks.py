"""Disks that fill up, the cache's and the coordinator's: the farm says so, waits for room, and goes on where it was."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.faults.conftest import FarmUnderFault, running_farm, running_phases
from tests.support.disks import fill, small_disk
from tests.support.farm import nix_store

pytestmark = pytest.mark.e2e

#: Size of the disks that fill up, and of one output on it: larger than what is written at once, not compressible.
DISK_MIB = 56
OUTPUT_MIB = 10
#: Size of a disk that does not fill up; it takes no more memory than what is on it.
WORKERS_MIB = 8192


@dataclass(frozen=True, slots=True)
class Cramped:
    """A farm, the disk of its cache, and that of its databases, logs and locks."""

    one: FarmUnderFault
    cache: Path
    disk: Path


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cramped]:
    root = tmp_path_factory.mktemp("cramped")
    # What workers and Ray keep is on neither of the small ones.
    with (
        small_disk(root / "cache", DISK_MIB) as cache,
        small_disk(root / "farm", DISK_MIB) as disk,
        small_disk(disk / "workers", WORKERS_MIB),
    ):
        (disk / "workers" / "ray").mkdir()
        (disk / "ray").symlink_to(disk / "workers" / "ray")
        settings = f'object_store_url = "{(cache / "objects").as_uri()}"'
        with running_farm(root, "left", "right", settings=settings) as one:
            yield Cramped(one, cache, disk)


def test_a_full_disk_of_the_cache_shows_nothing_broken_and_room_is_all_that_it_takes(cramped: Cramped) -> None:
    one = cramped.one
    file = one.graph(
        f"""
        large = n: step "large-${{toString n}}" [ ]
          "/bin/busybox dd if=/dev/urandom of=$out bs=1M count={OUTPUT_MIB} 2> /dev/null; exit 0";
        early = large 0;
        top = step "top" (map large (range 1 2)) ":";
        sourced = step "sourced" [ "${{./source}}" ] ":";
        """
    )
    (one.root / "source").write_bytes(os.urandom(OUTPUT_MIB << 20))
    early = one.ended(one.submit(file, "early"))
    fill(cramped.cache / "rubbish", leave_mib=OUTPUT_MIB // 2)
    submission = one.submit(file, "top")
    one.until(lambda: sum("no room is left" in phase for phase in running_phases(one, submission)) == 2)
    assert one.view(submission)["state"] == "running"

    # Nothing half is there, what was there is whole, and who brings more is told in one sentence.
    one.until(lambda: not list((cramped.cache / "objects" / "incoming").iterdir()))
    assert '"broken":0' in one.farm.drover("cache", "verify", "--full", "--json").stdout
    one.can_be_fetched(early)
    sent = one.farm.build(file, "-A", "sourced")
    assert sent.returncode != 0
    assert "no room is left; make some" in sent.stderr
    added = nix_store(one.farm.eval_store, "--add", str(one.root / "source")).stdout.strip()
    push = ("cache", "push", "--store", one.farm.eval_store, added)
    pushed = one.farm.drover(*push)
    assert pushed.returncode != 0
    assert "no room is left; make some" in pushed.stderr

    (cramped.cache / "rubbish").unlink()
    view = one.ended(submission)
    assert view["state"] == "succeeded", one.farm.log_path.read_text()[-3000:]
    one.can_be_fetched(view)
    assert one.farm.drover(*push).returncode == 0
    assert set(one.runs().values()) == {1}, one.runs()


def test_a_full_disk_of_the_coordinator_holds_the_farm_up_and_ruins_nothing(cramped: Cramped) -> None:
    one = cramped.one
    file = one.graph(
        """
        slow = name: n: step "${name}-${toString n}" [ ] "/bin/busybox sleep ${toString n}";
        top = step "crown" (map (n: step "over-${toString n}" [ (slow "short" n) ] ":") (range 1 6)) ":";
        late = step "late" (map (slow "later") (range 1 6)) ":";
        """
    )
    submission = one.submit(file, "top")
    one.until(one.building)
    fill(cramped.disk / "rubbish")
    one.until(lambda: "disk is full" in one.farm.drover("status").stdout)
    assert one.view(submission)["state"] == "running"
    (cramped.disk / "rubbish").unlink()
    view = one.ended(submission)
    assert view["state"] == "succeeded", one.farm.log_path.read_text()[-3000:]
    one.can_be_fetched(view)

    # Started on a full disk, or on one that cannot be written, it says so in a sentence and ends.
    late = one.submit(file, "late")
    one.until(one.building)
    fill(cramped.disk / "rubbish")
    one.until(lambda: "disk is full" in one.farm.drover("status").stdout)
    one.farm.kill()
    fill(cramped.disk / "more")
    assert "full" in _last_words(one)
    remount = ["mount", "-o"]
    subprocess.run([*remount, "remount,ro", cramped.disk], check=True)
    assert "Read-only file system" in _last_words(one)
    subprocess.run([*remount, "remount,rw", cramped.disk], check=True)
    (cramped.disk / "rubbish").unlink()
    (cramped.disk / "more").unlink()
    one.farm.start()
    after = one.ended(late)
    assert after["state"] == "succeeded", one.farm.log_path.read_text()[-3000:]
    assert one.view(submission) == view
    one.can_be_fetched(after)
    assert set(one.runs().values()) == {1}, one.runs()
    assert "Traceback" not in one.farm.log_path.read_text()


def test_a_farm_that_had_no_room_ends_in_order_and_ran_nothing_twice_without_a_reason(cramped: Cramped) -> None:
    cramped.one.is_whole_at_the_end()


def _last_words(one: FarmUnderFault) -> str:
    """Start a farm that cannot start; returns the one line that it says."""
    before = one.farm.log_path.stat().st_size
    with pytest.raises(RuntimeError):
        one.farm.start()
    [line] = one.farm.log_path.read_bytes()[before:].decode().splitlines()
    assert line.startswith("drover: "), line
    return line
