"""Open work in slots and hours, and a farm that a simulated provider grows from nothing and back by it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from scheduler import events as e
from scheduler.effects import PublishOutputs, StartBuild
from scheduler.farm import Farm
from scheduler.model import BuilderId, BuilderSpec, Instant, LeaseId, StepKey, StepSpec, StepState, SubmissionId
from scheduler.pauses import whole
from scheduler.policy import Limits
from scheduler.workload import Workload, workloads
from tests.scheduler.kit import LINUX, Scene, builder, join, recipe, step, submit
from tests.scheduler.test_placement import work

GIB = 1 << 30
ARM = "arm"


def loads(farm: Farm) -> dict[tuple[str, tuple[str, ...], int], Workload]:
    found = whole(workloads(farm.state))
    return {(each.requirements.system, each.requirements.features, each.memory_bytes): each for each in found}


def test_open_work_is_counted_by_what_it_requires_in_steps_slots_and_time() -> None:
    farm = Scene(Limits(lease_ttl_s=1e6))
    steps = [
        work(step("top", "low"), 60),
        work(step("low"), 2),
        *(work(step(f"short{number}"), 0.05) for number in range(40)),
        work(step("kvm", features=["kvm"]), 10),
        replace(work(step("big", system=ARM), 30), memory_bytes=5 * GIB),
    ]
    roots = ["top", "kvm", "big", *(f"short{number}" for number in range(40))]
    farm.play(submit("s", roots, *steps))
    found = loads(farm.farm)
    linux = found[LINUX, (), 0]
    assert (linux.ready, linux.running, linux.waiting, linux.work_ms) == (41, 0, 1, 64 * 60_000)
    # Forty of three seconds and one of two minutes: four slots have a minute of work each.
    assert linux.slots == 4
    assert found[LINUX, ("kvm",), 0].slots == found[ARM, (), 8 * GIB].slots == 1
    farm.play(join(builder("box"), 20))
    assert (loads(farm.farm)[LINUX, (), 0].running, loads(farm.farm)[LINUX, (), 0].slots) == (20, 20)


#: Seconds that the provider takes to start a machine, after which one is no longer needed, and between two looks.
START_S, IDLE_S, LOOK_S = 90.0, 120.0, 15.0
SLOTS = 4


@dataclass
class Node:
    """A machine of the provider: it comes, works, drains and goes."""

    spec: BuilderSpec
    joined: bool = False
    draining: bool = False
    idle_since: float = 0.0
    leases: dict[LeaseId, None] = field(default_factory=dict)


class Provider:
    """Machines by system, as many as the workload is worth; those too many are drained and go once they are empty."""

    def __init__(self, *submissions: e.SubmissionReceived) -> None:
        self.farm = Farm(Limits(lease_ttl_s=1e9))
        self.nodes: dict[BuilderId, Node] = {}
        self.most: dict[str, int] = {}
        self.count = 0
        self.now = 0.0
        #: (when, order, node that joins or lease that ends).
        self.coming: list[tuple[float, int, BuilderId | StartBuild]] = []
        self._order = 0
        self.call(*submissions)

    def call(self, *events: e.Event) -> None:
        pending = list(events)
        while pending:
            _, effects = self.farm.handle_many(pending, Instant(self.now))
            pending = []
            for effect in effects:
                if isinstance(effect, StartBuild):
                    node = self.nodes[effect.builder]
                    assert node.joined
                    assert not node.draining, "a machine that drains gets nothing new"
                    node.leases[effect.lease] = None
                    assert len(node.leases) <= SLOTS
                    work_s = self.farm.state.steps[effect.lease.step].work_ms / 1000
                    self.later(work_s, effect)
                elif isinstance(effect, PublishOutputs):
                    pending.append(e.OutputsPublished(effect.lease))

    def later(self, seconds: float, what: BuilderId | StartBuild) -> None:
        self._order += 1
        heappush(self.coming, (self.now + seconds, self._order, what))

    def scale(self) -> None:
        """Start what is lacking, drain what is too much, end what is empty."""
        wanted: dict[str, int] = {}
        for load in whole(workloads(self.farm.state)):
            wanted[load.requirements.system] = wanted.get(load.requirements.system, 0) + load.slots
        for system in (LINUX, ARM):
            own = [node for node in self.nodes.values() if system in node.spec.systems and not node.draining]
            lacking = -(-wanted.get(system, 0) // SLOTS) - len(own)
            for _ in range(lacking):
                self.count += 1
                spec = BuilderSpec(BuilderId(f"{system}{self.count}"), "1", frozenset({system}))
                self.nodes[spec.id] = Node(spec)
                self.later(START_S, spec.id)
            self.most[system] = max(self.most.get(system, 0), len(own) + max(0, lacking))
            surplus = [node for node in own if node.joined and not node.leases][: max(0, -lacking)]
            for node in surplus:
                if self.now - node.idle_since >= IDLE_S:
                    node.draining = True
                    self.call(e.BuilderReported(node.spec.id, "1", 0, draining=True))
        for node in [each for each in self.nodes.values() if each.draining and not each.leases]:
            del self.nodes[node.spec.id]
            self.call(e.BuilderLost(node.spec.id, "1", "scaled down"))

    def run(self) -> None:
        """Play until nothing is left to do and no machine is left."""
        while self.now == 0.0 or self.nodes or self.coming or whole(workloads(self.farm.state)):
            self.scale()
            until = self.now + LOOK_S
            while self.coming and self.coming[0][0] <= until:
                self.now, _, what = heappop(self.coming)
                if isinstance(what, StartBuild):
                    node = self.nodes[what.builder]
                    del node.leases[what.lease]
                    node.idle_since = self.now
                    self.call(e.BuildSucceeded(what.lease, what.builder, b""))
                else:
                    node = self.nodes[what]
                    node.joined, node.idle_since = True, self.now
                    self.call(e.BuilderJoined(node.spec, SLOTS))
            self.now = until
            deadline = self.farm.deadline()
            if deadline is not None and deadline <= self.now:
                self.call(e.TimePassed())
            assert self.now < 1e6, "it never ends"


def graph() -> list[StepSpec]:
    """Sixteen minutes on one machine, then forty steps side by side on two systems, then one that needs them all."""
    middle = [f"m{number}" for number in range(40)]
    steps = [work(step("base"), 16)]
    steps += [work(step(name, "base", system=LINUX if number % 4 else ARM), 12) for number, name in enumerate(middle)]
    return [*steps, work(StepSpec(StepKey("top"), (recipe(*middle),)), 20)]


def test_a_farm_grows_from_nothing_with_its_work_and_shrinks_to_nothing_without_losing_a_build() -> None:
    provider = Provider(submit("s", ["top"], *graph()))
    assert provider.nodes == {}
    provider.run()
    assert provider.farm.ended(SubmissionId("s"))
    assert {each.state for each in provider.farm.state.steps.values()} == {StepState.DONE}
    # No build was lost with a machine that went: each had one lease.
    assert {each.attempt for each in provider.farm.state.steps.values()} == {1}
    # Thirty and ten steps side by side, four on a machine.
    assert provider.most == {LINUX: 8, ARM: 3}
    assert provider.farm.state.builders == {}
    # It took little longer than the longest path and the starts of machines on it.
    assert provider.now < (16 + 12 + 20) * 60 + 3 * (START_S + LOOK_S) + 2 * IDLE_S


def test_machines_that_come_are_not_ordered_again_and_work_of_seconds_is_not_worth_many() -> None:
    steps = [work(step(f"x{number}"), 0.1) for number in range(90)]
    provider = Provider(submit("s", [each.key for each in steps], *steps))
    provider.run()
    assert provider.count == 3
