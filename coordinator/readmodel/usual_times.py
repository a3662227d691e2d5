"""Usual times of builds, kept in memory: what a package's newest successful builds on a system took.

Views ask while they render and are answered at once, with what is known by then; what is not is read from the store in
the background, for the next time. A store that is slow or gone costs nothing but the answer.
"""

from __future__ import annotations

import asyncio
import statistics
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from coordinator.errors import CoordinatorError
from coordinator.readmodel.estimate import Expected
from coordinator.stores.timings import AttemptTiming
from infra.clock import Clock
from infra.nix.store_path import package_of

#: Builds of which median and quartiles are taken.
BUILDS = 10
#: Packages and systems that are remembered, some 400 bytes each: a mass rebuild has some ten thousand.
REMEMBERED = 65_536
#: Seconds after which one is read again; one that had no builds, where a step of it runs, and where it waits.
READ_AGAIN_S = 600.0
ASK_AGAIN_S = 10.0
EXPECT_AGAIN_S = 300.0
#: Questions that wait for the store; more are put again when their step is looked at again. Those of one read.
WAITING = 8192
ASKED_AT_ONCE = 64

#: (package, system).
Key = tuple[str, str]
#: Packages, how many newest builds -> their seconds; may raise a `CoordinatorError`.
Builds = Callable[[Sequence[Key], int], Awaitable[Mapping[Key, Sequence[float]]]]


class UsualTimes:
    """The medians and quartiles. `run` reads those that are wanted and not known, until cancelled."""

    def __init__(self, builds: Builds, clock: Clock) -> None:
        self._builds = builds
        self._clock = clock
        #: (package, system) -> median and quartiles in seconds, and when they were read.
        self._known: OrderedDict[Key, tuple[float | None, Expected | None, float]] = OrderedDict()
        self._wanted: asyncio.Queue[Key] = asyncio.Queue(WAITING)
        self._asked: set[Key] = set()
        #: Those that were built while they are asked for: an answer that nothing is known came too early.
        self._built: set[Key] = set()
        #: Counts what the reads gave that is new; `on_answers` is called then.
        self.answers = 0
        self.on_answers: Callable[[], None] = lambda: None

    def of(self, name: str, system: str) -> float | None:
        """Return the seconds that a build of this name usually takes; None where that is not known, or not yet."""
        return self._look(name, system, ASK_AGAIN_S)[0]

    def expected(self, name: str, system: str) -> Expected | None:
        """Return the seconds between which half of its builds took; None where that is not known, or not yet."""
        return self._look(name, system, EXPECT_AGAIN_S)[1]

    def _look(self, name: str, system: str, unknown_again_s: float) -> tuple[float | None, Expected | None, float]:
        key = (package_of(name), system)
        found = self._known.get(key, _NOTHING)
        again_s = unknown_again_s if found[0] is None else READ_AGAIN_S
        if self._clock.now() - found[2] >= again_s and key not in self._asked and not self._wanted.full():
            self._asked.add(key)
            self._wanted.put_nowait(key)
        return found

    @property
    def unanswered(self) -> int:
        """Questions that the store has not answered."""
        return len(self._asked)

    def were_built(self, attempts: Iterable[AttemptTiming]) -> None:
        """Forget that nothing is known of packages that have been built now."""
        for attempt in attempts:
            key = (attempt.package or "", attempt.system or "")
            if attempt.outcome == "done" and self._known.get(key, _NOTHING)[0] is None:
                self._known.pop(key, None)
                if key in self._asked:
                    self._built.add(key)

    async def run(self) -> None:
        """Read what is wanted, many at a time."""
        while True:
            keys = [await self._wanted.get()]
            while len(keys) < ASKED_AT_ONCE and not self._wanted.empty():
                keys.append(self._wanted.get_nowait())
            try:
                builds = await self._builds(keys, BUILDS)
            except CoordinatorError:
                # What was known stays, and is read again as late as if this were news.
                self._learn({key: self._known.get(key, _NOTHING)[:2] for key in keys})
                continue
            took = {key: builds.get(key, ()) for key in keys}
            self._learn({key: (statistics.median(its) if its else None, quartiles(its)) for key, its in took.items()})

    def _learn(self, read: Mapping[Key, tuple[float | None, Expected | None]]) -> None:
        before = self.answers
        for key, (median, expected) in read.items():
            self._asked.discard(key)
            was_built = key in self._built
            self._built.discard(key)
            if median is None and was_built:
                continue
            self.answers += median != self._known.get(key, _NOTHING)[0]
            self._known[key] = (median, expected, self._clock.now())
            self._known.move_to_end(key)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        if self.answers != before:
            self.on_answers()


#: What is known of a package that was never read.
_NOTHING: tuple[float | None, Expected | None, float] = (None, None, 0.0)


def quartiles(took: Sequence[float]) -> Expected | None:
    """Return the seconds between which the middle half of builds took; of one build, its own; None of none."""
    if len(took) < 2:
        return Expected(took[0], took[0]) if took else None
    lower, _, upper = statistics.quantiles(took, method="inclusive")
    return Expected(lower, upper)
