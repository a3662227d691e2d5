"""Lines that several pages show: a step, a submission, as templates read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from coordinator.api.models import Counts, StepStatus, SubmissionState, SubmissionView, TransferView, WorkerView
from coordinator.readmodel.rows import ACTIVE, StepRow, SubmissionRow
from coordinator.readmodel.views import Views
from scheduler.model import Requirements, StepKey

#: States in the order in which a bar shows them.
BAR_STATES: Final = ("done", "publishing", "running", "ready", "waiting", "failed", "doomed", "abandoned")

_BACKS_OFF: Final = "tried again after a pause, because an attempt failed or was handed back"


@dataclass(frozen=True, slots=True)
class StepLine:
    """A step in a list."""

    key: str
    name: str
    state: StepStatus
    worker: str = ""
    stage: str = ""
    phase: str = ""
    transfer: TransferView | None = None
    started_at: float = 0.0
    ended_at: float = 0.0


@dataclass(frozen=True, slots=True)
class SlotLine:
    """A lease in a worker's hands, and where the worker is with it."""

    step: StepLine
    stage: str


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
    #: Its client still evaluates.
    open: bool = False

    @property
    def finished(self) -> int:
        """Steps that are in the cache."""
        return self.counts.held + self.counts.done


@dataclass(frozen=True, slots=True)
class QueueLine:
    """Ready steps that require the same, and what they wait for."""

    system: str
    features: tuple[str, ...]
    count: int
    reason: str


def slot_lines(views: Views, worker: WorkerView, most: int) -> tuple[SlotLine, ...]:
    """Return the first leases that a worker holds."""
    lines = []
    for key, stage in worker.leases[:most]:
        row = views.row_of(StepKey(key))
        lines.append(SlotLine(StepLine(key, key, StepStatus.RUNNING) if row is None else step_line(views, row), stage))
    return tuple(lines)


def queue_lines(ready: Mapping[Requirements, int], reasons: Mapping[Requirements, str]) -> list[QueueLine]:
    """Return the classes of ready steps, the longest first; one without a reason backs off."""
    lines = [
        QueueLine(wanted.system, tuple(wanted.features), count, reasons.get(wanted, _BACKS_OFF))
        for wanted, count in ready.items()
    ]
    return sorted(lines, key=lambda line: (-line.count, line.system, line.features))


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
        transfer=life.transfer,
        # A step that a worker began and gave back does not run now.
        started_at=life.started_at if life.ended_at or row.state in ACTIVE else 0.0,
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
    parts = [f"{count:,} {state}" for state, count in shares.items() if count]
    return SubmissionLine(
        id=view.id,
        title=_title(view),
        state=view.state,
        created_at=view.created_at,
        ended_at=view.ended_at,
        counts=counts,
        bar=tuple(shares.items()),
        progress=f"{', '.join(parts) or 'nothing'} of {counts.total:,} steps",
        open=view.open,
    )


def _title(view: SubmissionView) -> str:
    if view.label or not view.roots:
        return view.label or view.id
    more = f" and {view.root_count - 1:,} more" if view.root_count > 1 else ""
    return f"{view.roots[0].attr or view.roots[0].drv.rpartition('/')[2]}{more}"
