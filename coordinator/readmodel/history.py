"""Answers about timings: an attempt as people see it, and a summary of the attempts of one package.

Pure: rows in, views out. `coordinator.readmodel.flakes` says which recipes are flaky.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Final

from coordinator.api.flakes import RecipeRecordView
from coordinator.api.timeline_models import (
    AttemptView,
    FetchView,
    FlakyStepView,
    HistoryView,
    StretchView,
    SystemHistoryView,
    WorkerTriesView,
)
from coordinator.readmodel.flakes import Recipe, ends_of, recipe_records
from coordinator.stores.timings import JUDGED, AttemptTiming, Measured

#: Newest successful builds that the usual figures of a package are medians of.
USUAL_OF: Final = 20
#: Attempts that a history shows of each system, and flaky steps that it names.
RECENT: Final = 50
FLAKY_NAMED: Final = 10


def attempt_view(timing: AttemptTiming) -> AttemptView:
    """Render one attempt."""
    measured = timing.measured or Measured()
    spans = [StretchView(name=name, at=at, took_s=took) for name, at, took in measured.spans]
    if timing.verify_at is not None and timing.verify_s is not None:
        spans.append(StretchView(name="verify", at=timing.verify_at, took_s=timing.verify_s))
        if timing.publish_s is not None:
            at = timing.verify_at + timing.verify_s
            spans.append(StretchView(name="publish", at=at, took_s=timing.publish_s))
    known = {name: value for name, value in asdict(timing).items() if name in _SAME}
    return AttemptView(
        **known,
        recipe=timing.recipe or 0,
        name=timing.name or "",
        system=timing.system or "",
        worker=timing.worker or "",
        isolation=timing.isolation or "",
        outcome=timing.outcome or "running",
        reason=timing.reason or "",
        message=timing.message or "",
        spans=tuple(spans),
        phases=tuple(StretchView(name=name, at=at, took_s=took) for name, at, took in measured.phases),
        more_phases=measured.more_phases,
        more_phases_s=measured.more_phases_s,
        fetches=tuple(
            FetchView(path=path, source=source, nar_bytes=size, at=at, took_s=took, shared=shared)
            for path, source, size, at, took, shared in measured.fetches
        ),
        more_fetches=measured.more_fetches,
        more_fetches_bytes=measured.more_fetches_bytes,
        cut=measured.cut,
        traceparent=measured.traceparent,
    )


#: Fields that a timing and its view have alike.
_SAME: Final = frozenset(
    {"step", "attempt", "submitted_at", "ready_at", "leased_at", "built_at", "ended_at", "build_s", "cpu_s"}
    | {"peak_memory_bytes", "read_bytes", "written_bytes", "fetched_bytes", "output_bytes", "uploaded_bytes"}
)


def history_view(name: str, timings: Sequence[AttemptTiming]) -> HistoryView:
    """Render the attempts of a package, newest first, by system."""
    systems: dict[str, list[AttemptTiming]] = {}
    for timing in timings:
        systems.setdefault(timing.system or "", []).append(timing)
    return HistoryView(name=name, systems=tuple(_of_system(each, systems[each]) for each in sorted(systems)))


def usual(values: Iterable[float | None]) -> float | None:
    """Return the median of the first USUAL_OF known values; None where there is none."""
    known = [value for value in values if value is not None][:USUAL_OF]
    return median(known) if known else None


def _of_system(system: str, timings: Sequence[AttemptTiming]) -> SystemHistoryView:
    done = [timing for timing in timings if timing.outcome == "done"]
    records = recipe_records(ends_of(timings))
    flaky = _flaky_steps(records, timings)
    return SystemHistoryView(
        system=system,
        done=len(done),
        failed=sum(timing.outcome == "failed" for timing in timings),
        lost=sum(timing.outcome in {"lost", "retried"} for timing in timings),
        recipes=len(records),
        flaky=len(flaky),
        flaky_steps=flaky[:FLAKY_NAMED],
        workers=_by_worker(timings),
        usual_s=usual(timing.build_s for timing in done),
        usual_memory_bytes=_whole(usual(timing.peak_memory_bytes for timing in done)),
        usual_output_bytes=_whole(usual(timing.output_bytes for timing in done)),
        recent=tuple(attempt_view(timing) for timing in timings[:RECENT]),
    )


def _flaky_steps(
    records: Mapping[Recipe, RecipeRecordView], timings: Sequence[AttemptTiming]
) -> tuple[FlakyStepView, ...]:
    """Return the flaky steps, those that fail most first."""
    names = {timing.step: timing.name or "" for timing in timings}
    flaky = [
        FlakyStepView(step=step, name=names[step], record=record)
        for (step, _), record in records.items()
        if record.flaky
    ]
    return tuple(sorted(flaky, key=lambda each: (-each.record.failed / each.record.attempts, each.step)))


def _by_worker(timings: Sequence[AttemptTiming]) -> tuple[WorkerTriesView, ...]:
    tried: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for timing in timings:
        if timing.worker and timing.outcome in JUDGED:
            tried[timing.worker] += 1
            failed[timing.worker] += timing.outcome != "done"
    return tuple(WorkerTriesView(worker=each, attempts=tried[each], failed=failed[each]) for each in sorted(tried))


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
