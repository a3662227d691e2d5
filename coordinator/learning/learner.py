"""Learner: reads what builds took, again and again, and gives the core what follows from it.

It runs beside everything else. A store of timings that is slow or gone leaves what was learned before. What the core
gets is in its journal with each step (`StepSpec.work_ms`), so that a replay needs no timings.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Final

from sqlalchemy import select

from coordinator.api.questions import EstimateSource
from coordinator.errors import CoordinatorError
from coordinator.learning.learned import Learned, TimedBuild, kind_of, learn
from coordinator.stores.timings import TimingStore, attempts
from infra.clock import Clock
from infra.nix.store_path import package_of
from scheduler.events import Event, SpeedsMeasured
from scheduler.model import BuilderId

_log = logging.getLogger(__name__)

#: Seconds between two looks.
LOOK_EVERY_S: Final = 60.0
#: Newest builds that are learned from: some 10 MB and half a second of a thread.
BUILDS: Final = 50_000
#: Builds that are taken from the store between two turns of the event loop, some 5 us each.
BUILDS_AT_ONCE: Final = 1_000
#: Builds that are older teach nothing: machines and packages change.
WINDOW_S: Final = 90 * 86400.0
#: Speeds that differ by a smaller part than this from what the core has are not worth its attention.
WORTH_TELLING: Final = 0.05
#: Speed of a worker for a system that it only emulates, until it is measured.
EMULATED_SPEED: Final = 0.2

#: Since when -> builds, the oldest first; may raise a `CoordinatorError`.
Read = Callable[[float], Awaitable[Sequence[TimedBuild]]]
Post = Callable[[Sequence[Event]], Awaitable[None]]


async def timed_builds(store: TimingStore, since: float) -> list[TimedBuild]:
    """Return the newest builds that ended well, the oldest first; at most `BUILDS`. Raises `TimingsError`."""
    table = attempts.c
    query = (
        select(table.name, table.system, table.worker, table.build_s)
        .where(table.ended_at >= since, table.outcome == "done", table.build_s.is_not(None))
        .order_by(table.ended_at.desc())
        .limit(BUILDS)
    )
    found: list[TimedBuild] = []
    async with aclosing(store.answers_in_pieces(query, BUILDS_AT_ONCE)) as pieces:
        async for rows in pieces:
            found += [
                TimedBuild(package_of(name), system, worker, seconds, kind_of(name))
                for name, system, worker, seconds in rows
                if name and system and worker and seconds > 0
            ]
    found.reverse()
    return found


class Learner:
    """Keeps `learned` true, and the core's speeds with it. `emulated` gives (worker, system) of all that emulate."""

    def __init__(self, read: Read, post: Post, emulated: Callable[[], Sequence[tuple[str, str]]], clock: Clock) -> None:
        self._read = read
        self._post = post
        self._emulated = emulated
        self._clock = clock
        self._posted: dict[tuple[str, str], float] = {}
        self.learned = Learned()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Learn from all builds as of now; post speeds where they have changed."""
        try:
            builds = await self._read(self._clock.now() - WINDOW_S)
        except CoordinatorError as error:
            _log.debug("nothing new is learned: %s", error)
        else:
            self.learned = await asyncio.to_thread(learn, builds)
        await self._tell()

    async def _tell(self) -> None:
        speeds = dict.fromkeys(self._emulated(), EMULATED_SPEED) | dict(self.learned.speeds)
        both = speeds.keys() | self._posted.keys()
        if all(abs(speeds.get(key, 1.0) / self._posted.get(key, 1.0) - 1) < WORTH_TELLING for key in both):
            return
        event = SpeedsMeasured(tuple((BuilderId(name), on, speed) for (name, on), speed in sorted(speeds.items())))
        await self._post((event,))
        self._posted = speeds

    def work_ms(self, name: str, system: str) -> int:
        """Return the expected work of a derivation, by its name: milliseconds on a worker of speed 1."""
        return self.learned.expected(package_of(name), system, kind_of(name)).work_ms

    def source(self, name: str, system: str) -> tuple[EstimateSource, int]:
        """Return what the expected work of a derivation is taken from, by its name, and of how many builds."""
        expected = self.learned.expected(package_of(name), system, kind_of(name))
        return expected.source.value, expected.builds
