"""A farm of two workers for what continuous integration does, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.faults.conftest import FarmUnderFault, running_farm
from tests.support.farm import FARMS


@pytest.fixture(scope="session")
def ci_farm(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[FarmUnderFault]:
    with running_farm(tmp_path_factory.mktemp("ci"), "left", "right", slots=2) as pair:
        pytestconfig.stash.setdefault(FARMS, []).append(pair.farm)
        yield pair


@pytest.fixture
def one(ci_farm: FarmUnderFault) -> Iterator[FarmUnderFault]:
    yield ci_farm
    ci_farm.put_right()
