"""Facts of a snapshot: what many facts before have led to. `scheduler.facts` has them too.

A snapshot is some `StepRestored`, then `SubmissionRestored`, `BuilderRestored`, at last one `FarmRestored`; it stands
at the beginning of a journal and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scheduler.model import (
    NO_INSTANT,
    BuilderId,
    Failure,
    FailureKind,
    Instant,
    Recipe,
    StepKey,
    StepState,
    SubmissionId,
)
from scheduler.resource_limits import ResourceLimits
from scheduler.terms import NO_TERMS, Terms


@dataclass(frozen=True, slots=True)
class StepPast:
    """Part of a step's state that few steps of a snapshot have: past trials or a lease. As in `records.Step`."""

    active: int
    ended: int
    failed_at: Instant
    builder: BuilderId
    evidence: bytes
    failure: Failure | None
    cause: StepKey | None
    tried: tuple[int, ...]
    faults: int
    returns: int
    strikes: tuple[FailureKind, ...]
    avoid: BuilderId
    not_before: Instant
    accounts: tuple[tuple[BuilderId, str], ...] = ()
    moves: int = 0
    #: Absent in journals of before 2026-12-01.
    follows: tuple[StepKey, ...] = ()


@dataclass(frozen=True, slots=True)
class StepRestored:
    """Part of a snapshot: one step with all that durable facts have led to. Fields are as in `records.Step`."""

    durable: ClassVar[bool] = True
    step: StepKey
    recipes: tuple[Recipe, ...]
    sequence: int
    state: StepState
    depth: int
    born: int
    attempt: int
    done_at: Instant
    #: By sequence, in order.
    dependents: tuple[int, ...]
    roots: tuple[SubmissionId, ...]
    past: StepPast | None
    #: Absent in journals of before 2026-11-30.
    work_ms: int = 0
    tail_ms: int = 0
    memory_bytes: int = 0
    output_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SubmissionRestored:
    """Part of a snapshot: a submission that is not forgotten."""

    durable: ClassVar[bool] = True
    submission: SubmissionId
    roots: tuple[StepKey, ...]
    withdrawn: bool = False
    paid_until: Instant = NO_INSTANT
    wait_s: int | None = None
    limits: tuple[tuple[StepKey, ResourceLimits], ...] = ()
    #: Of one that may still grow: all that it stands on or stood on.
    open: bool = False
    members: tuple[StepKey, ...] = ()
    terms: Terms = NO_TERMS
    #: Withdrawn because a root of it failed.
    failed_fast: bool = False


@dataclass(frozen=True, slots=True)
class BuilderRestored:
    """Part of a snapshot: the leases of a builder, oldest first."""

    durable: ClassVar[bool] = True
    builder: BuilderId
    heard: Instant
    leases: tuple[StepKey, ...]


@dataclass(frozen=True, slots=True)
class FarmRestored:
    """The end of a snapshot, with the counters of the state."""

    durable: ClassVar[bool] = True
    steps: int
    known: int
    life: int
    floor: int = 0
