"""What the core decided: the closed set of facts, in the past tense. The journal holds exactly the durable ones.

Policy may change between releases, a fact may not: `evolve` gives the same state for the same facts for ever. Facts
about builders are not durable: after a restart builders join anew and say which leases they still hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scheduler.model import (
    BuilderId,
    BuilderSpec,
    Failure,
    Instant,
    LeaseId,
    Recipe,
    StepKey,
    StepSpec,
    SubmissionId,
)


@dataclass(frozen=True, slots=True)
class SubmissionAccepted:
    """`members` is every step the submission stands on; `joined` those that others had already brought, unfinished."""

    durable: ClassVar[bool] = True
    submission: SubmissionId
    at: Instant
    roots: tuple[StepKey, ...]
    members: tuple[StepKey, ...]
    held: tuple[StepKey, ...]
    joined: tuple[StepKey, ...]


@dataclass(frozen=True, slots=True)
class SubmissionWithdrawn:
    """The client's wish is gone; steps that nobody else wants are abandoned by facts of their own."""

    durable: ClassVar[bool] = True
    submission: SubmissionId
    at: Instant


@dataclass(frozen=True, slots=True)
class StepAdded:
    """A step became known."""

    durable: ClassVar[bool] = True
    spec: StepSpec


@dataclass(frozen=True, slots=True)
class RecipeAdded:
    """Another way to make a known step became known; it is tried after the ones before."""

    durable: ClassVar[bool] = True
    step: StepKey
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class StepHeld:
    """The cache already holds the result: done without a build."""

    durable: ClassVar[bool] = True
    step: StepKey


@dataclass(frozen=True, slots=True)
class StepRevived:
    """A failed, doomed or abandoned step is wanted again and starts over with its first recipe."""

    durable: ClassVar[bool] = True
    step: StepKey


@dataclass(frozen=True, slots=True)
class StepLeased:
    """A builder got the right to build. The lease expires unless the builder's heartbeats renew it."""

    durable: ClassVar[bool] = True
    lease: LeaseId
    builder: BuilderId
    recipe: int
    at: Instant


@dataclass(frozen=True, slots=True)
class LeaseRevoked:
    """The lease is over without a verdict on the step, which may be leased again from `not_before` on."""

    durable: ClassVar[bool] = True
    lease: LeaseId
    builder: BuilderId
    failure: Failure
    not_before: Instant


@dataclass(frozen=True, slots=True)
class StepBuilt:
    """Outputs are uploaded; publishing has begun. The builder's slot is free."""

    durable: ClassVar[bool] = True
    lease: LeaseId
    builder: BuilderId
    evidence: bytes
    at: Instant


@dataclass(frozen=True, slots=True)
class StepDone:
    """The result is published: done means that it can be fetched."""

    durable: ClassVar[bool] = True
    lease: LeaseId
    at: Instant


@dataclass(frozen=True, slots=True)
class StepFellBack:
    """One recipe failed for good and the next takes over."""

    durable: ClassVar[bool] = True
    step: StepKey
    recipe: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The last recipe failed for good, or the attempts are spent."""

    durable: ClassVar[bool] = True
    step: StepKey
    attempt: int
    builder: BuilderId
    failure: Failure
    at: Instant


@dataclass(frozen=True, slots=True)
class StepDoomed:
    """The step can never run: `cause` is the root failure, not merely the next step down."""

    durable: ClassVar[bool] = True
    step: StepKey
    cause: StepKey


@dataclass(frozen=True, slots=True)
class StepAbandoned:
    """Nobody wants the step any more."""

    durable: ClassVar[bool] = True
    step: StepKey


@dataclass(frozen=True, slots=True)
class BuilderAdmitted:
    """A builder may get leases."""

    durable: ClassVar[bool] = False
    builder: BuilderSpec
    capacity: int
    at: Instant


@dataclass(frozen=True, slots=True)
class BuilderRefreshed:
    """A heartbeat renewed the builder's leases and told its capacity."""

    durable: ClassVar[bool] = False
    builder: BuilderId
    capacity: int
    at: Instant


@dataclass(frozen=True, slots=True)
class BuilderRemoved:
    """The builder is gone; its leases were revoked by facts before this one."""

    durable: ClassVar[bool] = False
    builder: BuilderId
    reason: str
    at: Instant


Fact = (
    SubmissionAccepted
    | SubmissionWithdrawn
    | StepAdded
    | RecipeAdded
    | StepHeld
    | StepRevived
    | StepLeased
    | LeaseRevoked
    | StepBuilt
    | StepDone
    | StepFellBack
    | StepFailed
    | StepDoomed
    | StepAbandoned
    | BuilderAdmitted
    | BuilderRefreshed
    | BuilderRemoved
)
