"""A small world around a farm: agents, a cache, and a network that loses, doubles and delays what it carries.

The world has no chance of its own: whoever drives it chooses (a seeded generator, or Hypothesis). Reports of agents
are late or doubled but not lost (agents keep them until acknowledged), everything else may be lost. Every call is
followed by the invariants, every fact is put before the judge.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

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
    StepSpec,
    StepState,
    SubmissionId,
    SubmissionRefusedError,
)
from scheduler.placement import asked_of, has_memory
from scheduler.policy import Limits
from tests.scheduler.kit import builder
from tests.scheduler.oracles import Judge, OracleError

READY = StepState.READY
#: What the drivers choose systems and features from; each has a builder below that can take it.
CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("linux", ()),
    ("linux", ()),
    ("darwin", ()),
    ("linux", ("kvm",)),
    ("darwin", ("big",)),
    ("builtin", ()),
)


@dataclass
class Agent:
    spec: BuilderSpec
    capacity: int
    alive: bool = True
    leases: list[LeaseId] = field(default_factory=list)
    #: What this incarnation was ever told: a repeated order is a no-op.
    told: set[LeaseId] = field(default_factory=set)
    #: What it was told to follow, and what this incarnation has built.
    after: dict[LeaseId, tuple[LeaseId, ...]] = field(default_factory=dict)
    built: set[LeaseId] = field(default_factory=set)


@dataclass
class World:
    """See the module."""

    limits: Limits = field(default_factory=Limits)
    now: float = 0.0
    #: Of the builders, in order; nothing is known of their speed where it is empty.
    speeds: tuple[float, ...] = ()
    #: Of their machines, likewise.
    memories: tuple[int, ...] = ()
    #: Whether they take leases that follow others.
    succession: bool = False

    def __post_init__(self) -> None:
        self.farm = Farm(self.limits)
        self.facts: list[f.Fact] = []
        #: The same, call by call.
        self.calls: list[list[f.Fact]] = []
        self.judge = Judge(self.limits)
        self.orders: list[x.Effect] = []
        self.mail: list[e.Event] = []
        self.cache: set[StepKey] = set()
        self.submitted: list[SubmissionId] = []
        self.wishes: dict[SubmissionId, tuple[StepKey, ...]] = {}
        self.incarnations = 0
        self.restarts = 0
        self.agents = {
            spec.id: Agent(spec, capacity)
            for spec, capacity in (
                (builder("b0", "linux"), 2),
                (builder("b1", "linux", "darwin", features=["kvm"]), 2),
                (builder("b2", "darwin", features=["big"], mandatory=["big"]), 1),
            )
        }
        for agent, memory_bytes in zip(self.agents.values(), self.memories, strict=False):
            agent.spec = replace(agent.spec, memory_bytes=memory_bytes)
        for agent in self.agents.values():
            agent.spec = replace(agent.spec, takes_successors=self.succession)
        for agent in self.agents.values():
            self._hello(agent)
        self._measure()

    def _measure(self) -> None:
        systems = ("linux", "darwin", "builtin")
        pairs = [(agent, speed) for agent, speed in zip(self.agents, self.speeds, strict=False)]
        if pairs:
            self.mail.append(e.SpeedsMeasured(tuple((name, on, speed) for name, speed in pairs for on in systems)))

    def call(self, *events: e.Event) -> None:
        """One call of the core, checked."""
        doomed = [event.builder for event in events if isinstance(event, e.BuilderLost) and self._is_here(event)]
        before = len(self.farm.state.steps)
        try:
            facts, effects = self.farm.handle_many(events, Instant(self.now))
        except SubmissionRefusedError:
            # A step known as merely held got its first recipe, on top of one that fell back to needing it (seed 9233).
            invariants.check(self.farm.state)
            if len(self.farm.state.steps) != before:
                raise OracleError("a refused submission has left steps behind") from None
            return
        self.judge.now = self.now
        self.judge.asked = any(_asks(event) for event in events)
        for fact in facts:
            self.judge.take(fact)
        self.judge.after_call()
        self.judge.take_effects(effects)
        self.facts += facts
        self.calls.append(facts)
        self.orders += effects
        invariants.check(self.farm.state)
        for name in doomed:
            if name in self.judge.builders:
                raise OracleError(f"{name} died and is not removed")
        for event in events:
            if isinstance(event, e.SubmissionReceived) and facts and not (event.again or event.replanned):
                built = [key for key in event.held if not self.judge.steps[key].done]
                if built:
                    raise OracleError(f"the cache holds {built}, which are to be built")
        self._check_deadline()
        self._check_holds()
        self._check_memory()

    def _check_holds(self) -> None:
        """A step waits for a faster builder only where there is one, and no longer than that can be worth."""
        for step in self.farm.state.steps.values():
            if step.held is None or step.queue is None:
                continue
            able = [self.farm.state.builders[id_] for id_ in step.queue.builders]
            free = [each for each in able if each.willing and each.free > 0]
            asked = asked_of(step, step.queue)
            free = [each for each in free if has_memory(each, asked)]
            if not free or step.held.memory_bytes:
                continue
            system = step.recipe.requirements.system
            best, most = (max(each.speed(system) for each in some) for some in (free, able))
            gain_s = step.work_ms / 1000 * (1 / best - 1 / most)
            if self.now >= step.held.since + gain_s:
                raise OracleError(f"{step} has waited since {step.held.since} for what gains {gain_s:.0f} s at most")

    def _check_memory(self) -> None:
        """No builder runs what asks for more than its machine has, but for one that asks for more than any has."""
        for each in self.farm.state.builders.values():
            placed = [step for step in each.leases.values() if step.key not in each.followers]
            asked = [step.memory_bytes for step in placed if step.memory_bytes]
            if each.memory_bytes != sum(asked):
                raise OracleError(f"{each.id} counts {each.memory_bytes} bytes, its leases ask for {sum(asked)}")
            if len(asked) > 1 and each.spec is not None and 0 < each.spec.memory_bytes < sum(asked):
                raise OracleError(f"{each.id} runs what asks for {sum(asked)} bytes and has {each.spec.memory_bytes}")

    def _is_here(self, event: e.BuilderLost) -> bool:
        admitted = self.judge.builders.get(event.builder)
        return admitted is not None and admitted.spec.incarnation == event.incarnation

    def _check_deadline(self) -> None:
        deadline = self.farm.deadline()
        latest = [admitted.heard + self.limits.lease_ttl_s for admitted in self.judge.builders.values()]
        latest += [
            step.not_before for step in self.farm.state.steps.values() if step.state is READY and step.not_before
        ]
        latest += self.judge.quarantines.values()
        if latest and (deadline is None or deadline > min(latest)):
            raise OracleError(f"the farm wants to sleep until {deadline} and should wake at {min(latest)}")

    def submit(
        self,
        roots: Iterable[StepKey],
        graph: dict[StepKey, StepSpec],
        *,
        later: bool,
        blind: bool = False,
        retry: bool = False,
        again: SubmissionId | None = None,
        replanned: bool = False,
    ) -> None:
        """Ask the cache and send a submission of everything below `roots`, now or by mail; `again` is a known one."""
        wanted = list(dict.fromkeys(roots))
        held: list[StepKey] = []
        steps: list[StepSpec] = []
        for key in wanted:
            if key in self.cache:
                held.append(key)
                if not blind:
                    continue
            steps.append(graph[key])
            wanted += [n for recipe in graph[key].recipes for n in recipe.needs if n not in wanted]
        name = SubmissionId(f"s{len(self.submitted)}") if again is None else again
        if again is None:
            self.submitted.append(name)
        self.wishes[name] = tuple(dict.fromkeys(roots))
        event = e.SubmissionReceived(
            name,
            self.wishes[name],
            tuple(steps),
            tuple(held),
            Instant(self.now),
            retry_failed=retry,
            again=again is not None and not replanned,
            replanned=replanned,
        )
        if later:
            self.mail.append(event)
        else:
            self.call(event)

    def retry(self, name: SubmissionId, graph: dict[StepKey, StepSpec]) -> None:
        """Let a submission run again: it is planned anew, as the coordinator does."""
        if name in self.farm.state.submissions:
            self.submit(self.wishes[name], graph, later=False, retry=True, again=name)

    def replan(self, name: SubmissionId, graph: dict[StepKey, StepSpec]) -> None:
        """Plan a submission anew, as the coordinator does where it has seen that the cache lost something."""
        if name in self.farm.state.submissions:
            self.submit(self.wishes[name], graph, later=False, again=name, replanned=True)

    def cancel(self, name: SubmissionId) -> None:
        """A client is promised that this arrives; only after its submission has."""
        if name in self.farm.state.submissions:
            self.call(e.SubmissionCancelled(name))

    def expire(self, name: SubmissionId) -> None:
        """Nobody asks for a submission any more, whether it has ended, still runs or never arrived."""
        self.call(e.SubmissionExpired(name))

    def post(self, index: int, *, twice: bool = False) -> None:
        """Deliver one piece of mail, any one; perhaps keep a copy for later."""
        event = self.mail.pop(index % len(self.mail))
        if twice and not isinstance(event, e.SubmissionReceived):
            self.mail.append(event)
        self.call(event)

    def order(self, index: int, *, lose: bool = False, publish_fails: FailureKind | None = None) -> None:
        """Carry out one effect, any one; what is not publishing may be lost."""
        effect = self.orders.pop(index % len(self.orders))
        if isinstance(effect, x.FetchAhead):
            return
        if isinstance(effect, x.PublishOutputs):
            if publish_fails is not None:
                self.mail.append(e.PublishFailed(effect.lease, Failure(publish_fails, "no")))
            else:
                self.cache.add(effect.lease.step)
                self.mail.append(e.OutputsPublished(effect.lease))
            return
        agent = self.agents[effect.builder]
        if lose or not agent.alive:
            return
        if isinstance(effect, x.StartBuild):
            if effect.lease not in agent.told:
                agent.told.add(effect.lease)
                agent.leases.append(effect.lease)
                agent.after[effect.lease] = effect.after
                if not agent.built.union(agent.leases).issuperset(effect.after):
                    self.finish(agent, effect.lease, FailureKind.RETURNED)
        elif effect.lease in agent.leases:
            self.finish(agent, effect.lease, FailureKind.CANCELLED)

    def finish(self, agent: Agent, lease: LeaseId, kind: FailureKind | None) -> None:
        """End a build on an agent; None is success. The report goes by mail."""
        ahead = agent.after.get(lease, ())
        if kind is None and not agent.built.issuperset(ahead):
            if any(each in agent.leases for each in ahead if each not in agent.built):
                # It has not begun yet.
                return
            kind = FailureKind.RETURNED
        agent.leases.remove(lease)
        if kind is None:
            agent.built.add(lease)
            self.mail.append(e.BuildSucceeded(lease, agent.spec.id, b"e"))
        else:
            self.mail.append(e.BuildFailed(lease, agent.spec.id, Failure(kind, "no")))

    def heartbeat(self, agent: Agent, capacity: int | None = None, *, draining: bool = False, unfit: str = "") -> None:
        room = agent.capacity if capacity is None else capacity
        if agent.alive:
            spec = agent.spec
            self.mail.append(e.BuilderReported(spec.id, spec.incarnation, room, tuple(agent.leases), draining, unfit))

    def _hello(self, agent: Agent) -> None:
        self.mail.append(e.BuilderJoined(agent.spec, agent.capacity, tuple(agent.leases)))

    def kill(self, agent: Agent, *, seen: bool) -> None:
        if agent.alive:
            agent.alive = False
            agent.leases.clear()
            if seen:
                self.mail.append(e.BuilderLost(agent.spec.id, agent.spec.incarnation, "killed"))

    def start(self, agent: Agent) -> None:
        """Start a dead agent anew, or let a living one greet again."""
        if not agent.alive:
            self.incarnations += 1
            spec = agent.spec
            agent.spec = BuilderSpec(
                *(spec.id, f"i{self.incarnations}", spec.systems, spec.features, spec.mandatory),
                takes_successors=spec.takes_successors,
            )
            agent.alive = True
            agent.told, agent.after, agent.built = set(), {}, set()
        self._hello(agent)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.call(e.TimePassed())

    def restart(self) -> None:
        """Kill the coordinator: orders on their way are lost, the journal stays; agents greet the new one.

        Every other time it starts from a snapshot; the journal that it is judged by stays whole.
        """
        durable = [fact for fact in self.facts if fact.durable]
        farm, shortcut = Farm(self.limits), Farm(self.limits)
        farm.replay(durable)
        if invariants.durable(farm.state) != invariants.durable(self.farm.state):
            raise OracleError("the journal does not give the state back")
        shortcut.replay(farm.snapshot())
        if invariants.durable(farm.state) != invariants.durable(shortcut.state):
            raise OracleError("a snapshot does not give the state back")
        if farm.snapshot() != shortcut.snapshot():
            raise OracleError("a snapshot of what a snapshot gave is another one")
        self.restarts += 1
        self.farm = shortcut if self.restarts % 2 else farm
        self.orders = list(farm.resume(Instant(self.now)))
        self.judge.now = self.now
        self.judge.restarted()
        self._measure()
        for agent in self.agents.values():
            if agent.alive:
                self._hello(agent)

    def settle(self) -> None:
        """Withhold nothing more and let every build succeed: then every submission ends and nothing dangles."""
        for agent in self.agents.values():
            self.start(agent)
        self._deliver_all()
        self._check_rights()
        for _ in range(600):
            self._deliver_all()
            for agent in self.agents.values():
                for lease in tuple(agent.leases):
                    self.finish(agent, lease, None)
            if not self.mail and all(self.farm.ended(name) for name in self.submitted):
                break
            for agent in self.agents.values():
                self.heartbeat(agent)
            # Builders speak every 20 s at least; in between the farm is woken exactly when it asked.
            deadline = self.farm.deadline()
            self.sleep(20.0 if deadline is None else min(20.0, max(0.0, deadline - self.now)))
        else:
            raise OracleError("a submission does not end though nothing is withheld")
        self._check_rights()
        busy = [step for step in self.farm.state.steps.values() if step.builder or step.wanted]
        if busy:
            raise OracleError(f"leases or wishes are left when all is done: {busy}")

    def _check_rights(self) -> None:
        """One heartbeat later no agent builds without a right."""
        for agent in self.agents.values():
            self.heartbeat(agent)
        self._deliver_all()
        for agent in self.agents.values():
            for lease in agent.leases:
                life = self.judge.steps.get(lease.step)
                if life is None or (life.holder, life.attempt) != (agent.spec.id, lease.attempt):
                    raise OracleError(f"{agent.spec.id} still builds {lease} without a right")

    def _deliver_all(self) -> None:
        while self.orders or self.mail:
            while self.orders:
                self.order(0)
            while self.mail:
                self.post(0)


def _asks(event: e.Event) -> bool:
    return isinstance(event, e.RetryAsked) or (isinstance(event, e.SubmissionReceived) and event.retry_failed)
