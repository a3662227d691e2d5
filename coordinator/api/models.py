"""Answers and streamed events of the coordinator as JSON: plain records.

They are dataclasses without pydantic, because a client that asks one short question would wait longer for pydantic than
for its answer; `coordinator.client.decoding` checks what arrives. `coordinator.api.routes` says which route answers
which, and `coordinator.api.requests` has what clients send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum
from typing import Any, Literal, TypeAlias

from coordinator.api.flakes import RecipeRecordView, WorkerRecordView
from infra.records import record


class StepStatus(StrEnum):
    """The states of scheduler.transitions, as clients see them."""

    WAITING = "waiting"
    READY = "ready"
    RUNNING = "running"
    PUBLISHING = "publishing"
    DONE = "done"
    FAILED = "failed"
    DOOMED = "doomed"
    ABANDONED = "abandoned"


class SubmissionState(StrEnum):
    """Derived from the steps, never stored."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: A newer one of its branch took its place.
    SUPERSEDED = "superseded"
    #: Its deadline passed.
    EXPIRED = "expired"


WorkerState: TypeAlias = Literal["online", "silent", "draining", "quarantined", "gone"]
AttemptOutcome: TypeAlias = Literal["running", "done", "failed", "retried", "lost", "returned", "moved", "cancelled"]
IsolationClass: TypeAlias = Literal["A", "B", "C"]
WaitingKind: TypeAlias = Literal[
    "steps",
    "follows",
    "not_wanted",
    "no_worker",
    "no_system",
    "no_feature",
    "reserved",
    "slots",
    "limit",
    "quarantined",
    "draining",
    "faster",
    "memory",
    "back_off",
    "retries_spent",
    "known_failure",
]


@record(frozen=True, slots=True, kw_only=True)
class IntakeMissing:
    """The part of the query that must be sent."""

    derivations: tuple[str, ...]
    sources: tuple[str, ...]
    #: Why upstreams did not answer for built paths, or gave less than they have; "" where they could.
    trouble: str = ""


@record(frozen=True, slots=True, kw_only=True)
class Counts:
    """Steps of one submission by state. `held` and the states `done` to `abandoned` sum up to `total`."""

    total: int = 0
    #: Already in the cache when the submission arrived.
    held: int = 0
    #: Unfinished then, but already wanted by another submission; counted by their state too.
    joined: int = 0
    #: Published since.
    done: int = 0
    running: int = 0
    publishing: int = 0
    ready: int = 0
    waiting: int = 0
    failed: int = 0
    doomed: int = 0
    abandoned: int = 0


@record(frozen=True, slots=True, kw_only=True)
class FailureView:
    """Reason of a step's failure."""

    kind: str
    message: str


@record(frozen=True, slots=True, kw_only=True)
class WaitingView:
    """Reason for programs that a step does not run. Fields that its kind does not use are empty.

    `steps`: `count` needs are not done, `steps` the first few. `follows`: one of `workers` has its lease and begins
    it, or publishes what it has built, after these. `not_wanted`. `no_worker`, `no_system`, `no_feature`
    (`system`, `features` that the closest lacks), `reserved` (`workers` demand features it does not require): no worker
    can take it, and where `until` is not 0, it fails then. `slots`, `limit`: `workers` could, it is number `position`
    of `count`. `quarantined`, `draining`: `workers` could and take nothing. `faster`: since `since` it waits for
    one of `workers` that should have room at `until`, and ends it earlier than those that have some. `memory`:
    the same, for one that should have the `memory_bytes` that it asks for. `back_off`: tried again at `until`, after
    `count` failures. `retries_spent`: tried again at `until`, because too many attempts of its submission failed
    within the hour. `known_failure`: `steps` names the step that failed at `since`, which is taken for known until
    `until`.
    """

    kind: WaitingKind
    steps: tuple[str, ...] = ()
    count: int = 0
    system: str = ""
    features: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()
    position: int = 0
    since: float = 0.0
    until: float = 0.0
    reason: str = ""
    memory_bytes: int = 0


@record(frozen=True, slots=True, kw_only=True)
class TransferView:
    """Inputs that a running step waits for, or outputs that it sends, on their way: NAR bytes, all paths together."""

    direction: Literal["fetch", "upload"]
    #: Store path whose bytes moved last.
    path: str
    #: Where they come from, or go to: `objects` (the object store) or `cache` (over HTTP).
    source: str
    done_bytes: int
    #: None where it is not known.
    size_bytes: int | None = None


