"""Answers about when things end and how much is done: a submission's estimate, its critical path, the throughput.

Plain records, as those of `coordinator.api.models`.
"""

from __future__ import annotations

from coordinator.api.models import EtaView, StepStatus
from infra.records import record


@record(frozen=True, slots=True, kw_only=True)
class PathStepView:
    """A step of a critical path: of the one to come, or of the one so far (then with `took_s`)."""

    step: str
    name: str
    state: StepStatus
    worker: str = ""
    #: 0 where it has not begun.
    started_at: float = 0.0
    #: What the builds of its package usually take at most; None where it has no history.
    takes_s: float | None = None
    #: Of the path so far: what its last attempt took, and how long that was waited for since the step before.
    took_s: float = 0.0
    waited_s: float = 0.0


@record(frozen=True, slots=True, kw_only=True)
class PathView:
    """A critical path in the order of building: some of its `count` steps, which take, or took, `seconds` in all."""

    steps: tuple[PathStepView, ...] = ()
    count: int = 0
    seconds: float = 0.0


@record(frozen=True, slots=True, kw_only=True)
class LoadView:
    """The open work of a submission for one kind of worker."""

    system: str
    features: tuple[str, ...]
    steps: int
    #: Seconds of one slot, as far as they are known; those of steps without history are guessed.
    work_s: float
    slots: int
    #: Other submissions with work for these workers.
    others: int


@record(frozen=True, slots=True, kw_only=True)
class SubmissionEtaView:
    """End of a submission as foreseen, what bounds it, and what has bounded its time so far."""

    submission: str
    #: None where it has ended, or is not worked out yet.
    eta: EtaView | None
    #: The steps that bounded its time until now; the last ones.
    so_far: PathView
    #: The steps that come next on its longest path; the first ones.
    to_come: PathView
    loads: tuple[LoadView, ...] = ()


@record(frozen=True, slots=True, kw_only=True)
class ThroughputBar:
    """Count of what ended in one stretch of time."""

    finished: int = 0
    failed: int = 0
    #: Steps of submissions that came then whose results were in the cache.
    reused: int = 0


@record(frozen=True, slots=True, kw_only=True)
class ThroughputView:
    """Count of what the farm has done, by stretches of `every_s` up to `until`, the oldest first."""

    until: float
    every_s: float
    bars: tuple[ThroughputBar, ...]

    @property
    def total(self) -> ThroughputBar:
        """The sums."""
        return _sum(self.bars)

    def latest(self, count: int = 5) -> ThroughputBar:
        """Return the sums of the newest stretches that are over; the last one is under way."""
        return _sum(self.bars[-count - 1 : -1])


def _sum(bars: tuple[ThroughputBar, ...]) -> ThroughputBar:
    return ThroughputBar(
        finished=sum(bar.finished for bar in bars),
        failed=sum(bar.failed for bar in bars),
        reused=sum(bar.reused for bar in bars),
    )


@record(frozen=True, slots=True, kw_only=True)
class RunningView:
    """A running submission on the farm's list."""

    id: str
    label: str
    done: int
    total: int
    created_at: float
    eta: EtaView | None
