"""The HTTP API's JSON, as models: what clients send, what they get, what a watcher is streamed.

`coordinator.api.routes` says which route takes and answers which.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field

from coordinator.api.limits import MAX_LIMIT, MAX_WAIT_S
from workers.wire.grades import CanaryReport

#: Bytes of a label, an attribute path, a path: what people read, and every list shows.
MAX_TEXT_BYTES = 1024
#: Roots of one submission; some 20 MB of JSON.
MAX_ROOTS = 100_000
#: Characters of an output's name; Nix makes it part of a store path's name, which has at most 211.
MAX_OUTPUT_LENGTH = 211


class Model(BaseModel):
    """Base of the API's models."""

    model_config = ConfigDict(frozen=True, extra="forbid")


#: Base names of store paths; the first that is none is the only one that is told.
Names = Annotated[tuple[Annotated[str, Field(max_length=255)], ...], FailFast()]


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


class RootLimits(Model):
    """What the build of a root itself may use; 0: the farm's default. Its dependencies have the defaults."""

    #: Seconds of wall time and of silence (`meta.timeout`, `meta.maxSilent`).
    timeout_s: Annotated[int, Field(ge=0, le=MAX_LIMIT)] = 0
    silence_s: Annotated[int, Field(ge=0, le=MAX_LIMIT)] = 0
    #: Bytes of log that are kept, at most the farm's own limit, and of all outputs together (`meta.drover`).
    log_bytes: Annotated[int, Field(ge=0, le=MAX_LIMIT)] = 0
    output_bytes: Annotated[int, Field(ge=0, le=MAX_LIMIT)] = 0
    #: Memory that the build takes: workers run builds side by side only as far as theirs goes.
    memory_bytes: Annotated[int, Field(ge=0, le=MAX_LIMIT)] = 0


def _short(text: str) -> str:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"it has {size} bytes; at most {MAX_TEXT_BYTES} are taken")
    return text


#: What people call something. The length in characters is looked at first: that costs nothing.
_Text = Annotated[str, Field(max_length=MAX_TEXT_BYTES), AfterValidator(_short)]


class RootRequest(Model):
    """One wish: an attribute of the evaluated file and the derivation it stands for (`outputs` empty: all)."""

    attr: _Text
    drv: _Text
    outputs: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_OUTPUT_LENGTH)], ...], Field(max_length=64), FailFast()
    ] = ()
    limits: RootLimits | None = None


class SubmitRequest(Model):
    """A submission of derivations that the coordinator already has."""

    roots: Annotated[tuple[RootRequest, ...], Field(min_length=1, max_length=MAX_ROOTS), FailFast()]
    label: _Text = ""
    #: Build again what is known to fail.
    retry_failed: bool = False
    #: Seconds that a step waits while no worker that could build it is there, before it fails; 0 is for ever, None the
    #: farm's own limit. The most patient submission counts; kept where it runs again.
    wait_s: Annotated[int, Field(ge=0, le=MAX_WAIT_S)] | None = None
    #: Further derivations, full .drv paths: built where one makes an input source that the cache lacks.
    makers: Annotated[tuple[_Text, ...], Field(max_length=MAX_ROOTS), FailFast()] = ()


class IntakeQuery(Model):
    """Base names of the closure: .drv files and input sources."""

    store_dir: Annotated[str, Field(max_length=4096)]
    derivations: Names
    sources: Names
    #: Those of `sources` that something built: they cannot be sent, so the farm's upstreams are asked for them.
    built: Names = ()


class IntakeMissing(Model):
    """The part of the query that must be sent."""

    derivations: tuple[str, ...]
    sources: tuple[str, ...]
    #: Why upstreams could not be asked for built paths, or gave less than they have; "" where they could.
    trouble: str = ""


class Counts(Model):
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


class FailureView(Model):
    """Why a step failed."""

    kind: str
    message: str


class WaitingView(Model):
    """Why a step does not run, for programs; what a kind does not tell is empty.

    `steps`: `count` needs are not done, `steps` the first few. `not_wanted`. `no_worker`, `no_system`, `no_feature`
    (`system`, `features` that the closest lacks), `reserved` (`workers` demand features it does not ask for): nobody
    can take it, and where `until` is not 0, it fails then. `slots`, `limit`: `workers` could, it is number `position`
    of `count`. `quarantined`, `draining`: `workers` could and take nothing. `back_off`: tried again at `until`,
    after `count` failures. `retries_spent`: tried again at `until`, because too many attempts of its submission failed
    within the hour. `known_failure`: `steps` names the step that failed at `since`, which is taken for known until
    `until`.
    """

    kind: Literal[
        "steps",
        "not_wanted",
        "no_worker",
        "no_system",
        "no_feature",
        "reserved",
        "slots",
        "limit",
        "quarantined",
        "draining",
        "back_off",
        "retries_spent",
        "known_failure",
    ]
    steps: tuple[str, ...] = ()
    count: int = 0
    system: str = ""
    features: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()
    position: int = 0
    since: float = 0.0
    until: float = 0.0
    reason: str = ""


class StepView(Model):
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
    started_at: float = 0.0
    ended_at: float = 0.0
    uploaded_bytes: int = 0
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


