"""Counts of workers' attempts in the store of timings: how many failed, and how failures fall on each.

Only the newest attempts are looked at, and the database adds up: what comes back is a row for each worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import CTE, Double, case, cast, func, select

from coordinator.stores.timings import JUDGED, TimingStore, attempts

#: Newest attempts that workers are compared by: some 0.1 s of the database's thread where few of them failed.
COMPARED_ATTEMPTS: Final = 20_000


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """One worker's newest attempts, and its failures beside those of all; `coordinator.api.flakes` explains them."""

    worker: str
    attempts: int
    failed_attempts: int
    failed: int = 0
    failures: int = 0
    expected: float = 0.0


async def worker_counts(store: TimingStore, since: float) -> list[WorkerCounts]:
    """Return the workers of the newest attempts that ended since a time, with what their failures compare with.

    At most `COMPARED_ATTEMPTS` are looked at. Raises `TimingsError`.
    """
    return [
        # PostgreSQL's sums of counts are decimals.
        WorkerCounts(worker, tried, bad, int(failed or 0), int(failures or 0), float(expected or 0.0))
        for worker, tried, bad, failed, failures, expected in await store.answers(_query(since))
    ]


def _query(since: float) -> Any:
    """Return the question for each worker's attempts, and for the comparison of its failures with others'."""
    table = attempts.c
    bad = case((table.outcome == "done", 0), else_=1)
    ended = (
        select(table.step, table.recipe, table.worker, table.package, table.system, bad.label("bad"))
        .where(table.ended_at >= since, table.outcome.in_(JUDGED), table.worker.is_not(None))
        .order_by(table.ended_at.desc())
        .limit(COMPARED_ATTEMPTS)
        .cte("ended")
    )
    of = ended.c
    every = (
        select(of.worker, func.count().label("tried"), func.sum(of.bad).label("bad")).group_by(of.worker).cte("every")
    )
    compared = _compared(ended)
    return (
        select(every.c.worker, every.c.tried, every.c.bad)
        .add_columns(compared.c.failed, compared.c.failures, compared.c.expected)
        .outerjoin(compared, compared.c.worker == every.c.worker)
        .order_by(every.c.worker)
    )


def _compared(ended: CTE) -> CTE:
    """Return each worker's failures, all failures of the packages that it tried, and its share of these."""
    of = ended.c
    # A package that failed nowhere adds nothing to any of the sums, and most are such.
    suspect = select(of.package, of.system).where(of.bad == 1).distinct().cte("suspect")
    of_suspects = (of.package == suspect.c.package) & (of.system == suspect.c.system)
    some = select(of.step, of.recipe, of.worker, of.package, of.system, of.bad).join(suspect, of_suspects).cte("some")
    # Windows instead of joins of these with each other: PostgreSQL, which knows no sizes of them, walks all pairs.
    recipe = (some.c.step, some.c.recipe)
    marked = select(some, func.min(some.c.bad).over(partition_by=recipe).label("never")).cte("marked")
    of_marked = marked.c
    group = (of_marked.step, of_marked.recipe, of_marked.worker, of_marked.package, of_marked.system)
    tries = (
        select(*group, func.max(of_marked.bad).label("bad")).where(of_marked.never == 0).group_by(*group).cte("tries")
    )
    package = (tries.c.package, tries.c.system)
    cells = (
        select(*package, tries.c.worker, func.count().label("tried"), func.sum(tries.c.bad).label("failed"))
        .group_by(*package, tries.c.worker)
        .cte("cells")
    )
    cell = cells.c
    whole = (cell.package, cell.system)
    shares = (
        select(cell.worker, cell.tried, cell.failed)
        .add_columns(func.sum(cell.tried).over(partition_by=whole).label("all_tried"))
        .add_columns(func.sum(cell.failed).over(partition_by=whole).label("all_failed"))
        .cte("shares")
    )
    each = shares.c
    share = cast(each.all_failed, Double) * each.tried / each.all_tried
    return (
        select(each.worker, func.sum(each.failed).label("failed"))
        .add_columns(func.sum(each.all_failed).label("failures"), func.sum(share).label("expected"))
        .where(each.all_tried > each.tried)
        .group_by(each.worker)
        .cte("compared")
    )
