"""Succession: a builder gets the lease of what stands on its own builds before these are published (`early`).

A step that is ready needs all its inputs in the cache. Where one builder has made all that is not there yet, the step
can begin on it at once: what it waits for otherwise is a way to the cache and back. So the builder gets the lease while
it still builds (a *follower*, which takes the place of the build before it) or publishes, and begins without a pause.

Nothing that is ready loses by it: a step follows only where nothing ready could take its place, where no other builder
with room is faster or has more of its inputs, and where its memory fits. Only dependents of what was just leased or
built are looked at, `FEW` of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from scheduler import facts as f
from scheduler.locality import fetches_of
from scheduler.model import NO_INSTANT, Failure, FailureKind, Instant, LeaseId, StepState
from scheduler.placement import COMPARED, LEAST_GAIN_S, Placement
from scheduler.records import Builder, Queue, Step
from scheduler.state import FarmState

#: Dependents of one step that are looked at.
FEW: Final = 16
#: Needs that one step follows at most, and needs that one has which follows any.
MOST_FOLLOWED: Final = 8
MOST_NEEDS: Final = 512
#: Leases and unpublished builds that follow others, of each place of a builder: should one fail, they are lost.
EARLY_PER_PLACE: Final = 8

_WAITING, _LEASED, _DONE = StepState.WAITING, StepState.LEASED, StepState.DONE
#: Facts that end an open lease without a result.
_ENDS: Final = (f.LeaseRevoked, f.StepFailed, f.StepFellBack)


def handing_back(state: FarmState, fact: f.Fact, now: Instant) -> list[f.Fact]:
    """Return what must be before a fact: where a lease ends without a result, those end that follow it.

    That costs them nothing and blames no builder. `Farm` looks at all that is decided, so that no way to end a lease
    can forget what follows it.
    """
    if not isinstance(fact, _ENDS):
        return []
    ended = state.steps[fact.lease.step if isinstance(fact, f.LeaseRevoked) else fact.step]
    why = Failure(FailureKind.CANCELLED, f"it followed {ended.key}, which ended without a result")
    behind = state.early.behind(ended)
    return [f.LeaseRevoked(step.lease, step.builder, why, NO_INSTANT, at=now) for step in behind]


class SuccessionRules:
    """The decisions about early leases."""

    __slots__ = ("_state",)

    def __init__(self, state: FarmState) -> None:
        self._state = state

    def grant(self, placement: Placement, now: Instant) -> Iterator[f.FactOrPause]:
        """Grant leases that follow what was leased and built since the last time."""
        fresh, builders = self._state.early.fresh, self._state.builders
        while fresh:
            ahead = fresh.popleft()
            builder = builders.get(ahead.builder)
            if builder is None:
                continue
            for queue in builder.queues:
                if queue.lanes:
                    # What is ready could begin there instead; perhaps everywhere.
                    if len(queue.builders) == len(builders):
                        fresh.clear()
                    break
            else:
                if _takes(builder):
                    yield from self._followed(ahead, builder, placement, now)

    def _followed(self, ahead: Step, builder: Builder, placement: Placement, now: Instant) -> Iterator[f.FactOrPause]:
        for step in _candidates(ahead, builder, now):
            if self._may_follow(step, builder, placement):
                yield f.StepLeased(LeaseId(step.key, self._state.next_attempt(step)), builder.id, step.active, now)

    def _may_follow(self, step: Step, builder: Builder, placement: Placement) -> bool:
        early = self._state.early
        if early.counts.get(builder.id, 0) >= EARLY_PER_PLACE * builder.capacity:
            return False
        ahead = [need for need in step.needs if need.state is not _DONE]
        # Of another incarnation, the builder would not know it.
        if any(need.builder != builder.id or need.asked_at < builder.since for need in ahead):
            return False
        queue = step.home or self._state.ready.home_of(step.recipe.requirements)
        if queue is None or builder.id not in queue.builders or not _is_best(step, builder, queue):
            return False
        running = [need for need in ahead if need.state is _LEASED]
        if running:
            memory_bytes = min([need.memory_bytes for need in running])
            return step.memory_bytes <= memory_bytes and not any(self._has_follower(need, builder) for need in running)
        fits = not step.memory_bytes or bool(placement.with_memory(step, queue, [builder]))
        return builder.id in self._state.free and fits

    def _has_follower(self, need: Step, builder: Builder) -> bool:
        """Return whether the place of a need is taken by another already, or not had yet."""
        behind = self._state.early.successors.get(need, ())
        return need.key in builder.followers or any(each.key in builder.followers for each in behind)


def _takes(builder: Builder) -> bool:
    spec = builder.spec
    return spec is not None and spec.takes_successors and builder.willing and not builder.probation


def _candidates(ahead: Step, builder: Builder, now: Instant) -> list[Step]:
    """Return the dependents of a step that may follow it, those with the longest way to a root first."""
    found = [
        step
        for step in islice(ahead.dependents, FEW)
        if step.state is _WAITING
        and 0 < step.unmet <= MOST_FOLLOWED
        and len(step.needs) <= MOST_NEEDS
        and step.not_before <= now
        and step.avoid != builder.id
    ]
    return sorted(found, key=lambda step: (-step.tail_ms, step.sequence)) if len(found) > 1 else found


def _is_best(step: Step, builder: Builder, queue: Queue) -> bool:
    """Return whether no other builder should rather take a step once it is ready."""
    speeds, work_s = queue.speeds, step.work_ms / 1000
    if speeds:
        here = speeds[builder.id]
        for other in islice(queue.by_speed, COMPARED):
            speed = speeds[other.id]
            if speed <= here:
                break
            if other.free > 0 or work_s * (1 / here - 1 / speed) >= LEAST_GAIN_S:
                return False
    fetches = fetches_of(step)
    if fetches is None:
        return True
    own = fetches.here(builder)
    others = islice((each for each in queue.builders.values() if each is not builder and each.free > 0), COMPARED)
    return all(fetches.here(other) <= own for other in others)
