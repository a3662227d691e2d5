"""Permission for weakly isolated workers: those that the operator allows by name may build.

The decision is the coordinator's, because it publishes what they build; workers only measure (`workers.wire.grades`). A
worker that says nothing of its isolation counts as the weakest.
"""

from __future__ import annotations

from collections.abc import Collection

from workers.wire.grades import UNMEASURED, IsolationGrade

#: The class that needs a permission.
WEAK = "C"


class WeakIsolation:
    """The workers of class C that the operator allows."""

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(allowed)

    def refusal(self, worker: str, grade: IsolationGrade | None) -> str:
        """Return why a worker gets no work for its isolation and what to do, one sentence; empty where it gets some."""
        told = grade or UNMEASURED
        if told.level != WEAK or worker in self._allowed:
            return ""
        reason = told.reasons[0] if told.reasons else "it says no reason"
        more = f" (and {len(told.reasons) - 1} more in `drover workers`)" if len(told.reasons) > 1 else ""
        remedy = f"{told.remedy}, or " if told.remedy else ""
        return (
            f"its isolation is weak, class {told.level}: {reason}{more}; "
            f"{remedy}allow it by name: `drover up --allow-weak-isolation {worker}`"
        )
