"""Deadlines of submissions that wait, the first one first.

An index of the state and nothing more. Written by `evolve` alone.
"""

from __future__ import annotations

from heapq import heappop, heappush

from scheduler.model import Instant, SubmissionId


class Deadlines:
    """Deadlines by submission; the first one of the heap is always live, so that readers only look."""

    __slots__ = ("_at", "_heap")

    def __init__(self) -> None:
        self._at: dict[SubmissionId, Instant] = {}
        self._heap: list[tuple[Instant, SubmissionId]] = []

    @property
    def first(self) -> tuple[Instant, SubmissionId] | None:
        """The next deadline and its submission."""
        return self._heap[0] if self._heap else None

    def at(self, submission: SubmissionId) -> float:
        """Return the deadline of a submission that waits, 0 where it has none."""
        return self._at.get(submission, 0.0)

    def put(self, submission: SubmissionId, at: Instant) -> None:
        """Set the deadline of a submission; 0 is none."""
        if self._at.get(submission, 0.0) == at:
            return
        if at:
            self._at[submission] = at
            heappush(self._heap, (at, submission))
        else:
            self._at.pop(submission, None)
        self._prune()

    def drop(self, submission: SubmissionId) -> None:
        """Forget the deadline of a submission, where it has one."""
        if self._at.pop(submission, None) is not None:
            self._prune()

    def _prune(self) -> None:
        heap = self._heap
        while heap and self._at.get(heap[0][1]) != heap[0][0]:
            heappop(heap)
