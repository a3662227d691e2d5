"""How long a ready step waits for a builder that could take it: beyond `Limits.give_up_s` it fails.

The time of a step runs while it stands in a queue without builders. It starts anew when such a builder has been there,
and after a restart, for builders join anew then: a step may wait longer than the limit and never shorter.

This is memory of the decisions and no part of the durable state: the failure is a fact. An event costs the steps
that have come to stand so, and those whose time is over.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler import facts as f
from scheduler.model import NO_INSTANT, Failure, FailureKind, Instant
from scheduler.policy import Limits
from scheduler.reasons import unserved
from scheduler.records import Step
from scheduler.state import FarmState
from scheduler.verdicts import Verdicts


class Forsaken:
    """Since when steps wait for a builder of their kind, the longest first."""

    __slots__ = ("_limits", "_since", "_state", "_verdicts")

    def __init__(self, state: FarmState, limits: Limits, verdicts: Verdicts) -> None:
        self._state = state
        self._limits = limits
        self._verdicts = verdicts
        #: Those that have left such a queue drop out when they come to the front.
        self._since: dict[Step, Instant] = {}

    def due(self, now: Instant) -> Iterator[f.Fact]:
        """Give up the steps whose time is over; start the time of those that have come to wait."""
        self._take_note(now)
        while self._since:
            step, since = next(iter(self._since.items()))
            if not _waits(step):
                del self._since[step]
            elif since + self._limits.give_up_s <= now:
                del self._since[step]
                yield from self._verdicts.give_up(step, self._failure(step, since, now), now)
                self._take_note(now)
            else:
                return

    def deadline(self) -> Iterator[Instant]:
        """Yield when `due` will next have something to say: at once where it has not seen all that wait."""
        if not self._limits.give_up_s:
            return
        if self._state.ready.forsaken:
            yield NO_INSTANT
        for since in self._since.values():
            yield Instant(since + self._limits.give_up_s)
            return

    def _take_note(self, now: Instant) -> None:
        forsaken = self._state.ready.forsaken
        if not forsaken:
            return
        if self._limits.give_up_s:
            for step in forsaken:
                self._since.pop(step, None)
                self._since[step] = now
        forsaken.clear()

    def _failure(self, step: Step, since: Instant, now: Instant) -> Failure:
        wanted = step.recipe.requirements
        asks = f" with {', '.join(wanted.features)}" if wanted.features else ""
        reason = unserved(self._state, wanted)
        message = (
            f"no worker could take it for {_duration(now - since)} ({reason}): start a worker for"
            f" {wanted.system}{asks}, then submit it again"
        )
        return Failure(FailureKind.NO_WORKER, message.replace("builder", "worker"))


def _waits(step: Step) -> bool:
    return step.queue is not None and not step.queue.builders


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.0f} h" if seconds >= 7200 else f"{seconds:.0f} s"
