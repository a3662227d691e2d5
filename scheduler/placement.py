"""Placement by earliest finish: the fastest builder with room takes a step, unless a busy faster one ends it earlier.

A step of `work_ms` takes that long on a builder of speed 1 and half as long at speed 2. A builder without room has room
again when the first of its leases is expected to end; one that is late is expected to take half as long again as it has
taken. So a long step waits for a fast builder, and what takes little, or is less urgent, fills the slow ones meanwhile.

No builder takes steps that ask for more memory together than its machine has; a step that asks for more than any has
takes all of the largest. The first that fits nowhere keeps a builder for itself, which takes nothing else that asks for
memory, so that it does not wait for good behind small ones.

Inputs that a builder lacks are fetched first (`locality`): where they are large, the builder that ends the step first
is one that has them, or that is so much faster.

Only what may decide when all ends waits for a faster builder: a path that goes on after the builders of its queue have
built all that is ready there. Anything else takes what idles, as does what stands behind `LOOK_AHEAD` steps that wait.

A wait for a faster builder is bounded: it ends once it has lasted as long as that could gain, at the latest after
`LONGEST_HOLD_S`. It is thought over when the builder should have had room, and when a faster one than then has some.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import islice
from typing import Final

from scheduler.locality import Fetches, fetches_of, first_to_end
from scheduler.model import FAR_OFF, BuilderId, Instant
from scheduler.records import Builder, Hold, Lane, Queue, Step

#: Steps of one lane that may wait, the next begins where there is room; and steps of one round that may.
LOOK_AHEAD: Final = 16
HOLDS_OF_ROUND: Final = 64
#: Faster builders that one step is compared with; the fastest come first.
COMPARED: Final = 32
#: Steps of one round that keep a builder for the memory that they ask for: each empties a machine.
KEPT_OF_ROUND: Final = 1
#: Longest wait, and the least that a wait must be able to gain.
LONGEST_HOLD_S: Final = 4 * 3600.0
LEAST_GAIN_S: Final = 5.0
#: What a late lease is expected to take yet, as a part of what it has taken.
OVERDUE: Final = 0.5
#: A round is repeated no sooner than this.
SOONEST_S: Final = 1.0
#: Builders whose rooms are remembered.
REMEMBERED: Final = 4096


class Rooms:
    """Instants at which builders are expected to have room for one more, by the leases that they hold."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        #: Of each builder: `moves` when it was looked at, and the instants, the first one last.
        self._known: dict[BuilderId, tuple[int, list[float]]] = {}

    def of(self, builder: Builder, now: Instant) -> list[float]:
        """Return the instants, the first one last. Looks anew where a lease began, ended or is late."""
        known = self._known.get(builder.id)
        if known is not None and known[0] == builder.moves and (not known[1] or known[1][-1] > now):
            return known[1]
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        rooms = sorted([end for end, _ in _ends(builder, now)], reverse=True)
        self._known[builder.id] = builder.moves, rooms
        return rooms


def has_memory(builder: Builder, bytes_: int) -> bool:
    """Return whether a builder has so much memory that no lease has asked for; one of which it is not known has."""
    spec = builder.spec
    return spec is None or not spec.memory_bytes or builder.memory_bytes + bytes_ <= spec.memory_bytes


def memory_at(builder: Builder, bytes_: int, now: Instant) -> float:
    """Return when enough leases are expected to have ended that a builder has so much memory; `FAR_OFF` for never."""
    free = (builder.spec.memory_bytes if builder.spec is not None else 0) - builder.memory_bytes
    if free >= bytes_:
        return now
    for end, memory_bytes in sorted(_ends(builder, now)):
        free += memory_bytes
        if free >= bytes_:
            return end
    return FAR_OFF


