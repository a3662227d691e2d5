"""A farm of two workers for what continuous integration does, for all tests of this folder."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.faults.conftest import FarmUnderFault, running_farm
from tests.support.farm import FARMS

#: Owners with tokens of their own, and their weights.
OWNERS = {"ci": 3, "people": 1}


def token_of(farm: FarmUnderFault, owner: str) -> Path:
    """Return the file of an owner's token."""
    return farm.root / f"{owner}-token"


@pytest.fixture(scope="session")
def ci_farm(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[FarmUnderFault]:
    root = tmp_path_factory.mktemp("ci")
    owners = []
    for owner, weight in OWNERS.items():
        file = root / f"{owner}-token"
        file.write_text(secrets.token_hex(16))
        file.chmod(0o600)
        owners.append(f'{{ name = "{owner}", weight = {weight}, tokens = ["{file}"] }}')
    with running_farm(root, "left", "right", slots=2, settings=f"owners = [{', '.join(owners)}]") as pair:
        pytestconfig.stash.setdefault(FARMS, []).append(pair.farm)
        yield pair


@pytest.fixture
def one(ci_farm: FarmUnderFault) -> Iterator[FarmUnderFault]:
    yield ci_farm
    ci_farm.put_right()
