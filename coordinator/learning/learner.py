"""Learner: reads what builds took, again and again, and gives the core what follows from it.

It runs beside everything else. A store of timings that is slow or gone leaves what was learned before. What the core
gets is in its journal (`StepSpec.work_ms`, `WorksRevised`), so that a replay needs no timings. Steps that wait are
looked at again when something was built: the first builds of a mass rebuild teach its others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, TypeVar

from sqlalchemy import select

from coordinator.api.questions import CostView, EstimateSource
from coordinator.errors import CoordinatorError
from coordinator.learning.costs import Cost
from coordinator.learning.learned import ExpectedWork, Learned, learn
from coordinator.learning.works import TimedBuild, WorkKind, WorkSource, kind_of
from coordinator.stores.timings import TimingStore, attempts
from infra.clock import Clock
from infra.nix.store_path import package_of
from infra.slices import in_slices
from scheduler.events import Event, SpeedsMeasured, WorksEstimated
from scheduler.model import MOST_MEMORY_BYTES, MOST_OUTPUT_BYTES, BuilderId, StepKey
from scheduler.pauses import PAUSE, PIECE, Pause
from scheduler.state import FarmState
from scheduler.transitions import UNFINISHED

_log = logging.getLogger(__name__)

#: Seconds between two looks where nothing was built; after builds, at least, and as a multiple of what the last took.
LOOK_EVERY_S: Final = 60.0
LOOK_AGAIN_S: Final = 1.0
LOOK_AGAIN_PART: Final = 50.0
#: Newest builds that are learned from: some 10 MB and half a second of a thread.
BUILDS: Final = 50_000
#: Builds that are taken from the store between two turns of the event loop, some 5 us each.
BUILDS_AT_ONCE: Final = 1_000
#: Builds that are older teach nothing: machines and packages change.
WINDOW_S: Final = 90 * 86400.0
#: Speeds that differ by a smaller part than this from what the core has are not worth its attention.
WORTH_TELLING: Final = 0.05
#: Works that differ by less than these factors from what the core has stay as they are: what is known of the package
#: itself, and what is guessed, which would move all that was never built at each look.
WORTH_REVISING: Final = 1.25
GUESS_WORTH_REVISING: Final = 3.0
#: Speed of a worker for a system that it only emulates, until it is measured.
EMULATED_SPEED: Final = 0.2

#: Processors that a build is given beside those that earlier ones used, and the most.
MORE_CORES: Final = 1.5
MOST_CORES: Final = 1024

#: Since when -> builds, the oldest first; may raise a `CoordinatorError`.
Read = Callable[[float], Awaitable[Sequence[TimedBuild]]]
#: What has a figure: a worker with a system, or a worker.
_Rated = TypeVar("_Rated")
Post = Callable[[Sequence[Event]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class OpenWork:
    """A step that has not ended: name, system and kind of its derivation, and what the core expects of it."""

    step: StepKey
    name: str
    system: str
    kind: WorkKind
    work_ms: int
    features: tuple[str, ...] = ()


#: Returns all of them; read in slices of the loop, while they may change.
OpenWorks = Callable[[], Iterable[OpenWork]]


def open_works(state: FarmState, name_of: Callable[[StepKey], str]) -> Iterator[OpenWork]:
    """Yield the steps of the farm that have not ended; may be read with pauses, while the farm goes on."""
    for step in list(state.steps.values()):
        if step.state in UNFINISHED and step.recipes and (name := name_of(step.key)):
            requires = step.recipe.requirements
            yield OpenWork(step.key, name, requires.system, kind_of(name), step.work_ms, requires.features)


def no_open_works() -> Iterable[OpenWork]:
    """Nothing waits anywhere."""
    return ()


def revised(learned: Learned, works: Iterable[OpenWork]) -> Generator[Pause, None, tuple[tuple[StepKey, int], ...]]:
    """Return the steps of which something else is expected by now, with what that is; with pauses."""
    news: list[tuple[StepKey, int]] = []
    for count, work in enumerate(works, 1):
        expected = learned.expected(package_of(work.name), work.system, work.kind, work.features, work.step)
        if _is_news(work.work_ms, expected):
            news.append((work.step, expected.work_ms))
        if not count % PIECE:
            yield PAUSE
    return tuple(news)


def _is_news(work_ms: int, expected: ExpectedWork) -> bool:
    known = expected.source in (WorkSource.DERIVATION, WorkSource.PACKAGE, WorkSource.OTHER_SYSTEM)
    factor = WORTH_REVISING if known else GUESS_WORTH_REVISING
    return not work_ms / factor < expected.work_ms < work_ms * factor


async def timed_builds(store: TimingStore, since: float) -> list[TimedBuild]:
    """Return the newest builds that ended well, the oldest first; at most `BUILDS`. Raises `TimingsError`."""
    table = attempts.c
    query = (
        select(
            *(table.name, table.system, table.worker, table.build_s, table.peak_memory_bytes, table.features),
            *(table.step, table.inputs_s, table.fetched_bytes, table.upload_s, table.cpu_s, table.output_bytes),
        )
        .where(table.ended_at >= since, table.outcome == "done", table.build_s.is_not(None))
        .order_by(table.ended_at.desc())
        .limit(BUILDS)
    )
    found: list[TimedBuild] = []
    async with aclosing(store.answers_in_pieces(query, BUILDS_AT_ONCE)) as pieces:
        async for rows in pieces:
            found += [
                _timed(name, system, worker, seconds, peak, features, step, *costs)
                for name, system, worker, seconds, peak, features, step, *costs in rows
                if name and system and worker and seconds > 0
            ]
    found.reverse()
    return found


def _timed(  # noqa: PLR0917 - the columns of a row
    name: str,
    system: str,
    worker: str,
    seconds: float,
    peak_bytes: float | None,
    features: str | None,
    step: str,
    inputs_s: float | None,
    fetched_bytes: float | None,
    upload_s: float | None,
    cpu_s: float | None,
    output_bytes: float | None,
) -> TimedBuild:
    return TimedBuild(
        package_of(name),
        system,
        worker,
        seconds,
        kind_of(name),
        _memory(peak_bytes),
        inputs_s,
        None if fetched_bytes is None else int(fetched_bytes),
        upload_s,
        cpu_s,
        None if output_bytes is None else int(output_bytes),
        step,
        tuple(features.split(",")) if features else (),
    )


def _memory(peak_bytes: float | None) -> int:
    """Return a peak as it was measured, 0 where it was not, or is nothing that a machine could have."""
    return int(peak_bytes) if peak_bytes is not None and 0 < peak_bytes <= MOST_MEMORY_BYTES else 0


class Learner:
    """Keeps `learned` true, and what the core has of it: speeds, and works of steps that have not ended.

    `emulated` gives (worker, system) of all that emulate.
    """

    def __init__(
        self,
        read: Read,
        post: Post,
        emulated: Callable[[], Sequence[tuple[str, str]]],
        clock: Clock,
        open_works: OpenWorks = no_open_works,
    ) -> None:
        self._read = read
        self._post = post
        self._emulated = emulated
        self._clock = clock
        self._open_works = open_works
        self._built = asyncio.Event()
        #: Called where something new was learned.
        self.on_learned: Callable[[], None] = lambda: None
        self._posted: dict[tuple[str, str], float] = {}
        self._rates: dict[str, int] = {}
        self.learned = Learned()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self._built.clear()
            began = time.monotonic()
            await self.look()
            pause_s = min(LOOK_EVERY_S, max(LOOK_AGAIN_S, LOOK_AGAIN_PART * (time.monotonic() - began)))
            await asyncio.sleep(pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S - pause_s):
                    await self._built.wait()

    def were_built(self) -> None:
        """Look again soon: builds have ended."""
        self._built.set()

    async def look(self) -> None:
        """Learn from all builds as of now; post speeds and works where they have changed."""
        try:
            builds = await self._read(self._clock.now() - WINDOW_S)
        except CoordinatorError as error:
            _log.debug("nothing new is learned: %s", error)
        else:
            learned = await asyncio.to_thread(self._learn, builds)
            if learned is not self.learned:
                self.learned = learned
                self.on_learned()
                await self._revise()
        await self._tell()

    def _learn(self, builds: Sequence[TimedBuild]) -> Learned:
        """Return what builds teach; what was learned before where that is the same."""
        learned = learn(builds)
        return self.learned if learned == self.learned else learned

    async def _revise(self) -> None:
        works = await in_slices(revised(self.learned, self._open_works()), can_wait=True)
        if works:
            await self._post((WorksEstimated(works),))

    async def _tell(self) -> None:
        speeds = dict.fromkeys(self._emulated(), EMULATED_SPEED) | dict(self.learned.speeds)
        rates = dict(self.learned.fetch_rates)
        # A rate that was not measured is none; a speed that was not is 1.
        same_rates = rates.keys() == self._rates.keys() and not _differs(rates, self._rates)
        if same_rates and not _differs(speeds, self._posted):
            return
        event = SpeedsMeasured(
            tuple((BuilderId(name), on, speed) for (name, on), speed in sorted(speeds.items())),
            tuple((BuilderId(name), rate) for name, rate in sorted(rates.items())),
        )
        await self._post((event,))
        self._posted, self._rates = speeds, rates

    def expect(self, name: str, system: str, features: Sequence[str] = (), step: str = "") -> tuple[int, int, int]:
        """Return what a build is expected to take, by its derivation's name: milliseconds at speed 1, memory, output.

        Memory and output are bytes, 0 where they are not known.
        """
        package, kind = package_of(name), kind_of(name)
        work = self.learned.expected(package, system, kind, features, step)
        output_bytes = self.learned.cost(Cost.OUTPUT_BYTES, package, system, kind, features)
        memory_bytes = self.learned.memory_bytes(package, system, kind)
        return work.work_ms, memory_bytes, min(int(output_bytes), MOST_OUTPUT_BYTES)

    def source(
        self, name: str, system: str, features: Sequence[str] = (), step: str = ""
    ) -> tuple[EstimateSource, int]:
        """Return what the expected work of a derivation is taken from, by its name, and of how many builds."""
        expected = self.learned.expected(package_of(name), system, kind_of(name), features, step)
        return expected.source.value, expected.builds

    def cores(self, name: str, system: str) -> int:
        """Return the processors that a build should have use for; 0 where none of its package was measured.

        Half as many more as earlier ones used, so that what could use more comes to show it.
        """
        for each in self.learned.expected_costs(package_of(name), system, kind_of(name)):
            if each.cost is Cost.CORES and each.source in (WorkSource.PACKAGE, WorkSource.OTHER_SYSTEM):
                return min(MOST_CORES, max(1, math.ceil(each.value * MORE_CORES)))
        return 0

    def costs(self, name: str, system: str, features: Sequence[str] = ()) -> tuple[CostView, ...]:
        """Return what else is expected of a build, each with its source."""
        return tuple(
            [
                CostView(
                    cost=each.cost.value, value=each.value, spread=each.spread, source=each.source.value,
                    builds=each.builds,
                )
                for each in self.learned.expected_costs(package_of(name), system, kind_of(name), features)
            ]
        )  # fmt: skip


def _differs(known: Mapping[_Rated, float], before: Mapping[_Rated, float]) -> bool:
    """Return whether some figures are worth telling of; one that is not there is 1."""
    both = known.keys() | before.keys()
    return any(abs(known.get(key, 1.0) / before.get(key, 1.0) - 1) >= WORTH_TELLING for key in both)