class Placement:
    """One round of grants: which steps wait, and how often the room of a builder was counted on."""

    __slots__ = ("_counted", "_kept", "_now", "_rooms", "holds", "look_again")

    def __init__(self, now: Instant, rooms: Rooms) -> None:
        self._now = now
        self._rooms = rooms
        self._counted: dict[BuilderId, int] = {}
        #: Builders that take nothing else which asks for memory.
        self._kept: dict[BuilderId, Step] = {}
        #: Steps that wait, each for a builder; None for one too many to look at.
        self.holds: dict[Step, Hold | None] = {}
        #: When one of the waits has to be looked at again.
        self.look_again = FAR_OFF

    def choose(self, step: Step, queue: Queue, able: Sequence[Builder], *, may_wait: bool = True) -> list[Builder]:
        """Return the builders among `able` that should take the step; empty where it waits (`holds`).

        One that may not wait for a faster builder still waits for memory.
        """
        if step.memory_bytes:
            able = self.with_memory(step, queue, able)
            if not able:
                self.holds[step] = self._keep(step, queue)
                return []
        speeds = queue.speeds
        if not speeds:
            return nearest(able, fetches_of(step))
        best = max([speeds[builder.id] for builder in able])
        if may_wait and self._hold(step, queue, best, able):
            return []
        fetches = fetches_of(step)
        if fetches is None:
            return [builder for builder in able if speeds[builder.id] == best]
        return first_to_end(_durations(step, queue, able, fetches))

    def with_memory(self, step: Step, queue: Queue, able: Sequence[Builder]) -> list[Builder]:
        """Return the builders among `able` that have the memory which the step asks for, and are kept for no other."""
        asked = asked_of(step, queue)
        return [each for each in able if has_memory(each, asked) and self._kept.get(each.id, step) is step]

    def _keep(self, step: Step, queue: Queue) -> Hold | None:
        """Return the wait for the builder that should have the step's memory first, and keep it for the first such."""
        if len(self.holds) >= HOLDS_OF_ROUND:
            return None
        now, held, asked = self._now, step.held, asked_of(step, queue)
        if held is None or held.memory_bytes != asked or now >= held.until or not _serves(queue, held.builder):
            large = (each for each in queue.builders.values() if each.willing and machine_has(each, asked))
            found = min(((memory_at(each, asked, now), each.id) for each in islice(large, COMPARED)), default=None)
            if found is None:
                return None
            held = Hold(found[1], now if held is None else held.since, _soon(found[0], now), 0.0, asked)
        if len(self._kept) < KEPT_OF_ROUND:
            self._kept[held.builder] = step
        return held

    def _hold(self, step: Step, queue: Queue, best: float, able: Sequence[Builder]) -> bool:
        """Let a step wait where a faster builder is expected to end it earlier than those that are able.

        The fastest of these has the speed `best`.
        """
        fastest = queue.speeds[queue.by_speed[0].id] if queue.by_speed else best
        gain_s = step.work_ms / 1000 * (1 / best - 1 / fastest)
        if gain_s < LEAST_GAIN_S or len(self.holds) >= HOLDS_OF_ROUND:
            return False
        if not _outlasts(step, queue, best):
            return False
        now, held = self._now, step.held
        ends = min(gain_s, LONGEST_HOLD_S) + (now if held is None else held.since)
        if now >= ends:
            return False
        if held is None or held.over < best or now >= held.until or not _serves(queue, held.builder):
            held = self._best_hold(step, queue, best, able)
        if held is None:
            return False
        self.holds[step] = held
        self._counted[held.builder] = self._counted.get(held.builder, 0) + 1
        self.look_again = Instant(min(self.look_again, max(min(held.until, ends), now + SOONEST_S)))
        return True

    def _best_hold(self, step: Step, queue: Queue, best: float, able: Sequence[Builder]) -> Hold | None:
        now, work_s, asked = self._now, step.work_ms / 1000, asked_of(step, queue)
        end, found, fetches = now + work_s / best, None, fetches_of(step)
        if fetches is not None:
            end = now + min([seconds for seconds, _ in _durations(step, queue, able, fetches)])
        for builder in queue.by_speed[:COMPARED]:
            speed = queue.speeds[builder.id]
            if speed <= best or now + work_s / speed >= end:
                break
            if not machine_has(builder, asked):
                continue
            # One that offers less than it holds (pressure, probation) has no room by the first that ends.
            before = max(0, -builder.free) + self._counted.get(builder.id, 0)
            rooms, takes_s = self._rooms.of(builder, now), work_s / speed
            if fetches is not None:
                takes_s += fetches.seconds(builder)
            if before < len(rooms) and rooms[-1 - before] + takes_s < end:
                end, found = rooms[-1 - before] + takes_s, (builder.id, rooms[-1 - before])
        if found is None:
            return None
        return Hold(found[0], now if step.held is None else step.held.since, Instant(found[1]), best)


