"""Moves of running builds: one on a slow builder begins anew on a faster one that idles, where that ends it earlier.

How long a package takes is not known before it was built: what takes hours begins on slow machines too. A build that
has taken twice what was expected is taken to need three times as long again: times of builds are heavy-tailed. That is
four hours at most, so that what has run for longer than a faster builder could make good stays. One that is not late is
expected to end as was foreseen. The longest path to a root comes first, and only rooms that no ready step takes are
used. The build loses what it has done, which is bounded: it moves at most `MOVES` times in a life of its step, each
time to a builder that is faster by `FASTER`.

A second run beside the first would lose nothing, but holds two slots: it ended rebuilds no earlier (RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import islice
from typing import Final

from scheduler import facts as f
from scheduler.locality import fetches_of
from scheduler.model import FAR_OFF, NO_INSTANT, Failure, FailureKind, Instant, LeaseId, StepState
from scheduler.placement import LONGEST_HOLD_S, Placement
from scheduler.records import Builder, Queue, Step
from scheduler.state import FarmState

#: Moves in one life of a step, and of one look.
MOVES: Final = 3
MOVES_OF_LOOK: Final = 64
#: Seconds that a build has run at least, and that its move should gain at least.
LEAST_RUN_S: Final = 60.0
LEAST_GAIN_S: Final = 60.0
#: How often as fast the other builder is at least, and which part of the rest the whole takes there at most.
FASTER: Final = 1.2
MARGIN: Final = 0.95
#: How often as long as expected a build has taken that is late, and what it takes yet, as a part of what it has taken.
LATE: Final = 2.0
LATE_REST: Final = 3.0
#: What a late build is taken to need yet at most: as long as a step would wait for a faster builder.
MOST_REST_S: Final = LONGEST_HOLD_S
#: Seconds between two looks, and leases of one queue that a look is at, those of the slowest builders first.
LOOK_EVERY_S: Final = 1.0
LOOKED_AT: Final = 1024


class Moves:
    """The decisions about moves. Holds when to look."""

    __slots__ = ("_differ", "_next_at", "look_again")

    def __init__(self) -> None:
        self._next_at = NO_INSTANT
        #: Whether the last look found builders that differ in speed.
        self._differ = False
        #: When a build that runs may be moved; `FAR_OFF` where that is not foreseen.
        self.look_again = FAR_OFF

    def move(self, state: FarmState, placement: Placement, now: Instant) -> Generator[f.FactOrPause, None, bool]:
        """Move builds to builders with room that no ready step has taken; return whether one was moved."""
        self.look_again = FAR_OFF
        # A clock that was set back must not end the looks.
        if now < self._next_at <= now + LOOK_EVERY_S:
            self.look_again = self._next_at if self._differ else FAR_OFF
            return False
        self._next_at = Instant(now + LOOK_EVERY_S)
        queues = {queue: None for each in state.free.values() for queue in each.queues if queue.by_speed}
        self._differ = bool(queues)
        moved = 0
        for queue in queues:
            running = sorted(_running(queue), key=lambda each: (-each[0].tail_ms, each[0].sequence))
            for step, builder in running:
                better = None if moved >= MOVES_OF_LOOK else self._better(step, builder, queue, placement, now)
                if better is None:
                    continue
                moved += 1
                why = f"{better.id} is faster, has room and should end it earlier"
                cancelled = Failure(FailureKind.CANCELLED, why)
                yield f.LeaseRevoked(step.lease, builder.id, cancelled, NO_INSTANT, at=now, moved=True)
                yield f.StepLeased(LeaseId(step.key, state.next_attempt(step)), better.id, step.active, now)
        return bool(moved)

    def _better(self, step: Step, builder: Builder, queue: Queue, placement: Placement, now: Instant) -> Builder | None:
        """Return the fastest builder with room that ends a running step earlier; None where there is none yet."""
        here = queue.speeds[builder.id]
        for other in queue.by_speed:
            speed = queue.speeds[other.id]
            if speed < here * FASTER:
                return None
            if other.free <= 0 or other.id == step.avoid:
                continue
            if step.memory_bytes and not placement.with_memory(step, queue, [other]):
                continue
            fetches = fetches_of(step)
            fetch_s = 0.0 if fetches is None else fetches.seconds(other)
            at = _moves_at(step, here, speed, fetch_s, now)
            if at <= now:
                return other
            self.look_again = Instant(min(self.look_again, max(at, self._next_at)))
            return None
        return None


def _running(queue: Queue) -> Iterator[tuple[Step, Builder]]:
    """Return builds of the queue that may move, those of the slowest builders first, with these."""
    leases = ((step, builder) for builder in reversed(queue.by_speed) for step in builder.leases.values())
    for step, builder in islice(leases, LOOKED_AT):
        can_move = step.state is StepState.LEASED and step.moves < MOVES and not step.unmet
        if can_move and step.home is queue:
            yield step, builder


def _moves_at(step: Step, here: float, there: float, fetch_s: float, now: Instant) -> float:
    """Return when a build should move from a builder of one speed to another, as far as can be seen now."""
    taken_s, work_s = now - step.asked_at, step.work_ms / 1000
    if taken_s < LEAST_RUN_S:
        return step.asked_at + LEAST_RUN_S
    late_at = step.asked_at + LATE * work_s / here
    if now < late_at:
        rest_s, whole_s = max(0.0, work_s / here - taken_s), work_s / there + fetch_s
        return now if whole_s <= MARGIN * rest_s and rest_s - whole_s >= LEAST_GAIN_S else late_at
    rest_s = min(LATE_REST * taken_s, MOST_REST_S)
    again_s = (taken_s + rest_s) * here / there
    if again_s >= MARGIN * rest_s:
        return FAR_OFF
    whole_s = again_s + fetch_s
    return now if whole_s <= MARGIN * rest_s and rest_s - whole_s >= LEAST_GAIN_S else now + LEAST_GAIN_S
