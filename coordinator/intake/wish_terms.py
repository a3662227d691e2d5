"""Terms of a submission from the wish of its client."""

from __future__ import annotations

from coordinator.api.requests import SubmitRequest
from coordinator.errors import IntakeError
from scheduler.model import NO_INSTANT, Instant
from scheduler.terms import Terms

#: Tag that tells the branches of several repositories apart.
REPOSITORY_TAG = "repository"


def terms_of(wish: SubmitRequest, owner: str, now: Instant) -> Terms:
    """Return what a wish sets for its submission.

    Raises `IntakeError` for a deadline that has passed or is given twice, and for one that supersedes nothing.
    """
    if wish.deadline_s and wish.deadline_at:
        raise IntakeError("the request's deadline is given as deadline_s and as deadline_at; give one of them.")
    deadline = Instant(now + wish.deadline_s) if wish.deadline_s else Instant(wish.deadline_at)
    if NO_INSTANT < deadline <= now:
        raise IntakeError("the request's deadline has passed; give one that is to come.")
    lineage = ""
    if wish.pull or wish.branch:
        place = f"pull {wish.pull}" if wish.pull else f"branch {wish.branch}"
        lineage = "\n".join((wish.tags.get(REPOSITORY_TAG, ""), place, wish.label))
    elif wish.supersede:
        raise IntakeError("only a submission with a branch or a pull request supersedes others; name one of them.")
    return Terms(owner, wish.priority, lineage, deadline, wish.fail_fast)
