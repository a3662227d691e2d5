"""A mass rebuild in front of somebody else's single build does not make it wait to its end."""

from __future__ import annotations

import json
import time

import pytest

from tests.support.attack import FarmUnderAttack

pytestmark = pytest.mark.e2e

#: Builds of the mass rebuild, each of some hundred thousand steps of a shell: many turns of the farm's slots.
MANY = 60


def test_a_single_build_does_not_wait_for_the_end_of_a_mass_rebuild(readme_farm: FarmUnderAttack) -> None:
    # More than a busy machine takes to evaluate the other one; it is ended with it.
    work = "i=0; while [ $i -lt 600000 ]; do i=$((i + 1)); done; echo > $out"
    mass = f'builtins.genList (n: shell "mass-${{toString n}}" "{work}") {MANY}'
    submitted = readme_farm.build_text(mass, "--detach", "--json")
    assert submitted.returncode == 0, submitted.stderr
    first = json.loads(submitted.stdout.splitlines()[-1])["id"]
    second = readme_farm.build_text('shell "single" "echo > $out"', "--detach", "--json")
    assert second.returncode == 0, second.stderr
    single = json.loads(second.stdout.splitlines()[-1])["id"]
    while (view := readme_farm.api(f"submissions/{single}"))["state"] == "running":
        time.sleep(0.05)
    assert view["state"] == "succeeded"
    readme_farm.drover("cancel", first)
    # By the farm's own times: a busy machine may evaluate, and look, much later than things happen.
    [alone] = readme_farm.api(f"submissions/{single}/steps")
    ends = [each["ended_at"] for each in readme_farm.api(f"submissions/{first}/steps?state=done")]
    assert sum(end <= alone["ended_at"] for end in ends) < MANY
    assert sum(view["created_at"] <= end <= alone["ended_at"] for end in ends) < MANY // 4
