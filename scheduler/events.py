"""Events: the closed set of inputs of the core, in the past tense.

Every event may be lost, doubled, late or out of order except `SubmissionReceived`, `SubmissionGrown`, `SealAsked`,
`SubmissionCancelled` and `RetryAsked`, which a client has been promised. A stale event is ignored; an impossible one is
a bug and asserted.
One stale event cannot be distinguished from a fresh one: the greeting of a builder's earlier life. The core believes
it, and the shell greets the builder again as soon as the present one reports (`coordinator/engine/worker_events.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.model import FAR_OFF, BuilderId, BuilderSpec, Failure, Instant, LeaseId, StepKey, StepSpec, SubmissionId
from scheduler.resource_limits import ResourceLimits
from scheduler.terms import NO_TERMS, Terms
from scheduler.values import quick


@dataclass(frozen=True, slots=True)
class SubmissionReceived:
    """A client wants `roots`. `steps` closes over their needs, except where `held` (published) ends a branch.

    The core raises `SubmissionRefusedError` where it does not, or where the recipes in use would run in a circle.
    """

    submission: SubmissionId
    roots: tuple[StepKey, ...]
    steps: tuple[StepSpec, ...]
    #: Steps whose result the cache already holds; they may stand in `steps` or only be needed by one that does.
    held: tuple[StepKey, ...] = ()
    #: When intake looked into the cache. A step in `steps` that became done since is done; one that was done before and
    #: is not in `held` was lost. The default takes the answer for newer than all the core knows.
    asked_at: Instant = FAR_OFF
    #: Build again what is known to fail: everything, or these steps.
    retry_failed: bool = False
    retry: tuple[StepKey, ...] = ()
    #: The submission is known and ended without success; it is to run again. Nothing happens where it did not.
    again: bool = False
    #: The submission is known and has not ended; it was planned anew because the cache lost something. What was lost is
    #: made again, what failed stays failed. Nothing happens where the submission has ended.
    replanned: bool = False
    #: Seconds that its steps wait for a builder that could take them, before they fail; 0 is for ever. None is the
    #: farm's limit, and what was set before where it runs again or was planned anew.
    wait_s: int | None = None
    #: What builds of these roots may use, where the submission sets something.
    limits: tuple[tuple[StepKey, ResourceLimits], ...] = ()
    #: What it sets for itself; kept where it runs again or was planned anew.
    terms: Terms = NO_TERMS
    #: It takes the place of older ones of its owner and lineage that have not ended: these are withdrawn.
    supersedes: bool = False
    #: More roots are to come (`SubmissionGrown`): it does not end before it is sealed, and may have no root yet.
    open: bool = False
    #: Bytes that results among `held` should have, unpacked; those that are not named are not known.
    held_bytes: tuple[tuple[StepKey, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SubmissionGrown:
    """A client wants further `roots` by an open submission; those that it has already change nothing.

    `steps` closes over their needs, except where `held` or a known step ends a branch. Other fields are as in
    `SubmissionReceived`; what has failed in the submission since it came stays failed. The core raises
    `SubmissionClosedError` where the submission is not open, and `SubmissionRefusedError` as for a received one.
    """

    submission: SubmissionId
    roots: tuple[StepKey, ...]
    steps: tuple[StepSpec, ...]
    held: tuple[StepKey, ...] = ()
    asked_at: Instant = FAR_OFF
    retry_failed: bool = False
    limits: tuple[tuple[StepKey, ResourceLimits], ...] = ()
    held_bytes: tuple[tuple[StepKey, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SealAsked:
    """No more roots come for an open submission; a repeat is a no-op.

    `incomplete` says why where its client did not say so itself, because more may have been meant to come.
    """

    submission: SubmissionId
    incomplete: str = ""


@dataclass(frozen=True, slots=True)
class SubmissionCancelled:
    """A client no longer wants a submission; a repeat is a no-op."""

    submission: SubmissionId


@dataclass(frozen=True, slots=True)
class PriorityAsked:
    """A client gives a submission another priority; None is one above all that wait of its owner."""

    submission: SubmissionId
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class SubmissionExpired:
    """The time to keep an ended submission is over; one that has not ended stays."""

    submission: SubmissionId


@dataclass(frozen=True, slots=True)
class RetryAsked:
    """A client wants a failed step forgotten as such although no submission waits for it."""

    step: StepKey


@dataclass(frozen=True, slots=True)
class BuilderJoined:
    """A builder greeted the farm: what it offers, how many leases it will hold, which it holds."""

    builder: BuilderSpec
    capacity: int
    leases: tuple[LeaseId, ...] = ()
    #: It finishes what it holds and wants nothing new.
    draining: bool = False
    #: Why it should get nothing new for now, by its own word; empty while it is fit.
    unfit: str = ""


@quick
@dataclass(frozen=True, slots=True)
class BuilderReported:
    """A heartbeat. `capacity` is how many leases the builder is willing to hold in all, `leases` those it holds."""

    builder: BuilderId
    incarnation: str
    capacity: int
    leases: tuple[LeaseId, ...] = ()
    #: As in `BuilderJoined`.
    draining: bool = False
    unfit: str = ""
    #: How often its store has deleted something since it joined: what it had may be gone.
    collections: int = 0


@dataclass(frozen=True, slots=True)
class BuilderLost:
    """The transport has confirmed that this incarnation is gone (silence alone is not a loss: its deadline is)."""

    builder: BuilderId
    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class SpeedsMeasured:
    """Measured speeds: builder, system and speed, where 1 is usual. All others have 1 from now on.

    They may be of builders that are not here: these have them once they join.
    """

    speeds: tuple[tuple[BuilderId, str, float], ...]
    #: Bytes of inputs a second that builders fetch; those that are not named fetch as the usual one.
    fetch_rates: tuple[tuple[BuilderId, int], ...] = ()


@dataclass(frozen=True, slots=True)
class WorksEstimated:
    """Steps are expected to take as long as this now, as in `StepSpec.work_ms`; finished and unknown ones are passed.

    It costs what stands below these steps, so that it comes seldom and with all that has changed.
    """

    works: tuple[tuple[StepKey, int], ...]


@quick
@dataclass(frozen=True, slots=True)
class BuildSucceeded:
    """The outputs lie in the object store, not yet published. `evidence` is opaque and kept until they are."""

    lease: LeaseId
    builder: BuilderId
    evidence: bytes
    #: Bytes of the outputs, unpacked; 0: not known.
    output_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BuildFailed:
    """A lease ended without a result."""

    lease: LeaseId
    builder: BuilderId
    failure: Failure
    #: The limit, in seconds or bytes, at which the build was stopped; 0 where it was none.
    limit: int = 0


@quick
@dataclass(frozen=True, slots=True)
class OutputsPublished:
    """The result of this lease can now be fetched by anyone."""

    lease: LeaseId


@dataclass(frozen=True, slots=True)
class PublishFailed:
    """Publishing ended without success; the kind says whether building again can help."""

    lease: LeaseId
    failure: Failure


@dataclass(frozen=True, slots=True)
class ResultsHeld:
    """The cache has the results of steps that were to be built, from elsewhere than a build; others are passed over."""

    steps: tuple[StepKey, ...]
    #: When it had them.
    seen_at: Instant = FAR_OFF


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The engine woke up at a deadline; all that matters is `now`."""


#: Events with a graph of steps, and those of which there are as many as builds.
Wished = SubmissionReceived | SubmissionGrown
Ended = BuildSucceeded | OutputsPublished
Other = (
    SealAsked
    | SubmissionCancelled
    | PriorityAsked
    | SubmissionExpired
    | RetryAsked
    | BuilderJoined
    | BuilderReported
    | BuilderLost
    | SpeedsMeasured
    | WorksEstimated
    | BuildFailed
    | PublishFailed
    | ResultsHeld
    | TimePassed
)
Event = Wished | Ended | Other
