"""A build that rewrites an input in its worker's store poisons nothing: neither the next build nor the cache."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.farm import Farm
from tests.support.patience import PATIENCE_S

GRAPH = """
let
  run = name: script: derivation {
    inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" script ]; salt = "SALT";
  };
in rec {
  input = run "input" "mkdir -p $out/lib; echo true > $out/lib/file";
  evil = run "evil" ''
    it=${input}/lib/file; chmod u+w ${input}/lib $it; echo TAMPERED > $it; read x < $it; echo built from $x > $out
  '';
  honest = run "honest" "read x < ${input}/lib/file; echo built from $x > $out";
  later = run "later" "read x < ${input}/lib/file; echo later built from $x > $out";
}
"""


class Attack:
    """The graph on a farm, with an input of its own."""

    def __init__(self, farm: Farm, root: Path) -> None:
        self.farm = farm
        self.root = root
        self._file = root / "graph.nix"
        self._file.write_text(GRAPH.replace("SALT", str(root)))

    def build(self, attr: str) -> subprocess.CompletedProcess[str]:
        return self.farm.build(self._file, "-A", attr, "--json")

    def path(self, built: subprocess.CompletedProcess[str]) -> str:
        assert built.returncode == 0, built.stderr
        return str(json.loads(built.stdout.splitlines()[-1])["roots"][0]["outputs"]["out"])

    def fetched(self, path: str) -> str:
        """Return what a client of the cache gets."""
        assert self.farm.fetch(self.root / "client", path).returncode == 0
        return (self.root / "client" / path.lstrip("/")).read_text()

    def in_worker(self, path: str) -> Path:
        return self.farm.state / "workers/allowed/store" / path.lstrip("/")

    def assert_nothing_is_poisoned(self) -> None:
        verified = self.farm.drover("cache", "verify", "--full", "--json")
        assert verified.returncode == 0, verified.stderr
        assert json.loads(verified.stdout)["broken"] == 0

    def try_once(self, attr: str, problem: str) -> None:
        """Let a build be tried until it ends with that problem, and want it no longer: it would be tried again."""
        assert self.farm.build(self._file, "-A", attr, "--detach").returncode == 0
        submission = self.farm.api("submissions")[0]
        deadline = time.monotonic() + PATIENCE_S
        while problem not in self.farm.api(f"steps/{submission['roots'][0]['step']}")["waiting_for"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert self.farm.drover("cancel", submission["id"]).returncode == 0

    def until_trusted(self) -> None:
        """Wait until the worker is online and has nothing in hand: what was cancelled may have begun once more."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            [allowed] = [worker for worker in self.farm.api("workers") if worker["name"] == "allowed"]
            if allowed["state"] == "online" and not allowed["leases"]:
                return
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture
def attack(weak_farm: Farm, tmp_path: Path) -> Attack:
    return Attack(weak_farm, tmp_path)


def test_what_was_built_over_a_rewritten_input_is_never_published(attack: Attack) -> None:
    given = attack.path(attack.build("input"))
    attack.try_once("evil", "was changed in the worker's store")
    attack.until_trusted()
    assert (attack.in_worker(given) / "lib/file").read_text() == "true\n"
    assert attack.fetched(attack.path(attack.build("honest"))) == "built from true\n"
    attack.assert_nothing_is_poisoned()


def test_an_input_that_a_program_beside_the_farm_changed_is_noticed_and_mended(attack: Attack) -> None:
    given = attack.path(attack.build("input"))
    attack.path(attack.build("honest"))
    file = attack.in_worker(given) / "lib/file"
    file.chmod(0o644)
    file.write_text("TAMPERED\n")
    assert attack.fetched(attack.path(attack.build("later"))) == "later built from true\n"
    assert file.read_text() == "true\n"
    attack.assert_nothing_is_poisoned()
