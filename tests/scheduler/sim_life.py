"""One life of the simulated farm: its seed, clock, chance, faults and story."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Protocol

from scheduler import events as e
from scheduler import facts as f
from tests.scheduler.kit import tell_event
from tests.scheduler.oracles import OracleError
from tests.scheduler.story import tell

#: When every life begins.
BEGIN_S = 1000.0
#: Events of one life; more means that something goes round in circles.
MOST_EVENTS = 60_000

FAULTS = (
    "lose", "double", "late", "ghost", "cut", "die", "drain", "unfit", "break", "vanish", "publish", "crash", "cancel",
    "retry",
)  # fmt: skip


class Shell(Protocol):
    """The coordinator, as the network and the clients know it."""

    #: Counts its lives: what an earlier one waited for never comes back.
    life: int

    @property
    def up(self) -> bool:
        """True while it runs."""

    def turn(self, *events: e.Event) -> bool:
        """Take events in; return whether what followed is durable."""


class Life:
    """Time and chance of one life, and all that happened in it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now = BEGIN_S
        self.story: list[tuple[float, object]] = []
        self.chance = random.Random(seed)
        #: How often each fault happens: some often, some never.
        self.faults = {name: self.chance.choice([0.0, 0.0, 0.05, 0.2]) for name in FAULTS}
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + seconds, next(self._numbers), action))

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> None:
        while self._heap and self._heap[0][0] <= until and not stop():
            self.now, _, action = heapq.heappop(self._heap)
            self.events += 1
            if self.events > MOST_EVENTS:
                raise OracleError(f"more than {MOST_EVENTS} events: something goes round in circles")
            action()
        self.now = max(self.now, min(until, self.now if self._heap else until))

    def happens(self, fault: str) -> bool:
        share = self.faults[fault]
        return share > 0 and self.chance.random() < share

    def note(self, what: object) -> None:
        self.story.append((self.now, what))

    def lines(self) -> list[str]:
        """The story, one line for each thing that happened."""
        return [f"{when - BEGIN_S:9.2f} {_line(what)}" for when, what in self.story]


def _line(what: object) -> str:
    if isinstance(what, str):
        return f"# {what}"
    if type(what).__module__ == f.__name__:
        return f"    {tell(what)}"  # type: ignore[arg-type]
    return f"> {tell_event(what)}"  # type: ignore[arg-type]
