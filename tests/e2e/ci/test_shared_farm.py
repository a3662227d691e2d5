"""Pushes of several owners on one farm: who gets how much of it, and which submission takes the place of which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scheduler.facts import StepLeased
from tests.e2e.ci.conftest import OWNERS, token_of
from tests.e2e.faults.conftest import FarmUnderFault

pytestmark = pytest.mark.e2e


@contextmanager
def held_back(one: FarmUnderFault) -> Iterator[None]:
    """Nothing is begun before all of it is submitted."""
    for worker in one.names:
        assert one.farm.drover("drain", worker).returncode == 0
    try:
        yield
    finally:
        for worker in one.names:
            one.farm.drover("drain", worker, "--off")


def test_two_owners_share_the_farm_by_weight_whoever_came_first_and_in_how_many_pieces(
    one: FarmUnderFault, tmp_path: Path
) -> None:
    counts = {"people": 10, "ci": 30}
    steps = {owner: [f"{owner}-{number}-{tmp_path.name}" for number in range(count)] for owner, count in counts.items()}
    parts = {"people": steps["people"], **{f"ci{at}": steps["ci"][at::3] for at in range(3)}}
    attrs = [f'{name} = step "{name}" [ ] ":";' for names in steps.values() for name in names]
    attrs += [f'{part} = step "{part}-{tmp_path.name}" [ {" ".join(names)} ] ":";' for part, names in parts.items()]
    file = one.graph(" ".join(attrs))
    with held_back(one):
        submitted = [one.submit(file, "people", "--token-file", str(token_of(one, "people")))]
        submitted += [one.submit(file, f"ci{at}", "--token-file", str(token_of(one, "ci"))) for at in range(3)]
    views = [one.ended(each) for each in submitted]
    assert [(view["state"], view["owner"]) for view in views] == [("succeeded", "people")] + [("succeeded", "ci")] * 3
    granted = [fact.lease.step.partition("-")[2] for fact in one.journal() if isinstance(fact, StepLeased)]
    granted = [name for name in granted if name in {*steps["people"], *steps["ci"]}]
    # A worker hands back what waits for a busy slot for too long: that was granted, and is granted again.
    order = [name.partition("-")[0] for name in dict.fromkeys(granted)]
    again = len(granted) - len(order)
    assert len(order) == sum(counts.values())
    assert one.runs() | dict.fromkeys([*steps["people"], *steps["ci"]], 1) == one.runs(), "each is built once"
    share = OWNERS["ci"] / sum(OWNERS.values())
    for count in range(1, len(order) + 1):
        assert abs(order[:count].count("ci") - count * share) <= 1 + again, (count, order)


def test_a_newer_push_of_a_branch_takes_the_place_of_the_older_and_spares_what_only_that_wanted(
    one: FarmUnderFault, tmp_path: Path
) -> None:
    old, both, new = (f"{each}-{tmp_path.name}" for each in ("old", "both", "new"))
    file = one.graph(
        f'common = step "{both}" [ ] ":"; a = step "{old}" [ common ] ":"; b = step "{new}" [ common ] ":";'
    )
    push = ("--token-file", str(token_of(one, "ci")), "--branch", f"main-{tmp_path.name}")
    with held_back(one):
        older = one.submit(file, "a", *push)
        people = one.submit(file, "common", "--token-file", str(token_of(one, "people")), *push[2:])
        newer = one.submit(file, "b", *push, "--supersede")
    assert (one.ended(newer)["state"], one.ended(people)["state"]) == ("succeeded", "succeeded")
    view = one.view(older)
    assert (view["state"], view["superseded_by"]) == ("superseded", newer)
    assert one.runs(old) + one.runs(both) + one.runs(new) == {both: 1, new: 1}
    assert newer in one.farm.drover("status", older).stdout
