"""Answers to questions of people, as JSON: why a step waits, what the farm does now, what a name could be.

Plain records, as those of `coordinator.api.models`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from coordinator.api.difference_models import DifferenceView, RunReasonView
from coordinator.api.estimates import RunningView, ThroughputView
from coordinator.api.flakes import WorkerRecordView
from coordinator.api.models import StepView, TransferView, WorkerState
from infra.records import record


@record(frozen=True, slots=True, kw_only=True)
class WantedView:
    """A submission that wants a step, and one way to it: `path` names steps from the root `attr` down to it."""

    submission: str
    label: str
    attr: str
    path: tuple[str, ...]


#: Origins of an expectation, the best first: builds of the same derivation, of the package, of the package on another
#: system, of packages that ask for the same features, of its kind.
EstimateSource: TypeAlias = Literal["derivation", "package", "other_system", "features", "kind", "nothing"]
#: What is expected of a build beside its time: seconds, processors in use at one time, bytes.
CostName: TypeAlias = Literal["fetch_s", "upload_s", "cpu_s", "cores", "output_bytes"]
#: States of a worker towards a step.
CandidateState: TypeAlias = Literal["free", "full", "holds", "probation", "quarantined", "draining", "avoided"]


@record(frozen=True, slots=True, kw_only=True)
class CandidateView:
    """A worker that was looked at for a step."""

    worker: str
    state: CandidateState
    #: How fast it builds for the step's system: 1 is usual, 2 takes half the time.
    speed: float
    #: Builds in its hands, and how many it takes now.
    leases: int
    capacity: int
    #: When it should have room, and when it should have built the step; 0 where it gets nothing.
    room_at: float
    ends_at: float
    #: Bytes of large inputs that it has, and that it lacks; seconds in which it should fetch these, before it builds.
    here_bytes: int = 0
    missing_bytes: int = 0
    fetch_s: float = 0.0


@record(frozen=True, slots=True, kw_only=True)
class CostView:
    """One cost that is expected of a build: the median of earlier ones, how far they lie apart, and whence it is."""

    cost: CostName
    value: float
    spread: float
    source: EstimateSource
    builds: int = 0


@record(frozen=True, slots=True, kw_only=True)
class PlacingView:
    """Rank of a step that is not finished, the time that it should take, and the workers that were looked at."""

    #: Seconds from its start to the end of the last step of a submission above it: what has more goes first.
    rank_s: float
    #: Seconds on a usual worker, where these come from, and of how many builds.
    takes_s: float
    source: EstimateSource
    builds: int
    #: The first of the `count` workers that could take it, by when they would have built it.
    candidates: tuple[CandidateView, ...] = ()
    count: int = 0
    #: The worker that it waits for although another has room, since when, and until when that should have room.
    waits_for: str = ""
    waits_since: float = 0.0
    waits_until: float = 0.0
    #: Memory that it asks for, and bytes that its outputs should have, as it is placed by; 0: not known.
    memory_bytes: int = 0
    output_bytes: int = 0
    #: What else is expected of it by now.
    costs: tuple[CostView, ...] = ()


@record(frozen=True, slots=True, kw_only=True)
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
    #: Of a step that is not finished: how urgent it is, and where it would be built.
    placing: PlacingView | None = None
    #: Why each of its attempts was made, the newest RUNS_NAMED.
    ran: tuple[RunReasonView, ...] = ()
    #: Of a step that was begun: what differs from the last build of its name.
    difference: DifferenceView | None = None


@record(frozen=True, slots=True, kw_only=True)
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


@record(frozen=True, slots=True, kw_only=True)
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


@record(frozen=True, slots=True, kw_only=True)
class QueueView:
    """Ready steps that require the same, and what they wait for."""

    system: str
    features: tuple[str, ...]
    count: int
    reason: str


@record(frozen=True, slots=True, kw_only=True)
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


@record(frozen=True, slots=True, kw_only=True)
class CompletionView:
    """A name that a shell may complete to, and a word about it."""

    value: str
    help: str


@record(frozen=True, slots=True, kw_only=True)
class CompletionsView:
    """Names with the requested prefix, at most some."""

    items: tuple[CompletionView, ...]
