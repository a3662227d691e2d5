"""Two workers that build one thing at a time, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.faults.conftest import FarmUnderFault, running_farm
from tests.support.farm import FARMS


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[FarmUnderFault]:
    with running_farm(tmp_path_factory.mktemp("one-slot"), "left", "right", slots=1) as pair:
        pytestconfig.stash.setdefault(FARMS, []).append(pair.farm)
        yield pair


@pytest.fixture
def one(pair: FarmUnderFault) -> Iterator[FarmUnderFault]:
    yield pair
    pair.put_right()
