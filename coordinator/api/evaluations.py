"""Answers about remote evaluations, as plain records."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from infra.records import record

#: Beginning of every evaluation's name, which no submission's has.
EVALUATION_PREFIX: Final = "eval-"


class EvaluationState(StrEnum):
    """States of a remote evaluation, in the order in which it has them; the last three are ends."""

    QUEUED = "queued"
    #: Its git revision is fetched.
    FETCHING = "fetching"
    EVALUATING = "evaluating"
    #: All that could be evaluated is submitted.
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """True for an end."""
        return self in {EvaluationState.DONE, EvaluationState.FAILED, EvaluationState.CANCELLED}


@record(frozen=True, slots=True, kw_only=True)
class FailedAttrView:
    """An attribute that could not be evaluated."""

    attr: str
    #: The first line of Nix's error.
    error: str
    #: All that Nix printed of it, cut; of the first few failed attributes only.
    text: str = ""
    position: str = ""


@record(frozen=True, slots=True, kw_only=True)
class EvaluationView:
    """A remote evaluation."""

    id: str
    state: EvaluationState
    #: SHA-256 of its tree's NAR; empty until it is there.
    tree: str = ""
    #: Why it failed: one sentence.
    error: str = ""
    #: The submission of what it found; empty until there is one.
    submission: str = ""
    #: Attributes that are derivations so far.
    roots: int = 0
    #: Those that failed, the first ones, and how many there are.
    failed: tuple[FailedAttrView, ...] = ()
    failed_count: int = 0
    #: Those that were left out as Nix leaves them out, as a sentence.
    left_out: str = ""
    #: What Nix printed for people, cut.
    messages: str = ""
