"""A farm as a service manager runs it: its parent is process 1."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.farm import Farm, WorkerSpec
from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.e2e


def test_a_farm_whose_parent_is_process_1_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """Ray ends a driver without a parent as soon as its node ends; the head would then go on for an hour."""
    farm = Farm(tmp_path, [WorkerSpec("one", slots=1)])
    begun = subprocess.run(
        ["sh", "-c", 'log=$1; shift; setsid "$@" > "$log" 2>&1 & echo $!', "sh", farm.log_path, *farm.up_command],
        env=farm.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    try:
        while farm.health() != "ok":
            assert farm.processes_left(0.0), farm.log_path.read_text()
            time.sleep(0.1)
        farm.wait_for_workers(1)
        os.kill(int(begun.stdout), signal.SIGTERM)
        assert farm.processes_left(PATIENCE_S) == {}
    finally:
        farm.clear()
