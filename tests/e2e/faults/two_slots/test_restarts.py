"""Restarts: a killed part comes back, and the builds that ran meanwhile were never in danger."""

from __future__ import annotations

import signal
from functools import partial

import pytest

from infra.process_tree import process_tree, signal_all
from tests.e2e.faults.conftest import FarmUnderFault

pytestmark = pytest.mark.e2e

#: Short builds in one graph, and how often the coordinator is killed while they run.
SHORT_BUILDS = 300
KILLS = 5


def have_run(one: FarmUnderFault, count: int) -> bool:
    return one.runs("short-").total() >= count


def test_a_coordinator_killed_again_and_again_during_three_hundred_builds_builds_each_once(one: FarmUnderFault) -> None:
    file = one.graph(
        f'top = step "top-of-short" (map (n: step "short-${{toString n}}" [] ":") (range 1 {SHORT_BUILDS})) ":";'
    )
    submission = one.submit(file, "top")
    for kill in range(1, KILLS + 1):
        enough = kill * SHORT_BUILDS // (KILLS + 2)
        one.until(partial(have_run, one, enough))
        one.farm.kill()
        one.farm.start()
    view = one.ended(submission)
    assert view["state"] == "succeeded", one.farm.log_path.read_text()[-3000:]
    one.can_be_fetched(view)
    runs = one.runs("short-")
    assert len(runs) == SHORT_BUILDS
    assert set(runs.values()) == {1}
    assert one.runs()["top-of-short"] == 1
    # What waited for a busy slot for too long was handed back, and is no build.
    attempts = one.farm.api(f"submissions/{submission}/timeline?limit=1000")
    builds = [each for each in attempts if each["outcome"] != "returned"]
    assert len(builds) == SHORT_BUILDS + 1
    times = ("submitted_at", "ready_at", "leased_at", "built_at", "ended_at")
    assert [each for each in builds if each["outcome"] != "done" or None in [each[time] for time in times]] == []


def test_a_build_goes_on_while_coordinator_and_ray_head_are_dead(one: FarmUnderFault) -> None:
    file = one.graph('slow = step "slow" [] "while [ ! -e /tally/go-slow ]; do /bin/busybox sleep 0.1; done";')
    submission = one.submit(file, "slow")
    one.until(one.building)
    head = one.leader("head")
    signal_all(process_tree(head), signal.SIGKILL)
    one.until(lambda: "it is started again" in one.farm.log_path.read_text())
    one.farm.kill()
    (one.tally / "go-slow").touch()
    one.farm.start()
    view = one.ended(submission)
    assert view["state"] == "succeeded"
    assert one.runs()["slow"] == 1
    [attempt] = one.farm.begun(view["roots"][0]["step"])
    assert (attempt["outcome"], attempt["cut"]) == ("done", False)
    assert {span["name"] for span in attempt["spans"]} >= {"build", "pack", "upload", "verify", "publish"}
    again = one.graph('after = step "after" [] ":";')
    assert one.ended(one.submit(again, "after"))["state"] == "succeeded"
    one.can_be_fetched(view)
