"""Terms of a submission: whose it is, how urgent, until when, and what becomes of it when others come or steps fail."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from scheduler.model import NO_INSTANT, Instant

#: Bounds of a priority.
LOWEST_PRIORITY: Final = -5
HIGHEST_PRIORITY: Final = 5


class Withdrawal(StrEnum):
    """Reasons why a submission ended before its steps did."""

    #: Its client, or another, withdrew it.
    CANCELLED = "cancelled"
    #: A newer one of the same lineage took its place.
    SUPERSEDED = "superseded"
    #: Its deadline passed.
    DEADLINE = "deadline"
    #: A root of it failed, and it wanted nothing more then.
    FAIL_FAST = "fail_fast"


@dataclass(frozen=True, slots=True)
class Terms:
    """Settings of a submission for itself, and its owner, which follows from its token."""

    #: Owners share builders by weight (`policy.Policy.weight`).
    owner: str = ""
    #: Of several submissions of one owner the higher goes first.
    priority: int = 0
    #: Submissions of one owner with the same one stand for each other (`SubmissionReceived.supersedes`); "" is none.
    lineage: str = ""
    #: When it is withdrawn; 0 is never.
    deadline: Instant = NO_INSTANT
    #: The first root that fails, or can never run, withdraws it.
    fail_fast: bool = False


NO_TERMS: Final = Terms()
