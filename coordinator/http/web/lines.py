"""Lines that several pages show: a step, a submission, as templates read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from coordinator.api.models import Counts, StepStatus, SubmissionState, SubmissionView
from coordinator.readmodel.rows import StepRow, SubmissionRow
from coordinator.readmodel.views import Views

#: States in the order in which a bar shows them.
BAR_STATES: Final = ("done", "publishing", "running", "ready", "waiting", "failed", "doomed", "abandoned")


@dataclass(frozen=True, slots=True)
class StepLine:
    """A step in a list."""

    key: str
    name: str
    state: StepStatus
    worker: str = ""
    stage: str = ""
    phase: str = ""
    started_at: float = 0.0
    ended_at: float = 0.0


@dataclass(frozen=True, slots=True)
class SubmissionLine:
    """A submission in a list, with the bar of its steps."""

    id: str
    title: str
    state: SubmissionState
    created_at: float
    #: 0 while it runs.
    ended_at: float
    counts: Counts
    bar: tuple[tuple[str, int], ...]
    #: What the bar shows, in words.
    progress: str

    @property
    def finished(self) -> int:
        """Steps that are in the cache."""
        return self.counts.held + self.counts.done


def step_line(views: Views, row: StepRow) -> StepLine:
    """Return a step as lists show it."""
    life = row.life
    return StepLine(
        key=row.key,
        name=views.name_of(row),
        state=row.state,
        worker=life.builder,
        stage=life.stage,
        phase=life.phase,
        started_at=life.started_at,
        ended_at=life.ended_at,
    )


def submission_line(views: Views, row: SubmissionRow) -> SubmissionLine:
    """Return a submission as lists show it; costs the same for any size."""
    return line_of(views.submission_view(row, roots=1))


def line_of(view: SubmissionView) -> SubmissionLine:
    """Return a submission as lists show it, from its view."""
    counts = view.counts
    shares = {state: getattr(counts, state) for state in BAR_STATES}
    shares["done"] += counts.held
    told = [f"{count:,} {state}" for state, count in shares.items() if count]
    return SubmissionLine(
        id=view.id,
        title=_title(view),
        state=view.state,
        created_at=view.created_at,
        ended_at=view.ended_at,
        counts=counts,
        bar=tuple(shares.items()),
        progress=f"{', '.join(told) or 'nothing'} of {counts.total:,} steps",
    )


def _title(view: SubmissionView) -> str:
    if view.label or not view.roots:
        return view.label or view.id
    more = f" and {view.root_count - 1:,} more" if view.root_count > 1 else ""
    return f"{view.roots[0].attr or view.roots[0].drv.rpartition('/')[2]}{more}"
