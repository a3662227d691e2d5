"""A worker that cannot keep builds from its machine says so, and gets work only where its name is allowed."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.attack import FarmUnderAttack
from tests.support.farm import Farm
from tests.support.patience import PATIENCE_S

ONE = 'derivation { name = "one"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo > $out" ]; }'


def _worker(farm: Farm, name: str, state: str) -> dict[str, Any]:
    """The worker once it is in that state."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = [worker for worker in farm.api("workers") if worker["name"] == name and worker["state"] == state]
        if found or time.monotonic() > deadline:
            return dict(found[0])
        time.sleep(0.1)


def test_the_worker_of_the_readmes_farm_is_fully_isolated(readme_farm: FarmUnderAttack) -> None:
    [worker] = readme_farm.api("workers")
    report = worker["isolation_report"]
    assert (worker["isolation"], worker["isolation_reasons"]) == ("A", [])
    assert report["host_uid"] not in (0, None)
    assert (report["writable"], report["changes_inputs"], report["reads_secrets"]) == ([], False, False)
    assert (report["interfaces"], report["fixed_reaches_loopback"]) == (["lo"], False)


def test_a_worker_whose_builders_are_root_takes_nothing_and_says_what_to_do(weak_farm: Farm) -> None:
    refused = _worker(weak_farm, "refused", "quarantined")
    assert refused["isolation"] == "C"
    assert refused["reason"].startswith("its isolation is weak, class C: builders run as the host's root")
    assert refused["reason"].endswith("allow it by name: `drover up --allow-weak-isolation refused`")
    shown = weak_farm.drover("workers").stdout
    assert "refused is of isolation class C: builders run as the host's root" in shown
    with urllib.request.urlopen(f"{weak_farm.url}/metrics", timeout=PATIENCE_S) as answer:
        assert 'drover_workers_isolation{class="C"} 2' in answer.read().decode()


@pytest.fixture
def expression(tmp_path: Path) -> Path:
    file = tmp_path / "one.nix"
    file.write_text(ONE)
    return file


def test_a_worker_that_is_allowed_by_name_builds_and_what_it_built_says_in_which_class(
    weak_farm: Farm, expression: Path
) -> None:
    built = weak_farm.build(expression)
    assert built.returncode == 0, built.stderr
    _worker(weak_farm, "allowed", "online")
    [submission, *_] = weak_farm.api("submissions")
    [step] = weak_farm.api(f"submissions/{submission['id']}/steps")
    assert (step["worker"], step["isolation"]) == ("allowed", "C")
    assert "isolation  class C" in weak_farm.drover("status", step["key"]).stdout
