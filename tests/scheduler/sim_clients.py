"""The clients of the simulated farm, and its cache, which loses things."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from scheduler import events as e
from scheduler.model import Instant, StepKey, StepSpec, SubmissionId
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
        wanted, held, steps = list(dict.fromkeys(roots)), [], []
        for key in wanted:
            if key in self.cache:
                held.append(key)
                continue
            steps.append(graph[key])
            wanted += [need for recipe in graph[key].recipes for need in recipe.needs if need not in wanted]
        name = SubmissionId(f"s{next(self.names)}") if again is None else again
        asked_at = Instant(self.life.now)
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
            if self.shell.turn(event):
                self.accepted.setdefault(name, tuple(roots))
            elif again is None:
                self.pending += 1
                self.life.after(5.0, resend)

        def resend() -> None:
            self.pending -= 1
            self.wish(roots, graph, retry=retry)

        self.life.after(self.life.chance.uniform(0.0, 1.0), arrive)

    def cancel(self, name: SubmissionId) -> None:
        if not self.shell.turn(e.SubmissionCancelled(name)):
            self.life.after(5.0, lambda: self.cancel(name))

    def expire(self) -> None:
        """Forget a submission, or ask for it too early or again."""
        if self.accepted and self.forgetting.random() < self.forgetful:
            self.shell.turn(e.SubmissionExpired(self.forgetting.choice(list(self.accepted))))

    def vanish(self) -> None:
        """The cache loses something. Perhaps a worker reports it, and the coordinator has seen it and plans anew."""
        self.cache.discard(self.life.chance.choice(sorted(self.cache)))
        if self.accepted and self.mending.random() < self.mended:
            name = self.mending.choice(list(self.accepted))
            self.wish(self.accepted[name], self.graph, retry=False, again=name, replanned=True)