class RootFailureView(Model):
    """Why a root is not built: the step whose own failure is the root cause, which may be the root's."""

    step: str
    name: str
    kind: str
    #: The failure's sentence, cut (the step has all of it).
    message: str


class RootView(Model):
    """A root of a submission and the step it stands on."""

    attr: str
    drv: str
    step: str
    state: StepStatus
    outputs: dict[str, str]
    #: Of a root that failed or is doomed.
    failure: RootFailureView | None = None


class SubmissionView(Model):
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


class DrainRequest(Model):
    """Whether a worker is drained."""

    on: bool = True


class WorkerView(Model):
    """A worker as people see it."""

    name: str
    state: Literal["online", "silent", "draining", "quarantined", "gone"]
    systems: tuple[str, ...]
    emulated: tuple[str, ...]
    features: tuple[str, ...]
    slots: int
    #: Steps in its hands: key and stage.
    leases: tuple[tuple[str, str], ...]
    nix_version: str
    #: How it keeps builds from its machine (`workers.wire.grades`): A full, B the macOS sandbox, C weaker or not
    #: measured; why it is no better, and what its latest canary found.
    isolation: Literal["A", "B", "C"] = "C"
    isolation_reasons: tuple[str, ...] = ()
    isolation_report: CanaryReport | None = None
    built: int = 0
    last_seen: float = 0.0
    #: Why it is silent, gone or quarantined, and until when it is quarantined.
    reason: str = ""
    until: float = 0.0


class RetryView(Model):
    """What became of a wish to build a failed step again."""

    step: StepView
    #: Those that run again for it; none where nobody waits for it, and the next one that wants it builds it.
    submissions: tuple[str, ...]


class FarmView(Model):
    """How to use the farm's cache, and what keeps the farm from working at the moment."""

    version: str
    cache_url: str
    public_keys: tuple[str, ...]
    store_dir: str
    #: A clause each; empty while all is well.
    troubles: tuple[str, ...] = ()


class Snapshot(Model):
    """First event of a stream: the whole submission and the steps that run or failed."""

    type: Literal["snapshot"] = "snapshot"
    submission: SubmissionView
    steps: tuple[StepView, ...]


class StepChanged(Model):
    """A step of the submission changed state, stage or phase."""

    type: Literal["step"] = "step"
    step: StepView


class CountsChanged(Model):
    """Counts moved; at most a few a second."""

    type: Literal["counts"] = "counts"
    counts: Counts
    uploaded_bytes: int
    stuck: tuple[str, ...] = ()


class Ended(Model):
    """Last event of a stream."""

    type: Literal["end"] = "end"
    submission: SubmissionView


WatchEvent = Annotated[Snapshot | StepChanged | CountsChanged | Ended, Field(discriminator="type")]


class CacheView(Model):
    """What one cache holds. Sizes are bytes; `saved_bytes` is what objects that serve several paths save."""

    name: str
    paths: int
    tombstoned: int
    nar_bytes: int
    file_bytes: int
    saved_bytes: int
    realisations: int
    conflicts: int
    leases: int
    #: Roots by kind.
    roots: dict[str, int]
    public_keys: tuple[str, ...]


class CacheRootView(Model):
    """A root: `kind` is `pin`, `submission`, `push` or another; 0 for times that there are none of."""

    kind: str
    name: str
    paths: int
    created_at: float
    expires_at: float = 0.0
    used_at: float = 0.0


class PinRequest(Model):
    """Full store paths to keep with all that they refer to; `expires_at` 0: until unpinned."""

    paths: Annotated[
        tuple[Annotated[str, Field(max_length=4096)], ...], Field(min_length=1, max_length=10_000), FailFast()
    ]
    expires_at: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class KeeperView(Model):
    """A root that keeps a path: `chain` leads from a path of the root to it, each referring to the next."""

    kind: str
    name: str
    expires_at: float = 0.0
    chain: tuple[str, ...]


class WhyView(Model):
    """Who keeps a path."""

    path: str
    published: bool
    keepers: tuple[KeeperView, ...]


class CollectRequest(Model):
    """A wish for a garbage collection; `dry_run` changes nothing and gives the same numbers."""

    dry_run: bool = False


class CollectView(Model):
    """What a collection did, or would do. Sizes are bytes, times seconds."""

    dry_run: bool
    reachable: int
    tombstoned: int
    deleted_paths: int
    deleted_objects: int
    deleted_bytes: int
    orphans: int
    expired_roots: tuple[str, ...]
    phase_seconds: dict[str, float]


class VerifyRequest(Model):
    """`full` reads every object; `repair` fetches again what is broken, and hides what cannot be had."""

    full: bool = False
    repair: bool = False


class FaultView(Model):
    """A path that is not as promised, and what was done about it."""

    path: str
    fault: str
    outcome: str


class VerifyView(Model):
    """What verification found; `faults` are at most some hundreds, `broken` counts all."""

    checked: int
    broken: int
    repaired: int
    hidden: int
    faults: tuple[FaultView, ...]
    seconds: float


class ResignView(Model):
    """What signing anew changed."""

    narinfos: int
    realisations: int
    public_keys: tuple[str, ...]


class ErrorBody(Model):
    """What went wrong, for a program (`code`) and for a person (`message`)."""

    code: str
    message: str


class ErrorView(Model):
    """The body of every answer that is not a success."""

    error: ErrorBody
