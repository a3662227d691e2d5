"""What every test folder may use, and which tests run side by side."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["tests.support.servers"]

TESTS = Path(__file__).parent
#: Folders by the time that their tests take, the longest first, so that lanes end together.
LONGEST_FIRST = ("e2e/faults", "hostile", "e2e", "workers", "coordinator", "infra", "scheduler", "architecture")
#: Farms that modules share, each with the name of the group that the modules make.
SHARED_FARMS = {"readme_farm": "hostile", "weak_farm": "hostile", "farm@e2e": "e2e"}
#: Frames in which pytest removes what earlier runs left: one for each directory of a tree, and tests make deep ones.
REMOVAL_DEPTH = 20_000


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests, and give pytest-xdist (`--dist loadgroup`) those as one group that share fixtures.

    A group is run by one process. In `e2e/faults` each test hurts a farm of its own, so each is a group.
    """
    items.sort(key=_turn)
    shared = {item.path: SHARED_FARMS[name] for item in items for name in _fixtures(item) if name in SHARED_FARMS}
    for item in items:
        alone = _folder(item).startswith("e2e/faults/")
        group = item.nodeid if alone else shared.get(item.path, str(item.path.relative_to(TESTS)))
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Let pytest remove deep trees of earlier runs, which it does last; tests ran with Python's own limit."""
    sys.setrecursionlimit(REMOVAL_DEPTH)


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    """Undo what a coordinator in this process kept from Python's collector, garbage of the tests included."""
    yield
    gc.unfreeze()


def _folder(item: pytest.Item) -> str:
    return f"{item.path.parent.relative_to(TESTS)}/"


def _turn(item: pytest.Item) -> int:
    folder = _folder(item)
    return next(turn for turn, name in enumerate(LONGEST_FIRST) if folder.startswith(f"{name}/"))


def _fixtures(item: pytest.Item) -> list[str]:
    names: list[str] = getattr(item, "fixturenames", [])
    in_e2e = _folder(item).startswith("e2e/")
    return [f"{name}@e2e" if name == "farm" and in_e2e else name for name in names]
