"""A pool of evaluators: the places of all sources are visited side by side, within one ceiling of memory.

Each finding is given as soon as it is there. An attribute that fails costs the others nothing. When the evaluators
have more memory together than they may, the largest is killed, and the attribute that it was at is evaluated alone at
the end: with all the memory for itself, and as an error of its own if that is not enough.

What imports from derivations holds nothing up, and nothing holds it up: it has an evaluator of its own beside the
others, and a place whose import is being built waits without one.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Final, TypeAlias

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
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.evaluation.source import MAX_DEPTH, NixValue
from infra.process import ProcessNotFound
from infra.records import record

#: Findings that wait for their reader.
MAX_WAITING: Final = 10_000
#: Places that an evaluator is asked for in one go.
MAX_BATCH: Final = 32
#: Seconds between two looks at the memory of the evaluators.
MEMORY_EVERY_S: Final = 0.1
#: Names of a path without end that people are shown, and its error.
SHOWN_DEPTH: Final = 3
ENDLESS: Final = f"it goes on for more than {MAX_DEPTH} names below; a set may lead to itself"


@record(frozen=True, slots=True)
class PooledSource:
    """A value with what its evaluators go by."""

    value: NixValue
    #: Whole environment of its evaluators.
    env: Mapping[str, str]
    #: Store through which they go; None: their own.
    imports: ImportStore | None = None


@record(frozen=True, slots=True)
class OtherEvaluator:
    """A program that evaluates beside the pool."""

    #: Gives what it finds, and places that are left to the pool.
    findings: AsyncGenerator[AttrPlace | tuple[AttrPlace, Finding]]
    #: Part of the memory that it has until it ends.
    memory_bytes: int


#: Says what is evaluated instead of a finding; None: nothing, it stands.
Again: TypeAlias = Callable[[AttrPlace, Finding], Sequence[AttrPlace] | None]


async def findings_of_pool(
    sources: Sequence[PooledSource],
    limits: PoolLimits,
    places: Sequence[AttrPlace],
    *,
    on_messages: Callable[[str], None],
    again: Again,
    other: OtherEvaluator | None = None,
) -> AsyncGenerator[tuple[AttrPlace, Finding]]:
    """Evaluate sources; gives each finding with its place as soon as it is there, in no order.

    Args:
        sources: What is evaluated.
        limits: What it may take, with the other evaluator.
        places: Where the evaluation begins.
        on_messages: Is given what Nix printed for people of an attribute, in one piece.
        again: Is asked of each finding of the pool.
        other: Program that evaluates at the same time.

    Raises:
        EvaluationError: No evaluator can be started.
    """
    pool = _Pool(sources, limits, places, on_messages, again=again, other=other)
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
        self.door: ImportDoor | None = None

    async def leave(self) -> None:
        """End its evaluator, if there is one."""
        evaluator, self.evaluator = self.evaluator, None
        door, self.door = self.door, None
        self.memory_bytes = 0
        if evaluator is not None:
            await evaluator.close()
        if door is not None:
            door.close()


class _Pool:
    def __init__(
        self,
        sources: Sequence[PooledSource],
        limits: PoolLimits,
        places: Sequence[AttrPlace],
        on_messages: Callable[[str], None],
        *,
        again: Again,
        other: OtherEvaluator | None,
    ) -> None:
        self.findings: asyncio.Queue[tuple[AttrPlace, Finding] | None] = asyncio.Queue()
        #: Whether all that is left is the end of its evaluators, which nothing is to interrupt.
        self.is_leaving = False
        #: Bounds `findings`; the end of the pool has a place beside it.
        self.room = asyncio.Semaphore(MAX_WAITING)
        self._sources = sources
        self._limits = limits
        self._on_messages = on_messages
        self._again = again
        #: None once it has ended.
        self._other = other
        self._token = f"drover-{os.urandom(16).hex()}"
        self._waiting: deque[AttrPlace] = deque()
        #: Places of sources that go through a store of imports.
        self._importing: deque[AttrPlace] = deque()
        #: Places that are visited again when the build of that number has ended.
        self._parked: dict[int, list[AttrPlace]] = {}
        #: Places that are evaluated alone once all others are done.
        self._alone: deque[AttrPlace] = deque()
        self._changed = asyncio.Condition()
        #: One evaluator starts at a time: the first makes the store if there is none, and two cannot do that at once.
        self._starting = asyncio.Lock()
        #: The evaluator for imports sits beside the others, because no attribute of theirs is to wait for it.
        self._import_seat = _Seat() if any(each.imports for each in sources) else None
        self._seats = [_Seat() for _ in range(limits.evaluators)]
        if self._import_seat is not None:
            self._seats.append(self._import_seat)
        self._group = asyncio.TaskGroup()
        self._put(places)

    async def run(self) -> None:
        """Visit all places."""
        try:
            async with self._group as group:
                watch = group.create_task(self._watch_memory())
                if self._other is not None:
                    group.create_task(self._take_from(self._other))
                while self._is_going or self._alone:
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

    @property
    def _is_going(self) -> bool:
        """True while places wait, or may come from a build or the other evaluator."""
        return bool(self._waiting or self._importing or self._parked or self._other)

    @property
    def _memory_bytes(self) -> int:
        """Bytes that the evaluators may have now."""
        return self._limits.memory_bytes - (self._other.memory_bytes if self._other is not None else 0)

    def _put(self, places: Sequence[AttrPlace]) -> None:
        for place in places:
            (self._importing if self._sources[place.source].imports else self._waiting).append(place)

    async def _take_from(self, other: OtherEvaluator) -> None:
        """Take what the other evaluator finds, and what it leaves to the pool."""
        try:
            async with aclosing(other.findings) as findings:
                async for found in findings:
                    if isinstance(found, AttrPlace):
                        async with self._changed:
                            self._put([found])
                            self._changed.notify_all()
                    else:
                        await self._hand_out(*found)
        finally:
            async with self._changed:
                self._other = None
                self._changed.notify_all()

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
                await self._changed.wait_for(lambda: (self._work(seat) and self._admits(seat)) or self._is_over())
                queue = self._work(seat)
                if not queue:
                    return
                places = self._next(seat, queue)
                seat.busy = True
            try:
                await self._visit(seat, places, alone=False)
            finally:
                async with self._changed:
                    queue.extendleft(reversed(places))
                    seat.busy = False
                    self._changed.notify_all()

    def _work(self, seat: _Seat) -> deque[AttrPlace]:
        """Return the places that this seat is for now: the seat of imports has no others, and others help it last."""
        if seat is self._import_seat or (not self._waiting and self._other is None):
            return self._importing
        return self._waiting

    def _is_over(self) -> bool:
        """Return whether nothing waits now, and what may come need not be waited for before places go alone."""
        if self._waiting or self._importing or self._other or any(each.busy for each in self._seats):
            return False
        return bool(self._alone or not self._parked)

    def _admits(self, seat: _Seat) -> bool:
        """Return whether there is memory for an evaluator in this seat, judged by the largest of the others."""
        if seat.evaluator is not None or not any(each.busy for each in self._seats):
            return True
        sizes = [each.memory_bytes for each in self._seats if not self._is_idle(each)]
        return sum(sizes) + max(sizes) <= self._memory_bytes

    def _is_idle(self, seat: _Seat) -> bool:
        """Return whether the seat of imports has no work; its evaluator ends where others want the memory."""
        return seat is self._import_seat and not seat.busy and not self._importing

    def _share_bytes(self) -> int:
        """Return the memory that an evaluator may have between two batches; one that has more is started anew."""
        unused = self._import_seat is not None and not self._importing and self._import_seat.evaluator is None
        return self._memory_bytes // (len(self._seats) - unused)

    def _next(self, seat: _Seat, queue: deque[AttrPlace]) -> deque[AttrPlace]:
        """Take places of one source that wait longest: few enough that every seat has work to the end."""
        source = queue[0].source
        if seat.evaluator is not None and any(place.source == seat.source for place in queue):
            source = seat.source
        most = min(MAX_BATCH, 1 + len(queue) // (2 * len(self._seats)))
        taken: deque[AttrPlace] = deque()
        others: deque[AttrPlace] = deque()
        while queue and len(taken) < most:
            place = queue.popleft()
            (taken if place.source == source else others).append(place)
        queue.extendleft(reversed(others))
        return taken

    async def _visit(self, seat: _Seat, places: deque[AttrPlace], *, alone: bool) -> None:
        """Visit places in order; takes those out that are done, and ends early if the evaluator does."""
        evaluator = await self._evaluator(seat, places[0].source)
        await evaluator.visit(places)
        while places and seat.evaluator is evaluator:
            place = places.popleft()
            try:
                async with asyncio.timeout(self._limits.timeout_s):
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
                await self._take(seat, place, answer, messages)

    async def _evaluator(self, seat: _Seat, source: int) -> Evaluator:
        if seat.memory_bytes > self._share_bytes() or seat.source != source:
            await seat.leave()
        if seat.evaluator is None:
            sizes = [each.memory_bytes for each in self._seats]
            for idle in filter(self._is_idle, self._seats):
                if sum(sizes) + max(sizes) > self._memory_bytes:
                    await idle.leave()
            seat.source, seat.too_large = source, False
            try:
                async with self._starting, asyncio.timeout(self._limits.timeout_s):
                    seat.evaluator = await Evaluator.start(
                        await self._through_door(seat, self._sources[source]),
                        token=self._token,
                        env=self._sources[source].env,
                        memory_bytes=self._limits.memory_bytes,
                    )
            except ProcessNotFound:
                raise EvaluationError("nix is not on PATH; install Nix on this machine to evaluate files") from None
            except TimeoutError:
                raise EvaluationError(f"nix did not answer within {self._limits.timeout_s:g} s") from None
            except EvaluatorFailed as failed:
                self._on_messages(failed.messages)
                raise EvaluationError(
                    f"{failed}; correct {self._sources[source].value.name} or the arguments"
                ) from None
        return seat.evaluator

    async def _through_door(self, seat: _Seat, source: PooledSource) -> NixValue:
        """Return the value as it is evaluated in this seat."""
        if source.imports is None:
            return source.value
        seat.door = await source.imports.door(source.value)
        return seat.door.source(source.value)

    async def _take(self, seat: _Seat, place: AttrPlace, answer: PlaceAnswer | None, messages: str) -> None:
        if answer is None:
            imports = self._sources[place.source].imports
            if imports is not None and (number := imports.awaited(messages)) is not None:
                await self._park(seat, place, imports, number)
                return
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
                self._put([below])
            else:
                await self._give(below, LeftOut(self._attr(below), is_set=False))
        self._put([place.below(str(index), asked=True) for index in range(answer.elements)])

    async def _park(self, seat: _Seat, place: AttrPlace, imports: ImportStore, number: int) -> None:
        """Have built what the place imports, and visit it again after that."""
        build = imports.build(number, self._attr(place))
        if build.done():
            # Newer Nix keeps the error of a value, so that it takes an evaluator that has not seen it.
            await seat.leave()
            self._put([place])
        elif number in self._parked:
            self._parked[number].append(place)
        else:
            self._parked[number] = [place]
            self._group.create_task(self._unpark(number, build))

    async def _unpark(self, number: int, build: asyncio.Task[str | None]) -> None:
        # What it comes to is said to the evaluator that asks again.
        await asyncio.shield(build)
        async with self._changed:
            self._put(self._parked.pop(number))
            self._changed.notify_all()

    def _attr(self, place: AttrPlace) -> str:
        return join_attr(self._sources[place.source].value.asked[place.at].label, place.path)

    async def _fail(self, place: AttrPlace, error: str, text: str = "") -> None:
        await self._give(place, FailedAttr(self._attr(place), error, text, position(text)))

    async def _give(self, place: AttrPlace, finding: Finding) -> None:
        """Hand out a finding of the pool, unless something is to be evaluated instead."""
        instead = self._again(place, finding)
        if instead is None:
            await self._hand_out(place, finding)
        elif instead:
            async with self._changed:
                self._put(instead)
                self._changed.notify_all()

    async def _hand_out(self, place: AttrPlace, finding: Finding) -> None:
        await self.room.acquire()
        self.findings.put_nowait((place, finding))

    async def _watch_memory(self) -> None:
        """Kill the largest evaluator whenever they have more memory together than they may."""
        while True:
            await asyncio.sleep(MEMORY_EVERY_S)
            seats = {seat.evaluator.pid: seat for seat in self._seats if seat.evaluator is not None}
            for pid, size in (await resident_bytes(list(seats))).items():
                seats[pid].memory_bytes = size
            if sum(seat.memory_bytes for seat in self._seats) > self._memory_bytes:
                largest = max(self._seats, key=lambda seat: (self._is_idle(seat), seat.memory_bytes))
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
