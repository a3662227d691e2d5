"""What every test folder may use."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

pytest_plugins = ["tests.support.servers"]

#: Frames in which pytest removes what earlier runs left: one for each directory of a tree, and tests make deep ones.
REMOVAL_DEPTH = 20_000


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Let pytest remove deep trees of earlier runs, which it does last; tests ran with Python's own limit."""
    sys.setrecursionlimit(REMOVAL_DEPTH)


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    """Undo what a coordinator in this process kept from Python's collector, garbage of the tests included."""
    yield
    gc.unfreeze()
