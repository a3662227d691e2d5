"""SIGKILL to what builds: the builder, the daemon that serves it, the agent, everything on a node. The step is built on
the other machine, for a reason that is on record, and what was killed is there again without anybody's help."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.process_tree import live_processes, process_tree
from scheduler import facts
from scheduler.model import FailureKind
from tests.e2e.faults.conftest import FarmUnderFault
from tests.support.patience import PATIENCE_S
from tests.support.processes import above, processes_with

pytestmark = pytest.mark.e2e


@dataclass(frozen=True, slots=True)
class Running:
    """A build that goes on until somebody makes its `go`."""

    name: str
    submission: str
    worker: str
    #: Store path of its output, which stands in the environment of all its processes.
    out: str
    go: Path
    #: Number of this attempt of its step.
    attempt: int
    #: How often its step had begun then.
    runs: int

    def builder(self) -> list[int]:
        return processes_with(self.out)

    def above(self, command: str) -> int:
        """The process of that command which the builder descends from."""
        return above(self.builder()[0], command)


def test_a_builder_that_is_killed_once_gets_another_machine(one: FarmUnderFault) -> None:
    first = start(one, "shot-once")
    kill(first.builder())
    second = elsewhere(one, first)
    finish(one, second)
    assert verdicts(one, "shot-once") == {"shot-once": [FailureKind.KILLED]}


def test_a_builder_that_is_killed_twice_has_failed(one: FarmUnderFault) -> None:
    first = start(one, "shot-twice")
    kill(first.builder())
    second = elsewhere(one, first)
    kill(second.builder())
    assert one.ended(first.submission)["state"] == "failed"
    step = step_of(one, first.submission)
    assert (step["failure"]["kind"], len(one.farm.begun(step["key"]))) == ("killed", 2)
    assert verdicts(one, "shot-twice") == {"shot-twice": [FailureKind.KILLED, FailureKind.KILLED]}


def test_a_daemon_that_dies_while_its_builder_is_silent_is_no_reason_to_build_there_again(one: FarmUnderFault) -> None:
    first = start(one, "silent")
    kill([first.above("nix-daemon --stdio")])
    second = elsewhere(one, first)
    finish(one, second)
    assert verdicts(one, "silent") == {"silent": [FailureKind.CONNECTION_LOST]}


def test_a_daemon_whose_owner_dies_ends_and_says_so(one: FarmUnderFault) -> None:
    first = start(one, "disowned")
    kill([first.above("owner.py")])
    second = elsewhere(one, first)
    finish(one, second)
    assert verdicts(one, "disowned") == {"disowned": [FailureKind.DAEMON_LOST]}


def test_a_build_whose_daemon_dies_three_times_is_suspect(one: FarmUnderFault) -> None:
    running = start(one, "breaker", "echo loud")
    kill([running.above("nix-daemon --stdio")])
    running = elsewhere(one, running)
    # The owner too: nobody is left who would end the builder in order.
    kill([running.above("nix-daemon --stdio"), running.above("owner.py")])
    orphans = running.builder()
    running = elsewhere(one, running)
    assert not set(orphans) & set(running.builder())
    kill([running.above("nix-daemon --stdio")])
    assert one.ended(running.submission)["state"] == "failed"
    assert step_of(one, running.submission)["failure"]["kind"] == "suspect"
    one.until(lambda: not running.builder())
    lost = FailureKind.CONNECTION_LOST
    assert verdicts(one, "breaker") == {"breaker": [lost, lost, FailureKind.SUSPECT]}


def test_an_agent_that_is_killed_takes_its_build_along_and_is_started_again(one: FarmUnderFault) -> None:
    first = start(one, "agentless")
    kill([first.above("ray::AgentHost")])
    second = elsewhere(one, first)
    finish(one, second)
    one.farm.wait_for_workers(2)
    assert verdicts(one, "agentless") == {"agentless": [FailureKind.WORKER_LOST]}
    lost, done = one.farm.begun(step_of(one, first.submission)["key"])
    assert [lost["outcome"], done["outcome"]] == ["lost", "done"]
    assert lost["cut"]
    build = next(span for span in lost["spans"] if span["name"] == "build")
    assert abs(build["at"] + build["took_s"] - lost["ended_at"]) < 0.001


def test_a_node_that_is_killed_is_started_again_and_ends_the_builder_that_outlived_it(one: FarmUnderFault) -> None:
    both_build(one, "survivor")
    file = one.graph(waits("survivor"))
    client = subprocess.Popen(
        one.farm.build_command(file, "-A", "survivor", "--json"),
        env=one.farm.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    one.until(one.building)
    [submission] = [view["id"] for view in one.farm.api("submissions") if view["state"] == "running"]
    first = running(one, submission, "survivor")
    builder = first.builder()
    node = {process.pid for process in process_tree(one.leader(f"worker-{first.worker}"))}
    kill(node - set(builder))
    second = elsewhere(one, first, builder)
    second.go.touch()
    output, _ = client.communicate(timeout=PATIENCE_S)
    assert client.returncode == 0
    view = json.loads(output.splitlines()[-1])
    one.can_be_fetched(view)
    one.farm.wait_for_workers(2)
    assert not set(builder) & live_processes().keys()
    assert verdicts(one, "survivor") == {"survivor": [FailureKind.WORKER_LOST]}


def waits(name: str, before: str = ":") -> str:
    script = f"{before}; while [ ! -e /tally/go-{name} ]; do /bin/busybox sleep 0.1; done"
    return f'{name} = step "{name}" [ ] "{script}";'


def start(one: FarmUnderFault, name: str, before: str = ":") -> Running:
    both_build(one, name)
    return running(one, one.submit(one.graph(waits(name, before)), name), name)


def both_build(one: FarmUnderFault, before: str) -> None:
    """Neither machine is left with a bad name, which would count towards its quarantine."""
    one.farm.wait_for_workers(2)
    meet = "touch /tally/{0}-at-{2}; while [ ! -e /tally/{1}-at-{2} ]; do /bin/busybox sleep 0.1; done"
    steps = [
        f'(step "{here}-{before}" [ ] "{meet.format(here, there, before)}")'
        for here, there in (("first", "second"), ("second", "first"))
    ]
    file = one.graph(f'{before} = step "met-{before}" [ {" ".join(steps)} ] ":";')
    assert one.ended(one.submit(file, before))["state"] == "succeeded"


def running(
    one: FarmUnderFault, submission: str, name: str, ended: Iterable[int] = (), before: Running | None = None
) -> Running:
    """The build as it runs now, after an attempt `before`."""
    runs = 0 if before is None else before.runs
    one.until(lambda: step_of(one, submission)["stage"] == "building")
    step = step_of(one, submission)
    out = step["outputs"]["out"]
    one.until(lambda: set(processes_with(out)) - set(ended) and one.runs()[name] > runs)
    return Running(name, submission, step["worker"], out, one.tally / f"go-{name}", step["attempt"], one.runs()[name])


def elsewhere(one: FarmUnderFault, before: Running, survivors: Iterable[int] = ()) -> Running:
    """The next attempt of a build, which is on the other machine; `survivors` are processes of the one before."""

    def is_over() -> bool:
        step = step_of(one, before.submission)
        return bool(step["attempt"] > before.attempt or step["state"] == "failed")

    # By the farm's count, since the next one may have begun before this looks.
    one.until(is_over)
    now = running(one, before.submission, before.name, survivors, before)
    assert now.worker != before.worker
    return now


def finish(one: FarmUnderFault, build: Running) -> None:
    build.go.touch()
    view = one.ended(build.submission)
    assert view["state"] == "succeeded", step_of(one, build.submission)
    one.can_be_fetched(view)


def step_of(one: FarmUnderFault, submission: str) -> dict[str, Any]:
    step: dict[str, Any]
    [step] = one.farm.api(f"submissions/{submission}/steps")
    return step


def verdicts(one: FarmUnderFault, name: str) -> dict[str, list[FailureKind]]:
    """Return why begun builds ended without a result, by step and in order: of the one and of those before it."""
    found: dict[str, list[FailureKind]] = {}
    ended = [(fact.lease.step, fact.failure) for fact in one.ended_early()]
    # A step fails after all that was tried.
    ended += [(fact.step, fact.failure) for fact in one.journal() if isinstance(fact, facts.StepFailed)]
    for step, failure in ended:
        if failure.kind is not FailureKind.RETURNED and step.endswith(f"-{name}"):
            found.setdefault(step.partition("-")[2], []).append(failure.kind)
    return found


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
