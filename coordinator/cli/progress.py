"""A watched submission, folded from its events: what is known, what runs, and what is new."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, replace
from enum import Enum

from coordinator.api.models import (
    Counts,
    CountsChanged,
    Ended,
    EtaView,
    Snapshot,
    StepChanged,
    StepStatus,
    StepView,
    SubmissionState,
    SubmissionView,
    TransfersChanged,
    TreeNode,
    WatchEvent,
)
from infra.records import record

#: Steps in a worker's hands, or whose outputs the farm takes in.
ACTIVE = frozenset({StepStatus.RUNNING, StepStatus.PUBLISHING})
_OPEN = ACTIVE | {StepStatus.WAITING, StepStatus.READY}
#: Places of the forest that are kept; more than the coordinator sends at a time (`coordinator.readmodel.forest`).
MOST_PLACES = 8192


class News(Enum):
    """Kinds of news that a follower may print as a line."""

    STARTED = "started"
    STARTED_AGAIN = "started again"
    BUILT = "built"
    FAILED = "failed"


@record(slots=True)
class Tally:
    """One worker's work for the submission, as far as the events show."""

    built: int = 0
    failed: int = 0


@record(slots=True)
class Progress:
    """The watched submission, folded from its events."""

    submission: SubmissionView | None = None
    counts: Counts = field(default_factory=Counts)
    uploaded_bytes: int = 0
    stuck: tuple[str, ...] = ()
    queued: tuple[str, ...] = ()
    #: None while the coordinator has not said when it ends.
    eta: EtaView | None = None
    #: How far this program's own evaluation is, in words; empty where it does not evaluate.
    evaluating: str = ""
    #: Steps in a worker's hands, by key.
    running: dict[str, StepView] = field(default_factory=dict)
    #: Steps whose failure was printed, in that order.
    failed: dict[str, StepView] = field(default_factory=dict)
    #: Places of the forest by key.
    tree: dict[str, TreeNode] = field(default_factory=dict)
    #: By worker, in the order in which they came.
    workers: dict[str, Tally] = field(default_factory=dict)
    #: The latest attempt of each step that was announced. Their numbers go on from earlier lives of a step.
    _started: dict[str, int] = field(default_factory=dict)
    _built: set[str] = field(default_factory=set)

    def apply(self, event: WatchEvent) -> list[tuple[News, StepView]]:
        """Take an event in and return what is new, each thing once even where the stream begins again."""
        match event:
            case Snapshot():
                self._settle(event.submission)
                self.running, self.tree, self.eta = {}, {}, event.eta
                self._plant(event.tree)
                return [news for step in event.steps for news in self._step(step)]
            case StepChanged():
                return self._step(event.step)
            case TransfersChanged():
                for each in event.transfers:
                    step = self.running.get(each.key)
                    if step is not None:
                        self.running[each.key] = replace(step, transfer=each.transfer)
                return []
            case CountsChanged():
                self.counts = event.counts
                self.uploaded_bytes = event.uploaded_bytes
                self.stuck = event.stuck
                self.queued = event.queued
                self.eta = event.eta
                if self.submission is not None and self.submission.open != event.open:
                    self.submission = replace(self.submission, open=event.open, incomplete=event.incomplete)
                self._plant(event.tree)
                return []
            case Ended():
                self._settle(event.submission)
                self.running, self.tree, self.eta = {}, {}, None
                return []

    def _settle(self, submission: SubmissionView) -> None:
        self.submission = submission
        self.counts = submission.counts
        self.uploaded_bytes = submission.uploaded_bytes
        self.stuck = submission.stuck

    def _plant(self, nodes: Iterable[TreeNode]) -> None:
        self.tree.update((node.key, node) for node in nodes)
        if len(self.tree) > MOST_PLACES:
            self.tree = {key: node for key, node in self.tree.items() if key in self.running}

    def _step(self, step: StepView) -> list[tuple[News, StepView]]:
        active = step.state in ACTIVE and not _only_follows(step)
        if active:
            self.running[step.key] = step
            self.workers.setdefault(step.worker, Tally())
        else:
            self.running.pop(step.key, None)
        if step.state not in _OPEN:
            self.tree.pop(step.key, None)
        announced = self._started.get(step.key)
        if active and (announced is None or step.attempt > announced):
            self._started[step.key] = step.attempt
            return [(News.STARTED if announced is None else News.STARTED_AGAIN, step)]
        if step.state is StepStatus.DONE and step.attempt and step.key not in self._built:
            self._built.add(step.key)
            self.workers.setdefault(step.worker, Tally()).built += 1
            return [(News.BUILT, step)]
        if step.state is StepStatus.FAILED and step.key not in self.failed:
            self.failed[step.key] = step
            if step.worker:
                self.workers.setdefault(step.worker, Tally()).failed += 1
            return [(News.FAILED, step)]
        return []

    def longest_first(self, now: float) -> list[StepView]:
        """Return what runs, what has run for the longest time first."""
        return sorted(self.running.values(), key=lambda step: (step.started_at or now, step.key))

    @property
    def all_seen(self) -> bool:
        """True if the tallies of the workers hold every step that was built."""
        return sum(tally.built for tally in self.workers.values()) >= self.counts.done

    @property
    def ended(self) -> bool:
        """True if nothing more will come."""
        return self.submission is not None and self.submission.state is not SubmissionState.RUNNING


def _only_follows(step: StepView) -> bool:
    """Return whether a step has a worker's lease and begins once what it follows is built there."""
    return step.state is StepStatus.RUNNING and step.waiting is not None and step.waiting.kind == "follows"
