"""A mass rebuild in front of somebody else's single build does not make it wait to its end."""

from __future__ import annotations

import json

import pytest

from tests.support.attack import FarmUnderAttack

pytestmark = pytest.mark.e2e

#: Builds of the mass rebuild, each of some hundred thousand steps of a shell: many turns of the farm's slots.
MANY = 60


def test_a_single_build_does_not_wait_for_the_end_of_a_mass_rebuild(readme_farm: FarmUnderAttack) -> None:
    work = "i=0; while [ $i -lt 60000 ]; do i=$((i + 1)); done; echo > $out"
    mass = f'builtins.genList (n: shell "mass-${{toString n}}" "{work}") {MANY}'
    submitted = readme_farm.build_text(mass, "--detach", "--json")
    assert submitted.returncode == 0, submitted.stderr
    first = json.loads(submitted.stdout.splitlines()[-1])["id"]
    single = readme_farm.build_text('shell "single" "echo > $out"')
    assert single.returncode == 0, single.stderr
    counts = readme_farm.api(f"submissions/{first}")["counts"]
    assert counts["done"] < MANY // 2, counts
    readme_farm.drover("cancel", first)
