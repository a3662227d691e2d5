"""Ends of builds pass a submission that is being taken in, and come to the same as if they had come before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from scheduler import admission, decide, farm, graph, invariants, step_rules, wanted
from scheduler import events as e
from scheduler.facts import Fact, StepDone, StepLeased
from scheduler.farm import Farm
from scheduler.model import BuilderId, FailureKind, Instant, LeaseId, StepSpec, StepState
from scheduler.policy import Limits
from tests.scheduler.kit import Scene, broke, join, lease, report, step, submit

#: Steps of each of two graphs, and slots of the builder.
STEPS, SLOTS = 40, 12


@pytest.fixture(autouse=True)
def _pauses_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (admission, decide, farm, graph, step_rules, wanted):
        for name in ("PIECE", "FACTS_PIECE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 1)


def layers(chance: Random, name: str, below: Sequence[str]) -> list[StepSpec]:
    """Make steps that need some of each other and of those below."""
    known = [*below]
    steps = []
    for number in range(STEPS):
        key = f"{name}{number}"
        steps.append(step(key, *chance.sample(known, min(len(known), chance.randint(0, 3)))))
        known.append(key)
    return steps


def roots_of(chance: Random, steps: list[StepSpec]) -> Sequence[str]:
    needed = {need for spec in steps for recipe in spec.recipes for need in recipe.needs}
    tops = [spec.key for spec in steps if spec.key not in needed]
    return tops if chance.random() < 0.7 else [*tops, steps[chance.randrange(STEPS)].key]


class Interrupted:
    """A farm with a submission whose builds end while another submission is taken in."""

    def __init__(self, seed: int) -> None:
        self.chance = Random(seed)
        self.scene = Scene(Limits(start_grace_s=1e6))
        self.scene.play(join("b", SLOTS))
        old = layers(self.chance, "old", [])
        self.scene.play(submit("first", roots_of(self.chance, old), *old))
        self.old = [spec.key for spec in old]
        #: Facts of what passed, in order, and how often it did, by whether leases might be granted.
        self.passed: list[Fact] = []
        self.passes: Counter[bool] = Counter()

    @property
    def farm(self) -> Farm:
        return self.scene.farm

    def held(self) -> list[LeaseId]:
        return [each.lease for each in self.farm.state.steps.values() if each.builder]

    def take(self, event: e.Event) -> list[Fact]:
        """Take a submission in; at each pause a build may end. Returns the submission's own facts."""
        work = self.farm.handling([event], Instant(2.0), grant=False)
        while True:
            try:
                next(work)
            except StopIteration as end:
                self._pass()
                facts: list[Fact] = end.value[0]
                return facts
            # The first part has many more pauses.
            if self.chance.random() < (0.04 if self._may_grant() else 0.5):
                self._pass()

    def _may_grant(self) -> bool:
        return self.farm._opening.lets_grant  # noqa: SLF001 - whether it may, not whether it did

    def _pass(self) -> None:
        if not self.farm.lets_pass:
            return
        running = [each for each in self.farm.state.steps.values() if each.builder]
        events: list[e.Event] = [report("b", SLOTS, *self.held())]
        if running:
            ends = self.chance.choice(running)
            leased = ends.state is StepState.LEASED
            events.append(
                e.BuildSucceeded(ends.lease, ends.builder, b"evidence") if leased else e.OutputsPublished(ends.lease)
            )
        assert self.farm.may_pass(events, Instant(3.0))
        grants = self._may_grant()
        facts, _ = self.farm.passing(events, Instant(3.0))
        self.passes[grants] += bool(running)
        assert grants or not any(isinstance(fact, StepLeased) for fact in facts)
        self.passed += facts


