"""Counts of workers' attempts in the store of timings: how many failed, and how failures fall on each.

Only the newest attempts are looked at, and the database adds up: what comes back is a row for each worker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Double, case, cast, func, select

from coordinator.stores.timings import JUDGED, TimingStore, attempts

#: Newest attempts that workers are compared by: some 0.2 s of the database's thread where a third of them failed.
COMPARED_ATTEMPTS: Final = 20_000


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """One worker's newest attempts, and its failures beside those of all; `coordinator.api.flakes` explains them."""

    worker: str
    attempts: int
    failed_attempts: int
    steps: int = 0
    failed: int = 0
    failures: int = 0
    expected: float = 0.0


async def worker_counts(store: TimingStore, since: float) -> list[WorkerCounts]:
    """Return the workers of the newest attempts that ended since a time, with what their failures compare with.

    At most `COMPARED_ATTEMPTS` are looked at. Raises `TimingsError`.
    """
    totals, compared = _queries(since)
    counts = {worker: WorkerCounts(worker, tried, bad) for worker, tried, bad in await store.answers(totals)}
    for worker, *whole, expected in await store.answers(compared):
        # PostgreSQL's sums of counts are decimals. An attempt that ended between the questions is not in the first.
        steps, failed, failures = map(int, whole)
        known = counts.get(worker) or WorkerCounts(worker, 0, 0)
        counts[worker] = replace(known, steps=steps, failed=failed, failures=failures, expected=float(expected))
    return [counts[worker] for worker in sorted(counts)]


def _queries(since: float) -> tuple[Any, Any]:
    """Return the questions for each worker's attempts, and for the comparison of its failures with others'."""
    table = attempts.c
    bad = case((table.outcome == "done", 0), else_=1)
    ended = (
        select(table.step, table.recipe, table.worker, table.package, table.system, bad.label("bad"))
        .where(table.ended_at >= since, table.outcome.in_(JUDGED), table.worker.is_not(None))
        .order_by(table.ended_at.desc())
        .limit(COMPARED_ATTEMPTS)
        .cte("ended")
    )
    totals = select(ended.c.worker, func.count(), func.sum(ended.c.bad)).group_by(ended.c.worker)
    recipe = (ended.c.step, ended.c.recipe)
    # The same steps are of one package and system.
    tries = (
        select(*recipe, ended.c.worker, func.max(ended.c.bad).label("bad"))
        .add_columns(func.min(ended.c.package).label("package"), func.min(ended.c.system).label("system"))
        .group_by(*recipe, ended.c.worker)
        .cte("tries")
    )
    possible = select(*recipe).group_by(*recipe).having(func.min(ended.c.bad) == 0).cte("possible")
    same = (possible.c.step == tries.c.step) & (possible.c.recipe == tries.c.recipe)
    packages = (tries.c.package, tries.c.system)
    cells = (
        select(*packages, tries.c.worker, func.count().label("tried"), func.sum(tries.c.bad).label("failed"))
        .join(possible, same)
        .group_by(*packages, tries.c.worker)
        .cte("cells")
    )
    cell = cells.c
    sums = (func.sum(cell.tried).label("tried"), func.sum(cell.failed).label("failed"))
    all_of = select(cell.package, cell.system, *sums).group_by(cell.package, cell.system).cte("all_of")
    share = cast(all_of.c.failed, Double) * cell.tried / all_of.c.tried
    compared = (
        select(cell.worker, func.sum(cell.tried).label("steps"), func.sum(cell.failed).label("failed"))
        .add_columns(func.sum(all_of.c.failed).label("failures"), func.sum(share).label("expected"))
        .join(all_of, (all_of.c.package == cell.package) & (all_of.c.system == cell.system))
        .where(all_of.c.tried > cell.tried)
        .group_by(cell.worker)
    )
    return totals, compared
