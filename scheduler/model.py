"""The words of the core: keys, requirements, steps, builders, leases.

The scheduler knows no Nix. A step is an opaque key with one or more recipes; every recipe of a step makes the same
result, so any one of them is enough. Everything here is an immutable value and can be compared, hashed and stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

from scheduler.values import quick


class ImpossibleError(Exception):
    """An input or fact that cannot occur unless another part has a bug; the root of this package's exceptions.

    The state may be half changed when it is raised from `evolve`: the engine must stop and replay its journal.
    """


class SubmissionRefusedError(ImpossibleError):
    """A graph that intake must have rejected. Raised before any fact: the state is as it was and may be used on."""


class SubmissionClosedError(SubmissionRefusedError):
    """Further roots for a submission that is not open: it was sealed or withdrawn, or is not known."""


StepKey = NewType("StepKey", str)
BuilderId = NewType("BuilderId", str)
SubmissionId = NewType("SubmissionId", str)
#: Seconds since the epoch, as the engine's one clock reads them; the core only compares and adds.
Instant = NewType("Instant", float)


#: "Not set", before every real instant; and after every real instant.
NO_INSTANT = Instant(0.0)
FAR_OFF = Instant(float("inf"))
#: Work of a step of which nothing is known, in milliseconds on a builder of speed 1. All such steps have the same, so
#: that among them the longest path is the one of most steps.
UNKNOWN_WORK_MS = 60_000
#: No step asks for more memory.
MOST_MEMORY_BYTES = 1 << 50
#: No step's outputs are taken for larger.
MOST_OUTPUT_BYTES = 1 << 50
#: Steps that ask for this system run on any builder (Nix's own pseudo-system of `builtins`).
ANY_SYSTEM = "builtin"


@dataclass(frozen=True, slots=True)
class Requirements:
    """Requirements on a builder: one system, and every named feature (sorted, without repeats)."""

    system: str
    features: tuple[str, ...] = ()


@quick
@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to make a step: what the builder must offer and which steps must be done before."""

    requirements: Requirements
    needs: tuple[StepKey, ...] = ()


@quick
@dataclass(frozen=True, slots=True)
class StepSpec:
    """A step and its recipes, preferred first; more than one only where different recipes give one result.

    A recipe keeps its place: what is known of a step, and what a later submission says of it, are one list as far as
    both go.
    """

    key: StepKey
    recipes: tuple[Recipe, ...]
    #: Milliseconds that a build is expected to take on a builder of speed 1; 0: nothing is known of it. Absent in
    #: journals of before 2026-11-30.
    work_ms: int = 0
    #: Memory that a build should take at most; 0: not known, it is counted as none. Absent likewise.
    memory_bytes: int = 0
    #: Bytes that its outputs should have together, unpacked; 0: not known. Absent likewise.
    output_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BuilderSpec:
    """Offer of a builder. One with mandatory features takes only steps that require all of them."""

    id: BuilderId
    #: Changes whenever the builder's process starts anew; reports of an earlier incarnation are stale.
    incarnation: str
    systems: frozenset[str]
    features: frozenset[str] = frozenset()
    mandatory: frozenset[str] = frozenset()
    #: Memory of its machine; 0: not known, any build fits.
    memory_bytes: int = 0
    #: Whether it begins a lease as soon as it has built what the step needs, published or not (`early`).
    takes_successors: bool = False

    def offers(self, wanted: Requirements) -> bool:
        """Return whether a step with these requirements may run here."""
        return (
            (wanted.system == ANY_SYSTEM or wanted.system in self.systems)
            and self.features.issuperset(wanted.features)
            and self.mandatory.issubset(wanted.features)
        )


class StepState(StrEnum):
    """States of a step. The last four are finished: nothing happens until a submission wants the step again."""

    #: A need is not done, or no submission wants the step yet.
    WAITING = "waiting"
    #: Every need is done and a submission wants it; may still be backing off.
    READY = "ready"
    #: A builder has the right to build it, at once or as soon as it has built what the step needs (`early`).
    LEASED = "leased"
    #: Outputs are uploaded and being verified and signed; the builder's slot is free again.
    PUBLISHING = "publishing"
    #: Anyone can fetch the result.
    DONE = "done"
    #: Its own recipes failed, or its attempts are spent.
    FAILED = "failed"
    #: A step below failed.
    DOOMED = "doomed"
    #: No submission wants it any more.
    ABANDONED = "abandoned"


@quick
@dataclass(frozen=True, slots=True, order=True)
class LeaseId:
    """The right to build one step once. `attempt` counts from 1 and never repeats for a step: it is the fence."""

    step: StepKey
    attempt: int


class FailureKind(StrEnum):
    """Reasons that a lease ended without a result; `failures.CONSEQUENCES` is the one table of consequences."""

    #: The builder ran and failed (exit status).
    PERMANENT = "permanent"
    #: An output is missing, refers to what it may not, or cannot be registered.
    OUTPUT_REJECTED = "output_rejected"
    #: A fixed output has other bytes than the derivation promises.
    HASH_MISMATCH = "hash_mismatch"
    #: The address that a fixed output is fetched from says that there is nothing (any more).
    SOURCE_GONE = "source_gone"
    #: A limit of the build: wall time, silence, log size, output size.
    TIMEOUT = "timeout"
    SILENCE = "silence"
    LOG_LIMIT = "log_limit"
    OUTPUT_SIZE = "output_size"
    #: Building again gave other bits.
    NOT_DETERMINISTIC = "not_deterministic"
    #: A need failed for good, so this way to make the step has failed too.
    DEPENDENCY = "dependency"
    #: The builder failed in a way that may pass (a server that a fixed output is fetched from).
    TRANSIENT = "transient"
    #: The farm's fault, when nothing below is more exact.
    INFRASTRUCTURE = "infrastructure"
    DAEMON_LOST = "daemon_lost"
    INPUT_MISSING = "input_missing"
    DISK_LOW = "disk_low"
    UPLOAD_FAILED = "upload_failed"
    WORKER_LOST = "worker_lost"
    #: The builder was ended by signal 9, which it did not send itself.
    KILLED = "killed"
    #: The daemon went away while it ran the build.
    CONNECTION_LOST = "connection_lost"
    #: Connections were lost so often that the build itself is suspected.
    SUSPECT = "suspect"
    #: No builder that could take it has been known for too long; it never had a lease for that.
    NO_WORKER = "no_worker"
    #: The worker hands the lease back without having started it. Costs no attempt budget.
    RETURNED = "returned"
    #: The shell has seen that the cache lost an input, and mends that. Costs no attempt budget either.
    INPUT_LOST = "input_lost"
    #: The build was stopped on the coordinator's wish.
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Failure:
    """The kind decides, the message is for people and never parsed."""

    kind: FailureKind
    message: str
    #: Two failures with one signature are the same one, however their messages differ (in hashes, numbers, places). Set
    #: where Nix has judged the build itself; empty where nothing points to the recipe. Opaque to the core.
    signature: str = ""
