"""Reports of coverage for people and programs, from what the store has."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from coordinator.api.environments import (
    CoverageView,
    EnvironmentView,
    GapView,
    PointerView,
    RevisionView,
    SystemCoverageView,
    TrendView,
)
from coordinator.environments.coverage import (
    DAY_S,
    CoverageGap,
    SystemCoverage,
    TrendDay,
    by_reason,
    day_of,
    oldest,
    weekly,
)
from coordinator.environments.model import Environment, EnvironmentRevision
from coordinator.environments.pointers import SystemPointer
from coordinator.environments.store import CoverageAssessment, EnvironmentStore
from infra.clock import Clock

#: Gaps of one environment that a report has; of each in a list of all.
MAX_GAPS: Final = 1000
FEW_GAPS: Final = 10
#: Weeks of a trend.
MAX_WEEKS: Final = 60


class CoverageReports:
    """Reads one store. Every method raises `EnvironmentsError` where the database fails."""

    def __init__(self, store: EnvironmentStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def brief(self, name: str) -> CoverageView:
        """Return the coverage of an environment with few gaps and without its past."""
        return await self._view(name, FEW_GAPS, {})

    async def whole(self, name: str) -> CoverageView:
        """Return the coverage of an environment with its gaps and its past."""
        return await self._view(name, MAX_GAPS, await self._store.trend(name))

    async def _view(self, name: str, gaps: int, trend: dict[str, list[TrendDay]]) -> CoverageView:
        found = await self._store.assessment(name) or CoverageAssessment(0, 0.0, (), ())
        pointers = await self._store.pointers(name)
        today = day_of(self._clock.now())
        # In a thread: there may be a gap for each of 100,000 packages.
        return await asyncio.to_thread(_coverage_view, name, found, pointers, trend, today, gaps)


def _coverage_view(  # noqa: PLR0917 - what a report is made of
    name: str,
    found: CoverageAssessment,
    pointers: Mapping[str, SystemPointer],
    trend: Mapping[str, Sequence[TrendDay]],
    today: int,
    shown: int,
) -> CoverageView:
    ages = oldest(found.gaps)
    gaps: defaultdict[str, list[CoverageGap]] = defaultdict(list)
    for gap in found.gaps:
        gaps[gap.system].append(gap)
    return CoverageView(
        environment=name,
        revision=found.revision,
        assessed_at=found.at,
        systems=tuple(
            _system_view(
                each,
                pointers[each.system].revision if each.system in pointers else 0,
                gaps[each.system],
                ages.get(each.system, 0.0),
                weekly(trend.get(each.system, ()), today)[-MAX_WEEKS:],
            )
            for each in found.systems
        ),
        gaps=tuple(_gap_view(gap) for gap in found.gaps[:shown]),
        gap_count=len(found.gaps),
    )


def environment_view(
    environment: Environment, revisions: Sequence[EnvironmentRevision], pointers: Mapping[str, SystemPointer]
) -> EnvironmentView:
    """Return what clients see of an environment."""
    source, poll = environment.source, environment.poll
    return EnvironmentView(
        name=environment.name,
        kind=source.kind.value,
        path=source.path,
        url=source.url,
        ref=source.ref,
        owners=environment.owners,
        created_at=environment.created_at,
        looked_at=poll.looked_at,
        seen_at=poll.seen_at,
        mark=poll.mark,
        trouble=poll.trouble,
        trouble_since=poll.trouble_since,
        revisions=tuple(
            RevisionView(
                number=each.number,
                created_at=each.created_at,
                mark=each.mark,
                note=each.note,
                packages=dict(each.packages),
            )
            for each in revisions
        ),
        stable=tuple(
            PointerView(
                system=each.system,
                revision=each.revision,
                moved_at=each.moved_at,
                held_through=each.held_through,
                before=each.before,
            )
            for each in pointers.values()
        ),
    )


def _system_view(
    found: SystemCoverage, stable: int, gaps: Sequence[CoverageGap], oldest_at: float, trend: Sequence[TrendDay]
) -> SystemCoverageView:
    return SystemCoverageView(
        system=found.system,
        packages=found.total,
        here=found.here,
        upstream=found.upstream,
        local=found.local,
        impossible=found.impossible,
        here_percent=found.percent(found.here),
        upstream_percent=found.percent(found.upstream),
        local_percent=found.percent(found.local),
        impossible_percent=found.percent(found.impossible),
        whole=found.is_whole,
        stable=stable,
        reasons=by_reason(gaps),
        oldest_gap_at=oldest_at,
        trend=tuple(
            TrendView(
                day_at=each.day * DAY_S,
                packages=each.coverage.total,
                fetched=each.coverage.percent(each.coverage.fetched),
            )
            for each in trend
        ),
    )


def _gap_view(gap: CoverageGap) -> GapView:
    return GapView(
        system=gap.system,
        package=gap.package,
        way=gap.way.value,
        reason=gap.reason,
        detail=gap.detail,
        since=gap.since,
    )
