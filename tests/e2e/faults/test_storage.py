"""What keeps things fails: the farm waits, says so, and goes on where it was."""

from __future__ import annotations

import subprocess
import time

import pytest

from scheduler import facts
from tests.e2e.faults.conftest import MakeFarm
from tests.support.proxy import Fault, proxy_in_thread
from tests.support.servers import MortalPostgres, S3Server

pytestmark = pytest.mark.e2e

#: How long the database is away, in seconds.
AWAY_S = 20.0
#: How long the object store fails in each of its two ways.
STORE_AWAY_S = 8.0


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
    mortal_postgres.end()
    gone = time.monotonic()
    one.until(lambda: "is away" in one.farm.drover("status").stdout)
    with subprocess.Popen(one.farm.build_command(file, "-A", "late"), env=one.farm.environment) as late:
        time.sleep(max(0.0, gone + AWAY_S - time.monotonic()))
        mortal_postgres.start()
        view = one.ended(submission)
        assert view["state"] == "succeeded", one.farm.log_path.read_text()[-3000:]
        assert late.wait() == 0
    assert "is away" not in one.farm.drover("status").stdout
    one.can_be_fetched(view)
    assert one.farm.stop() == 0
    one.nothing_ran_twice_without_a_reason()
    assert set(one.runs().values()) == {1}, one.runs()
    log = one.farm.log_path.read_text()
    assert "the journal's database is away" in log
    assert "the journal's database is back" in log
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
        waiting = one.farm.api(f"submissions/{submission}/steps?state=running")
        assert any("upload" in step["stage"] and place.url in step["phase"] for step in waiting), waiting
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
