"""A coordinator whose Ray head and workers are other machines' programs: each may go away, and comes back.

`drover head` and `drover worker` run by themselves; the coordinator starts and ends neither.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.process_tree import live_processes, process_tree, signal_all
from tests.e2e.faults.conftest import FarmUnderFault
from tests.support.elsewhere import Elsewhere, Program
from tests.support.farm import Farm
from tests.support.processes import processes_with

pytestmark = pytest.mark.e2e

JOINED = "has joined the farm"
WAIT_FOR_GO = "while [ ! -e /tally/go ]; do /bin/busybox sleep 0.1; done"
#: How long a worker lets running builds end; the long one is longer than this test would wait for it.
GRACE_S = 2.0
LONG_GRACE_S = 3600.0


class Apart(FarmUnderFault):
    """One coordinator, a head and two workers, each a program of its own."""

    def __init__(self, root: Path) -> None:
        self._prepare(root, "")
        config = root / "head.toml"
        config.touch()
        self.token = root / "head" / "ray-token"
        self.elsewhere = Elsewhere(root, config, self.token)
        self.farm = Farm(root, [], settings=f'ray_address = "{self.elsewhere.address}"\nray_token = "{self.token}"\n')
        self.left, self.right = self.worker("left", LONG_GRACE_S), self.worker("right", GRACE_S)
        self.programs = {"left": self.left, "right": self.right}

    def worker(self, name: str, grace_s: float) -> Program:
        return self.elsewhere.worker(
            name,
            *("--slots", "1", "--nix-option", "sandbox-paths", self.sandbox_paths),
            environment={"DROVER_STOP_GRACE_S": str(grace_s)},
        )

    def have(self, *names: str) -> None:
        """Start those of these workers that do not run, and stop the others."""
        for name, program in self.programs.items():
            if name not in names:
                program.force_stop()
            elif not program.runs:
                program.start(JOINED)
        self.until(lambda: self.online() == set(names))

    def online(self) -> set[str]:
        return {worker["name"] for worker in self.farm.api("workers") if worker["state"] == "online"}

    def busy(self) -> set[str]:
        return {worker["name"] for worker in self.building()}

    def troubles(self) -> str:
        return " ".join(self.farm.api("farm")["troubles"])

    def kill_head(self) -> None:
        """The program and everything below it: a machine that is switched off."""
        self.elsewhere.head.process.kill()
        self.elsewhere.head.process.wait()
        self.kill_node(self.elsewhere.root / "head", "head")

    def kill_node(self, state: Path, record: str) -> None:
        killed = process_tree(self.node(state, record))
        signal_all(killed, signal.SIGKILL)
        self.until(lambda: killed.isdisjoint(live_processes().values()))

    def stop(self) -> None:
        # Twice: what is left to build is of no interest.
        for program in (self.left, self.right):
            program.force_stop()
        self.farm.stop()
        self.elsewhere.head.stop()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    apart = Apart(tmp_path_factory.mktemp("apart"))
    try:
        apart.elsewhere.start_head()
        apart.farm.start()
        apart.left.start(JOINED)
        apart.farm.wait_for_workers(1)
        yield apart
    finally:
        apart.stop()
        apart.farm.clear()


@pytest.fixture
def apart(made: Apart) -> Iterator[Apart]:
    """The farm of all tests, each of which finds the workers that it wants or starts them."""
    yield made
    (made.tally / "go").unlink(missing_ok=True)


def test_builds_go_on_without_a_head_and_workers_come_once_it_is_back(apart: Apart) -> None:
    apart.have("left")
    file = apart.graph(f'top = step "behind-headless" [ (step "headless" [ ] "{WAIT_FOR_GO}") ] ":";')
    submission = apart.submit(file, "top")
    apart.until(apart.busy)
    apart.kill_head()
    apart.until(lambda: f"no Ray head answers at {apart.elsewhere.address}" in apart.troubles())
    (apart.tally / "go").touch()
    view = apart.ended(submission)
    assert view["state"] == "succeeded"
    apart.can_be_fetched(view)
    assert "no Ray head answers" in apart.farm.drover("status").stdout
    apart.elsewhere.start_head()
    apart.until(lambda: not apart.troubles())
    apart.right.start(JOINED)
    apart.until(lambda: apart.online() == {"left", "right"})


def test_a_worker_program_that_is_killed_is_taken_over_with_its_build(apart: Apart) -> None:
    apart.have("left", "right")
    submission = apart.submit(apart.graph(f'kept = step "kept" [ ] "{WAIT_FOR_GO}";'), "kept")
    apart.until(apart.busy)
    program = apart.programs[next(iter(apart.busy()))]
    program.process.kill()
    program.process.wait()
    program.start(JOINED)
    (apart.tally / "go").touch()
    assert apart.ended(submission)["state"] == "succeeded"
    assert apart.runs()["kept"] == 1


def test_a_node_that_is_lost_is_reported_by_its_worker_and_taken_back(apart: Apart) -> None:
    apart.have("left", "right")
    submission = apart.submit(apart.graph(f'lost = step "lost" [ ] "{WAIT_FOR_GO}";'), "lost")
    apart.until(apart.busy)
    [name] = apart.busy()
    lost = apart.programs[name]
    apart.kill_node(apart.elsewhere.root / f"worker-{name}", "worker")
    assert lost.ended() == 4
    [sentence] = [line for line in lost.log.splitlines() if line.startswith("drover: ")]
    assert sentence.startswith(f"drover: the Ray node of worker {name} ended unexpectedly")
    lost.start(JOINED)
    apart.until(lambda: apart.busy() == {"left", "right"} - {name})
    (apart.tally / "go").touch()
    assert apart.ended(submission)["state"] == "succeeded"
    apart.until(lambda: apart.online() == {"left", "right"})


def test_a_worker_that_is_stopped_takes_nothing_new_and_finishes(apart: Apart) -> None:
    apart.have("left", "right")
    drain(apart, "right")
    file = apart.graph(f'a = step "last" [ ] "{WAIT_FOR_GO}"; b = step "next" [ ] ":";')
    last = apart.submit(file, "a")
    apart.until(apart.busy)
    drain(apart, "right", "--off")
    apart.left.send(signal.SIGTERM)
    apart.until(lambda: apart.online() == {"right"})
    following = apart.ended(apart.submit(file, "b"))
    [step] = apart.farm.api(f"submissions/{following['id']}/steps")
    assert step["worker"] == "right"
    assert apart.left.process.poll() is None
    (apart.tally / "go").touch()
    assert apart.left.ended() == 0
    assert apart.ended(last)["state"] == "succeeded"
    [step] = apart.farm.api(f"submissions/{last}/steps")
    assert (step["worker"], len(apart.farm.begun(step["key"]))) == ("left", 1)


def test_what_does_not_end_within_the_grace_is_handed_back(apart: Apart) -> None:
    apart.have("right")
    submission = apart.submit(apart.graph(f'back = step "handed-back" [ ] "{WAIT_FOR_GO}";'), "back")
    # A step is `building` before its builder runs, which would then end before it began.
    apart.until(lambda: apart.runs()["handed-back"])
    [step] = apart.farm.api(f"submissions/{submission}/steps")
    apart.right.send(signal.SIGTERM)
    assert apart.right.ended() == 0
    assert not processes_with(step["outputs"]["out"])
    apart.left.start(JOINED)
    apart.until(lambda: apart.busy() == {"left"})
    (apart.tally / "go").touch()
    assert apart.ended(submission)["state"] == "succeeded"
    assert apart.runs()["handed-back"] == 2


def test_a_second_signal_ends_the_grace(apart: Apart) -> None:
    apart.have("left")
    submission = apart.submit(apart.graph(f'hurry = step "hurried" [ ] "{WAIT_FOR_GO}";'), "hurry")
    apart.until(lambda: apart.busy() == {"left"})
    apart.left.send(signal.SIGTERM)
    apart.until(lambda: apart.online() == set())
    apart.left.send(signal.SIGTERM)
    assert apart.left.ended() == 0
    # So does the death of the node: nobody is there to wait for.
    apart.left.start(JOINED)
    apart.until(lambda: apart.busy() == {"left"})
    apart.left.send(signal.SIGTERM)
    apart.until(lambda: apart.online() == set())
    apart.kill_node(apart.elsewhere.root / "worker-left", "worker")
    assert apart.left.ended() == 4
    (apart.tally / "go").touch()
    apart.right.start(JOINED)
    assert apart.ended(submission)["state"] == "succeeded"


def test_a_head_without_its_tables_is_another_one(apart: Apart) -> None:
    apart.have("right")
    apart.kill_head()
    shutil.rmtree(apart.elsewhere.root / "head" / "ray")
    apart.elsewhere.start_head()
    assert apart.right.ended() == 4
    assert apart.farm.wait() == 4
    for log in (apart.right.log, apart.farm.log_path.read_text()):
        assert "was started again without its tables" in log.splitlines()[-1]
    apart.farm.start()
    apart.right.start(JOINED)
    apart.farm.wait_for_workers(1)
    view = apart.ended(apart.submit(apart.graph('again = step "again" [ ] ":";'), "again"))
    apart.can_be_fetched(view)


def test_a_farm_whose_parts_went_away_ends_in_order(made: Apart) -> None:
    made.stop()
    assert made.farm.processes_left() == {}
    made.nothing_ran_twice_without_a_reason()


def drain(apart: Apart, *told: str) -> None:
    done = apart.farm.drover("drain", *told)
    assert done.returncode == 0, done.stderr
