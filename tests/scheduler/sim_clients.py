"""The clients of the simulated farm, and its cache, which loses things."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Container, Iterable, Sequence

from scheduler import events as e
from scheduler.model import Instant, StepKey, StepSpec, SubmissionId
from scheduler.terms import NO_TERMS, Terms
from tests.scheduler.sim_life import Life, Shell


class Clients:
    """Submit, cancel, and find what has vanished. Chances of their own keep seeds what they were before these came."""

    def __init__(self, life: Life, shell: Shell, graph: dict[StepKey, StepSpec]) -> None:
        self.life = life
        self.shell = shell
        self.graph = graph
        self.cache: set[StepKey] = set()
        self.forgetting = random.Random(f"forgetting {life.seed}")
        self.forgetful = self.forgetting.choice([0.0, 0.0, 0.2, 0.6])
        self.mending = random.Random(f"mending {life.seed}")
        self.mended = self.mending.choice([0.0, 0.5, 1.0])
        self.waiting = random.Random(f"waiting {life.seed}")
        self.give_up_s = self.waiting.choice([0.0, 0.0, 5.0, 40.0])
        self.patience = self.waiting.choice([(None,), (None,), (None, 0, 2, 20, 90)])
        self.streaming = random.Random(f"streaming {life.seed}")
        self.streamed = self.streaming.choice([0.0, 0.0, 0.4, 0.9])
        self.terming = random.Random(f"terms {life.seed}")
        self.particular = self.terming.choice([0.0, 0.0, 0.5, 1.0])
        self.names = itertools.count()
        #: Wishes on their way.
        self.pending = 0
        self.accepted: dict[SubmissionId, tuple[StepKey, ...]] = {}

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
        if again is None and self.streaming.random() < self.streamed:
            Stream(self, roots, graph, retry=retry).begin()
            return
        steps, held = self.plan(roots, graph)
        name = SubmissionId(f"s{next(self.names)}") if again is None else again
        asked_at = Instant(self.life.now)
        wait_s = self.waiting.choice(self.patience)
        terms, supersedes = self.terms() if again is None else (NO_TERMS, False)
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
                terms=terms,
                supersedes=supersedes,
            )
            if self.shell.turn(event):
                self.accepted.setdefault(name, tuple(roots))
            elif again is None:
                self.pending += 1
                self.life.after(5.0, resend)

        def resend() -> None:
            self.pending -= 1
            self.wish(roots, graph, retry=retry)

        self.life.after(self.life.chance.uniform(0.0, 1.0), arrive)

    def terms(self) -> tuple[Terms, bool]:
        """Return what a submission sets for itself, and whether it supersedes others."""
        chance = self.terming
        if chance.random() >= self.particular:
            return NO_TERMS, False
        terms = Terms(
            owner=chance.choice(["", "a", "b"]),
            priority=chance.choice([0, 0, -5, 1, 5]),
            lineage=chance.choice(["", "main", "branch"]),
            deadline=Instant(chance.choice([0.0, 0.0, self.life.now + chance.uniform(0.5, 120.0)])),
            fail_fast=chance.random() < 0.4,
        )
        return terms, chance.random() < 0.5

    def plan(
        self, roots: Iterable[StepKey], graph: dict[StepKey, StepSpec], known: Container[StepKey] = ()
    ) -> tuple[list[StepSpec], list[StepKey]]:
        """Return the steps to make and those that the cache holds, without those that are `known`."""
        wanted: list[StepKey] = [key for key in dict.fromkeys(roots) if key not in known]
        steps: list[StepSpec] = []
        held: list[StepKey] = []
        for key in wanted:
            if key in self.cache:
                held.append(key)
                continue
            steps.append(graph[key])
            needs = (need for recipe in graph[key].recipes for need in recipe.needs)
            wanted += [need for need in dict.fromkeys(needs) if need not in wanted and need not in known]
        return steps, held

    def cancel(self, name: SubmissionId) -> None:
        if not self.shell.turn(e.SubmissionCancelled(name)):
            self.life.after(5.0, lambda: self.cancel(name))

    def expire(self) -> None:
        """Forget a submission, or ask for it too early or again; or give one another priority."""
        if self.accepted and self.terming.random() < self.particular:
            name = self.terming.choice(list(self.accepted))
            self.shell.turn(e.PriorityAsked(name, self.terming.choice([None, None, -5, 3])))
        if self.accepted and self.forgetting.random() < self.forgetful:
            self.shell.turn(e.SubmissionExpired(self.forgetting.choice(list(self.accepted))))

    def vanish(self) -> None:
        """The cache loses something. Perhaps a worker reports it, and the coordinator has seen it and plans anew."""
        self.cache.discard(self.life.chance.choice(sorted(self.cache)))
        if self.accepted and self.mending.random() < self.mended:
            name = self.mending.choice(list(self.accepted))
            self.wish(self.accepted[name], self.graph, retry=False, again=name, replanned=True)


class Stream:
    """A client that opens a submission and sends its roots in batches; calls are lost, doubled and late.

    Where it falls silent, or has lost its submission, the farm seals what it left.
    """

    def __init__(
        self, clients: Clients, roots: Sequence[StepKey], graph: dict[StepKey, StepSpec], *, retry: bool
    ) -> None:
        self.clients = clients
        self.roots = list(dict.fromkeys(roots))
        self.graph = graph
        self.retry = retry
        self.chance = clients.streaming
        self.name = SubmissionId(f"s{next(clients.names)}")
        self.wait_s = clients.waiting.choice(clients.patience)
        self.sent = self.chance.choice([0, 0, 1])
        #: All that this submission was planned with: what it has already is not planned again, or only sometimes.
        self.known: set[StepKey] = set()
        self.silent_after = self.chance.choice([None, None, None, self.chance.randrange(3)])

    def begin(self) -> None:
        """Open the submission."""
        self.clients.pending += 1
        self._later(self._open)

    def _later(self, action: Callable[[], None], most_s: float = 30.0) -> None:
        self.clients.life.after(self.chance.uniform(0.0, most_s), action)

    def _planned(self, roots: Sequence[StepKey]) -> tuple[tuple[StepSpec, ...], tuple[StepKey, ...]]:
        again = self.chance.random() < 0.3
        steps, held = self.clients.plan(roots, self.graph, () if again else self.known)
        self.known.update(spec.key for spec in steps)
        self.known.update(held)
        return tuple(steps), tuple(held)

    def _open(self) -> None:
        roots = self.roots[: self.sent]
        steps, held = self._planned(roots)
        asked_at = Instant(self.clients.life.now)
        event = e.SubmissionReceived(
            self.name, tuple(roots), steps, held, asked_at, self.retry, wait_s=self.wait_s, open=True
        )
        if not self._told(event):
            # It does not know whether it was taken: the name is its own, so it sends it again.
            self._later(self._open, 10.0)
            return
        self.clients.accepted[self.name] = tuple(roots)
        self._later(self._grow)

    def _told(self, event: e.Event) -> bool:
        """Send an event, perhaps twice; return whether its answer came."""
        shell = self.clients.shell
        done = shell.turn(event)
        if done and self.clients.life.happens("double"):
            shell.turn(event)
        return done and not self.clients.life.happens("lose")

    def _grow(self) -> None:
        if self.silent_after is not None and self.sent > self.silent_after:
            self.clients.life.after(100.0, lambda: self._seal("its client was silent"))
            return
        if self.sent == len(self.roots):
            self._seal("")
            return
        upto = self.sent + self.chance.randrange(1, 3)
        # A batch that is sent again has roots that are there already, and perhaps one more.
        roots = self.roots[max(0, self.sent - self.chance.randrange(2)) : upto]
        steps, held = self._planned(roots)
        asked_at = Instant(self.clients.life.now)
        event = e.SubmissionGrown(self.name, tuple(roots), steps, held, asked_at, self.retry)
        if self._told(event):
            self.sent = min(upto, len(self.roots))
            self.clients.accepted[self.name] = tuple(self.roots[: self.sent])
        self._later(self._grow)

    def _seal(self, incomplete: str) -> None:
        if self._told(e.SealAsked(self.name, incomplete)):
            self.clients.pending -= 1
        else:
            self._later(lambda: self._seal(incomplete), 10.0)
