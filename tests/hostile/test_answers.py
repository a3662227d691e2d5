"""Answers to people where something did not work: which root, why, and an exit status that a script can act on."""

from __future__ import annotations

import json

import pytest

from tests.support.attack import FarmUnderAttack

pytestmark = pytest.mark.e2e

BROKEN = """
    let broken = shell "broken" "echo about to fail; exit 7"; in {
      above = shell "above" "echo ${broken} > $out";
      fine = shell "fine" "echo fine > $out";
    }
"""
UNBUILDABLE = """
    let
      content = extra: derivation ({
        name = "content"; system = builtins.currentSystem; builder = "/bin/sh"; outputHashMode = "recursive";
      } // extra);
    in rec {
      floating = content { __contentAddressed = true; outputHashAlgo = "sha256"; };
      impure = content { __impure = true; };
      deferred = shell "deferred" "echo ${floating} > $out";
    }
"""


def test_a_doomed_root_is_named_with_its_cause_wherever_a_submission_is_shown(readme_farm: FarmUnderAttack) -> None:
    done = readme_farm.build_text(BROKEN, "-A", "above", "-A", "fine", "--json")
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    roots = {root["attr"]: root for root in result["roots"]}
    (broken,) = result["failed_steps"]
    cause = roots["above"]["failure"]
    assert (cause["step"], cause["name"], cause["kind"]) == (broken["key"], "broken", "permanent")
    assert "exit code 7" in cause["message"]
    assert roots["fine"]["failure"] is None

    shown = {
        "build": done.stderr,
        "watch": readme_farm.drover("watch", result["id"]).stdout,
        "status": readme_farm.drover("status", result["id"]).stdout,
    }
    for command, text in shown.items():
        (line,) = [line for line in text.splitlines() if line.startswith("  ✘ above  ")]
        assert "not built because broken failed: " in line, command
        assert f"drover log {broken['key']}" in line, command


def test_a_retry_of_what_was_cancelled_is_wrong_usage(readme_farm: FarmUnderAttack) -> None:
    waiting = 'derivation { name = "far"; system = "riscv64-linux"; builder = "/bin/sh"; }'
    submission = json.loads(readme_farm.build_text(waiting, "--detach", "--json").stdout.splitlines()[-1])["id"]
    assert readme_farm.drover("cancel", submission).returncode == 0
    retried = readme_farm.drover("retry", submission)
    assert retried.returncode == 2
    assert "was cancelled; submit its roots again" in retried.stderr


@pytest.mark.parametrize("kind", ["floating", "impure", "deferred"])
def test_a_kind_that_the_farm_does_not_build_is_no_fault_of_its_infrastructure(
    readme_farm: FarmUnderAttack, kind: str
) -> None:
    features = ("--option", "experimental-features", "ca-derivations impure-derivations")
    done = readme_farm.build_text(UNBUILDABLE, "-A", kind, *features)
    assert done.returncode == 3, done.stderr
    assert "this farm builds only" in done.stderr
