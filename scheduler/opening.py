"""Pauses at which the ends of builds may pass a submission that is being taken in.

A mass rebuild keeps the core busy for half a second, and builds end meanwhile. What follows from their ends and what
follows from the submission come to the same in either order, as long as

1. the submission has only made steps known that were not, which nothing stands on yet, or
2. it begins to stand on its steps, one after the other, and no lease is granted: what becomes ready in one order does
   in the other.

So facts of such an end may go to the journal first although the core had begun with the submission. Not so once it has
moved a step that was known: what follows from an end may then follow from that move.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.facts import Fact, FactOrPause, StepAdded, StepCached, SubmissionAccepted, SubmissionGrew
from scheduler.pauses import PAUSE
from scheduler.state import FarmState


class Opening:
    """Record of what the submission that is being taken in has done so far, or the last one did."""

    __slots__ = ("_accepts", "_adds", "_busy", "_commutes", "_state")

    def __init__(self, state: FarmState) -> None:
        self._state = state
        self._busy = False
        #: All facts so far made steps known; or then came the one by which it is accepted, which is being applied.
        self._adds = self._accepts = False
        #: It did nothing else.
        self._commutes = True

    def around(self, decided: Iterator[FactOrPause]) -> Iterator[FactOrPause]:
        """Yield what is decided about a submission, and note what it does."""
        self._busy = self._adds = self._commutes = True
        try:
            for fact in decided:
                if fact is not PAUSE:
                    self._note(fact)
                yield fact
        finally:
            self._busy = self._adds = self._accepts = False

    def _note(self, fact: Fact) -> None:
        if isinstance(fact, StepAdded) or (isinstance(fact, StepCached) and fact.step not in self._state.steps):
            self._commutes = self._adds
            return
        self._accepts = self._adds and isinstance(fact, SubmissionAccepted)
        self._commutes = self._adds and isinstance(fact, SubmissionAccepted | SubmissionGrew)
        self._adds = False

    @property
    def lets_pass(self) -> bool:
        """True if ends of builds may be taken in now."""
        if not self._busy:
            return self._commutes
        state = self._state
        return (self._adds or (self._accepts and state.engaging)) and not (state.orphans or state.failing)

    @property
    def lets_grant(self) -> bool:
        """True if leases may be granted after these."""
        return self._adds
