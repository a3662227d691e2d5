"""What keeps things fails: the farm waits, says so, and goes on where it was."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from scheduler import facts
from tests.e2e.faults.conftest import Hurt, MakeFarm
from tests.support.disks import fill, small_disk
from tests.support.farm import nix_store
from tests.support.proxy import Fault, proxy_in_thread
from tests.support.servers import MortalPostgres, S3Server

pytestmark = pytest.mark.e2e

#: How long the database is away, in seconds.
AWAY_S = 20.0
#: How long the object store fails in each of its two ways.
STORE_AWAY_S = 5.0
#: Size of the disk that fills up, and of one output on it: larger than what is written at once, not compressible.
DISK_MIB = 56
OUTPUT_MIB = 10
#: Size of a disk that does not fill up; it takes no more memory than what is on it.
WORKERS_MIB = 8192


def test_a_database_that_is_gone_for_a_while_costs_nothing_but_the_wait(
    hurt: MakeFarm, mortal_postgres: MortalPostgres
) -> None:
    url = mortal_postgres.server.url(mortal_postgres.server.create_database())
    settings = "\n".join(f'{name}_database_url = "{url}"' for name in ("journal", "derivations", "cache"))
    one = hurt("left", "right", slots=2, settings=settings, journal_url=url)
    # Some end before it goes, some while it is away, some after it is back.
    file = one.graph(
        f"""
        short = n: step "short-${{toString n}}" [ ] "/bin/busybox sleep ${{toString n}}";
        long = step "long" [ ] "/bin/busybox sleep {AWAY_S + 4:.0f}";
        top = step "top" ([ long ] ++ map (n: step "over-${{toString n}}" [ (short n) ] ":") (range 1 9)) ":";
        late = step "late" [ (short 3) ] ":";
        """
    )
    submission = one.submit(file, "top")
    one.until(lambda: "short-2" in one.runs() and "long" in one.runs())
    mortal_postgres.kill()
    gone = time.monotonic()
    one.until(lambda: "the journal cannot be written" in one.farm.drover("status").stdout)
    with subprocess.Popen(one.farm.build_command(file, "-A", "late"), env=one.farm.environment) as late:
        time.sleep(max(0.0, gone + AWAY_S - time.monotonic()))
        mortal_postgres.start()
        view = one.ended(submission)
        assert view["state"] == "succeeded", one.farm.log_path.read_text()[-3000:]
        assert late.wait() == 0
    assert "trouble" not in one.farm.drover("status").stdout
    one.can_be_fetched(view)
    assert one.farm.stop() == 0
    one.nothing_ran_twice_without_a_reason()
    assert set(one.runs().values()) == {1}, one.runs()
    log = one.farm.log_path.read_text()
    assert "the journal cannot be written" in log
    assert "the journal can be written again" in log
    assert "Traceback" not in log


def test_an_object_store_that_fails_in_every_way_costs_no_build(
    hurt: MakeFarm, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxy_in_thread(s3_server.port) as proxy:
        place = s3_server.at("fails", proxy.endpoint)
        for name, value in place.environment.items():
            monkeypatch.setenv(name, value)
        one = hurt("left", "right", slots=2, settings=f'object_store_url = "{place.url}"')
        # Large ones go in parts, small ones in one request; what stands on them is fetched by the other worker.
        file = one.graph(
            """
            large = n: step "large-${toString n}" [ ]
              "/bin/busybox dd if=/dev/urandom of=$out bs=1M count=10 2> /dev/null; exit 0";
            small = n: step "small-${toString n}" [ ] "/bin/busybox sleep ${toString n}";
            over = n: step "over-${toString n}" [ (small n) (large (n - n / 3 * 3)) ] ":";
            top = step "top" (map over (range 1 9)) ":";
            """
        )
        submission = one.submit(file, "top")
        one.until(one.building)
        everything = 1_000_000
        for fault in (Fault.CUT, Fault.UNAVAILABLE):
            proxy.fail(fault, everything)
            one.until(lambda: proxy.failed > 3)
            time.sleep(STORE_AWAY_S)
            assert one.view(submission)["state"] == "running"
        assert any(place.url in phase for phase in _phases(one, submission))
        for fault in (Fault.CUT_BODY, Fault.CUT_ANSWER):
            proxy.fail(fault, 5)
            one.until(lambda: proxy.failed == 5 or one.view(submission)["state"] != "running")
        view = one.ended(submission)
        assert view["state"] == "succeeded", one.farm.log_path.read_text()[-3000:]
        one.can_be_fetched(view)
        checked = one.farm.drover("cache", "verify", "--full", "--json")
        assert '"broken":0' in checked.stdout, checked.stdout
        assert one.farm.stop() == 0
    one.nothing_ran_twice_without_a_reason()
    assert set(one.runs().values()) == {1}, one.runs()
    revoked = [fact.failure for fact in one.journal() if isinstance(fact, facts.LeaseRevoked)]
    assert [failure for failure in revoked if failure.kind != "returned"] == []


def test_a_full_disk_of_the_cache_shows_nothing_broken_and_room_is_all_that_it_takes(
    hurt: MakeFarm, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", DISK_MIB) as disk:
        one = hurt("left", "right", slots=1, settings=f'object_store_url = "{(disk / "objects").as_uri()}"')
        file = one.graph(
            f"""
            large = n: step "large-${{toString n}}" [ ]
              "/bin/busybox dd if=/dev/urandom of=$out bs=1M count={OUTPUT_MIB} 2> /dev/null; exit 0";
            early = large 0;
            top = step "top" (map large (range 1 2)) ":";
            sourced = step "sourced" [ "${{./source}}" ] ":";
            """
        )
        (tmp_path / "source").write_bytes(os.urandom(OUTPUT_MIB << 20))
        early = one.ended(one.submit(file, "early"))
        fill(disk / "rubbish", leave_mib=OUTPUT_MIB // 2)
        submission = one.submit(file, "top")
        one.until(lambda: sum("no room is left" in phase for phase in _phases(one, submission)) == 2)
        assert one.view(submission)["state"] == "running"

        # Nothing half is there, what was there is whole, and who brings more is told in one sentence.
        one.until(lambda: not list((disk / "objects" / "incoming").iterdir()))
        assert '"broken":0' in one.farm.drover("cache", "verify", "--full", "--json").stdout
        one.can_be_fetched(early)
        sent = one.farm.build(file, "-A", "sourced")
        assert sent.returncode != 0
        assert "no room is left; make some" in sent.stderr
        added = nix_store(one.farm.eval_store, "--add", str(tmp_path / "source")).stdout.strip()
        push = ("cache", "push", "--store", one.farm.eval_store, added)
        pushed = one.farm.drover(*push)
        assert pushed.returncode != 0
        assert "no room is left; make some" in pushed.stderr

        (disk / "rubbish").unlink()
        view = one.ended(submission)
        assert view["state"] == "succeeded", one.farm.log_path.read_text()[-3000:]
        one.can_be_fetched(view)
        assert one.farm.drover(*push).returncode == 0
        assert one.farm.stop() == 0
    one.nothing_ran_twice_without_a_reason()
    assert set(one.runs().values()) == {1}, one.runs()


def test_a_full_disk_of_the_coordinator_holds_the_farm_up_and_ruins_nothing(hurt: MakeFarm, tmp_path: Path) -> None:
    # Databases, logs and locks are on the small one; what workers, Ray and the cache keep is not.
    with small_disk(tmp_path / "farm", DISK_MIB) as disk, small_disk(disk / "workers", WORKERS_MIB):
        for name in ("ray", "objects"):
            (disk / "workers" / name).mkdir()
            (disk / name).symlink_to(disk / "workers" / name)
        one = hurt("left", "right", slots=2)
        file = one.graph(
            """
            slow = name: n: step "${name}-${toString n}" [ ] "/bin/busybox sleep ${toString n}";
            top = step "top" (map (n: step "over-${toString n}" [ (slow "short" n) ] ":") (range 1 6)) ":";
            late = step "late" (map (slow "later") (range 1 6)) ":";
            """
        )
        submission = one.submit(file, "top")
        one.until(one.building)
        fill(disk / "rubbish")
        one.until(lambda: "disk is full" in one.farm.drover("status").stdout)
        assert one.view(submission)["state"] == "running"
        (disk / "rubbish").unlink()
        view = one.ended(submission)
        assert view["state"] == "succeeded", one.farm.log_path.read_text()[-3000:]
        one.can_be_fetched(view)

        # Started on a full disk, or on one that cannot be written, it says so in a sentence and ends.
        late = one.submit(file, "late")
        one.until(one.building)
        fill(disk / "rubbish")
        one.until(lambda: "disk is full" in one.farm.drover("status").stdout)
        one.farm.kill()
        fill(disk / "more")
        assert "full" in _last_words(one)
        remount = ["mount", "-o"]
        subprocess.run([*remount, "remount,ro", disk], check=True)
        assert "Read-only file system" in _last_words(one)
        subprocess.run([*remount, "remount,rw", disk], check=True)
        (disk / "rubbish").unlink()
        (disk / "more").unlink()
        one.farm.start()
        after = one.ended(late)
        assert after["state"] == "succeeded", one.farm.log_path.read_text()[-3000:]
        assert one.view(submission) == view
        one.can_be_fetched(after)
        assert one.farm.stop() == 0
        one.nothing_ran_twice_without_a_reason()
        assert set(one.runs().values()) == {1}, one.runs()
        assert "Traceback" not in one.farm.log_path.read_text()


def _last_words(one: Hurt) -> str:
    """Start a farm that cannot start; returns the one line that it says."""
    before = one.farm.log_path.stat().st_size
    with pytest.raises(RuntimeError):
        one.farm.start()
    [line] = one.farm.log_path.read_bytes()[before:].decode().splitlines()
    assert line.startswith("drover: "), line
    return line


def _phases(one: Hurt, submission: str) -> list[str]:
    return [step["phase"] for step in one.farm.api(f"submissions/{submission}/steps?state=running")]
