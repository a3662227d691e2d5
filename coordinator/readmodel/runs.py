"""Reasons why a step ran: the submissions that it was built for, why each attempt was made, and what differs.

Submissions that have ended want a step no longer; the timings of its attempts name them, and the way from a root of
theirs down to the step is found in the recipes that the core knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.api.difference_models import DifferenceView, RunReasonView
from coordinator.api.questions import WantedView
from coordinator.readmodel.comparisons import PAGE, WHOLE
from coordinator.readmodel.differences import Differences
from coordinator.readmodel.rows import StepRow, SubmissionRow
from coordinator.readmodel.surroundings import way_down
from coordinator.readmodel.views import Views
from coordinator.stores.timings import AttemptTiming, TimingsError, TimingStore
from infra.nix.causes import Bounds
from infra.slices import in_slices
from scheduler.farm import Farm
from scheduler.model import StepKey

#: Attempts whose reasons are named, the newest, and submissions.
RUNS_NAMED: Final = 20
SUBMISSIONS_NAMED: Final = 5
#: Edges of the graph that are looked at for the ways from roots down to a step, by the bounds of a question.
WAY_EDGES: Final = {WHOLE: 2_000_000, PAGE: 60_000}


@dataclass(frozen=True, slots=True)
class Run:
    """Reasons of a step that ran."""

    reasons: tuple[RunReasonView, ...] = ()
    #: The first of the submissions that it was built for and that are not forgotten, the newest first.
    built_for: tuple[WantedView, ...] = ()
    built_for_count: int = 0
    #: None for a step that never ran.
    difference: DifferenceView | None = None
    #: The reason why timings are missing, "" where they are not.
    trouble: str = ""


class Runs:
    """Answers why steps ran."""

    def __init__(self, views: Views, core: Farm, timings: TimingStore, differences: Differences) -> None:
        self._views = views
        self._core = core
        self._timings = timings
        self.differences = differences

    async def of(self, row: StepRow, bounds: Bounds) -> Run:
        """Return why a step ran; nothing for one that never did."""
        if not row.life.attempt:
            return Run()
        timings, trouble = await self._kept(row.key)
        submissions = self._built_for(row, timings)
        named = submissions[:SUBMISSIONS_NAMED]
        wanted = [await self._wanted(row, each, WAY_EDGES[bounds] // len(named)) for each in named]
        return Run(
            run_reasons(timings)[-RUNS_NAMED:],
            tuple(wanted),
            len(submissions),
            await self.differences.against_last(row, bounds),
            trouble,
        )

    async def _kept(self, key: StepKey) -> tuple[list[AttemptTiming], str]:
        try:
            return await self._timings.of_steps([key]), ""
        except TimingsError as error:
            return [], str(error)

    def _built_for(self, row: StepRow, timings: Sequence[AttemptTiming]) -> list[SubmissionRow]:
        """Return the submissions that a step was built for, the newest first, once each."""
        names = [name for timing in timings for name in (timing.wanted_by or "").split(",") if name]
        found = [*row.submissions, *self._views.failed_through(row), *filter(None, map(self._views.find, names))]
        return sorted(dict.fromkeys(found), key=lambda each: -each.created_at)

    async def _wanted(self, row: StepRow, submission: SubmissionRow, most_edges: int) -> WantedView:
        way = await in_slices(way_down(self._core, frozenset(submission.roots), row.key, most_edges))
        note = self._views.note(submission.id)
        attr = next((root.attr for root in note.roots if way and root.step == way[0]), "")
        rows = [self._views.row_of(key) for key in way]
        names = tuple([self._views.name_of(each) for each in rows if each is not None])
        return WantedView(submission=submission.id, label=note.label, attr=attr, path=names)


def run_reasons(timings: Sequence[AttemptTiming]) -> tuple[RunReasonView, ...]:
    """Return the reason of each attempt, the first one first, as `timings` are."""
    previous: AttemptTiming | None = None
    reasons = []
    for timing in timings:
        reason = _first(timing) if previous is None else _after(previous)
        reasons.append(RunReasonView(attempt=timing.attempt, at=timing.leased_at or 0.0, reason=reason))
        previous = timing
    return tuple(reasons)


def _first(timing: AttemptTiming) -> str:
    if timing.attempt > 1:
        return "earlier attempts are no longer remembered"
    return "a submission wanted it, and the farm's cache lacked its outputs"


def _after(previous: AttemptTiming) -> str:
    before = f"attempt {previous.attempt}"
    because = f" ({previous.reason})" if previous.reason else ""
    because += f": {previous.message}" if previous.message else ""
    on = f" {previous.worker}" if previous.worker else ""
    sentences = {
        "done": f"{before} had built it, and the cache has lost or collected an output since",
        "failed": f"{before} failed for good{because}; later it was asked for again",
        "retried": f"{before} failed{because}",
        "lost": f"the worker{on} of {before} was lost",
        "returned": f"{before} was handed back{because}",
        "moved": f"{before} was stopped for another one elsewhere"
        + (f": {previous.message}" if previous.message else ""),
        "cancelled": f"{before} was stopped while no submission wanted it; later one did again",
    }
    return sentences[previous.outcome] if previous.outcome else f"the end of {before} is not known"
