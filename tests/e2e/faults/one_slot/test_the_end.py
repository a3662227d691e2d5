"""The farm of this folder after all that was done to it."""

from __future__ import annotations

import pytest

from tests.e2e.faults.conftest import FarmUnderFault

pytestmark = pytest.mark.e2e


def test_a_farm_that_was_hurt_ends_in_order_and_ran_nothing_twice_without_a_reason(pair: FarmUnderFault) -> None:
    pair.is_whole_at_the_end()