def durable(farm: Farm) -> object:
    """Return what the journal determines; ways from what is done to a root count once it is lost, and grow then."""
    steps, opened = invariants.durable(farm.state)
    ways = (17, 19)
    first, step = next(iter(steps.values())), next(iter(farm.state.steps.values()))
    assert [first[way] for way in ways] == [step.depth, step.tail_ms]
    done = StepState.DONE.value
    without = {
        key: [None if its[0] == done and place in ways else each for place, each in enumerate(its)]
        for key, its in steps.items()
    }
    return without, opened


def replayed(facts: list[Fact]) -> Farm:
    again = Farm()
    again.replay(facts)
    return again


def test_what_passed_comes_before_the_submission_and_leads_to_the_same_state() -> None:
    """Over many graphs that share steps, with pauses wherever there is one."""
    passes: Counter[bool] = Counter()
    done = 0
    for seed in range(40):
        play = Interrupted(seed)
        new = layers(play.chance, "new", play.old)
        own = play.take(submit("second", roots_of(play.chance, new), *new, held=["cached"]))
        invariants.check(play.farm.state)
        assert durable(replayed([*play.scene.journal, *play.passed, *own])) == durable(play.farm)
        # Then leases are granted as ever.
        play.scene.journal += play.passed + own
        play.scene.at(4.0).play(report("b", SLOTS, *play.held()))
        assert durable(replayed(play.scene.journal)) == durable(play.farm)
        passes += play.passes
        done += sum(isinstance(fact, StepDone) for fact in play.passed)
    assert passes[True] > 120
    assert passes[False] > 120
    assert done > 120


def test_nothing_passes_once_a_step_that_was_known_has_moved() -> None:
    """The cache has lost what a build stands on: what follows from the build's end may follow from that."""
    play = Interrupted(1)
    scene = play.scene
    gone = next(each for each in play.farm.state.steps.values() if each.builder and each.dependents)
    for event in (e.BuildSucceeded(gone.lease, gone.builder, b""), e.OutputsPublished(gone.lease)):
        scene.play(event)
    assert gone.state is StepState.DONE
    specs = [StepSpec(each.key, each.recipes) for each in play.farm.state.steps.values()]
    roots = [root.key for root in play.farm.state.submissions[next(iter(play.farm.state.submissions))]]
    again = submit("first", roots, *specs, replanned=True)
    work = play.farm.handling([again], Instant(2.0), grant=False)
    may_pass = [(gone.state is StepState.DONE, play.farm.lets_pass) for _ in work]
    assert (True, True) in may_pass
    assert (False, True) not in may_pass
    assert not play.farm.lets_pass


def test_what_may_fail_or_revoke_something_does_not_pass() -> None:
    play = Interrupted(2)
    running = next(each for each in play.farm.state.steps.values() if each.builder)

    def may_pass(*events: e.Event, now: float = 3.0) -> bool:
        return play.farm.may_pass(events, Instant(now))

    assert may_pass(report("b", SLOTS, *play.held()))
    assert may_pass(report("b", SLOTS))
    # By then a lease that it does not hold is sent again, or revoked.
    assert not may_pass(report("b", SLOTS), now=2e6)
    # A worker names no lease any more whose end it reports; it must be its own that runs.
    others = [each for each in play.held() if each != running.lease]
    ended = e.BuildSucceeded(running.lease, running.builder, b"")
    assert may_pass(ended, report("b", SLOTS, *others), now=2e6)
    assert not may_pass(replace(ended, builder=BuilderId("c")), report("b", SLOTS, *others), now=2e6)
    play.scene.play(ended)
    assert may_pass(ended, report("b", SLOTS, *others), now=2e6)
    assert not may_pass(report("b", SLOTS, incarnation="another"))
    assert not may_pass(report("stranger", SLOTS))
    assert not may_pass(broke(running.key, "b", FailureKind.PERMANENT))
    assert not may_pass(e.TimePassed())
    assert not may_pass(submit("third", [running.key]))
    assert may_pass(e.OutputsPublished(LeaseId(running.key, 7)))
    assert lease(running.key) == running.lease
