"""Permission for weakly isolated workers: those that the operator allows by name may build.

The decision is the coordinator's, because it publishes what they build; workers only measure (`workers.wire.grades`). A
worker that reports nothing of its isolation counts as the weakest.
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
        measured = grade or UNMEASURED
        if measured.level != WEAK or worker in self._allowed:
            return ""
        reason = measured.reasons[0] if measured.reasons else "it says no reason"
        more = f" (and {len(measured.reasons) - 1} more in `drover workers`)" if len(measured.reasons) > 1 else ""
        remedy = f"{measured.remedy}, or " if measured.remedy else ""
        return (
            f"its isolation is weak, class {measured.level}: {reason}{more}; "
            f"{remedy}allow it by name: `drover up --allow-weak-isolation {worker}`"
        )
