"""A pool of evaluators: the places of all sources are visited side by side, within one ceiling of memory.

Each finding is given as soon as it is there. An attribute that fails costs the others nothing. When the evaluators
have more memory together than they may, the largest is killed, and the attribute that it was at is evaluated alone at
the end: with all the memory for itself, and as an error of its own if that is not enough.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from coordinator.errors import CoordinatorError
from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.evaluator import Evaluator, EvaluatorFailed, PlaceAnswer, resident_bytes
from coordinator.evaluation.import_store import ImportDoor, ImportStore
from coordinator.evaluation.messages import error_line, position
from coordinator.evaluation.model import (
    BARE_NAME,
    AttrPlace,
    FailedAttr,
    Finding,
    LeftOut,
    join_attr,
)
from coordinator.evaluation.source import MAX_DEPTH, NixValue
from infra.process import ProcessNotFound

#: Findings that wait for their reader.
MAX_WAITING: Final = 10_000
#: Places that an evaluator is asked for in one go.
MAX_BATCH: Final = 32
#: Seconds between two looks at the memory of the evaluators.
MEMORY_EVERY_S: Final = 0.1
#: Names of a path without end that people are shown, and its error.
SHOWN_DEPTH: Final = 3
ENDLESS: Final = f"it goes on for more than {MAX_DEPTH} names below; a set may lead to itself"
#: Seconds that one attribute may take.
TIMEOUT_S: Final = 1800.0
#: Most evaluators that are chosen by themselves, and the memory that one is thought to want at least.
MAX_EVALUATORS: Final = 8
EVALUATOR_BYTES: Final = 512 * 1024 * 1024
#: Part of the machine's free memory that an evaluation takes where no limit is given.
MEMORY_PART: Final = 0.6
DEFAULT_MEMORY_BYTES: Final = 4 * 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Share of a machine that an evaluation may take."""

    #: Evaluators side by side.
    evaluators: int
    #: Bytes of memory of all evaluators together.
    memory_bytes: int
    #: Seconds of one attribute; None: forever.
    timeout_s: float | None = TIMEOUT_S

    @classmethod
    def of_machine(
        cls, evaluators: int | None = None, memory_bytes: int | None = None, timeout_s: float | None = TIMEOUT_S
    ) -> PoolLimits:
        """Return limits; what is None comes from what this machine has."""
        memory = memory_bytes or int(_free_bytes() * MEMORY_PART)
        side_by_side = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
                           MAX_EVALUATORS, max(1, memory // EVALUATOR_BYTES))  # fmt: skip
        return cls(evaluators or side_by_side, memory, timeout_s)


def _free_bytes() -> int:
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    return int(DEFAULT_MEMORY_BYTES / MEMORY_PART)


async def findings_of_pool(
    sources: Sequence[NixValue],
    limits: PoolLimits,
    *,
    env: Mapping[str, str],
    on_messages: Callable[[str], None],
    places: Sequence[AttrPlace] | None = None,
    imports: ImportStore | None = None,
) -> AsyncGenerator[tuple[AttrPlace, Finding]]:
    """Evaluate sources; gives each finding with its place as soon as it is there, in no order.

    Args:
        sources: What is evaluated.
        limits: What it may take.
        env: Whole environment of the evaluators.
        on_messages: Is given what Nix printed for people of an attribute, in one piece.
        places: Where the evaluation begins; None: at all that is asked.
        imports: Store through which the evaluators go; None: their own.

    Raises:
        EvaluationError: No evaluator can be started.
    """
    pool = _Pool(sources, limits, env, on_messages, places=places, imports=imports)
    task = asyncio.create_task(pool.run())
    task.add_done_callback(lambda _: pool.findings.put_nowait(None))
    try:
        while (found := await pool.findings.get()) is not None:
            pool.room.release()
            yield found
        await task
    finally:
        if not pool.is_leaving:
            task.cancel()
        with suppress(asyncio.CancelledError, CoordinatorError):
            await task


class _Seat:
    """One evaluator's place in the pool, and what sits there."""

    def __init__(self) -> None:
        self.evaluator: Evaluator | None = None
        #: Index of the source that its evaluator is for.
        self.source = -1
        #: Bytes of memory that its evaluator was seen to have.
        self.memory_bytes = 0
        self.busy = False
        #: Whether its evaluator was killed because of its memory.
        self.too_large = False
        #: Place that its evaluator is at.
        self.place: AttrPlace | None = None
        self.door: ImportDoor | None = None
        #: Deadline of the place, and seconds that are left of it while builds that it waits for go on.
        self._deadline: asyncio.Timeout | None = None
        self._left_s: float | None = None
        self._builds = 0

    async def leave(self) -> None:
        """End its evaluator, if there is one."""
        evaluator, self.evaluator = self.evaluator, None
        door, self.door = self.door, None
        self.memory_bytes = 0
        if evaluator is not None:
            await evaluator.close()
        if door is not None:
            door.close()

    @asynccontextmanager
    async def deadline(self, timeout_s: float | None) -> AsyncIterator[None]:
        """End the block after so many seconds, without those in which a build goes on that it waits for."""
        self._left_s = timeout_s
        async with asyncio.timeout(None if self._builds else timeout_s) as deadline:
            self._deadline = deadline
            try:
                yield
            finally:
                self._deadline = None

    def build_begins(self) -> None:
        """Stop the clock of the place."""
        self._builds += 1
        if self._builds == 1 and self._deadline is not None and (when := self._deadline.when()) is not None:
            self._left_s = when - asyncio.get_running_loop().time()
            self._deadline.reschedule(None)

    def build_ended(self) -> None:
        """Let the clock of the place go on."""
        self._builds -= 1
        if not self._builds and self._deadline is not None and self._left_s is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._left_s)


