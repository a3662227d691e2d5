"""Forest of a submission: the steps that run, and one way up from each through the steps that wait for it.

One `ForestDiff` belongs to one watcher and returns only what that watcher has not received. The whole graph is never
walked: a step costs the way up to the first place that was sent already.
"""

from __future__ import annotations

from typing import Protocol

from coordinator.api.models import StepStatus, TreeNode
from coordinator.readmodel.rows import OPEN, StepRow, SubmissionRow

#: Places that one watcher knows at a time; beyond that the ways up are cut.
TREE_NODES = 1024


class Ways(Protocol):
    """Source of the ways up, and of names."""

    def name_of(self, row: StepRow) -> str:
        """Return a step's name, or its key where no details are known."""

    def unmet(self, row: StepRow) -> int:
        """Return how many needs of a step are not done."""

    def above(self, row: StepRow, submission: SubmissionRow) -> StepRow | None:
        """Return a step of the submission that waits for this one."""


def waits(row: StepRow, submission: SubmissionRow) -> bool:
    """Return true if a step waits for others, in this submission among others."""
    return row.state is StepStatus.WAITING and submission in row.submissions


class ForestDiff:
    """Finds what is new in the forest of one submission, at most `most` places of it."""

    def __init__(self, submission: SubmissionRow, ways: Ways, most: int = TREE_NODES) -> None:
        self._submission = submission
        self._ways = ways
        self._most = most
        #: Each place as it was sent: the step above it and its open needs.
        self._sent: dict[StepRow, tuple[StepRow | None, int]] = {}

    @property
    def held(self) -> int:
        """Number of places that are held."""
        return len(self._sent)

    def anew(self) -> tuple[TreeNode, ...]:
        """Return the whole forest, for a reader that has received nothing."""
        self._sent.clear()
        return self.changes()

    def whole(self) -> tuple[TreeNode, ...]:
        """Return all places as they were sent, for a reader that goes on with the next `changes`."""
        return tuple([self._node(row) for row in self._sent])

    def changes(self) -> tuple[TreeNode, ...]:
        """Return the places that are new or differ from what was sent."""
        if len(self._sent) >= self._most // 2:
            self._forget_what_nothing_runs_below()
        stale = [row for row, (above, pending) in self._sent.items() if self._differs(row, above, pending)]
        for gone in stale:
            del self._sent[gone]
        changed: dict[StepRow, None] = {}
        for start in (*filter(self._has, stale), *self._submission.active.values()):
            row: StepRow | None = start
            while row is not None and row not in self._sent and len(self._sent) < self._most:
                changed[row] = None
                row = self._place(row)
        return tuple([self._node(row) for row in changed])

    def _differs(self, row: StepRow, above: StepRow | None, pending: int) -> bool:
        if not self._has(row) or self._ways.unmet(row) != pending:
            return True
        return above is not None and not waits(above, self._submission)

    def _has(self, row: StepRow) -> bool:
        return row.state in OPEN and self._submission in row.submissions

    def _forget_what_nothing_runs_below(self) -> None:
        kept: dict[StepRow, tuple[StepRow | None, int]] = {}
        for active in self._submission.active.values():
            row: StepRow | None = active
            while row is not None and row not in kept and row in self._sent:
                kept[row] = self._sent[row]
                row = kept[row][0]
        self._sent = kept

    def _place(self, row: StepRow) -> StepRow | None:
        """Note where a step stands; returns the step above it."""
        above = self._ways.above(row, self._submission)
        self._sent[row] = (above, self._ways.unmet(row))
        return above

    def _node(self, row: StepRow) -> TreeNode:
        above, pending = self._sent[row]
        return TreeNode(
            key=row.key, name=self._ways.name_of(row), above=above.key if above is not None else "", pending=pending
        )
