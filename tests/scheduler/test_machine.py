"""Hypothesis drives the world: any order of submissions, losses, doubles, deaths and restarts, shrunk when it fails."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from scheduler.events import RetryAsked
from scheduler.model import FailureKind
from tests.scheduler.simulation import only_first, random_graph
from tests.scheduler.world import World

ANY = st.integers(min_value=0, max_value=1 << 16)


class FarmMachine(RuleBasedStateMachine):
    """Every call is checked by the world: invariants of the state, the judge of the facts."""

    @initialize(seed=st.integers(min_value=0, max_value=1 << 16), alternatives=st.sampled_from([0.0, 0.5]))
    def begin(self, seed: int, alternatives: float) -> None:
        self.world = World()
        self.graph = random_graph(random.Random(seed), alternatives)
        self.plain = only_first(self.graph)

    @rule(root=ANY, another=ANY, later=st.booleans(), plain=st.booleans(), retry=st.booleans())
    def submit(self, root: int, another: int, later: bool, plain: bool, retry: bool) -> None:
        keys = list(self.graph)
        roots = [keys[root % len(keys)], keys[another % len(keys)]]
        self.world.submit(roots, self.plain if plain else self.graph, later=later, retry=retry)

    @rule(which=ANY, plain=st.booleans())
    @precondition(lambda self: self.world.submitted)
    def retry(self, which: int, plain: bool) -> None:
        name = self.world.submitted[which % len(self.world.submitted)]
        if name in self.world.wishes:
            self.world.retry(name, self.plain if plain else self.graph)

    @rule(which=ANY, plain=st.booleans())
    @precondition(lambda self: self.world.submitted)
    def replan(self, which: int, plain: bool) -> None:
        name = self.world.submitted[which % len(self.world.submitted)]
        if name in self.world.wishes:
            self.world.replan(name, self.plain if plain else self.graph)

    @rule(which=ANY)
    @precondition(lambda self: self.world.farm.state.failed)
    def retry_step(self, which: int) -> None:
        failed = list(self.world.farm.state.failed)
        self.world.call(RetryAsked(failed[which % len(failed)]))

    @rule(which=ANY)
    @precondition(lambda self: self.world.submitted)
    def cancel(self, which: int) -> None:
        self.world.cancel(self.world.submitted[which % len(self.world.submitted)])

    @rule(which=ANY)
    @precondition(lambda self: self.world.submitted)
    def expire(self, which: int) -> None:
        self.world.expire(self.world.submitted[which % len(self.world.submitted)])

    @rule(which=ANY, twice=st.booleans())
    @precondition(lambda self: self.world.mail)
    def post(self, which: int, twice: bool) -> None:
        self.world.post(which, twice=twice)

    @rule()
    def post_all_in_order(self) -> None:
        while self.world.mail:
            self.world.post(0)

    @rule(which=ANY, lose=st.booleans(), fails=st.sampled_from([None, None, *FailureKind]))
    @precondition(lambda self: self.world.orders)
    def carry_out(self, which: int, lose: bool, fails: FailureKind | None) -> None:
        self.world.order(which, lose=lose, publish_fails=fails)

    @rule(which=ANY, lease=ANY, kind=st.sampled_from([None, None, *FailureKind]))
    @precondition(lambda self: any(agent.leases for agent in self.world.agents.values()))
    def finish(self, which: int, lease: int, kind: FailureKind | None) -> None:
        busy = [agent for agent in self.world.agents.values() if agent.leases]
        agent = busy[which % len(busy)]
        self.world.finish(agent, agent.leases[lease % len(agent.leases)], kind)

    @rule(
        which=ANY, capacity=st.sampled_from([None, 0, 1]), draining=st.booleans(), unfit=st.sampled_from(["", "disk"])
    )
    def heartbeat(self, which: int, capacity: int | None, draining: bool, unfit: str) -> None:
        agents = list(self.world.agents.values())
        self.world.heartbeat(agents[which % len(agents)], capacity, draining=draining, unfit=unfit)

    @rule(which=ANY, seen=st.booleans())
    def kill(self, which: int, seen: bool) -> None:
        agents = list(self.world.agents.values())
        self.world.kill(agents[which % len(agents)], seen=seen)

    @rule(which=ANY)
    def start(self, which: int) -> None:
        agents = list(self.world.agents.values())
        self.world.start(agents[which % len(agents)])

    @rule(seconds=st.sampled_from([0.1, 5.0, 20.0, 130.0]))
    def sleep(self, seconds: float) -> None:
        self.world.sleep(seconds)

    @rule(which=ANY)
    @precondition(lambda self: self.world.cache)
    def forget(self, which: int) -> None:
        cached = sorted(self.world.cache)
        self.world.cache.discard(cached[which % len(cached)])

    @rule()
    def restart(self) -> None:
        self.world.restart()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()
            self.world.restart()


TestFarm = FarmMachine.TestCase
TestFarm.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
