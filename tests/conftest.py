"""What every test folder may use."""

import sys

import pytest

pytest_plugins = ["tests.support.servers"]

#: Frames in which pytest removes what earlier runs left: one for each directory of a tree, and tests make deep ones.
REMOVAL_DEPTH = 20_000


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Let pytest remove deep trees of earlier runs, which it does last; tests ran with Python's own limit."""
    sys.setrecursionlimit(REMOVAL_DEPTH)
