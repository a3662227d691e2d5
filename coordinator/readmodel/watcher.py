"""One reader of one submission's changes: what it has not seen yet, bounded, or that it must see everything anew."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Protocol

from coordinator.api.models import (
    CountsChanged,
    Ended,
    Snapshot,
    StepChanged,
    StepStatus,
    StepTransfer,
    StepView,
    SubmissionView,
    TransfersChanged,
    WatchEvent,
)
from coordinator.readmodel.forest import ForestDiff, Ways
from coordinator.readmodel.rows import StepRow, SubmissionRow
from scheduler.model import StepKey
from scheduler.pauses import Pause

#: Changed steps that a watcher may leave unread before it gets a snapshot instead.
WATCH_PENDING = 1024
#: Failed steps in one snapshot; the rest is behind `submissions/ID/steps?state=failed`.
SNAPSHOT_FAILED = 100
#: Steps whose transfers one event names, those that moved last; and seconds until bytes that move, and nothing else,
#: wake a reader: of thousands of readers each costs some 20 us then.
TRANSFERS_SHOWN = 32
MOVES_EVERY_S = 1.0


class Renderer(Ways, Protocol):
    """Port of the views, which render rows."""

    def snapshot(self, row: SubmissionRow) -> Generator[Pause, None, Snapshot]:
        """Render a submission with the steps that run or failed, with pauses."""

    def step_view(self, row: StepRow) -> StepView:
        """Render a step."""

    def counts_changed(self, row: SubmissionRow) -> CountsChanged:
        """Render the counts of a submission."""

    def submission_view(self, row: SubmissionRow) -> SubmissionView:
        """Render a submission."""


class Watcher:
    """One reader of one submission's changes. `wake` is called when there is something to take; it must not block."""

    def __init__(self, views: Renderer, submission: SubmissionRow, wake: Callable[[], None]) -> None:
        self._views = views
        self._submission = submission
        self._wake = wake
        self._forest = ForestDiff(submission, views)
        #: Steps that changed since the last `take`, oldest change first.
        self._changed: dict[StepKey, StepRow] = {}
        #: Steps whose transfers came on since the last `take`, the latest last; and when that last woke the reader.
        self._moved: dict[StepKey, StepRow] = {}
        self._moves_woke_at = 0.0
        #: More changed since the last `take` than bytes moved.
        self._stirred = False
        self._behind = True
        self._over = False

    def bytes_moved(self, row: StepRow, now: float) -> None:
        """The transfer of a step of the submission came on; nothing else changed."""
        if self._behind:
            return
        self._moved.pop(row.key, None)
        self._moved[row.key] = row
        if len(self._moved) > TRANSFERS_SHOWN:
            del self._moved[next(iter(self._moved))]
        if abs(now - self._moves_woke_at) >= MOVES_EVERY_S:
            self._moves_woke_at = now
            self._wake()

    def step_changed(self, row: StepRow) -> None:
        """A step of the submission changed."""
        self._stirred = True
        if not self._behind:
            self._changed.pop(row.key, None)
            self._changed[row.key] = row
            if len(self._changed) > WATCH_PENDING:
                self._changed.clear()
                self._behind = True
        self._wake()

    def submission_changed(self) -> None:
        """Something about the submission as a whole changed."""
        self._stirred = True
        self._wake()

    @property
    def pending(self) -> int:
        """Number of steps that the next `take` returns one by one."""
        return len(self._changed)

    def failed(self, *, anew: bool = False) -> list[StepRow]:
        """Return the failed steps that the next `take` shows, or that a snapshot does."""
        failed = list(self._submission.failed.values())[:SNAPSHOT_FAILED]
        rows = failed if anew or self._behind else self._changed.values()
        return [row for row in rows if row.state is StepStatus.FAILED]

    @property
    def is_behind(self) -> bool:
        """True if the next event is a snapshot."""
        return self._behind

    @property
    def over(self) -> bool:
        """True if the last event has been taken."""
        return self._over

    def snapshot(self) -> Generator[Pause, None, Snapshot]:
        """Render the submission, with pauses, for a reader that begins now and goes on with what `events` yields."""
        snapshot = yield from self._views.snapshot(self._submission)
        return replace(snapshot, tree=self._forest.whole())

    def take(self) -> list[WatchEvent]:
        """Return what a reader must now see; the first time, and when it fell behind, a whole snapshot."""
        return [event for event in self.events() if not isinstance(event, Pause)]

    def events(self) -> Iterator[WatchEvent | Pause]:
        """Yield what `take` returns, each rendered when it is taken, with pauses; changes may come in between."""
        views, submission = self._views, self._submission
        if self._over:
            return
        changed, self._changed = self._changed, {}
        moved, self._moved = self._moved, {}
        stirred, self._stirred = self._stirred, False
        if self._behind:
            self._behind = False
            snapshot = yield from views.snapshot(submission)
            yield replace(snapshot, tree=self._forest.anew())
        else:
            for row in changed.values():
                yield StepChanged(step=views.step_view(row))
            transfers = [
                StepTransfer(key=row.key, transfer=row.life.transfer)
                for row in moved.values()
                if row.life.transfer is not None and row.key not in changed
            ]
            if transfers:
                yield TransfersChanged(transfers=tuple(transfers))
            if stirred or not transfers:
                yield replace(views.counts_changed(submission), tree=self._forest.changes())
        if (submission.ended or submission.withdrawn) and not self._changed and not self._behind:
            self._over = True
            yield Ended(submission=views.submission_view(submission))
