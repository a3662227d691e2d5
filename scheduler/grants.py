"""Grants of leases: owners by weight and submissions in turn, each step to the builder that ends it earliest.

Yields facts as `decide` does, which the caller applies before it takes the next.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from itertools import islice
from operator import attrgetter

from scheduler import facts as f
from scheduler.fetching_ahead import FetchingAhead
from scheduler.locality import fetches_of
from scheduler.model import FAR_OFF, BuilderId, Instant, LeaseId
from scheduler.moves import Moves
from scheduler.placement import LOOK_AHEAD, Placement, Rooms, first_of, nearest
from scheduler.policy import Policy
from scheduler.records import Builder, Queue, QueueHead, Step
from scheduler.state import FarmState
from scheduler.succession import SuccessionRules


class Grants:
    """The decisions about leases. Holds when to look again, and what was computed of builders."""

    __slots__ = ("_moves", "_policy", "_rooms", "_state", "_succession", "ahead", "look_again")

    def __init__(self, state: FarmState, policy: Policy) -> None:
        self._state = state
        self._policy = policy
        self._rooms = Rooms()
        self._moves = Moves()
        self._succession = SuccessionRules(state)
        #: The inputs of what is granted next.
        self.ahead = FetchingAhead(state, self._rooms)
        #: When a wait for a faster builder, or a build that may move to one, has to be looked at; `FAR_OFF` for never.
        self.look_again = FAR_OFF

    def grant(self, now: Instant) -> Iterator[f.FactOrPause]:
        """Grant leases, owners by weight and submissions in turn, until no free builder takes a ready step.

        Only queues of builders with free slots are looked at, and of each only the first step of the lane whose turn it
        is, or the first few where builders differ in speed or lack memory: steps that no builder can take cost nothing.
        Builds that run move to rooms that are left; what stands on them may follow them (`succession`).
        """
        self.look_again = FAR_OFF
        if not (self._state.free or self._state.early.fresh):
            return
        placement = Placement(now, self._rooms)
        if self._state.free:
            yield from self._lease_ready(placement, now)
            self.look_again = placement.look_again
        if self._state.free:
            yield from self._move(placement, now)
        if self._state.early.fresh:
            yield from self._succession.grant(placement, now)

    def _move(self, placement: Placement, now: Instant) -> Iterator[f.FactOrPause]:
        """Let builds move to rooms that no ready step takes, and grant leases where they ran."""
        if (yield from self._moves.move(self._state, placement, now)):
            again = Placement(now, self._rooms)
            yield from self._lease_ready(again, now)
            self.look_again = again.look_again
        self.look_again = min(self.look_again, self._moves.look_again)

    def _lease_ready(self, placement: Placement, now: Instant) -> Iterator[f.FactOrPause]:
        """Grant leases of ready steps."""
        free = self._state.free
        queues = {queue: None for builder in free.values() for queue in builder.queues if queue.lanes}
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
            if self.ahead.given:
                step = self._or_fetched(step, builder, best, placement, now)
            yield f.StepLeased(LeaseId(step.key, self._state.next_attempt(step)), builder.id, step.active, now)
            if builder.id not in free:
                _drop(builder, able_of)
            if not best.lanes:
                del queues[best]

    def _or_fetched(self, step: Step, builder: Builder, queue: Queue, placement: Placement, now: Instant) -> Step:
        """Return the step that the builder has fetched for, where it may begin instead of the one in turn."""
        fetched = self.ahead.instead_of(step, builder, now)
        if fetched is step or not queue.speeds:
            return fetched
        may = fetched not in placement.holds and placement.choose(fetched, queue, [builder])
        return fetched if may else step

    def _earliest(
        self, queue: Queue, able: list[Builder], placement: Placement, now: Instant
    ) -> Generator[f.FactOrPause, None, tuple[Step, list[Builder]] | None]:
        """Return the first step in turn that should begin now, with the builders for it; None where all wait."""
        for lane in queue.lanes_in_turn():
            for count, step in enumerate(islice(first_of(queue, lane), LOOK_AHEAD + 1)):
                if step not in placement.holds:
                    builders = placement.choose(step, queue, able, may_wait=count < LOOK_AHEAD)
                    if builders:
                        return step, builders
                    hold = placement.holds[step]
                    if hold is not None and hold is not step.held:
                        yield f.StepHeld(step.key, hold.builder, now, hold.until, hold.over, hold.memory_bytes)
        return None


_id = attrgetter("id")


def _able(queue: Queue, free: Mapping[BuilderId, Builder]) -> list[Builder]:
    return sorted([builder for builder in free.values() if builder.id in queue.builders], key=_id)


def _drop(builder: Builder, able_of: Mapping[Queue, list[Builder]]) -> None:
    """A builder has no room any more."""
    for able in able_of.values():
        if builder in able:
            able.remove(builder)


def _head(queue: Queue) -> QueueHead:
    return queue.head
