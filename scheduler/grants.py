"""Grants of leases: owners by weight and submissions in turn, each step to the builder that ends it earliest.

Yields facts as `decide` does, which the caller applies before it takes the next.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from itertools import islice

from scheduler import facts as f
from scheduler.locality import fetches_of
from scheduler.model import FAR_OFF, BuilderId, Instant, LeaseId
from scheduler.placement import LOOK_AHEAD, Placement, Rooms, first_of, nearest
from scheduler.policy import Policy
from scheduler.records import Builder, Queue, QueueHead, Step
from scheduler.state import FarmState


class Grants:
    """The decisions about leases. Holds when to look again, and what was computed of builders."""

    __slots__ = ("_policy", "_rooms", "_state", "look_again")

    def __init__(self, state: FarmState, policy: Policy) -> None:
        self._state = state
        self._policy = policy
        self._rooms = Rooms()
        #: When a wait for a faster builder has to be looked at again; `FAR_OFF` where there is none.
        self.look_again = FAR_OFF

    def grant(self, now: Instant) -> Iterator[f.FactOrPause]:
        """Grant leases, owners by weight and submissions in turn, until no free builder takes a ready step.

        Only queues of builders with free slots are looked at, and of each only the first step of the lane whose turn it
        is, or the first few where builders differ in speed or lack memory: steps that no builder can take cost nothing.
        """
        self.look_again = FAR_OFF
        free = self._state.free
        if not free:
            return
        queues = {queue: None for builder in free.values() for queue in builder.queues if queue.lanes}
        placement = Placement(now, self._rooms)
        able_of: dict[Queue, list[Builder]] = {}
        while queues:
            best = min(queues, key=_head) if len(queues) > 1 else next(iter(queues))
            able = able_of.get(best)
            if able is None:
                able = able_of[best] = _able(best, free)
            if not able:
                del queues[best]
                continue
            step = best.first
            fitting = placement.with_memory(step, best, able) if step.memory_bytes else able
            if best.speeds or not fitting:
                chosen = yield from self._earliest(best, able, placement, now)
                if chosen is None:
                    del queues[best]
                    continue
                step, fitting = chosen
            elif len(fitting) > 1 and (fetches := fetches_of(step)) is not None:
                fitting = nearest(fitting, fetches)
            builder = self._policy.place(step, fitting) if len(fitting) > 1 else fitting[0]
            yield f.StepLeased(LeaseId(step.key, self._state.next_attempt(step)), builder.id, step.active, now)
            if builder.id not in free:
                _drop(builder, able_of)
            if not best.lanes:
                del queues[best]
        self.look_again = placement.look_again

    def _earliest(
        self, queue: Queue, able: list[Builder], placement: Placement, now: Instant
    ) -> Generator[f.FactOrPause, None, tuple[Step, list[Builder]] | None]:
        """Return the first step in turn that should begin now, with the builders for it; None where all wait."""
        for lane in queue.lanes_in_turn():
            for step in islice(first_of(queue, lane), LOOK_AHEAD):
                if step not in placement.holds:
                    builders = placement.choose(step, queue, able)
                    if builders:
                        return step, builders
                    hold = placement.holds[step]
                    if hold is not None and hold is not step.held:
                        yield f.StepHeld(step.key, hold.builder, now, hold.until, hold.over, hold.memory_bytes)
        return None


def _able(queue: Queue, free: Mapping[BuilderId, Builder]) -> list[Builder]:
    return [builder for builder in free.values() if builder.id in queue.builders]


def _drop(builder: Builder, able_of: Mapping[Queue, list[Builder]]) -> None:
    """A builder has no room any more."""
    for able in able_of.values():
        if builder in able:
            able.remove(builder)


def _head(queue: Queue) -> QueueHead:
    return queue.head
