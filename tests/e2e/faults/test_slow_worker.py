"""Three Ray nodes of which a control group slows one: the farm learns it within a rebuild, and places work by it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.faults.conftest import FarmUnderFault, running_farm
from tests.support.throttle import one_slow

pytestmark = pytest.mark.e2e

#: First by its name, so that it takes what comes alone while all count as equally fast.
SLOW = "a-slow"
#: Its part of one processor.
PART = 0.4
#: Turns of a loop of packages that take a processor more than a second, and twice as long.
SHORT, LONG = 1_100_000, 1_800_000
#: Versions of each of the two packages of the first rebuild: the slow worker takes some while others build the rest.
VERSIONS = 9
GRAPH = f"""
  spin = name: turns: step name [ ] "i=0; while [ $i -lt ${{toString turns}} ]; do i=$((i+1)); done";
  versions = name: turns: map (n: spin "${{name}}-${{toString n}}.0" turns) (range 1 {VERSIONS});
  rebuild = step "rebuild" (rebuilt) "true";
  rebuilt = versions "tiny" {SHORT} ++ versions "small" {SHORT};
  alone = spin "tiny-20.0" {SHORT};
  tiny = spin "tiny-21.0" {SHORT};
  long = spin "long-9.0" {LONG};
  longer = spin "long-9.1" {LONG};
  again = step "again" [ tiny long longer ] "true";
"""


def worker_of(one: FarmUnderFault, name: str) -> str:
    return str(one.farm.api(f"steps/{name}")["worker"])


def workers(one: FarmUnderFault) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in one.farm.api("workers")}


def test_a_worker_that_is_slowed_is_known_for_it_after_one_rebuild_and_gets_the_short_work(tmp_path: Path) -> None:
    with ExitStack() as stack:
        one = stack.enter_context(running_farm(tmp_path, SLOW, "left", "right", slots=1))
        others = [one.leader("worker-left"), one.leader("worker-right")]
        stack.enter_context(one_slow(others, one.leader(f"worker-{SLOW}"), PART))
        graph = one.graph(GRAPH)
        assert all(not each["speeds"] for each in workers(one).values())
        assert one.ended(one.submit(graph, "rebuild"))["state"] == "succeeded"

        def slow_is_known() -> bool:
            speeds = {name: each["speeds"].get("x86_64-linux", 1.0) for name, each in workers(one).items()}
            return bool(speeds[SLOW] < 0.9 * min(speeds["left"], speeds["right"]))

        one.until(slow_is_known)
        built = {name: each["built"] for name, each in workers(one).items()}
        assert built[SLOW] == min(built.values())
        # What comes alone goes to another, and of three at one time the short one goes to the slow worker.
        assert one.ended(one.submit(graph, "alone"))["state"] == "succeeded"
        assert worker_of(one, "tiny-20.0") != SLOW
        assert one.ended(one.submit(graph, "again"))["state"] == "succeeded"
        assert [worker_of(one, name) == SLOW for name in ("tiny-21.0", "long-9.0", "long-9.1")] == [True, False, False]
        # What is shown is what it was decided by.
        table = one.farm.drover("workers").stdout
        assert f"{workers(one)[SLOW]['speeds']['x86_64-linux']:.2g}" in table