class _Pool:
    def __init__(
        self,
        sources: Sequence[NixValue],
        limits: PoolLimits,
        env: Mapping[str, str],
        on_messages: Callable[[str], None],
        *,
        places: Sequence[AttrPlace] | None,
        imports: ImportStore | None,
    ) -> None:
        self.findings: asyncio.Queue[tuple[AttrPlace, Finding] | None] = asyncio.Queue()
        #: Whether all that is left is the end of its evaluators, which nothing is to interrupt.
        self.is_leaving = False
        #: Bounds `findings`; the end of the pool has a place beside it.
        self.room = asyncio.Semaphore(MAX_WAITING)
        self._sources = sources
        self._limits = limits
        self._env = env
        self._on_messages = on_messages
        self._imports = imports
        self._token = f"drover-{secrets.token_hex(16)}"
        whole = (AttrPlace(source, at) for source, each in enumerate(sources) for at in range(len(each.asked)))
        self._waiting: deque[AttrPlace] = deque(whole if places is None else places)
        #: Places that are evaluated alone once all others are done.
        self._alone: deque[AttrPlace] = deque()
        self._changed = asyncio.Condition()
        #: One evaluator starts at a time: the first makes the store if there is none, and two cannot do that at once.
        self._starting = asyncio.Lock()
        self._seats = [_Seat() for _ in range(limits.evaluators)]

    async def run(self) -> None:
        """Visit all places."""
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch_memory())
                while self._waiting or self._alone:
                    await self._visit_waiting()
                    if self._alone:
                        await self._visit_alone(self._alone.popleft())
                watch.cancel()
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        finally:
            self.is_leaving = True
            for seat in self._seats:
                await seat.leave()

    async def _visit_waiting(self) -> None:
        async with asyncio.TaskGroup() as group:
            for seat in self._seats:
                group.create_task(self._sit(seat))

    async def _visit_alone(self, place: AttrPlace) -> None:
        for seat in self._seats:
            await seat.leave()
        seat = self._seats[0]
        seat.busy = True
        await self._visit(seat, deque([place]), alone=True)
        await seat.leave()
        seat.busy = False

    async def _sit(self, seat: _Seat) -> None:
        """Visit places as long as there are any, or may come any."""
        while True:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: (self._waiting and self._admits(seat)) or not any(each.busy for each in self._seats)
                )
                if not self._waiting:
                    return
                places = self._next(seat)
                seat.busy = True
            try:
                await self._visit(seat, places, alone=False)
            finally:
                async with self._changed:
                    self._waiting.extendleft(reversed(places))
                    seat.busy = False
                    self._changed.notify_all()

    def _admits(self, seat: _Seat) -> bool:
        """Return whether there is memory for an evaluator in this seat, judged by the largest of the others."""
        sizes = [each.memory_bytes for each in self._seats]
        return seat.evaluator is not None or sum(sizes) + max(sizes) <= self._limits.memory_bytes

    def _next(self, seat: _Seat) -> deque[AttrPlace]:
        """Take places of one source that wait longest: few enough that every seat has work to the end."""
        source = self._waiting[0].source
        if seat.evaluator is not None and any(place.source == seat.source for place in self._waiting):
            source = seat.source
        most = min(MAX_BATCH, 1 + len(self._waiting) // (2 * len(self._seats)))
        taken: deque[AttrPlace] = deque()
        others: deque[AttrPlace] = deque()
        while self._waiting and len(taken) < most:
            place = self._waiting.popleft()
            (taken if place.source == source else others).append(place)
        self._waiting.extendleft(reversed(others))
        return taken

    async def _visit(self, seat: _Seat, places: deque[AttrPlace], *, alone: bool) -> None:
        """Visit places in order; takes those out that are done, and ends early if the evaluator does."""
        evaluator = await self._evaluator(seat, places[0].source)
        await evaluator.visit(places)
        while places and seat.evaluator is evaluator:
            place = seat.place = places.popleft()
            try:
                async with seat.deadline(self._limits.timeout_s):
                    answer, messages = await evaluator.answer()
            except TimeoutError:
                await seat.leave()
                await self._fail(place, f"the evaluation did not end within {self._limits.timeout_s:g} s")
            except EvaluatorFailed as failed:
                too_large = seat.too_large or failed.out_of_memory
                await seat.leave()
                if not too_large:
                    await self._fail(place, str(failed), failed.messages)
                elif alone:
                    await self._fail(place, f"the evaluation needs more than {self._limits.memory_bytes >> 20} MiB")
                else:
                    self._alone.append(place)
            else:
                await self._take(place, answer, messages)

    async def _evaluator(self, seat: _Seat, source: int) -> Evaluator:
        grown = seat.memory_bytes > self._limits.memory_bytes // len(self._seats)
        if grown or seat.source != source:
            await seat.leave()
        if seat.evaluator is None:
            seat.source, seat.too_large = source, False
            try:
                async with self._starting, asyncio.timeout(self._limits.timeout_s):
                    seat.evaluator = await Evaluator.start(
                        await self._through_door(seat, self._sources[source]),
                        token=self._token,
                        env=self._env,
                        memory_bytes=self._limits.memory_bytes,
                    )
            except ProcessNotFound:
                raise EvaluationError("nix is not on PATH; install Nix on this machine to evaluate files") from None
            except TimeoutError:
                raise EvaluationError(f"nix did not answer within {self._limits.timeout_s:g} s") from None
            except EvaluatorFailed as failed:
                self._on_messages(failed.messages)
                raise EvaluationError(f"{failed}; correct {self._sources[source].name} or the arguments") from None
        return seat.evaluator

    async def _through_door(self, seat: _Seat, source: NixValue) -> NixValue:
        """Return the source as it is evaluated in this seat."""
        if self._imports is None:
            return source
        seat.door = await self._imports.door(
            source,
            lambda: self._attr(seat.place) if seat.place is not None else "",
            seat.build_begins,
            seat.build_ended,
        )
        return seat.door.source(source)

    async def _take(self, place: AttrPlace, answer: PlaceAnswer | None, messages: str) -> None:
        if answer is None:
            await self._fail(place, error_line(messages), messages)
            return
        if messages.strip():
            self._on_messages(messages)
        if len(place.path) >= MAX_DEPTH and (answer.names or answer.elements):
            await self._fail(shown_above(place), ENDLESS)
            return
        if answer.drv:
            await self._give(place, answer.root(self._attr(place)))
        elif answer.left:
            await self._give(place, LeftOut(self._attr(place), is_set=True))
        for name in answer.names:
            below = place.below(name, asked=False)
            if BARE_NAME.fullmatch(name):
                self._waiting.append(below)
            else:
                await self._give(below, LeftOut(self._attr(below), is_set=False))
        self._waiting.extend(place.below(str(index), asked=True) for index in range(answer.elements))

    def _attr(self, place: AttrPlace) -> str:
        return join_attr(self._sources[place.source].asked[place.at].label, place.path)

    async def _fail(self, place: AttrPlace, error: str, text: str = "") -> None:
        await self._give(place, FailedAttr(self._attr(place), error, text, position(text)))

    async def _give(self, place: AttrPlace, finding: Finding) -> None:
        await self.room.acquire()
        self.findings.put_nowait((place, finding))

    async def _watch_memory(self) -> None:
        """Kill the largest evaluator whenever they have more memory together than they may."""
        while True:
            await asyncio.sleep(MEMORY_EVERY_S)
            seats = {seat.evaluator.pid: seat for seat in self._seats if seat.evaluator is not None}
            for pid, size in (await resident_bytes(list(seats))).items():
                seats[pid].memory_bytes = size
            if sum(seat.memory_bytes for seat in self._seats) > self._limits.memory_bytes:
                largest = max(self._seats, key=lambda seat: seat.memory_bytes)
                if not largest.busy and len(self._seats) > 1:
                    await largest.leave()
                elif largest.evaluator is not None:
                    largest.too_large = True
                    largest.evaluator.kill()


def shown_above(place: AttrPlace) -> AttrPlace:
    """Return the place above one without end that stands for it."""
    return replace(place, path=place.path[:SHOWN_DEPTH])


def _first(errors: BaseExceptionGroup) -> BaseException:
    """Return the first error of a group that may hold groups."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
