"""Origin of a submission in words, the same for the terminal and for pages."""

from __future__ import annotations

from typing import Final

from coordinator.api.models import SubmissionView

#: Characters of a commit that are shown.
COMMIT_CHARS: Final = 12


def origin_words(view: SubmissionView) -> tuple[tuple[str, str], ...]:
    """Return pairs of a word and a value, as far as they are known."""
    named = (
        ("owner", view.owner),
        ("branch", view.branch),
        ("pull request", view.pull),
        ("commit", view.commit[:COMMIT_CHARS]),
        ("priority", str(view.priority) if view.priority else ""),
        ("superseded by", view.superseded_by),
        *sorted(view.tags.items()),
    )
    return tuple((word, value) for word, value in named if value)
