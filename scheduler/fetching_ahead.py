"""Hints to fetch ahead: a builder whose slots all build gets the inputs of the step that it should have next.

Without them its slot idles after each long build while large inputs come. A lease would do the same and keep the step
from others that have room first, so a hint is less: it is no fact, nothing depends on it, and one that is lost costs
the fetch that would have been made anyway.

The first steps in turn go, in thought, to the room that ends them first, as `placement` would: by when leases should
end, by speed, by memory; one that waits for a faster builder goes there. A builder that gets one with large inputs
which it lacks is let fetch them, one step at a time.

Expected ends are guesses. Where a builder has room before the one that fetched for the first in turn, it takes the step
that it fetched for instead (`instead_of`), if both have the same owners: so each fetch is of use. A step is overtaken
so for `OVERTAKEN_S` at most, after which it is given to another builder, too.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from heapq import nsmallest
from itertools import islice
from typing import Final

from scheduler.effects import Effect, FetchAhead
from scheduler.locality import WORTH_S, fetches_of
from scheduler.model import FAR_OFF, BuilderId, Instant
from scheduler.pauses import PAUSE, PIECE, Pause
from scheduler.placement import LOOK_AHEAD, Rooms, asked_of, first_of, machine_has, memory_at
from scheduler.records import Builder, Queue, Step, StoreLife
from scheduler.state import FarmState

#: Seconds between two looks, and for each builder of a large farm: hints are for builds that take longer, and a look
#: costs some microseconds a builder.
LOOK_EVERY_S: Final = 0.5
LOOK_A_BUILDER_S: Final = 0.002
#: Steps of one queue that are looked at, and rooms that they are compared for, those that come first.
STEPS: Final = LOOK_AHEAD
COMPARED: Final = 32
#: Builders whose rooms are gathered between two pauses.
ROOMS_PIECE: Final = PIECE // 4
#: Longest time for which the first step in turn is overtaken because another builder has fetched for it.
OVERTAKEN_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class _Hint:
    """A step whose inputs a builder was let fetch."""

    step: Step
    recipe: int
    builder: Builder
    #: The life of the builder's store in which they came.
    place: StoreLife
    #: When the step was first hinted.
    since: Instant

    def stands(self, state: FarmState) -> bool:
        """Return whether the step is still ready, and the builder has what it fetched."""
        builder = self.builder
        known = self.step.queue is not None and self.step.active == self.recipe
        return known and state.builders.get(builder.id) is builder and builder.place is self.place and builder.willing


@dataclass(frozen=True, slots=True)
class _Room:
    """One slot of a builder, and when it should be free."""

    at: float
    builder: Builder


class FetchingAhead:
    """The hints that were given, of each builder the last one."""

    __slots__ = ("_of_step", "_rooms", "_state", "given", "look_at")

    def __init__(self, state: FarmState, rooms: Rooms) -> None:
        self._state = state
        self._rooms = rooms
        #: By builder: what it fetches, or has fetched, and of each step the last one.
        self.given: dict[BuilderId, _Hint] = {}
        self._of_step: dict[Step, _Hint] = {}
        #: When to `look` again, at the earliest.
        self.look_at = 0.0

    def look(self, now: Instant, effects: list[Effect]) -> Iterator[Pause]:
        """Add the hints that are due to `effects`."""
        self.look_at = now + max(LOOK_EVERY_S, LOOK_A_BUILDER_S * len(self._state.builders))
        queues = [queue for queue in self._state.ready.queues.values() if queue.lanes and queue.builders]
        if self.given:
            self._forget()
        used: dict[BuilderId, int] = {}
        for queue in sorted(queues, key=lambda each: each.head) if len(queues) > 1 else queues:
            steps = list(_in_turn(queue))
            if any(fetches_of(step) is not None for step in steps):
                rooms = yield from self._rooms_of(queue, used, now)
                for step, builder in self._assigned(queue, steps, rooms, used, now):
                    self._hint(step, builder, now, effects)

    def instead_of(self, first: Step, builder: Builder, now: Instant) -> Step:
        """Return the step that a builder with room takes, where `first` is in turn: perhaps what it fetched for."""
        mine = self.given.get(builder.id)
        if mine is None or mine.step is first or not mine.stands(self._state):
            return first
        step, other = mine.step, self._of_step.get(first)
        if step.queue is not first.queue or step.owners != first.owners or step.held is not None or step.memory_bytes:
            return first
        if other is None or other.builder is builder or not other.stands(self._state):
            return first
        return step if now - other.since < OVERTAKEN_S else first

    def _forget(self) -> None:
        """Forget the hints of steps that have begun, and of builders that are gone or have deleted something."""
        if all(hint.stands(self._state) for hint in self.given.values()):
            return
        self.given = {id_: hint for id_, hint in self.given.items() if hint.stands(self._state)}
        self._of_step = {hint.step: hint for hint in self.given.values()}

    def _rooms_of(self, queue: Queue, used: dict[BuilderId, int], now: Instant) -> Generator[Pause, None, list[_Room]]:
        """Return the rooms that come first, of builders that have none now."""
        rooms: list[_Room] = []
        for count, builder in enumerate(tuple(queue.builders.values()), 1):
            if builder.free <= 0 and builder.willing:
                # One that offers less than it holds has no room by the first that ends.
                passed = used.get(builder.id, 0) - builder.free
                ends = self._rooms.of(builder, now)
                rooms += [_Room(at, builder) for at in ends[: max(0, len(ends) - passed)]]
            if not count % ROOMS_PIECE:
                rooms = _earliest(rooms)
                yield PAUSE
        return _earliest(rooms)

    def _assigned(
        self, queue: Queue, steps: list[Step], rooms: list[_Room], used: dict[BuilderId, int], now: Instant
    ) -> Iterator[tuple[Step, Builder]]:
        """Give each step a room, and yield those whose inputs the builder should fetch."""
        kept: dict[Step, Builder] = {}
        for step in steps:
            hint = self._of_step.get(step)
            if hint is not None and now - hint.since < OVERTAKEN_S:
                kept[step] = hint.builder
        promised = {builder.id for builder in kept.values()}
        for step in steps:
            if not rooms:
                return
            room = _room_for(step, queue, rooms, kept.get(step), now)
            if room is None:
                continue
            rooms.remove(room)
            used[room.builder.id] = used.get(room.builder.id, 0) + 1
            if step in kept or room.builder.id in promised:
                continue
            fetches = fetches_of(step)
            if fetches is not None and fetches.seconds(room.builder) >= WORTH_S:
                promised.add(room.builder.id)
                yield step, room.builder

    def _hint(self, step: Step, builder: Builder, now: Instant, effects: list[Effect]) -> None:
        before, earlier = self.given.get(builder.id), self._of_step.get(step)
        if before is not None and before.step is step:
            return
        if before is not None and self._of_step.get(before.step) is before:
            del self._of_step[before.step]
        hint = _Hint(step, step.active, builder, builder.place, now if earlier is None else earlier.since)
        self.given[builder.id] = self._of_step[step] = hint
        effects.append(FetchAhead(step.key, step.active, builder.id))


def _earliest(rooms: list[_Room]) -> list[_Room]:
    return nsmallest(COMPARED, rooms, key=lambda room: (room.at, room.builder.id))


def _in_turn(queue: Queue) -> Iterator[Step]:
    """Yield the first steps of a queue, roughly as they would be served: of each lane in turn one."""
    lanes = queue.lanes_in_turn() if len(queue.lanes) > 1 else list(queue.lanes.values())
    met: set[Step] = set()
    orders = [first_of(queue, lane) for lane in lanes[:STEPS]]
    while orders and len(met) < STEPS:
        for order in tuple(orders):
            step = next((step for step in islice(order, STEPS) if step not in met), None)
            if step is None:
                orders.remove(order)
            elif len(met) < STEPS:
                met.add(step)
                yield step


def _room_for(step: Step, queue: Queue, rooms: list[_Room], kept: Builder | None, now: Instant) -> _Room | None:
    """Return the room that ends a step first; that of the builder which fetched for it, or which it waits for."""
    held = step.held
    waits = None if held is None else queue.builders.get(held.builder)
    only = waits or kept
    if only is not None:
        return next((room for room in rooms if room.builder is only), None)
    asked, work_s, speeds = asked_of(step, queue), step.work_ms / 1000, queue.speeds
    best, found = float(FAR_OFF), None
    for room in rooms:
        builder, at = room.builder, float(room.at)
        if asked:
            at = max(at, memory_at(builder, asked, now)) if machine_has(builder, asked) else FAR_OFF
        end = at + work_s / speeds[builder.id] if speeds else at
        if end < best:
            best, found = end, room
    return found
