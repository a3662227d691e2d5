"""The farms that hostile tests start are the README's: what they have, who runs them, and that they build."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.support.attack import FarmUnderAttack
from tests.support.farm import processes_naming
from tests.support.loop import LoopStalls
from tests.support.ordinary import UID
from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

GOOD = 'shell "good" "echo good > $out"'
#: Starts a process that left its session and is deaf to signals, and goes on without waiting for it.
LEAVES = (
    """/bin/sh -c \\"trap '' TERM HUP INT QUIT; while :; do : leftover-NAME; done\\" < /dev/null > /dev/null 2>&1 &"""
)
#: Seconds within which what a cancelled build left is gone, also on a machine that has other things to do.
GONE_WITHIN_S = PATIENCE_S


def test_a_farm_without_configuration_builds_and_its_cache_is_read(
    readme_farm: FarmUnderAttack, tmp_path: Path
) -> None:
    readme_farm.process.reset_peak()
    with LoopStalls(readme_farm.url) as stalls:
        built = readme_farm.build_text(GOOD, "--json")
    assert built.returncode == 0, built.stderr
    path = json.loads(built.stdout.splitlines()[-1])["roots"][0]["outputs"]["out"]
    assert readme_farm.fetch(tmp_path / "plain", path).returncode == 0
    assert stalls.over(1.0) == 0
    now, peak = readme_farm.process.rss_and_peak_bytes
    assert now <= peak < 1_000_000_000
    assert 10 < readme_farm.process.descriptors < 1000


def test_a_stranger_has_no_token_and_is_told_so(readme_farm: FarmUnderAttack) -> None:
    assert readme_farm.request("GET", "/api/v1/submissions").status == 401
    assert readme_farm.request("GET", "/api/v1/submissions", token=readme_farm.token).status == 200


def test_an_ordinary_user_runs_a_farm(users_farm: FarmUnderAttack, tmp_path: Path) -> None:
    assert Path(f"/proc/{users_farm.pid}").stat().st_uid == UID
    built = users_farm.build_text(GOOD, "--json")
    assert built.returncode == 0, built.stderr + users_farm.log_path.read_text()[-2000:]
    path = json.loads(built.stdout.splitlines()[-1])["roots"][0]["outputs"]["out"]
    assert users_farm.fetch(tmp_path / "plain", path).returncode == 0
    [worker] = users_farm.api("workers")
    assert (worker["isolation"], worker["isolation_reasons"]) == ("A", [])
    assert worker["isolation_report"]["host_uid"] not in (0, UID, None)


@pytest.mark.parametrize("which", ["readme_farm", "users_farm"])
def test_nothing_that_a_build_leaves_outlives_it(request: pytest.FixtureRequest, which: str) -> None:
    farm: FarmUnderAttack = request.getfixturevalue(which)
    ended = f"{farm.port}-ended"
    built = farm.build_text(f'shell "leaves" "{LEAVES.replace("NAME", ended)} echo > $out"')
    assert built.returncode == 0, built.stderr
    assert processes_naming(f"leftover-{ended}") == {}


@pytest.mark.parametrize("which", ["readme_farm", "users_farm"])
def test_nothing_of_a_build_outlives_its_cancellation(request: pytest.FixtureRequest, which: str) -> None:
    farm: FarmUnderAttack = request.getfixturevalue(which)
    name = f"{farm.port}-cancelled"
    endless = f'shell "endless" "{LEAVES.replace("NAME", name)} trap \'\' TERM; while :; do :; done"'
    submitted = json.loads(farm.build_text(endless, "--detach", "--json").stdout.splitlines()[-1])
    deadline = time.monotonic() + GONE_WITHIN_S
    while not processes_naming(f"leftover-{name}"):
        assert time.monotonic() < deadline, "the build did not start"
        time.sleep(0.05)
    assert farm.drover("cancel", submitted["id"]).returncode == 0
    deadline = time.monotonic() + GONE_WITHIN_S
    while left := processes_naming(f"leftover-{name}"):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
