"""Time limit of ready steps that no builder could take: beyond it they fail.

The limit of a step is that of the most patient submission that stands on it; `Limits.give_up_s` is that of a
submission which names none. The time of a step runs while it stands in a queue without builders. It starts anew when
such a builder has been there, and after a restart, for builders join anew then: a step may wait longer than its limit
and never shorter.

This is memory of the decisions and no part of the durable state: the failure is a fact. An event costs the steps
that have come to stand so, and one call looks at `LOOKS_AT_ONCE` at most. Which submissions stand on a step is computed
only when the shortest limit of the farm is over for it, and again where a submission has let go of steps, at most every
`LOOK_AGAIN_S`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from heapq import heapify, heappop, heappush
from itertools import chain
from math import inf
from typing import assert_never

from scheduler import facts as f
from scheduler.model import NO_INSTANT, Failure, FailureKind, Instant, SubmissionId
from scheduler.pauses import PAUSE, PIECE, Pause, emptied
from scheduler.policy import Limits
from scheduler.reasons import (
    NoBuilderJoined,
    NoBuilderOffersFeatures,
    NoBuilderOffersSystem,
    OnlyReservedBuilders,
    Unserved,
    unserved,
)
from scheduler.records import Queue, Step
from scheduler.state import FarmState
from scheduler.step_rules import StepRules

#: Seconds between two looks at all that wait, where submissions have let go of steps: a look costs their number.
LOOK_AGAIN_S = 10.0
#: Steps that one call looks at: a mass rebuild that no builder can take must not hold up other events.
LOOKS_AT_ONCE = 1000
#: Entries of steps that no longer wait which are kept in any case before they are swept out.
STALE_ENTRIES = 1024


class Forsaken:
    """Since when steps wait for a builder of their kind, and when each is looked at next."""

    __slots__ = (
        "_heap",
        "_limits",
        "_looked_at",
        "_partings",
        "_state",
        "_step_rules",
        "_sweep_at",
        "_varied",
        "_waiting",
    )

    def __init__(self, state: FarmState, limits: Limits, step_rules: StepRules) -> None:
        self._state = state
        self._limits = limits
        self._step_rules = step_rules
        #: (since when it waits, when it is looked at next). Those that have left such a queue drop out when looked at.
        self._waiting: dict[Step, tuple[Instant, float]] = {}
        #: (when, sequence, step) of every next look that comes; those that `_waiting` does not hold are stale.
        self._heap: list[tuple[float, int, Step]] = []
        self._sweep_at = STALE_ENTRIES
        #: `FarmState.partings` and the time when all that wait were last looked at; whether any look was put off since.
        self._partings = 0
        self._looked_at = NO_INSTANT
        self._varied = False

    def due(self, now: Instant) -> Iterator[f.FactOrPause]:
        """Give up the steps whose time is over; start the time of those that have come to wait."""
        ready = self._state.ready
        looks = self._heap and self._heap[0][0] <= now
        if not (looks or ready.forsaken or ready.deserted or self._should_look_again()):
            return
        yield from self._take_note(now)
        if self._should_look_again() and now >= self._looked_at + LOOK_AGAIN_S:
            yield from self._look_again(now)
        over = self._over(now)
        while over:
            step = over.pop()
            since, _ = self._waiting.pop(step)
            if not _waits(step) or step in self._state.ready.forsaken:
                continue
            fell_back = False
            for fact in self._step_rules.give_up(step, self._failure(step, since, now), now):
                fell_back = fell_back or isinstance(fact, f.StepFellBack)
                yield fact
            if fell_back and self._state.wait_limits:
                # A more patient submission may stand on the others by now: the next call, at once, looks again.
                break
        for step in over:
            self._look_at(step, (self._waiting[step][0], now))
        yield from self._take_note(now)

    def deadline(self) -> Iterator[Instant]:
        """Yield the instant at which `due` may next yield a fact: at once where it has not seen all that wait."""
        if (self._state.ready.forsaken or self._state.ready.deserted) and self._shortest() < inf:
            yield NO_INSTANT
        if self._heap:
            yield Instant(self._heap[0][0])
        if self._should_look_again():
            yield Instant(self._looked_at + LOOK_AGAIN_S)

    def until(self, step: Step) -> Instant | None:
        """Return when a step is given up as things stand; None for never. Costs the steps that stand on it."""
        if step not in self._waiting or not _waits(step):
            return None
        until = self._waiting[step][0] + self._limit(step, {})
        return Instant(until) if until < inf else None

    def _take_note(self, now: Instant) -> Generator[Pause, None, None]:
        forsaken, deserted = self._state.ready.forsaken, self._state.ready.deserted
        if not (forsaken or deserted):
            return
        # One for all of them.
        entry = (now, now + self._shortest())
        for count, step in enumerate(chain(forsaken, _standing(deserted)), 1):
            self._look_at(step, entry)
            if not count % PIECE:
                yield PAUSE
        yield from emptied(forsaken)
        deserted.clear()
        if len(self._waiting) + len(self._heap) > self._sweep_at:
            yield from self._sweep()

    def _look_at(self, step: Step, entry: tuple[Instant, float]) -> None:
        self._waiting[step] = entry
        when = entry[1]
        if when < inf:
            heappush(self._heap, (when, step.sequence, step))

    def _sweep(self) -> Generator[Pause, None, None]:
        """Drop what no longer waits, and stale looks: this costs no more than what has come since the last time."""
        waiting: dict[Step, tuple[Instant, float]] = {}
        heap: list[tuple[float, int, Step]] = []
        for count, (step, entry) in enumerate(self._waiting.items(), 1):
            if _waits(step):
                waiting[step] = entry
                if entry[1] < inf:
                    heap.append((entry[1], step.sequence, step))
            if not count % PIECE:
                yield PAUSE
        heapify(heap)
        self._waiting, self._heap = waiting, heap
        self._sweep_at = 2 * (len(self._waiting) + len(self._heap)) + STALE_ENTRIES

    def _should_look_again(self) -> bool:
        """Return whether the limit of a step that waits may have become shorter since all were looked at."""
        if self._partings == self._state.partings or not self._waiting:
            return False
        return self._varied or bool(self._state.wait_limits)

    def _look_again(self, now: Instant) -> Generator[Pause, None, None]:
        self._partings, self._looked_at, self._varied = self._state.partings, now, False
        shortest = self._shortest()
        for count, (step, (since, _)) in enumerate(self._waiting.items(), 1):
            # No key is new: the dictionary may be written while it is walked.
            self._waiting[step] = (since, since + shortest)
            if not count % PIECE:
                yield PAUSE
        yield from self._sweep()

    def _over(self, now: Instant) -> list[Step]:
        """Return the steps whose time is over, the last to be looked at first; put off those that have a longer one."""
        heap, over = self._heap, []
        limits: dict[Step, float] = {}
        looks = 0
        while heap and heap[0][0] <= now and looks < LOOKS_AT_ONCE:
            when, _, step = heappop(heap)
            since, next_look = self._waiting.get(step, (NO_INSTANT, inf))
            if next_look != when:
                continue
            if not _waits(step):
                del self._waiting[step]
                continue
            looks += 1
            until = since + self._limit(step, limits)
            if until <= now:
                self._waiting[step] = (since, inf)
                over.append(step)
            else:
                self._varied = True
                self._look_at(step, (since, until))
        over.reverse()
        return over

    def _shortest(self) -> float:
        """Return the least that any step waits."""
        limits = self._state.wait_limits
        return min(map(_comparable, (self._limits.give_up_s, *limits.values())))

    def _limit(self, step: Step, limits: dict[Step, float]) -> float:
        """Return how long the most patient submission that stands on a step waits, with what is known in `limits`.

        A submission that names no limit has the farm's.
        """
        if not self._state.wait_limits:
            return _comparable(self._limits.give_up_s)
        owners = self._state.shares.submissions(step.owners)
        waits = set(map(self._wait_limit, owners))
        if len(waits) == 1:
            # Every submission that stands on the step is among its owners; an owner may have let go of it meanwhile.
            return waits.pop()
        stack = [step]
        while stack:
            top = stack[-1]
            above = [dependent for dependent in top.dependents if dependent not in limits]
            if above and top not in limits:
                stack += above
                continue
            stack.pop()
            if top not in limits:
                own = [self._wait_limit(submission) for submission in top.roots]
                limits[top] = max([*own, *(limits[dependent] for dependent in top.dependents)], default=0.0)
        return limits[step]

    def _wait_limit(self, submission: SubmissionId) -> float:
        return _comparable(self._state.wait_limits.get(submission, self._limits.give_up_s))

    def _failure(self, step: Step, since: Instant, now: Instant) -> Failure:
        wanted = step.recipe.requirements
        asks = f" with {', '.join(wanted.features)}" if wanted.features else ""
        reason = unserved(self._state, wanted)
        because = f" ({describe_unserved(reason)})" if reason is not None else ""
        message = (
            f"no worker could take it for {_duration(now - since)}{because}: start a worker for"
            f" {wanted.system}{asks}, then submit it again"
        )
        return Failure(FailureKind.NO_WORKER, message)


def describe_unserved(reason: Unserved) -> str:
    """Return the clause that a failure's message keeps of why no builder could take a step; people call it a worker."""
    match reason:
        case NoBuilderJoined():
            return "no worker has joined"
        case NoBuilderOffersSystem():
            return f"no worker offers the system {reason.system}"
        case NoBuilderOffersFeatures():
            return f"no worker of {reason.system} offers the feature {', '.join(reason.missing)}"
        case OnlyReservedBuilders():
            return f"needs a worker without mandatory features; {', '.join(reason.builders)} demand some"
        case _:
            assert_never(reason)


def _comparable(limit_s: float) -> float:
    """Return a limit as a number of seconds that can be compared: 0 means for ever."""
    return limit_s or inf


def _standing(queues: Iterable[Queue]) -> Iterator[Step]:
    """Yield the steps of those queues that still have no builder; one may come more than once."""
    for queue in queues:
        if not queue.builders:
            for lane in tuple(queue.lanes.values()):
                yield from (step for _, _, step in lane.heap if step.queue is queue)


def _waits(step: Step) -> bool:
    return step.queue is not None and not step.queue.builders


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.0f} h" if seconds >= 7200 else f"{seconds:.0f} s"
