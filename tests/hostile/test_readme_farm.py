"""The farms that hostile tests start are the README's: what they have, who runs them, and that they build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.attack import FarmUnderAttack
from tests.support.loop import LoopStalls
from tests.support.ordinary import UID

pytestmark = pytest.mark.e2e

GOOD = 'shell "good" "echo good > $out"'


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
    assert readme_farm.process.rss_bytes <= readme_farm.process.peak_rss_bytes < 1_000_000_000
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
