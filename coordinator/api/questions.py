"""Answers to questions of people, as JSON: why a step waits, what the farm does now, what a name could be.

Plain records, as those of `coordinator.api.models`.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.api.difference_models import DifferenceView, RunReasonView
from coordinator.api.estimates import RunningView, ThroughputView
from coordinator.api.flakes import WorkerRecordView
from coordinator.api.models import StepView, TransferView, WorkerState


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedView:
    """A submission that wants a step, and one way to it: `path` names steps from the root `attr` down to it."""

    submission: str
    label: str
    attr: str
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReasonsView:
    """The reasons why a step waits, failed, is built or was built."""

    step: StepView
    #: Of a doomed step: the one whose failure is the root cause.
    cause: StepView | None = None
    #: The first of the steps at the bottom of what it waits for: those that run, are ready or failed.
    below: tuple[StepView, ...] = ()
    #: The first of the `wanted_count` submissions that wait for it; where none does, of those that it was built for.
    wanted_by: tuple[WantedView, ...] = ()
    wanted_count: int = 0
    #: Why each of its attempts was made, the newest RUNS_NAMED.
    ran: tuple[RunReasonView, ...] = ()
    #: Of a step that was begun: what differs from the last build of its name.
    difference: DifferenceView | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotView:
    """A step in a worker's hands."""

    step: str
    name: str
    stage: str
    phase: str
    #: 0 where that is not known.
    started_at: float
    #: Bytes on their way, while it fetches or uploads.
    transfer: TransferView | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerActivityView:
    """A worker and what it does now; `leases` are the first of `lease_count`."""

    name: str
    state: WorkerState
    slots: int
    leases: tuple[SlotView, ...]
    lease_count: int
    #: Why it is silent or quarantined.
    reason: str = ""
    #: Its newest attempts beside those of other workers.
    record: WorkerRecordView | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """Ready steps that require the same, and what they wait for."""

    system: str
    features: tuple[str, ...]
    count: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivityView:
    """The farm as it is now: its workers that are there, its queues, and all steps and submissions by state."""

    troubles: tuple[str, ...]
    steps: dict[str, int]
    submissions: dict[str, int]
    workers: tuple[WorkerActivityView, ...]
    worker_count: int
    queues: tuple[QueueView, ...]
    #: The newest submissions that run, with their foreseen ends.
    running: tuple[RunningView, ...] = ()
    #: What ended in the last hour, by minute.
    throughput: ThroughputView | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionView:
    """A name that a shell may complete to, and a word about it."""

    value: str
    help: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionsView:
    """Names with the requested prefix, at most some."""

    items: tuple[CompletionView, ...]