@record(frozen=True, slots=True, kw_only=True)
class StepView:
    """One step as people see it."""

    key: str
    name: str
    system: str
    features: tuple[str, ...]
    drv: str
    #: Output name -> full store path.
    outputs: dict[str, str]
    state: StepStatus
    attempt: int = 0
    worker: str = ""
    #: The worker only pretends to be `system` (`--emulate`).
    emulated: bool = False
    #: Class of the isolation that it was built in; of the worker's while it runs, empty where that is not known.
    isolation: str = ""
    stage: str = ""
    phase: str = ""
    #: While its worker fetches or uploads; about once a second.
    transfer: TransferView | None = None
    started_at: float = 0.0
    ended_at: float = 0.0
    uploaded_bytes: int = 0
    #: Of a step that runs: what the newest builds of its package usually took, once that is known.
    usual_s: float | None = None
    #: Of a failed step: the phase that its builder had announced last, where that is known.
    failed_in: str = ""
    failure: FailureView | None = None
    #: For a doomed step: key of the step whose failure is the root cause.
    cause: str = ""
    #: For a step that does not run: why, in one sentence, and as a value.
    waiting_for: str = ""
    waiting: WaitingView | None = None
    #: It waits because the farm's cache has lost an input.
    lost_input: bool = False
    #: The last lines of a failed step's log.
    log_tail: str = ""
    #: What became of its recipe's attempts, of a step that is shown alone or failed.
    record: RecipeRecordView | None = None


@record(frozen=True, slots=True, kw_only=True)
class RootFailureView:
    """Reason that a root is not built: the step whose own failure is the root cause, which may be the root's."""

    step: str
    name: str
    kind: str
    #: The failure's sentence, cut (the step has all of it).
    message: str
    #: It was leased once, so that there is something to read.
    has_log: bool = True


@record(frozen=True, slots=True, kw_only=True)
class RootView:
    """A root of a submission and the step it stands on."""

    attr: str
    drv: str
    step: str
    state: StepStatus
    outputs: dict[str, str]
    #: Of a root that failed or is doomed.
    failure: RootFailureView | None = None


@record(frozen=True, slots=True, kw_only=True)
class UnevaluatedView:
    """An attribute that could not be evaluated, and why; `attr` empty: the whole of what was asked for."""

    attr: str
    kind: str
    message: str


@record(frozen=True, slots=True, kw_only=True)
class SubmissionView:
    """A submission as people see it. `stuck` holds sentences about steps that no worker can take."""

    id: str
    label: str
    state: SubmissionState
    created_at: float
    ended_at: float = 0.0
    #: The first ones; all `root_count` are behind `submissions/ID/roots`.
    roots: tuple[RootView, ...]
    counts: Counts
    root_count: int = 0
    #: Derivations that stand behind these steps; what is beyond `counts.total` makes what another one makes.
    derivations: int = 0
    #: Bytes of compressed NARs uploaded for this submission's own builds.
    uploaded_bytes: int = 0
    stuck: tuple[str, ...] = ()
    #: Its client evaluates still: more roots come, and it does not end before they have.
    open: bool = False
    #: Why not all of its roots have come, where it was sealed without them.
    incomplete: str = ""
    #: The first of `unevaluated` attributes that its client could not evaluate.
    not_evaluated: tuple[UnevaluatedView, ...] = ()
    unevaluated: int = 0
    #: By the token that submitted it; "" for those of before 2026-11-30.
    owner: str = ""
    #: Whence it comes, by its client's word.
    branch: str = ""
    pull: str = ""
    commit: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    #: Moment at which it is withdrawn unless it has ended; 0 for never.
    deadline_at: float = 0.0
    fail_fast: bool = False
    #: The submission that superseded it.
    superseded_by: str = ""


