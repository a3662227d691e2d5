"""The whole farm in one process and no time: real core, real worker machine, everything between and around simulated.

A seed is a life: random graphs, clients that submit, cancel and retry, and a swarm of faults, some often, some never:
messages lost, doubled, late, out of order; partitions; workers that die, drain, are unfit; builds that end in every
way; published results that vanish; a coordinator that dies before or after any append and replays what it has. Then all
faults end, and what is left must end too. Judged by the facts alone (`oracles`) and by what really happened.

`sim_life` has time and chance, `sim_network` and `sim_clients` what is around the coordinator, `sim_worker` the
workers, `sim_play` the command. Here are the coordinator, the faults of workers, and what is asked of a whole life.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import methodcaller

from scheduler import effects as x
from scheduler import events as e
from scheduler import facts as f
from scheduler import invariants
from scheduler.farm import Farm
from scheduler.model import (
    BuilderSpec,
    Failure,
    FailureKind,
    Instant,
    LeaseId,
    StepKey,
    SubmissionRefusedError,
)
from scheduler.policy import Limits
from tests.scheduler.kit import builder
from tests.scheduler.oracles import Judge, OracleError
from tests.scheduler.sim_clients import Clients
from tests.scheduler.sim_life import BEGIN_S, FAULTS, Life
from tests.scheduler.sim_network import TIMEOUT_S, Link, Network
from tests.scheduler.sim_worker import OUTCOMES, SimWorker
from tests.scheduler.simulation import only_first, random_graph

#: Seconds of faults, and most seconds until everything has ended afterwards (quarantines, back-offs, expired leases).
TROUBLED_S = 400.0
PEACE_S = 4 * 3600.0
#: Invariants of the state are checked on every so manieth turn: they cost its size.
CHECK_EVERY = 20


class Sim:
    """One life. Build it with a seed and `live`."""

    def __init__(self, seed: int) -> None:
        life = self.time = Life(seed)
        chance = life.chance
        share = chance.choice([0.0, 0.3])
        self.graph = random_graph(chance, share)
        self.plain = only_first(self.graph)
        #: How (step, recipe) ends whenever it is built; what is not in here succeeds.
        self.fate: dict[tuple[StepKey, int], str] = {}
        for spec in self.graph.values():
            for recipe in range(len(spec.recipes)):
                if chance.random() < life.faults["break"]:
                    self.fate[spec.key, recipe] = chance.choice(list(OUTCOMES))
        self.clients = Clients(life, self, self.graph)
        self.limits = Limits(failure_ttl_s=chance.choice([0.0, 60.0, 24 * 3600.0]), give_up_s=self.clients.give_up_s)
        self.ever_cached: set[StepKey] = set()
        self.journal: list[f.Fact] = []
        self.judge = Judge(self.limits)
        self.farm: Farm | None = Farm(self.limits)
        self.life = 0
        self.turns = 0
        self.wake_at = 0.0
        self.incarnations = itertools.count(2)
        self.network = Network(life, self)
        # Chance of its own: half of the seeds stay what they were before leases could follow others.
        succession = random.Random(f"succession {seed}").random() < 0.5
        self.network.links = [
            Link(self._worker(replace(spec, takes_successors=succession), slots))
            for spec, slots in (
                (builder("b0", "linux"), 2),
                (builder("b1", "linux", "darwin", features=["kvm"]), 2),
                (builder("b2", "darwin", features=["big"], mandatory=["big"]), 1),
            )
        ]

    @property
    def up(self) -> bool:
        """True while the coordinator runs."""
        return self.farm is not None

    # The coordinator.

    def turn(self, *events: e.Event) -> bool:
        """One turn of the engine; whether what followed is durable."""
        farm = self.farm
        if farm is None:
            return False
        for event in events:
            if not isinstance(event, e.TimePassed):
                self.time.note(event)
            if isinstance(event, e.BuilderJoined):
                self.network.greeted[event.builder.id] = event.builder.incarnation
        try:
            facts, effects = farm.handle_many(events or (e.TimePassed(),), Instant(self.time.now))
        except SubmissionRefusedError:
            return True
        if self.time.happens("crash") and self.time.chance.random() < 0.2:
            # The append is torn: nothing of it is there afterwards, and nothing was done about it.
            self.crash("before the append")
            return False
        self.journal += [fact for fact in facts if fact.durable]
        self.judge.now = self.time.now
        self.judge.asked = any(
            isinstance(event, e.SubmissionReceived | e.SubmissionGrown) and event.retry_failed for event in events
        )
        for fact in facts:
            self.time.story.append((self.time.now, fact))
            self.judge.take(fact)
            self._check_truth(fact)
        self.judge.after_call()
        self.judge.take_effects(effects)
        self.turns += 1
        if self.turns % CHECK_EVERY == 0:
            invariants.check(farm.state)
        if self.time.happens("crash") and self.time.chance.random() < 0.2:
            self.crash("after the append")
            return True
        self._act(effects)
        self._sleep()
        return True

    def _sleep(self) -> None:
        deadline = self.farm.deadline() if self.farm is not None else None
        if deadline is None:
            return
        life, wake_at = self.life, max(deadline, self.time.now)
        if self.wake_at > self.time.now and self.wake_at <= wake_at:
            return
        self.wake_at = wake_at

        def wake() -> None:
            if life == self.life and self.farm is not None:
                self.wake_at = 0.0
                self.turn()

        self.time.after(wake_at - self.time.now, wake)

    def crash(self, when: str) -> None:
        self.time.note(f"the coordinator dies {when}")
        self.farm = None
        self.life += 1
        self.time.after(self.time.chance.uniform(0.5, 60.0), self.restart)

    def restart(self) -> None:
        if self.farm is not None:
            return
        self.time.note("the coordinator starts again")
        farm = Farm(self.limits)
        farm.replay(self.journal)
        if self.time.chance.random() < 0.5:
            short = Farm(self.limits)
            short.replay(farm.snapshot())
            if invariants.durable(short.state) != invariants.durable(farm.state):
                raise OracleError("a snapshot does not give the state back")
            farm = short
        invariants.check(farm.state)
        self.farm = farm
        self.judge.now = self.time.now
        self.judge.restarted()
        self.wake_at = 0.0
        self._act(farm.resume(Instant(self.time.now)))
        for link in self.network.links:
            self.network.greet(link)
        self._sleep()

    def _act(self, effects: Sequence[x.Effect]) -> None:
        for effect in effects:
            match effect:
                case x.PublishOutputs():
                    self._publish(effect.lease)
                case x.StartBuild():
                    self.network.send(effect.builder, methodcaller("start", effect.lease, effect.recipe, effect.after))
                case x.CancelBuild():
                    self.network.send(effect.builder, methodcaller("cancel", effect.lease))

    def _publish(self, lease: LeaseId) -> None:
        life = self.life

        def published() -> None:
            if self.time.happens("publish"):
                kind = self.time.chance.choice([FailureKind.INFRASTRUCTURE] * 4 + [FailureKind.OUTPUT_REJECTED])
                if life == self.life:
                    self.turn(e.PublishFailed(lease, Failure(kind, "the cache said no")))
                return
            if life != self.life and self.time.chance.random() < 0.5:
                return
            self.clients.cache.add(lease.step)
            self.ever_cached.add(lease.step)
            if life == self.life:
                self.turn(e.OutputsPublished(lease))

        self.time.after(self.time.chance.uniform(0.05, 2.0), published)

    # The workers.

    def _worker(self, spec: BuilderSpec, slots: int) -> SimWorker:
        return SimWorker(
            spec,
            slots,
            lambda: self.time.now,
            self._of_worker,
            self._outcome,
            self._has_inputs,
            self.time.chance,
        )

    def _has_inputs(self, lease: LeaseId, recipe: int, here: set[StepKey]) -> bool:
        life = self.judge.steps.get(lease.step)
        # A lease may outlive its step, which may since be known again by fewer recipes.
        recipes = life.recipes[recipe : recipe + 1] if life is not None else []
        return bool(recipes) and all(need in self.clients.cache or need in here for need in recipes[0].needs)

    def _of_worker(self, worker: SimWorker, seconds: float, action: Callable[[], None]) -> None:
        self.time.after(seconds, lambda: action() if worker.alive else None)

    def _outcome(self, lease: LeaseId, recipe: int) -> str:
        fate = self.fate.get((lease.step, recipe))
        if fate is None and self.time.happens("break"):
            fate = self.time.chance.choice(list(OUTCOMES))
        return fate or ""

    def kill(self, link: Link) -> None:
        worker = link.worker
        if not worker.alive:
            return
        self.time.note(f"{worker.spec.id} dies")
        self._close(worker)
        worker.alive = False
        if self.time.chance.random() < 0.5:
            lost = e.BuilderLost(worker.spec.id, worker.spec.incarnation, "its node died")
            self.time.after(self.time.chance.uniform(0.1, 5.0), lambda: self.network.hears(lost))
        self.time.after(self.time.chance.uniform(1.0, 60.0), lambda: self.revive(link))

    def revive(self, link: Link) -> None:
        if link.worker.alive:
            return
        spec = replace(link.worker.spec, incarnation=str(next(self.incarnations)))
        link.worker = self._worker(spec, link.worker.slots)
        self.time.note(f"{spec.id} is back")
        self.network.again(link, self.life)

    def _close(self, worker: SimWorker) -> None:
        if len(worker.began) != len(set(worker.began)):
            raise OracleError(f"{worker.spec.id} built one lease twice: {worker.began}")

    def _something(self) -> None:
        """Do one random thing of the troubled time, once every few seconds."""
        chance = self.time.chance
        graph = self.graph if chance.random() < 0.7 else self.plain
        if chance.random() < 0.15:
            roots = chance.sample(list(self.graph), chance.randrange(1, 4))
            self.clients.wish(roots, graph, retry=self.time.happens("retry"))
        if self.clients.accepted and self.time.happens("cancel"):
            self.clients.cancel(chance.choice(list(self.clients.accepted)))
        if self.clients.accepted and self.time.happens("retry"):
            name = chance.choice(list(self.clients.accepted))
            self.clients.wish(self.clients.accepted[name], graph, retry=True, again=name)
        self.clients.expire()
        link = chance.choice(self.network.links)
        if self.time.happens("die"):
            self.kill(link)
        if self.time.happens("cut"):
            link.worker.cut_off_until = self.time.now + chance.choice([5.0, 60.0, 200.0])
        if self.time.happens("drain"):
            link.worker.drain(on=not link.worker.machine.draining)
        if self.time.happens("unfit"):
            link.worker.unfit = "" if link.worker.unfit else "its trial build fails"
        if self.clients.cache and self.time.happens("vanish"):
            self.clients.vanish()
        if self.time.now < BEGIN_S + TROUBLED_S:
            self.time.after(chance.uniform(1.0, 10.0), self._something)

    # A life, and what is asked of it.

    def live(self) -> Sim:
        for link in self.network.links:
            self.network.greet(link)
        self.clients.wish(self.time.chance.sample(list(self.graph), 3), self.graph, retry=False)
        self._something()
        self.time.run(BEGIN_S + TROUBLED_S)
        self._make_peace()
        self.time.run(self.time.now + PEACE_S, self._is_over)
        if not self._is_over():
            raise OracleError("something does not end though nothing is withheld")
        # Whatever a worker still does without a right is ended by one more heartbeat.
        self.time.run(self.time.now + 3 * TIMEOUT_S)
        self._check_end()
        return self

    def _make_peace(self) -> None:
        self.time.note("all faults end")
        self.time.faults = dict.fromkeys(FAULTS, 0.0)
        self.restart()
        for link in self.network.links:
            self.revive(link)
            link.worker.cut_off_until, link.worker.unfit = 0.0, ""
            link.worker.drain(on=False)
        # What vanished is found missing by a submission that asks the cache, and made again.
        self.clients.wish(list(self.graph), self.graph, retry=False)

    def _is_over(self) -> bool:
        farm = self.farm
        return (
            farm is not None
            and not self.clients.pending
            and all(farm.ended(name) for name, standing in self.judge.submissions.items() if standing)
        )

    def _check_truth(self, fact: f.Fact) -> None:
        if isinstance(fact, f.StepDone) and fact.lease.step not in self.ever_cached:
            raise OracleError(f"what nobody published is said to be done: {fact}")
        if isinstance(fact, f.StepBuilt):
            fate = self.fate.get((fact.lease.step, self.judge.steps[fact.lease.step].active))
            if fate is not None:
                raise OracleError(f"a build that can only end in {fate!r} is said to have succeeded: {fact}")

    def _check_end(self) -> None:
        farm = self.farm
        if farm is None:
            raise OracleError("the coordinator is gone though nothing kills it")
        invariants.check(farm.state)
        busy = [step for step in farm.state.steps.values() if step.builder or step.wanted]
        if busy:
            raise OracleError(f"leases or wishes are left when all is done: {busy}")
        again = Farm(self.limits)
        again.replay(self.journal)
        if invariants.durable(again.state) != invariants.durable(farm.state):
            raise OracleError("the journal does not give the state back")
        for link in self.network.links:
            self._close(link.worker)
            held = list(link.worker.machine.held())
            if held:
                raise OracleError(f"{link.worker.spec.id} still holds {held}")
            for step, attempt in link.worker.began:
                if self.judge.granted(StepKey(step)) < attempt:
                    raise OracleError(f"{link.worker.spec.id} built {step}@{attempt}, which no fact grants")
