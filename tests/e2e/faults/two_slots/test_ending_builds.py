"""Builds that end before their time: withdrawn, at a limit, on a worker that is drained or stopped."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tests.e2e.faults.conftest import FarmUnderFault
from tests.support.processes import SURVIVOR, processes_with

pytestmark = pytest.mark.e2e

#: Builds that go on while workers are restarted.
ROLLING = 60
WAIT_FOR = "while [ ! -e /tally/{go} ]; do /bin/busybox sleep 0.1; done"


def test_cancelled_builds_are_gone(one: FarmUnderFault) -> None:
    survivor = SURVIVOR.strip().replace('"', '\\"')
    all_met = " -a ".join(f"-e /tally/met-{number}" for number in (1, 2, 3))
    meet = f"touch /tally/met-${{n}}; until [ {all_met} ]; do /bin/busybox sleep 0.1; done"
    file = one.graph(
        f"""
        base = step "shared" [ ] "{WAIT_FOR.format(go="go-shared")}";
        mine = step "mine" [ base (step "survivor" [ ] "{survivor}") ] ":";
        other = step "other" [ base ] ":";
        meet = n: step "meet-${{n}}" [ ] "{meet}";
        three = step "three" (map (n: meet (toString n)) (range 1 3)) ":";
        """
    )
    mine, other = one.submit(file, "mine"), one.submit(file, "other")
    one.until(lambda: set(one.runs()) >= {"shared", "survivor"})
    steps = {step["name"]: step for step in one.farm.api(f"submissions/{mine}/steps")}
    mark, shared = (steps[name]["outputs"]["out"] for name in ("survivor", "shared"))
    one.until(lambda: len(processes_with(mark)) >= 3)
    assert one.farm.drover("cancel", mine).returncode == 0
    assert one.farm.drover("cancel", mine).returncode == 0
    # All slots but that of what is still wanted build again, and none did before what had been in it was gone.
    assert one.ended(one.submit(file, "three"))["state"] == "succeeded"
    assert not processes_with(mark)
    assert processes_with(shared)
    (one.tally / "go-shared").touch()
    assert one.ended(other)["state"] == "succeeded"
    assert one.view(mine)["state"] == "cancelled"
    assert one.runs()["shared"] == 1


def test_a_limit_of_a_root_does_not_hold_for_what_it_shares(one: FarmUnderFault) -> None:
    file = one.graph(
        """
        base = step "patient" [ ] "/bin/busybox sleep 4";
        short = base // { meta.timeout = 1; };
        silent = step "silent" [ ] "/bin/busybox sleep 60" // { meta.maxSilent = 1; };
        top = step "over-patient" [ base ] ":";
        """
    )
    top, short, silent = one.submit(file, "top"), one.submit(file, "short"), one.submit(file, "silent")
    assert one.ended(top)["state"] == "succeeded"
    assert one.ended(short)["state"] == "succeeded"
    assert one.ended(silent)["state"] == "failed"
    [step] = one.farm.api(f"submissions/{silent}/steps")
    assert step["failure"]["kind"] == "silence"


def test_a_drained_worker_finishes_and_gets_nothing_new(one: FarmUnderFault) -> None:
    file = one.graph(
        f"""
        long = step "long" [ ] "{WAIT_FOR.format(go="go-long")}";
        more = step "more" (map (n: step "more-${{toString n}}" [ ] ":") (range 1 8)) ":";
        """
    )
    long = one.submit(file, "long")
    one.until(one.building)
    [busy] = [worker["name"] for worker in one.building()]
    assert one.farm.drover("drain", busy).returncode == 0
    more = one.ended(one.submit(file, "more"))
    assert more["state"] == "succeeded"
    assert {step["worker"] for step in one.farm.api(f"submissions/{more['id']}/steps")} == {"left", "right"} - {busy}
    waiting = threading.Thread(target=one.farm.drover, args=("drain", busy, "--wait"))
    waiting.start()
    (one.tally / "go-long").touch()
    waiting.join()
    assert one.ended(long)["state"] == "succeeded"
    assert one.farm.drover("drain", busy, "--off").returncode == 0
    assert one.farm.drover("drain", "nobody").returncode == 2
    one.until(lambda: all(worker["state"] == "online" for worker in one.farm.api("workers")))


def test_workers_are_restarted_one_after_the_other_under_load_and_nothing_is_built_twice(one: FarmUnderFault) -> None:
    # Enough for as long as it takes on a quiet machine; what is left then is quick.
    script = "[ -e /tally/restarted ] || /bin/busybox sleep 2"
    file = one.graph(
        f"""
        top = step "rolled" (map (n: step "rolling-${{toString n}}" [ ] "{script}") (range 1 {ROLLING})) ":";
        """
    )
    rolled = one.submit(file, "top")
    for worker in ("left", "right"):
        one.until(lambda: len(one.building()) == 2 or one.view(rolled)["state"] != "running")
        assert one.farm.drover("drain", worker, "--wait").returncode == 0
        os.kill(one.leader(f"worker-{worker}"), signal.SIGTERM)
        # It is started again by itself, and is not drained then.
        one.until(lambda: all(worker["state"] == "online" for worker in one.farm.api("workers")))
    (one.tally / "restarted").touch()
    view = one.ended(rolled)
    assert view["state"] == "succeeded"
    one.can_be_fetched(view)
    steps = one.farm.api(f"submissions/{rolled}/steps")
    assert len(steps) == ROLLING + 1
    assert {one.runs()[step["name"]] for step in steps} == {1}


def test_a_stop_lets_running_builds_finish(one: FarmUnderFault) -> None:
    file = one.graph('last = step "after-the-last" [ (step "last" [ ] "/bin/busybox sleep 3") ] ":";')
    last = one.submit(file, "last")
    one.until(one.building)
    assert one.farm.stop(signal.SIGINT) == 0
    assert one.farm.processes_left() == {}
    one.farm.start()
    view = one.ended(last)
    assert view["state"] == "succeeded"
    one.can_be_fetched(view)
    assert one.runs()["last"] == 1
