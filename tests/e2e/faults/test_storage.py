"""A database and an object store that fail: the farm waits, says so, and goes on where it was."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.faults.conftest import FarmUnderFault, running_farm, running_phases
from tests.support.proxy import Fault, FaultyProxy, proxy_in_thread
from tests.support.servers import MortalPostgres, S3Server

pytestmark = pytest.mark.e2e

#: How long the database is away, in seconds.
AWAY_S = 20.0
#: How long the object store fails in each of its two ways.
STORE_AWAY_S = 5.0


@dataclass(frozen=True, slots=True)
class Kept:
    """A farm, and what keeps its things."""

    one: FarmUnderFault
    database: MortalPostgres
    proxy: FaultyProxy
    store_url: str


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Kept]:
    """One farm for both: neither failure leaves anything behind that concerns the other."""
    # The name is short: a socket's path has at most 107 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="drover-pg-") as directory,
        MortalPostgres(Path(directory), durable=True) as database,
        proxy_in_thread(s3_server.port) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        url = database.server.url(database.server.create_database())
        place = s3_server.at("fails", proxy.endpoint)
        for name, value in place.environment.items():
            patch.setenv(name, value)
        settings = [f'{name}_database_url = "{url}"' for name in ("journal", "derivations", "cache")]
        settings.append(f'object_store_url = "{place.url}"')
        root = tmp_path_factory.mktemp("kept")
        with running_farm(root, "left", "right", settings="\n".join(settings), journal_url=url) as one:
            yield Kept(one, database, proxy, place.url)


def test_a_database_that_is_gone_for_a_while_costs_nothing_but_the_wait(kept: Kept) -> None:
    one = kept.one
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
    kept.database.kill()
    gone = time.monotonic()
    one.until(lambda: "the journal cannot be written" in one.farm.drover("status").stdout)
    with subprocess.Popen(one.farm.build_command(file, "-A", "late"), env=one.farm.environment) as late:
        time.sleep(max(0.0, gone + AWAY_S - time.monotonic()))
        kept.database.start()
        view = one.ended(submission)
        assert view["state"] == "succeeded", one.farm.log_path.read_text()[-3000:]
        assert late.wait() == 0
    # Each part of the farm looks at its own database again in its own time.
    one.until(lambda: "trouble" not in one.farm.drover("status").stdout)
    one.can_be_fetched(view)
    assert set(one.runs().values()) == {1}, one.runs()
    log = one.farm.log_path.read_text()
    assert "the journal cannot be written" in log
    assert "the journal can be written again" in log
    assert "Traceback" not in log


def test_an_object_store_that_fails_in_every_way_costs_no_build(kept: Kept) -> None:
    one = kept.one
    # Large ones go in parts, small ones in one request; what stands on them is fetched by the other worker.
    file = one.graph(
        """
        large = n: step "large-${toString n}" [ ]
          "/bin/busybox dd if=/dev/urandom of=$out bs=1M count=10 2> /dev/null; exit 0";
        small = n: step "small-${toString n}" [ ] "/bin/busybox sleep ${toString n}";
        over = n: step "upon-${toString n}" [ (small n) (large (n - n / 3 * 3)) ] ":";
        top = step "crown" (map over (range 1 9)) ":";
        """
    )
    submission = one.submit(file, "top")
    one.until(one.building)
    everything = 1_000_000
    for fault in (Fault.CUT, Fault.UNAVAILABLE):
        kept.proxy.fail(fault, everything)
        one.until(lambda: kept.proxy.failed > 3)
        time.sleep(STORE_AWAY_S)
        assert one.view(submission)["state"] == "running"
    one.until(lambda: any(kept.store_url in phase for phase in running_phases(one, submission)))
    for fault in (Fault.CUT_BODY, Fault.CUT_ANSWER):
        kept.proxy.fail(fault, 5)
        one.until(lambda: kept.proxy.failed == 5 or one.view(submission)["state"] != "running")
    view = one.ended(submission)
    assert view["state"] == "succeeded", one.farm.log_path.read_text()[-3000:]
    one.can_be_fetched(view)
    checked = one.farm.drover("cache", "verify", "--full", "--json")
    assert '"broken":0' in checked.stdout, checked.stdout
    assert set(one.runs().values()) == {1}, one.runs()
    assert [fact.failure for fact in one.ended_early() if fact.failure.kind != "returned"] == []


def test_a_farm_whose_stores_failed_ends_in_order_and_ran_nothing_twice_without_a_reason(kept: Kept) -> None:
    kept.one.is_whole_at_the_end()