def _durations(step: Step, queue: Queue, builders: Sequence[Builder], fetches: Fetches) -> list[tuple[float, Builder]]:
    """Return the seconds that each builder would take for a step from now on, its fetches among them."""
    work_s, speeds = step.work_ms / 1000, queue.speeds
    return [(work_s / speeds[builder.id] + fetches.seconds(builder), builder) for builder in builders]


def nearest(builders: Sequence[Builder], fetches: Fetches | None) -> list[Builder]:
    """Return those of equally fast builders that have a step's inputs first; all where that makes no difference."""
    if fetches is None:
        return list(builders)
    return first_to_end([(fetches.seconds(builder), builder) for builder in builders])


def _outlasts(step: Step, queue: Queue, speed: float) -> bool:
    """Return whether the path of a step that begins on a builder of this speed ends after all that is ready now."""
    path_ms = step.work_ms / speed + step.tail_ms - step.work_ms
    return path_ms * queue.power > queue.ready_ms


def machine_has(builder: Builder, bytes_: int) -> bool:
    """Return whether a builder's machine has so much memory in all; one of which it is not known has."""
    return builder.spec is None or not builder.spec.memory_bytes or builder.spec.memory_bytes >= bytes_


def _soon(at: float, now: Instant) -> Instant:
    return Instant(max(at, now + SOONEST_S))


def asked_of(step: Step, queue: Queue) -> int:
    """Return the memory that a step asks for, at most what the largest of its builders has."""
    return min(step.memory_bytes, queue.most_memory_bytes) if queue.most_memory_bytes else step.memory_bytes


def _serves(queue: Queue, builder: BuilderId) -> bool:
    known = queue.builders.get(builder)
    return known is not None and known.willing


def _ends(builder: Builder, now: Instant) -> list[tuple[float, int]]:
    """Return when each place of a builder should be free again, with the memory that is free then."""
    if not builder.followers:
        return [(_end(step, builder, now), step.memory_bytes) for step in builder.leases.values()]
    ends = {step: (_end(step, builder, now), step.memory_bytes) for step in builder.leases.values()}
    for step in builder.followers.values():
        del ends[step]
    for step in builder.followers.values():
        # It takes the place of the last that it follows.
        last = max([need for need in step.follows if need in ends], key=lambda need: ends[need][0])
        end, memory_bytes = ends.pop(last)
        ends[step] = end + step.work_ms / 1000 / builder.speed(step.recipe.requirements.system), memory_bytes
    return list(ends.values())


def _end(step: Step, builder: Builder, now: Instant) -> float:
    end = step.asked_at + step.work_ms / 1000 / builder.speed(step.recipe.requirements.system)
    return end if end > now else now + OVERDUE * (now - step.asked_at)


def first_of(queue: Queue, lane: Lane) -> Iterator[Step]:
    """Yield the steps of a lane by rank, and change nothing: a heap is a tree whose branches grow away from its top.

    The k-th costs the logarithm of k, whatever the lane holds.
    """
    heap = lane.heap
    open_ = [(heap[0][0], heap[0][1], 0)]
    while open_:
        rank, _, at = heappop(open_)
        step = heap[at][2]
        for child in (2 * at + 1, 2 * at + 2):
            if child < len(heap):
                heappush(open_, (heap[child][0], heap[child][1], child))
        if step.queue is queue and step.rank == -rank:
            yield step
