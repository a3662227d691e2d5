"""A tracked lock of two systems on the farm of this folder: what is whole on one is released there alone."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.populate.conftest import PopulatedFarm, fetched_by_nix
from tests.e2e.populate.test_populate import add_packages
from tests.support.cache import store_path
from tests.support.farm import Farm
from tests.support.package_set import SYSTEMS
from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

NATIVE, MAC = SYSTEMS


def until(ask: Callable[[], Any], holds: Callable[[Any], bool]) -> Any:
    ends_at = time.monotonic() + PATIENCE_S
    while not holds(found := ask()):
        assert time.monotonic() < ends_at, found
        time.sleep(0.2)
    return found


def stable(populated: PopulatedFarm) -> dict[str, int]:
    found = populated.farm.drover("environments", "look", "team", "--json")
    assert found.returncode == 0, found.stderr
    return {each["system"]: each["revision"] for each in json.loads(found.stdout)["stable"] if each["revision"]}


def gaps(farm: Farm) -> list[tuple[str, str, str]]:
    coverage = farm.api("environments/team/coverage")
    return [(gap["package"], gap["way"], gap["reason"]) for gap in coverage["gaps"]]


def in_nix(expression: str) -> Any:
    command = ("nix-instantiate", "--eval", "--strict", "--json", "-E", expression)
    done = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE_S)
    return json.loads(done.stdout)


def test_stable_moves_for_the_system_that_is_whole_and_for_the_other_once_it_is(
    populated: PopulatedFarm, tmp_path: Path
) -> None:
    farm = populated.farm
    add_packages(populated, ["team-lib", "team-tool"])
    fetched, built = populated.offer("team-lib"), populated.output("team-tool", MAC)
    lock = populated.lock("team", [populated.entry("team-lib", NATIVE), populated.entry("team-tool", MAC)])
    for words in (("track", "team"), ("push", "team", str(lock), "--mark", "c1")):
        done = farm.drover("environments", *words)
        assert done.returncode == 0, done.stderr
    # The upstream's path is mirrored; the Mac's package is unknown to the farm, and so is built by nobody.
    assert until(lambda: stable(populated), bool) == {NATIVE: 1}
    told = farm.drover("coverage", "team").stdout
    assert f"{NATIVE}" in told
    assert "team-tool" in told
    assert "not tried" in told
    release = tmp_path / "stable.nix"
    with urllib.request.urlopen(f"{farm.cache_url}/environments/team/stable.nix", timeout=PATIENCE_S) as answer:
        release.write_bytes(answer.read())
    path = in_nix(f'(import {release}).systems."{NATIVE}".packages.team-lib.out')
    assert path == fetched
    fetched_by_nix(farm, tmp_path / "store", path)
    # Once its derivations have come and are built, the Mac follows.
    assert populated.populate(lock, "--proof", "none")[0] == 0
    assert until(lambda: stable(populated), lambda found: MAC in found) == {NATIVE: 1, MAC: 1}
    fetched_by_nix(farm, tmp_path / "mac", built)
    # A revision of which Linux lacks a path: the Mac goes on alone, and the gap has its reason.
    gone = {"install_id": "gone", "system": NATIVE, "store_path": store_path("team-gone"), "priority": 5}
    lock = populated.lock("team", [populated.entry("team-lib", NATIVE), populated.entry("team-tool", MAC), gone])
    assert farm.drover("environments", "push", "team", str(lock), "--mark", "c2").returncode == 0
    assert until(lambda: stable(populated), lambda found: found[MAC] == 2) == {NATIVE: 1, MAC: 2}
    until(lambda: gaps(farm), lambda found: found == [("gone", "impossible", "nowhere")])
