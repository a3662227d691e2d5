"""Filters of the list of submissions, as parameters of its query."""

from __future__ import annotations

from typing import Final

from coordinator.api.models import SubmissionState
from coordinator.api.route import Query

SUBMISSION_FILTERS: Final = (
    Query("state", "Only submissions in these states.", words=tuple(SubmissionState)),
    Query("owner", "Only submissions of this owner."),
    Query("branch", "Only submissions of this branch."),
    Query("pull", "Only submissions of this pull request."),
    Query("label", "Only submissions with this label."),
    Query("tag", "Only submissions with this tag, `KEY=VALUE`.", pattern="^[^=]+="),
    Query("within", "Only submissions of the last so many seconds.", "integer", minimum=1),
)
