"""Choice of submissions by the query of their list."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from coordinator.api.route import NUMBER_DIGITS
from coordinator.api.routes import SUBMISSIONS
from coordinator.errors import BadRequestError
from coordinator.http.api.pages import words_of
from coordinator.journal.codec import SubmissionNote
from coordinator.readmodel.rows import SubmissionRow


@dataclass(frozen=True, slots=True)
class SubmissionFilter:
    """Conditions on a submission; empty and 0 are none."""

    states: frozenset[str] = frozenset()
    owner: str = ""
    branch: str = ""
    pull: str = ""
    label: str = ""
    tag: tuple[str, str] | None = None
    #: The oldest that is let through came then.
    since: float = 0.0

    @classmethod
    def of(cls, request: web.Request, now: float) -> SubmissionFilter:
        """Return the filter of a request. Raises `BadRequestError`."""
        query = request.query
        within = query.get("within", "")
        if within and not (within.isascii() and within.isdigit() and len(within) <= NUMBER_DIGITS and int(within)):
            raise BadRequestError("`within` is a number of seconds; leave it out for submissions of any age.")
        key, given, value = query.get("tag", "").partition("=")
        if query.get("tag") and not (key and given):
            raise BadRequestError("`tag` is KEY=VALUE, as it was given to the submission.")
        return cls(
            states=words_of(request, SUBMISSIONS.named("state")),
            owner=query.get("owner", ""),
            branch=query.get("branch", ""),
            pull=query.get("pull", ""),
            label=query.get("label", ""),
            tag=(key, value) if given else None,
            since=now - int(within) if within else 0.0,
        )

    def passes(self, row: SubmissionRow, note: SubmissionNote) -> bool:
        """Return whether a submission is let through."""
        origin = note.origin
        wanted = (
            (self.owner, origin.owner),
            (self.branch, origin.branch),
            (self.pull, origin.pull),
            (self.label, note.label),
        )
        return (
            row.created_at >= self.since
            and (not self.states or row.state in self.states)
            and all(not asked or asked == has for asked, has in wanted)
            and (self.tag is None or self.tag in origin.tags)
        )
