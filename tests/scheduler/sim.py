"""The whole farm in one process and no time: real core, real worker machine, everything between and around simulated.

A seed is a life: random graphs, clients that submit, cancel and retry, and a swarm of faults, some often, some never:
messages lost, doubled, late, out of order; partitions; workers that die, drain, are unfit; builds that end in every
way; published results that vanish; a coordinator that dies before or after any append and replays what it has. Then all
faults end, and what is left must end too. Judged by the facts alone (`oracles`) and by what really happened.

    ./run sim [--seeds N] [--start S]

plays seeds on all cores; a seed that fails prints its story and the command that repeats it.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
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
    StepSpec,
    SubmissionId,
    SubmissionRefusedError,
)
from scheduler.policy import Limits
from tests.scheduler.kit import builder, tell_event
from tests.scheduler.oracles import Judge, OracleError
from tests.scheduler.sim_worker import OUTCOMES, Answer, SimWorker
from tests.scheduler.simulation import only_first, random_graph
from tests.scheduler.story import tell

#: Seconds of faults, and most seconds until everything has ended afterwards (quarantines, back-offs, expired leases).
TROUBLED_S = 400.0
PEACE_S = 4 * 3600.0
#: A call that is not answered counts as failed after this time; an idle poll is answered after that.
TIMEOUT_S = 40.0
LONG_POLL_S = 10.0
#: Events of one life; more means that something goes round in circles.
MOST_EVENTS = 60_000
#: Invariants of the state are checked on every so manieth turn: they cost its size.
CHECK_EVERY = 20
#: Lines of a story that are printed.
STORY_LINES = 400

FAULTS = (
    "lose", "double", "late", "ghost", "cut", "die", "drain", "unfit", "break", "vanish", "publish", "crash", "cancel",
    "retry",
)  # fmt: skip


@dataclass
class Link:
    """The coordinator's side of one worker: greet, then one poll after the other."""

    worker: SimWorker
    ack: int = 0
    incarnation: str = ""


