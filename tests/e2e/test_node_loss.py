"""A worker that dies in the middle of a build costs time, not results; a farm that stops leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Expression
from tests.support.farm import Farm, WorkerSpec, processes_naming

pytestmark = pytest.mark.e2e


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Farm]:
    farm = Farm(tmp_path, [WorkerSpec("left", slots=1), WorkerSpec("right", slots=1)])
    try:
        farm.start().wait_for_workers(2)
        yield farm
    finally:
        farm.stop()


def test_a_step_whose_node_is_killed_goes_to_another_and_nothing_is_left_at_the_end(
    pair: Farm, expression: Expression, tmp_path: Path
) -> None:
    file = expression.write('a = shell "survivor" "sleep 6; echo alive > $out";')
    client = subprocess.Popen(
        pair.build_command(file, "-A", "a", "--json"), env=pair.environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (busy := [w for w in pair.api("workers") if any(stage == "building" for _, stage in w["leases"])]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    victim = busy[0]["name"]
    killed = processes_naming(f"workers/{victim}")
    assert killed
    for pid in killed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    output, _ = client.communicate(timeout=120)
    assert client.returncode == 0
    result = json.loads(output.splitlines()[-1])
    step = pair.api(f"submissions/{result['id']}/steps")[0]
    assert step["worker"] != victim
    assert step["attempt"] == 2
    assert pair.fetch(tmp_path / "plain", result["roots"][0]["outputs"]["out"]).returncode == 0
    # The node comes back by itself.
    pair.wait_for_workers(2)
    assert pair.stop() == 0
    assert pair.leftovers() == {}
