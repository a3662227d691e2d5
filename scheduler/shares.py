"""Shares of submissions that wait, each under a number of its own: its stake in the steps that it wants.

An index of the state and nothing more. A stake begins with the first root that a submission waits for and ends with
the last; one that runs again gets a new one, so that marks of an old stake on steps count no more. Written by
`evolve` alone.

There are about `most` stakes at the most, because each grant of a lease looks at all stakes that wait, and at all of
the step's. Beyond that a submission joins the stake of its owner that the fewest have, and takes its turns together
with these; only an owner without a stake begins another. A stake has the highest priority of its submissions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from scheduler.model import SubmissionId
from scheduler.terms import NO_TERMS, Terms

#: Stakes at one time. A grant of a step that all of them want takes less than a millisecond.
MAX_STAKES: Final = 256


class Shares:
    """The live stakes."""

    __slots__ = ("_last", "_owners", "_priorities", "_roots", "_stakes", "_submissions", "most", "moved", "terms")

    def __init__(self) -> None:
        self.most = MAX_STAKES
        #: What submissions that are not forgotten set for themselves, where they set something.
        self.terms: dict[SubmissionId, Terms] = {}
        #: Called with a stake whose priority has changed.
        self.moved: Callable[[int], None] = lambda _stake: None
        self._last = 0
        self._stakes: dict[SubmissionId, int] = {}
        #: By stake: the submissions that have it, their owner, and their highest priority where that is not 0.
        self._submissions: dict[int, set[SubmissionId]] = {}
        self._owners: dict[int, str] = {}
        self._priorities: dict[int, int] = {}
        #: How many roots each submission still waits for.
        self._roots: dict[SubmissionId, int] = {}

    def terms_of(self, submission: SubmissionId) -> Terms:
        """Return what a submission set for itself."""
        return self.terms.get(submission, NO_TERMS)

    def begin(self, submission: SubmissionId) -> int:
        """Count one more root that a submission waits for; return its stake."""
        stake = self._stakes.get(submission)
        if stake is None:
            stake = self._stakes[submission] = self._place(self.terms_of(submission).owner)
            self._submissions.setdefault(stake, set()).add(submission)
            self.rank(submission)
        self._roots[submission] = self._roots.get(submission, 0) + 1
        return stake

    def _place(self, owner: str) -> int:
        if len(self._submissions) >= self.most:
            having = [stake for stake in self._submissions if self._owners[stake] == owner]
            if having:
                return min(having, key=lambda stake: len(self._submissions[stake]))
        self._last += 1
        self._owners[self._last] = owner
        return self._last

    def rank(self, submission: SubmissionId) -> None:
        """Take in the priority of a submission, where it waits."""
        stake = self._stakes.get(submission)
        if stake is not None:
            self._rank_stake(stake)

    def _rank_stake(self, stake: int) -> None:
        highest = max(self.terms_of(each).priority for each in self._submissions[stake])
        if highest != self._priorities.get(stake, 0):
            self._priorities[stake] = highest
            self.moved(stake)

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
            self._rank_stake(stake)
            return None
        del self._submissions[stake], self._owners[stake]
        self._priorities.pop(stake, None)
        return stake

    def waits(self, submission: SubmissionId) -> bool:
        """Return whether a submission waits for a root."""
        return submission in self._roots

    def waiting(self, owner: str) -> list[tuple[SubmissionId, Terms]]:
        """Return the submissions of an owner that wait, with their terms."""
        found = [(submission, self.terms_of(submission)) for submission in self._stakes]
        return [each for each in found if each[1].owner == owner]

    def is_live(self, stake: int) -> bool:
        """Return whether the stake has not ended."""
        return stake in self._submissions

    def owner_of(self, stake: int) -> str:
        """Return the owner of a live stake."""
        return self._owners[stake]

    def priority_of(self, stake: int) -> int:
        """Return the priority of a live stake."""
        return self._priorities.get(stake, 0)

    def submissions(self, stakes: Iterable[int]) -> list[SubmissionId]:
        """Return the submissions behind those of `stakes` that have not ended, whatever each wants itself."""
        return [submission for stake in stakes for submission in self._submissions.get(stake, ())]

    def live(self, stakes: Iterable[int]) -> tuple[int, ...]:
        """Return those of `stakes` that have not ended, each once, the oldest first."""
        return tuple(sorted({stake for stake in stakes if stake in self._submissions}))