@dataclass
class Sim:
    """One life. Build it with a seed and `live`."""

    seed: int
    now: float = 1000.0
    story: list[tuple[float, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        chance = self.chance
        self.faults = {name: chance.choice([0.0, 0.0, 0.05, 0.2]) for name in FAULTS}
        #: Chance of its own: half of the seeds stay what they were before submissions could be forgotten.
        self.forgetting = random.Random(f"forgetting {self.seed}")
        self.forgetful = self.forgetting.choice([0.0, 0.0, 0.2, 0.6])
        self.mending = random.Random(f"mending {self.seed}")
        self.mended = self.mending.choice([0.0, 0.5, 1.0])
        self.graph = random_graph(chance, chance.choice([0.0, 0.3]))
        self.plain = only_first(self.graph)
        #: How (step, recipe) ends whenever it is built; what is not in here succeeds.
        self.fate: dict[tuple[StepKey, int], str] = {}
        for spec in self.graph.values():
            for recipe in range(len(spec.recipes)):
                if chance.random() < self.faults["break"]:
                    self.fate[spec.key, recipe] = chance.choice(list(OUTCOMES))
        #: Chance of its own: half of the seeds stay what they were before builds could be given up.
        self.waiting = random.Random(f"waiting {self.seed}")
        self.limits = Limits(
            failure_ttl_s=chance.choice([0.0, 60.0, 24 * 3600.0]),
            give_up_s=self.waiting.choice([0.0, 0.0, 5.0, 40.0]),
        )
        self.patience = self.waiting.choice([(None,), (None,), (None, 0, 2, 20, 90)])
        self.cache: set[StepKey] = set()
        self.ever_cached: set[StepKey] = set()
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.events = 0
        self.journal: list[f.Fact] = []
        self.judge = Judge(self.limits)
        self.farm: Farm | None = Farm(self.limits)
        #: Counts the lives of the coordinator: what an earlier one waited for never comes back.
        self.life = 0
        self.turns = 0
        self.wake_at = 0.0
        self.names = itertools.count()
        #: Wishes on their way.
        self.pending = 0
        self.accepted: dict[SubmissionId, tuple[StepKey, ...]] = {}
        self.incarnations = itertools.count(2)
        #: The incarnation of each worker that the shell greeted last.
        self.greeted: dict[str, str] = {}
        self.links = [
            Link(self._worker(spec, slots))
            for spec, slots in (
                (builder("b0", "linux"), 2),
                (builder("b1", "linux", "darwin", features=["kvm"]), 2),
                (builder("b2", "darwin", features=["big"], mandatory=["big"]), 1),
            )
        ]

    # Time.

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (self.now + seconds, next(self.numbers), action))

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> None:
        while self.heap and self.heap[0][0] <= until and not stop():
            self.now, _, action = heapq.heappop(self.heap)
            self.events += 1
            if self.events > MOST_EVENTS:
                raise OracleError(f"more than {MOST_EVENTS} events: something goes round in circles")
            action()
        self.now = max(self.now, min(until, self.now if self.heap else until))

    def happens(self, fault: str) -> bool:
        share = self.faults[fault]
        return share > 0 and self.chance.random() < share

    def note(self, what: object) -> None:
        self.story.append((self.now, what))

    # The coordinator.

    def turn(self, *events: e.Event) -> bool:
        """One turn of the engine; whether what followed is durable."""
        farm = self.farm
        if farm is None:
            return False
        for event in events:
            if not isinstance(event, e.TimePassed):
                self.note(event)
            if isinstance(event, e.BuilderJoined):
                self.greeted[event.builder.id] = event.builder.incarnation
        try:
            facts, effects = farm.handle_many(events or (e.TimePassed(),), Instant(self.now))
        except SubmissionRefusedError:
            return True
        if self.happens("crash") and self.chance.random() < 0.2:
            # The append is torn: nothing of it is there afterwards, and nothing was done about it.
            self.crash("before the append")
            return False
        self.journal += [fact for fact in facts if fact.durable]
        self.judge.now = self.now
        self.judge.asked = any(isinstance(event, e.SubmissionReceived) and event.retry_failed for event in events)
        for fact in facts:
            self.story.append((self.now, fact))
            self.judge.take(fact)
            self._check_truth(fact)
        self.judge.after_call()
        self.turns += 1
        if self.turns % CHECK_EVERY == 0:
            invariants.check(farm.state)
        if self.happens("crash") and self.chance.random() < 0.2:
            self.crash("after the append")
            return True
        self._act(effects)
        self._sleep()
        return True

    def _sleep(self) -> None:
        deadline = self.farm.deadline() if self.farm is not None else None
        if deadline is None:
            return
        life, wake_at = self.life, max(deadline, self.now)
        if self.wake_at > self.now and self.wake_at <= wake_at:
            return
        self.wake_at = wake_at

        def wake() -> None:
            if life == self.life and self.farm is not None:
                self.wake_at = 0.0
                self.turn()

        self.after(wake_at - self.now, wake)

    def crash(self, when: str) -> None:
        self.note(f"the coordinator dies {when}")
        self.farm = None
        self.life += 1
        self.after(self.chance.uniform(0.5, 60.0), self.restart)

    def restart(self) -> None:
        if self.farm is not None:
            return
        self.note("the coordinator starts again")
        farm = Farm(self.limits)
        farm.replay(self.journal)
        if self.chance.random() < 0.5:
            short = Farm(self.limits)
            short.replay(farm.snapshot())
            if invariants.durable(short.state) != invariants.durable(farm.state):
                raise OracleError("a snapshot does not give the state back")
            farm = short
        invariants.check(farm.state)
        self.farm = farm
        self.judge.now = self.now
        self.judge.restarted()
        self.wake_at = 0.0
        self._act(farm.resume(Instant(self.now)))
        for link in self.links:
            self._greet(link)
        self._sleep()

    def _act(self, effects: Sequence[x.Effect]) -> None:
        for effect in effects:
            match effect:
                case x.PublishOutputs():
                    self._publish(effect.lease)
                case x.StartBuild():
                    self._send(effect.builder, methodcaller("start", effect.lease, effect.recipe))
                case x.CancelBuild():
                    self._send(effect.builder, methodcaller("cancel", effect.lease))

    def _publish(self, lease: LeaseId) -> None:
        life = self.life

        def published() -> None:
            if self.happens("publish"):
                kind = self.chance.choice([FailureKind.INFRASTRUCTURE] * 4 + [FailureKind.OUTPUT_REJECTED])
                if life == self.life:
                    self.turn(e.PublishFailed(lease, Failure(kind, "the cache said no")))
                return
            if life != self.life and self.chance.random() < 0.5:
                return
            self.cache.add(lease.step)
            self.ever_cached.add(lease.step)
            if life == self.life:
                self.turn(e.OutputsPublished(lease))

        self.after(self.chance.uniform(0.05, 2.0), published)

    # The network.

    def _delay(self) -> float:
        return self.chance.uniform(5.0, 60.0) if self.happens("late") else self.chance.uniform(0.001, 0.05)

    def _through(self, worker: SimWorker) -> bool:
        return not self.happens("lose") and worker.cut_off_until <= self.now

    def _send(self, name: str, order: Callable[[SimWorker], None]) -> None:
        """One message to whoever has that name when it arrives; it may be lost or come twice."""

        def arrive() -> None:
            worker = next(link.worker for link in self.links if link.worker.spec.id == name)
            if worker.alive and self._through(worker):
                order(worker)

        for _ in range(2 if self.happens("double") else 1):
            self.after(self._delay(), arrive)

    def _greet(self, link: Link) -> None:
        life, worker = self.life, link.worker

        def answer() -> None:
            if life != self.life or link.worker is not worker:
                return
            if not worker.alive or not self._through(worker):
                self.after(2.0, lambda: self._again(link, life))
                return
            hello = worker.hello()
            link.ack = link.ack if link.incarnation == worker.spec.incarnation else 0
            link.incarnation = worker.spec.incarnation
            self._ghost(hello)
            if self.turn(hello):
                self._poll(link)

        self.after(self._delay(), answer)

    def _again(self, link: Link, life: int) -> None:
        if life == self.life and self.farm is not None:
            self._greet(link)

    def _poll(self, link: Link) -> None:  # noqa: C901  one exchange, three moments
        """Ask for what there is; a lost question or answer counts as silence, and the worker is greeted anew."""
        life, worker, asked = self.life, link.worker, self.now
        answered = False

        def arrive() -> None:
            if not worker.alive or not self._through(worker):
                self.after(TIMEOUT_S, lambda: self._again(link, life))
            elif worker.outbox and worker.outbox[-1][0] > link.ack:
                answer()
            else:
                worker.waiting = answer
                self.after(LONG_POLL_S, answer)

        def answer() -> None:
            nonlocal answered
            if answered:
                return
            answered = True
            if worker.waiting is answer:
                worker.waiting = None
            if not worker.alive or not self._through(worker) or self.now - asked > TIMEOUT_S:
                self.after(TIMEOUT_S, lambda: self._again(link, life))
                return
            told = worker.events(link.ack)
            self.after(self.chance.uniform(0.001, 0.05), lambda: take(told))

        def take(told: Answer) -> None:
            if life != self.life or link.worker is not worker:
                return
            for event in (*told.reports, told.heartbeat):
                self._ghost(event)
            if self.greeted.get(worker.spec.id) != worker.spec.incarnation:
                # A ghost of an earlier life was greeted after this one.
                self.after(1.0, lambda: self._again(link, life))
                return
            if self.turn(*told.reports, told.heartbeat):
                link.ack = told.last
                self._poll(link)

        self.after(self._delay(), arrive)

    def _hears(self, event: e.Event) -> None:
        self.turn(event)

    def _ghost(self, event: e.Event) -> None:
        """Let the core hear something once more, long after its time."""
        if self.happens("ghost"):
            self.after(self.chance.uniform(1.0, 200.0), lambda: self._hears(event))

    # The workers.

    def _worker(self, spec: BuilderSpec, slots: int) -> SimWorker:
        return SimWorker(
            spec,
            slots,
            lambda: self.now,
            self._of_worker,
            self._outcome,
            self._has_inputs,
            self.chance,
        )

    def _has_inputs(self, lease: LeaseId, recipe: int) -> bool:
        life = self.judge.steps.get(lease.step)
        # A lease may outlive its step, which may since be known again by fewer recipes.
        recipes = life.recipes[recipe : recipe + 1] if life is not None else []
        return bool(recipes) and all(need in self.cache for need in recipes[0].needs)

    def _of_worker(self, worker: SimWorker, seconds: float, action: Callable[[], None]) -> None:
        self.after(seconds, lambda: action() if worker.alive else None)

    def _outcome(self, lease: LeaseId, recipe: int) -> str:
        fate = self.fate.get((lease.step, recipe))
        if fate is None and self.happens("break"):
            fate = self.chance.choice(list(OUTCOMES))
        return fate or ""

    def kill(self, link: Link) -> None:
        worker = link.worker
        if not worker.alive:
            return
        self.note(f"{worker.spec.id} dies")
        self._close(worker)
        worker.alive = False
        if self.chance.random() < 0.5:
            lost = e.BuilderLost(worker.spec.id, worker.spec.incarnation, "its node died")
            self.after(self.chance.uniform(0.1, 5.0), lambda: self._hears(lost))
        self.after(self.chance.uniform(1.0, 60.0), lambda: self.revive(link))

    def revive(self, link: Link) -> None:
        if link.worker.alive:
            return
        spec = replace(link.worker.spec, incarnation=str(next(self.incarnations)))
        link.worker = self._worker(spec, link.worker.slots)
        self.note(f"{spec.id} is back")
        self._again(link, self.life)

    def _close(self, worker: SimWorker) -> None:
        if len(worker.began) != len(set(worker.began)):
            raise OracleError(f"{worker.spec.id} built one lease twice: {worker.began}")

    # The clients.

    def wish(
        self,
        roots: Sequence[StepKey],
        graph: dict[StepKey, StepSpec],
        *,
        retry: bool,
        again: SubmissionId | None = None,
        replanned: bool = False,
    ) -> None:
        """Plan, ask the cache, submit; a client whose call fails tries again."""
        wanted, held, steps = list(dict.fromkeys(roots)), [], []
        for key in wanted:
            if key in self.cache:
                held.append(key)
                continue
            steps.append(graph[key])
            wanted += [need for recipe in graph[key].recipes for need in recipe.needs if need not in wanted]
        name = SubmissionId(f"s{next(self.names)}") if again is None else again
        asked_at = Instant(self.now)
        wait_s = self.waiting.choice(self.patience)
        self.pending += 1

        def arrive() -> None:
            self.pending -= 1
            event = e.SubmissionReceived(
                name,
                tuple(roots),
                tuple(steps),
                tuple(held),
                asked_at,
                retry,
                again=again is not None and not replanned,
                replanned=replanned,
                wait_s=wait_s,
            )
            if self.turn(event):
                self.accepted.setdefault(name, tuple(roots))
            elif again is None:
                self.pending += 1
                self.after(5.0, resend)

        def resend() -> None:
            self.pending -= 1
            self.wish(roots, graph, retry=retry)

        self.after(self.chance.uniform(0.0, 1.0), arrive)

    def cancel(self, name: SubmissionId) -> None:
        if not self.turn(e.SubmissionCancelled(name)):
            self.after(5.0, lambda: self.cancel(name))

    def _expire(self) -> None:
        """Forget a submission, or ask for it too early or again."""
        if self.accepted and self.forgetting.random() < self.forgetful:
            self.turn(e.SubmissionExpired(self.forgetting.choice(list(self.accepted))))

    def _vanish(self) -> None:
        """The cache loses something. Perhaps a worker reports it, and the coordinator has seen it and plans anew."""
        self.cache.discard(self.chance.choice(sorted(self.cache)))
        if self.accepted and self.mending.random() < self.mended:
            name = self.mending.choice(list(self.accepted))
            self.wish(self.accepted[name], self.graph, retry=False, again=name, replanned=True)

    def _something(self) -> None:
        """Do one random thing of the troubled time, once every few seconds."""
        chance = self.chance
        graph = self.graph if chance.random() < 0.7 else self.plain
        if chance.random() < 0.15:
            roots = chance.sample(list(self.graph), chance.randrange(1, 4))
            self.wish(roots, graph, retry=self.happens("retry"))
        if self.accepted and self.happens("cancel"):
            self.cancel(chance.choice(list(self.accepted)))
        if self.accepted and self.happens("retry"):
            name = chance.choice(list(self.accepted))
            self.wish(self.accepted[name], graph, retry=True, again=name)
        self._expire()
        link = chance.choice(self.links)
        if self.happens("die"):
            self.kill(link)
        if self.happens("cut"):
            link.worker.cut_off_until = self.now + chance.choice([5.0, 60.0, 200.0])
        if self.happens("drain"):
            link.worker.drain(on=not link.worker.machine.draining)
        if self.happens("unfit"):
            link.worker.unfit = "" if link.worker.unfit else "its trial build fails"
        if self.cache and self.happens("vanish"):
            self._vanish()
        if self.now < 1000.0 + TROUBLED_S:
            self.after(chance.uniform(1.0, 10.0), self._something)

    # A life, and what is asked of it.

    def live(self) -> Sim:
        for link in self.links:
            self._greet(link)
        self.wish(self.chance.sample(list(self.graph), 3), self.graph, retry=False)
        self._something()
        self.run(1000.0 + TROUBLED_S)
        self._make_peace()
        self.run(self.now + PEACE_S, self._is_over)
        if not self._is_over():
            raise OracleError("something does not end though nothing is withheld")
        # Whatever a worker still does without a right is ended by one more heartbeat.
        self.run(self.now + 3 * TIMEOUT_S)
        self._check_end()
        return self

    def _make_peace(self) -> None:
        self.note("all faults end")
        self.faults = dict.fromkeys(FAULTS, 0.0)
        self.restart()
        for link in self.links:
            self.revive(link)
            link.worker.cut_off_until, link.worker.unfit = 0.0, ""
            link.worker.drain(on=False)
        # What vanished is found missing by a submission that asks the cache, and made again.
        self.wish(list(self.graph), self.graph, retry=False)

    def _is_over(self) -> bool:
        farm = self.farm
        return (
            farm is not None
            and not self.pending
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
        for link in self.links:
            self._close(link.worker)
            held = list(link.worker.machine.held())
            if held:
                raise OracleError(f"{link.worker.spec.id} still holds {held}")
            for step, attempt in link.worker.began:
                if self.judge.granted(StepKey(step)) < attempt:
                    raise OracleError(f"{link.worker.spec.id} built {step}@{attempt}, which no fact grants")

    def lines(self) -> list[str]:
        """The story, one line for each thing that happened."""
        return [f"{when - 1000.0:9.2f} {_line(what)}" for when, what in self.story]


def _line(what: object) -> str:
    if isinstance(what, str):
        return f"# {what}"
    if type(what).__module__ == f.__name__:
        return f"    {tell(what)}"  # type: ignore[arg-type]
    return f"> {tell_event(what)}"  # type: ignore[arg-type]


def play(seed: int) -> Sim:
    """Live one life; raises whatever is found, with the story as notes of the exception."""
    sim = Sim(seed)
    try:
        return sim.live()
    except Exception as error:
        story = sim.lines()
        left = [f"… {len(story) - STORY_LINES} lines before"] if len(story) > STORY_LINES else []
        error.add_note("\n".join([*left, *story[-STORY_LINES:], f"again: ./run sim --start {seed} --seeds 1"]))
        raise


def failure_of(seed: int) -> tuple[int, str] | None:
    """Play a seed; its failure as text, with the story."""
    try:
        play(seed)
    except Exception as error:  # noqa: BLE001  whatever it is, it is this seed's failure
        return seed, "\n".join([*getattr(error, "__notes__", []), f"seed {seed}: {type(error).__name__}: {error}"])
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Play seeds on all cores until one fails."""
    parser = argparse.ArgumentParser(prog="./run sim", description="Play the simulated farm.")
    parser.add_argument("--seeds", type=int, default=10_000, metavar="N", help="how many seeds (10000)")
    parser.add_argument("--start", type=int, default=None, metavar="S", help="the first one; by default a fresh one")
    told = parser.parse_args(arguments)
    start = random.SystemRandom().randrange(10**9) if told.start is None else told.start
    print(f"seeds {start} to {start + told.seeds - 1}", flush=True)
    began = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for count, failure in enumerate(pool.map(failure_of, range(start, start + told.seeds), chunksize=20), 1):
            if failure is not None:
                print(failure[1])
                pool.shutdown(cancel_futures=True)
                return 1
            if count % 1000 == 0:
                print(f"{count} hold, {(time.monotonic() - began) / count * 1000:.1f} ms each", flush=True)
    print(f"all {told.seeds} hold, {(time.monotonic() - began) / max(1, told.seeds) * 1000:.1f} ms each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
