"""What keeps things fails: the farm waits, says so, and goes on where it was."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.e2e.faults.conftest import MakeFarm
from tests.support.servers import MortalPostgres

pytestmark = pytest.mark.e2e

#: How long the database is away, in seconds.
AWAY_S = 20.0


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
