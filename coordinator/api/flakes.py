"""Records of what became of a recipe's attempts, with their sentences.

Plain records, as those of `coordinator.api.models`. Pages and commands say the same of them, so the sentences stand
here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRecordView:
    """Outcomes of a step's attempts with its recipe in use that ended by the build itself, as far as remembered.

    A worker that was lost, a full disk and a lease that was handed back say nothing of a recipe and do not count.
    """

    attempts: int
    succeeded: int
    #: A failure was followed by a success: nothing but chance or the machine differed.
    flaky: bool

    @property
    def failed(self) -> int:
        """Attempts that failed."""
        return self.attempts - self.succeeded


def failure_sentence(record: RecipeRecordView | None) -> str:
    """Say of a failed step that its recipe can succeed; "" where it never did."""
    if record is None or not record.succeeded:
        return ""
    times = _times(record.attempts)
    return f"failed here, succeeded {record.succeeded} of {times} with the same recipe{_flaky(record)}"


def flake_sentence(record: RecipeRecordView | None) -> str:
    """Say of a step that its recipe is flaky, with its rate; "" where it is not."""
    if record is None or not record.flaky:
        return ""
    return f"failed {record.failed} of {_times(record.attempts)} with the same recipe{_flaky(record)}"


def _flaky(record: RecipeRecordView) -> str:
    return f": flaky, {record.failed * 100 / record.attempts:.0f} % fail" if record.flaky else ""


def _times(count: int) -> str:
    return f"{count} time" if count == 1 else f"{count} times"
