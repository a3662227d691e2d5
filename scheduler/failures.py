"""Consequences of failures: one table, a row for each kind. Nothing else in the core decides by kind.

Only what may be the farm's fault is tried again, another builder first, with back-off, and never without bound: each
recipe in a life of a step has the common budget `policy.Limits.attempts`, and some kinds a smaller one of their own.
Beyond it the failure is final, under the name that the row gives.

Blame follows evidence. A recipe that fails twice in the same way (`Failure.signature`) is at fault itself, by its
second builder's word, or by the same builder's where no other evidence is against that one. A builder is to blame for
faults that no recipe can cause, counted by step, and for the others once another builder has built the same step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from scheduler.model import Failure, FailureKind


class Course(StrEnum):
    """Next state of the lease's step."""

    #: It is a verdict: the next recipe takes over where that can help, else the step fails.
    END = "end"
    #: The farm is at fault, or may be: back-off and again, another builder first, within the budget.
    RETRY = "retry"
    #: No fault at all: the step may be leased again at once.
    HAND_BACK = "hand back"


@dataclass(frozen=True, slots=True)
class Consequence:
    """One row of the table."""

    course: Course
    #: Retries of this very kind in one life of a step; None where the common budget alone bounds them.
    tries: int | None = None
    #: What the failure is called once its tries are spent; None where its own name says it well enough.
    then: FailureKind | None = None
    #: Once final: whether another recipe of the step may do better.
    next_recipe: bool = False
    #: Once final: whether later submissions take it for known, within the failure cache's time to live.
    cacheable: bool = False
    #: Handed back: whether even the first lease after it waits.
    waits: bool = False
    #: Whether it counts towards the quarantine of the builder that reported or caused it.
    blames_builder: bool = False
    #: Whether the recipe may have caused it, so that it counts only once another builder has built the same step.
    #: A failure with a signature is always of this sort.
    doubtful: bool = False
    #: Whether too little memory is the likely reason: the step asks for more from then on.
    lacks_memory: bool = False


_K = FailureKind


def _verdict(*, next_recipe: bool = True, cacheable: bool = True) -> Consequence:
    return Consequence(Course.END, next_recipe=next_recipe, cacheable=cacheable)


def _fault() -> Consequence:
    return Consequence(Course.RETRY, blames_builder=True)


CONSEQUENCES: Mapping[FailureKind, Consequence] = MappingProxyType(
    {
        _K.PERMANENT: _verdict(),
        _K.OUTPUT_REJECTED: _verdict(),
        _K.HASH_MISMATCH: _verdict(),
        # A limit belongs to the submission that set it: another one's may be wider.
        _K.TIMEOUT: _verdict(cacheable=False),
        _K.SILENCE: _verdict(cacheable=False),
        _K.LOG_LIMIT: _verdict(cacheable=False),
        _K.OUTPUT_SIZE: _verdict(cacheable=False),
        _K.NOT_DETERMINISTIC: _verdict(),
        # The cause is cached, not what it doomed.
        _K.DEPENDENCY: _verdict(cacheable=False),
        # A worker may join any time; another recipe may ask for one that is there.
        _K.NO_WORKER: _verdict(cacheable=False),
        # A fetch from a server that does not answer: the builder's machine is not to blame, another source may help.
        _K.TRANSIENT: Consequence(Course.RETRY, next_recipe=True),
        # Servers say so in error too, but seldom twice: then another recipe may know another address.
        _K.SOURCE_GONE: Consequence(Course.RETRY, tries=1, next_recipe=True),
        _K.INFRASTRUCTURE: _fault(),
        _K.DAEMON_LOST: _fault(),
        _K.INPUT_MISSING: _fault(),
        _K.DISK_LOW: _fault(),
        _K.UPLOAD_FAILED: _fault(),
        _K.WORKER_LOST: _fault(),
        # Most often for lack of memory, which a larger machine may have; the second time the build is to blame.
        _K.KILLED: Consequence(Course.RETRY, tries=1, next_recipe=True, cacheable=True, lacks_memory=True),
        # Some builds break the daemon that runs them; infra/nix/FORMATS.md 5.4 allows such retries twice.
        _K.CONNECTION_LOST: Consequence(
            Course.RETRY,
            tries=2,
            then=_K.SUSPECT,
            blames_builder=True,
            doubtful=True,
        ),
        _K.SUSPECT: _verdict(cacheable=False),
        _K.RETURNED: Consequence(Course.HAND_BACK),
        # Mending takes a while, and what is built again needs the worker too.
        _K.INPUT_LOST: Consequence(Course.HAND_BACK, waits=True),
        _K.CANCELLED: Consequence(Course.HAND_BACK),
    }
)


def suspects_recipe(failure: Failure) -> bool:
    """Return whether a fault of the farm may as well be the recipe's."""
    return bool(failure.signature) or CONSEQUENCES[failure.kind].doubtful


def is_fault(kind: FailureKind) -> bool:
    """Return whether a lease that ended so costs one attempt of its step's budget."""
    return CONSEQUENCES[kind].course is Course.RETRY
