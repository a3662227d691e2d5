"""Which submissions wait, each under a number of its own: its stake in the steps that it wants.

An index of the state and nothing more. A stake begins with the first root that a submission waits for and ends with
the last; one that runs again gets a new one, so that what an old stake has left on steps counts for nobody. Written by
`evolve` alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.model import SubmissionId


class Shares:
    """The live stakes."""

    __slots__ = ("_last", "_stakes", "_submissions", "_waiting")

    def __init__(self) -> None:
        self._last = 0
        self._stakes: dict[SubmissionId, int] = {}
        self._submissions: dict[int, SubmissionId] = {}
        #: By stake: how many roots its submission still waits for.
        self._waiting: dict[int, int] = {}

    def begin(self, submission: SubmissionId) -> int:
        """Count one more root that a submission waits for; return its stake."""
        stake = self._stakes.get(submission)
        if stake is None:
            self._last += 1
            stake = self._stakes[submission] = self._last
            self._submissions[stake] = submission
        self._waiting[stake] = self._waiting.get(stake, 0) + 1
        return stake

    def end(self, submission: SubmissionId) -> int | None:
        """Count one root less; return the stake where that was the last."""
        stake = self._stakes[submission]
        self._waiting[stake] -= 1
        if self._waiting[stake]:
            return None
        del self._waiting[stake], self._stakes[submission], self._submissions[stake]
        return stake

    def is_live(self, stake: int) -> bool:
        """Whether the stake has not ended."""
        return stake in self._waiting

    def submissions(self, stakes: Iterable[int]) -> list[SubmissionId]:
        """Return whose those of `stakes` are that have not ended."""
        known = self._submissions
        return [known[stake] for stake in stakes if stake in known]

    def live(self, stakes: Iterable[int]) -> tuple[int, ...]:
        """Return those of `stakes` that have not ended, each once, the oldest first."""
        return tuple(sorted({stake for stake in stakes if stake in self._waiting}))