@record(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A worker as people see it."""

    name: str
    state: WorkerState
    systems: tuple[str, ...]
    emulated: tuple[str, ...]
    features: tuple[str, ...]
    slots: int
    #: Steps in its hands: key and stage.
    leases: tuple[tuple[str, str], ...]
    nix_version: str
    #: How it keeps builds from its machine (`workers.wire.grades`): A full, B the macOS sandbox, C weaker or not
    #: measured; why it is no better, and what its latest canary found.
    isolation: IsolationClass = "C"
    isolation_reasons: tuple[str, ...] = ()
    isolation_report: Mapping[str, Any] | None = None
    built: int = 0
    last_seen: float = 0.0
    #: Slots that it offers now, None from an older drover; fewer than all while its machine is under pressure, and why.
    offered: int | None = None
    offers_less: str = ""
    #: Why it is silent, gone or quarantined, and until when it is quarantined.
    reason: str = ""
    until: float = 0.0
    #: Its machine at the last heartbeat, where it measures them: load average over a minute by processor, bytes.
    load: float | None = None
    memory_available_bytes: int | None = None
    disk_free_bytes: int | None = None
    #: Its newest attempts beside those of other workers; None while that is not known, or where it had none.
    record: WorkerRecordView | None = None
    #: How fast it builds for each system, where that was measured: 1 is usual, 2 takes half the time.
    speeds: Mapping[str, float] = field(default_factory=dict)
    #: Bytes of inputs a second that it fetches; None where that was not measured.
    fetch_rate: int | None = None


@record(frozen=True, slots=True, kw_only=True)
class RetryView:
    """Outcome of a request to build a failed step again."""

    step: StepView
    #: Those that run again for it; none where no submission waits for it: the next one that wants it builds it.
    submissions: tuple[str, ...]


@record(frozen=True, slots=True, kw_only=True)
class FarmView:
    """Address and keys of the farm's cache, and present obstacles to the farm's work."""

    version: str
    cache_url: str
    public_keys: tuple[str, ...]
    store_dir: str
    #: A clause each; empty while all is well.
    troubles: tuple[str, ...] = ()


@record(frozen=True, slots=True, kw_only=True)
class EtaView:
    """Moments between which a submission ends if its steps take as long as the builds before them, and what bounds it.

    `bound`: `path` (the longest path of steps that need each other), `capacity` (the slots of a system), `no_worker`
    (a system that nothing builds now) or `unknown` (no step that is left has a history).
    """

    #: When this was worked out.
    at: float
    #: It cannot end before, and the steps without history are not counted in that.
    sooner_at: float
    #: 0 where no end can be foreseen.
    later_at: float = 0.0
    bound: Literal["path", "capacity", "no_worker", "unknown"]
    #: What bounds it, in a clause.
    because: str
    #: Open steps; those of them without history, and those that run longer than usual.
    steps: int
    unknown: int = 0
    overdue: int = 0


@record(frozen=True, slots=True, kw_only=True)
class TreeNode:
    """A step's place in the forest of steps that run and of those that wait for them, one way up from each."""

    key: str
    name: str
    #: Key of one step that waits for it; "" where none does, and where the way up is cut.
    above: str = ""
    #: Its needs that are not done.
    pending: int = 0


@record(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """First event of a stream: the whole submission and the steps that run or failed."""

    type: Literal["snapshot"] = "snapshot"
    submission: SubmissionView
    steps: tuple[StepView, ...]
    #: Where they stand, with what is above them.
    tree: tuple[TreeNode, ...] = ()
    #: None while it is not worked out.
    eta: EtaView | None = None


@record(frozen=True, slots=True, kw_only=True)
class StepChanged:
    """A step of the submission changed state, stage or phase."""

    type: Literal["step"] = "step"
    step: StepView


@record(frozen=True, slots=True, kw_only=True)
class StepTransfer:
    """A step, and how far its transfer is."""

    key: str
    transfer: TransferView


@record(frozen=True, slots=True, kw_only=True)
class TransfersChanged:
    """Bytes moved of steps that fetch or upload; about once a second, and at most some dozens of steps."""

    type: Literal["transfers"] = "transfers"
    transfers: tuple[StepTransfer, ...]


@record(frozen=True, slots=True, kw_only=True)
class CountsChanged:
    """Counts moved; at most a few a second."""

    type: Literal["counts"] = "counts"
    counts: Counts
    uploaded_bytes: int
    stuck: tuple[str, ...] = ()
    #: Sentences about the other ready steps: what each class of them waits for.
    queued: tuple[str, ...] = ()
    #: Places that are new or changed. One that is not open any more is gone without a word: its step's event says so.
    tree: tuple[TreeNode, ...] = ()
    #: None while it is not worked out, and of an end that has come.
    eta: EtaView | None = None
    #: As in `SubmissionView`.
    open: bool = False
    incomplete: str = ""


@record(frozen=True, slots=True, kw_only=True)
class Ended:
    """Last event of a stream."""

    type: Literal["end"] = "end"
    submission: SubmissionView


WatchEvent = Snapshot | StepChanged | TransfersChanged | CountsChanged | Ended


@record(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """Error for a program (`code`) and for a person (`message`)."""

    code: str
    message: str


@record(frozen=True, slots=True, kw_only=True)
class ErrorView:
    """The body of every answer that is not a success."""

    error: ErrorBody
