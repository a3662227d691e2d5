"""A worker on another machine, and the network between it and the coordinator gone: for a moment, and for too long.

The other machine is a network namespace that does not see the farm's directory; its worker joins as a user would have
it join. Packets are lost without a word, which is the worst that a network does.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.model import FailureKind
from tests.e2e.faults.conftest import FarmUnderFault
from tests.support.elsewhere import Program
from tests.support.farm import Farm, WorkerSpec
from tests.support.link import Link, open_link
from tests.support.processes import processes_with

pytestmark = pytest.mark.e2e

JOINED = "has joined the farm"
#: Seconds of a cut that costs nothing; of one after which the coordinator builds elsewhere; and of one after which the
#: Ray head gives the node up for good.
SHORT_S, WORKER_SILENCE_S, RAY_SILENCE_S = 5, 20, 40
#: Of the builds that wait for a `go`.
NAMES = ("short", "long", "longer", "late", "last")
WAIT_FOR_GO = "while [ ! -e /tally/go-{0} ]; do /bin/busybox sleep 0.1; done"


class Divided(FarmUnderFault):
    """A coordinator with one worker beside it and one behind a link."""

    def __init__(self, root: Path, link: Link) -> None:
        self._prepare(root, "", ("near", "far"))
        self.link = link
        near = WorkerSpec("near", slots=1, nix_options={"sandbox-paths": self.sandbox_paths})
        settings = f'ray_host = "{link.here}"\nray_silence_s = {RAY_SILENCE_S}\n'
        settings += f"limits.worker_silence_s = {WORKER_SILENCE_S}"
        self.farm = Farm(root, [near], settings=settings, host=link.here)

    def start(self) -> None:
        self.farm.start()
        self.farm.wait_for_workers(1)
        # Brought there by the user.
        token = self.root / "ray-token"
        shutil.copy(self.farm.state / "ray-token", token)
        self.far = Program(
            self.root / "far.log",
            "worker",
            *("--head", (self.farm.state / "ray-address").read_text().strip(), "--ray-token", token),
            *("--name", "far", "--host", self.link.there, "--state-dir", self.root / "far", "--slots", "1"),
            *("--no-yield-to-others", "--nix-option", "sandbox-paths", self.sandbox_paths),
            environment=self.farm.environment,
            prefix=self.link.prefix(self.farm.state),
        )
        self.far.start(JOINED)
        self.farm.wait_for_workers(2)

    def start_on_far(self, name: str) -> str:
        """Begin a build there, which waits for its `go`; returns its submission."""
        assert self.farm.drover("drain", "near").returncode == 0
        file = self.graph(f'top = step "behind-{name}" [ (step "{name}" [ ] "{WAIT_FOR_GO.format(name)}") ] ":";')
        submission = self.submit(file, "top")
        # A step is `building` before its builder runs.
        self.until(lambda: self.runs()[name])
        assert self.step(submission, name)["worker"] == "far"
        assert self.farm.drover("drain", "near", "--off").returncode == 0
        return submission

    def step(self, submission: str, name: str) -> dict[str, Any]:
        steps: list[dict[str, Any]] = self.farm.api(f"submissions/{submission}/steps")
        return next(step for step in steps if step["name"] == name)

    def built_by(self, submission: str, name: str) -> tuple[str, int]:
        """Return who has a step, and how many attempts of it were begun."""
        step = self.step(submission, name)
        return step["worker"], len(self.farm.begun(step["key"]))

    def states(self) -> dict[str, str]:
        return {worker["name"]: worker["state"] for worker in self.farm.api("workers")}


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Divided]:
    """One farm for all: each test leaves the link whole and both workers online."""
    with open_link() as link:
        divided = Divided(tmp_path_factory.mktemp("divided"), link)
        try:
            divided.start()
            yield divided
        finally:
            for name in NAMES:
                (divided.tally / f"go-{name}").touch()
            divided.far.stop()
            divided.farm.stop()
            divided.farm.clear()


@pytest.fixture
def one(divided: Divided) -> Iterator[Divided]:
    yield divided
    if divided.link.is_cut:
        divided.link.heal()
    far_is_back(divided)
    divided.put_right()


def test_a_short_cut_costs_nothing_although_the_build_ends_in_it(one: Divided) -> None:
    submission = one.start_on_far("short")
    out = one.step(submission, "short")["outputs"]["out"]
    one.link.cut()
    (one.tally / "go-short").touch()
    one.until(lambda: not processes_with(out))
    time.sleep(SHORT_S)
    assert one.step(submission, "short")["state"] == "running"
    one.link.heal()
    view = one.ended(submission)
    assert view["state"] == "succeeded"
    assert one.built_by(submission, "short") == ("far", 1)
    assert one.runs()["short"] == 1
    assert "short" not in dict(revoked(one))
    one.can_be_fetched(view)


def test_what_ends_after_the_farm_lost_patience_changes_nothing(one: Divided) -> None:
    submission = one.start_on_far("long")
    out = one.step(submission, "long")["outputs"]["out"]
    one.link.cut()
    one.until(lambda: one.runs()["long"] == 2)
    one.link.heal()
    # The first attempt ends while the second, elsewhere, is the one that counts; both end here.
    (one.tally / "go-long").touch()
    view = one.ended(submission)
    assert view["state"] == "succeeded"
    assert one.built_by(submission, "long") == ("near", 2)
    one.can_be_fetched(view)
    one.until(lambda: not processes_with(out))
    far_works_again(one, "late")
    assert [kind for name, kind in revoked(one) if name == "long"] == [FailureKind.WORKER_LOST]


def test_a_worker_that_ray_gave_up_begins_anew(one: Divided) -> None:
    submission = one.start_on_far("longer")
    one.link.cut()
    one.until(lambda: one.runs()["longer"] == 2)
    (one.tally / "go-longer").touch()
    assert one.ended(submission)["state"] == "succeeded"
    one.until(lambda: one.states()["far"] == "gone")
    one.link.heal()
    assert one.far.ended() == 4
    far_works_again(one, "last")
    assert [kind for name, kind in revoked(one) if name == "longer"] == [FailureKind.WORKER_LOST]


def test_a_farm_that_was_divided_ends_in_order_and_lost_nothing_but_a_worker(divided: Divided) -> None:
    assert divided.far.stop() == 0
    divided.is_whole_at_the_end()
    assert {kind for _, kind in revoked(divided)} <= {FailureKind.WORKER_LOST}


def revoked(one: Divided) -> list[tuple[str, FailureKind]]:
    return [(fact.lease.step.partition("-")[2], fact.failure.kind) for fact in one.ended_early()]


def far_is_back(one: Divided) -> None:
    """Whatever became of the worker: a service manager starts it again where it ended."""

    def back() -> bool:
        if one.far.process.poll() is not None:
            one.far.start(JOINED)
        return one.states() == {"near": "online", "far": "online"}

    one.until(back)


def far_works_again(one: Divided, name: str) -> None:
    far_is_back(one)
    submission = one.start_on_far(name)
    (one.tally / f"go-{name}").touch()
    view = one.ended(submission)
    assert view["state"] == "succeeded"
    assert one.built_by(submission, name) == ("far", 1)
    one.can_be_fetched(view)
