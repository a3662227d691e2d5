"""Fixtures of every test folder, and the groups of tests that run side by side."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.support.farm import FARMS
from tests.support.processes import sweep_dead_groups

pytest_plugins = ["tests.support.servers"]

# Before any test is decorated: the machine that runs them is shared, and no property is about time.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

#: What the names of groups begin with, by the time that these take, the longest first, so that lanes end together.
LONGEST_FIRST = (
    *("readme_farm", "tests/e2e/faults/two_slots", "tests/e2e/faults/test_partition"),
    *("tests/e2e/faults/test_nodes_elsewhere", "tests/e2e/faults/", "pair_farm", "own_farm", "tests/hostile/"),
    *(
        "tests/deploy/test_user_data",
        "tests/e2e",
        "tests/fleet/",
        "tests/deploy/test_images",
        "tests/workers/",
        "tests/coordinator/",
        "tests/infra/",
        "tests/scheduler/",
        "tests/",
    ),
)
#: Folders whose modules share a farm.
SHARED_FOLDERS = frozenset(
    {"tests/e2e", "tests/e2e/populate", "tests/e2e/faults/one_slot", "tests/e2e/faults/two_slots"}
)
#: Folder -> the one whose farm its modules use too: that farm is stopped after the last test of both.
SHARING_FOLDERS = {"tests/e2e/ci": "tests/e2e"}
#: Farms of `tests/hostile` that modules share, and these modules, which are one group.
SHARING = {
    ("readme_farm", "weak_farm"): (
        *("answers", "fair_share", "front_door", "inputs", "isolation", "logs", "readme_farm", "terminal"),
        "what_users_met",
    ),
    ("own_farm",): ("sockets", "submissions"),
    ("pair_farm",): ("bad_derivations", "compressions", "losses"),
}
#: Module -> the farms that it may use, whose names are those of its group.
SHARED_BY = {f"tests/hostile/test_{name}.py": farms for farms, names in SHARING.items() for name in names}
SHARED_FARMS = frozenset(farm for farms in SHARING for farm in farms)
#: Frames in which pytest removes what earlier runs left: one for each directory of a tree, and tests make deep ones.
REMOVAL_DEPTH = 20_000


def group(nodeid: str) -> str:
    """Return the name of the group of one test. A group shares its fixtures and is run by one process, in one go.

    A folder whose modules share a farm is one, and so are the modules of `hostile` that do; else a module is one.
    """
    module = nodeid.partition("::")[0]
    folder = module.rpartition("/")[0]
    folder = SHARING_FOLDERS.get(folder, folder)
    if module in SHARED_BY:
        return " ".join(SHARED_BY[module])
    return folder if folder in SHARED_FOLDERS else module


class ByGroup(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Hands whole groups to the lanes of pytest-xdist, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByGroup:
    """`--dist` of every kind goes by groups here."""
    return ByGroup(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests by group, the longest first."""
    places: dict[str, int] = {}
    for item in items:
        places.setdefault(group(item.nodeid), len(places))
        others = SHARED_FARMS.difference(SHARED_BY.get(item.nodeid.partition("::")[0], ()))
        assert others.isdisjoint(getattr(item, "fixturenames", ())), (
            f"{item.nodeid} uses a farm that other modules share: name its module in SHARING"
        )
    items.sort(key=lambda item: (_turn(item), places[group(item.nodeid)]))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the farms of a session after the last group that uses them, because an idle farm takes a tenth of a core."""
    if nextitem is None or group(nextitem.nodeid) != group(item.nodeid):
        for farm in item.config.stash.get(FARMS, []):
            farm.stop()
        item.config.stash[FARMS] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remove the control groups that farms of earlier runs left, which a farm that is killed cannot."""
    if not hasattr(session.config, "workerinput"):
        sweep_dead_groups()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Let pytest remove deep trees of earlier runs, which it does last; tests ran with Python's own limit."""
    sys.setrecursionlimit(REMOVAL_DEPTH)


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    """Undo what a coordinator in this process kept from Python's collector, garbage of the tests included."""
    yield
    gc.unfreeze()


def _turn(item: pytest.Item) -> int:
    name = group(item.nodeid)
    return next(turn for turn, start in enumerate(LONGEST_FIRST) if name.startswith(start))
