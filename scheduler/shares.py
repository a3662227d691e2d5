"""Shares of submissions that wait, each under a number of its own: its stake in the steps that it wants.

An index of the state and nothing more. A stake begins with the first root that a submission waits for and ends with
the last; one that runs again gets a new one, so that marks of an old stake on steps count no more. Written by
`evolve` alone.

There are at most `most` stakes, because each grant of a lease looks at all stakes that wait, and at all of the step's.
Beyond that a submission joins the stake that the fewest have, and takes its turns together with these.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from scheduler.model import SubmissionId

#: Stakes at one time. A grant of a step that all of them want takes less than a millisecond.
MAX_STAKES: Final = 256


class Shares:
    """The live stakes."""

    __slots__ = ("_last", "_roots", "_stakes", "_submissions", "most")

    def __init__(self) -> None:
        self.most = MAX_STAKES
        self._last = 0
        self._stakes: dict[SubmissionId, int] = {}
        #: By stake: the submissions that have it.
        self._submissions: dict[int, set[SubmissionId]] = {}
        #: How many roots each submission still waits for.
        self._roots: dict[SubmissionId, int] = {}

    def begin(self, submission: SubmissionId) -> int:
        """Count one more root that a submission waits for; return its stake."""
        stake = self._stakes.get(submission)
        if stake is None:
            stake = self._stakes[submission] = self._place()
            self._submissions.setdefault(stake, set()).add(submission)
        self._roots[submission] = self._roots.get(submission, 0) + 1
        return stake

    def _place(self) -> int:
        if len(self._submissions) >= self.most:
            return min(self._submissions, key=lambda stake: len(self._submissions[stake]))
        self._last += 1
        return self._last

    def end(self, submission: SubmissionId) -> int | None:
        """Count one root less; return the stake where that was the last of all that have it."""
        self._roots[submission] -= 1
        if self._roots[submission]:
            return None
        stake = self._stakes.pop(submission)
        del self._roots[submission]
        having = self._submissions[stake]
        having.remove(submission)
        if having:
            return None
        del self._submissions[stake]
        return stake

    def is_live(self, stake: int) -> bool:
        """Return whether the stake has not ended."""
        return stake in self._submissions

    def submissions(self, stakes: Iterable[int]) -> list[SubmissionId]:
        """Return the submissions behind those of `stakes` that have not ended, whatever each wants itself."""
        return [submission for stake in stakes for submission in self._submissions.get(stake, ())]

    def live(self, stakes: Iterable[int]) -> tuple[int, ...]:
        """Return those of `stakes` that have not ended, each once, the oldest first."""
        return tuple(sorted({stake for stake in stakes if stake in self._submissions}))
