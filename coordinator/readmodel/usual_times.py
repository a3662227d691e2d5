"""Usual times of builds, kept in memory: what a package's newest successful builds on a system took.

Views ask while they render and are answered at once, with what is known by then; what is not is read from the store in
the background, for the next time. A store that is slow or gone costs nothing but the answer.
"""

from __future__ import annotations

import asyncio
import statistics
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from coordinator.errors import CoordinatorError
from infra.clock import Clock
from infra.nix.store_path import package_of

#: Builds of which the median is taken.
BUILDS = 10
#: Packages and systems that are remembered; seconds after which one is read again, and one that had no builds.
REMEMBERED = 8192
READ_AGAIN_S = 600.0
ASK_AGAIN_S = 10.0
#: Questions that wait for the store; more are put again when their step changes.
WAITING = 256

#: (package, system, how many newest builds) -> their seconds; may raise a `CoordinatorError`.
Builds = Callable[[str, str, int], Awaitable[list[float]]]


class UsualTimes:
    """The medians. `run` reads those that are wanted and not known, until cancelled."""

    def __init__(self, builds: Builds, clock: Clock) -> None:
        self._builds = builds
        self._clock = clock
        #: (package, system) -> seconds, and when they were read.
        self._known: OrderedDict[tuple[str, str], tuple[float | None, float]] = OrderedDict()
        self._wanted: asyncio.Queue[tuple[str, str]] = asyncio.Queue(WAITING)
        self._asked: set[tuple[str, str]] = set()

    def of(self, name: str, system: str) -> float | None:
        """Return the seconds that a build of this name usually takes; None where that is not known, or not yet."""
        key = (package_of(name), system)
        seconds, read_at = self._known.get(key, (None, 0.0))
        again_s = ASK_AGAIN_S if seconds is None else READ_AGAIN_S
        if self._clock.now() - read_at >= again_s and key not in self._asked and not self._wanted.full():
            self._asked.add(key)
            self._wanted.put_nowait(key)
        return seconds

    @property
    def unanswered(self) -> int:
        """Questions that the store has not answered."""
        return len(self._asked)

    async def run(self) -> None:
        """Read the wanted medians, one after the other."""
        while True:
            key = await self._wanted.get()
            try:
                took = await self._builds(*key, BUILDS)
            except CoordinatorError:
                took = []
            self._asked.discard(key)
            self._known[key] = (statistics.median(took) if took else None, self._clock.now())
            self._known.move_to_end(key)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
