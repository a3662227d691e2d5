"""Questions about timings of a window of time: which attempts ran then, and how many at a time.

An attempt belongs to a window if it began before its end and ended after its begin. An index by begin finds nearly all
of them, from `LONG_S` before the window on; those that took longer have an index of their own. So a question costs what
its window holds, however much is remembered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Integer, Select, case, cast, func, literal, select

from coordinator.stores.timings import IS_LONG, LONG_S, AttemptTiming, TimingStore, attempts

#: Kind of the attempts that the submission which is looked at did not want.
OTHER: Final = "other"
_ROW: Final = (
    *(attempts.c.step, attempts.c.attempt, attempts.c.worker, attempts.c.name),
    *(attempts.c.leased_at, attempts.c.ended_at, attempts.c.outcome),
)


class Edges(NamedTuple):
    """Attempts of one worker and kind that begin, or end, in one bucket of a window."""

    bucket: int
    worker: str
    kind: str
    attempts: int
    #: Sum of their instants, from the begin of the window.
    sum_s: float


class TimingWindows:
    """Reads one store. Every method raises `TimingsError` where the database fails."""

    def __init__(self, store: TimingStore) -> None:
        self._store = store

    async def count(self, since: float, until: float, at_most: int) -> int:
        """Count the attempts of a window that have ended; counting ends with the first beyond `at_most`."""
        total = 0
        for within in _within(since, until):
            some = select(literal(1)).select_from(attempts).where(*within).limit(at_most + 1 - total).subquery()
            [(found,)] = await self._store.answers(select(func.count()).select_from(some))
            total += found
        return total

    async def attempts(self, since: float, until: float, limit: int) -> list[AttemptTiming]:
        """Return the attempts of a window that have ended, by begin: who, where, when and how it ended."""
        found: list[AttemptTiming] = []
        for within in _within(since, until):
            query = select(*_ROW).where(*within).order_by(attempts.c.leased_at).limit(limit - len(found))
            found += [_timing(row) for row in await self._store.answers(query)]
        return sorted(found, key=lambda each: each.leased_at or 0.0)

    async def running(self, until: float, limit: int) -> list[AttemptTiming]:
        """Return the attempts that began before an instant and of which no end is kept, by begin."""
        query = select(*_ROW).where(attempts.c.ended_at.is_(None), attempts.c.leased_at <= until).limit(limit)
        found = [_timing(row) for row in await self._store.answers(query)]
        return sorted(found, key=lambda each: each.leased_at or 0.0)

    async def edges(
        self, since: float, until: float, buckets: int, submission: str | None
    ) -> tuple[list[Edges], list[Edges]]:
        """Return where the attempts of a window that have ended begin and end, in `buckets` parts of it.

        Where a submission is named, attempts that it did not want are `OTHER`.
        """
        queries = self.statements(since, until, buckets, submission)
        # SQLite and PostgreSQL do two at a time.
        answers = await asyncio.gather(*(self._store.answers(query) for query in queries))
        begins, long_begins, ends, long_ends = (list(map(Edges._make, rows)) for rows in answers)
        return [*long_begins, *begins], [*long_ends, *ends]

    def statements(
        self, since: float, until: float, buckets: int, submission: str | None
    ) -> Sequence[Select[tuple[Any, ...]]]:
        """Return what `edges` asks: begins and ends, each of short and of long attempts."""
        kind: ColumnElement[Any] = attempts.c.outcome
        if submission is not None:
            own = attempts.c.wanted_by.contains(submission, autoescape=True)
            kind = case((own, attempts.c.outcome), else_=OTHER)
        width_s = (until - since) / buckets
        begin = case((attempts.c.leased_at < since, 0.0), else_=attempts.c.leased_at - since)
        end = attempts.c.ended_at - since
        queries = []
        for instant, more in ((begin, ()), (end, (attempts.c.ended_at < until,))):
            # First by the bucket: rows come nearly in that order, and comparing numbers is cheaper than names.
            groups = (self._whole(instant / width_s), func.coalesce(attempts.c.worker, ""), kind)
            for within in _within(since, until):
                query = select(*groups, func.count(), func.sum(instant)).where(*within, *more)
                queries.append(query.group_by(*groups))
        return queries

    def _whole(self, value: ColumnElement[Any]) -> ColumnElement[Any]:
        """Cut a number that is not negative; PostgreSQL's cast rounds."""
        return cast(value if self._store.dialect == "sqlite" else func.trunc(value), Integer)


def _within(since: float, until: float) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the conditions of the attempts of a window, one for each index."""
    first = since - LONG_S
    return (
        (attempts.c.leased_at.between(first, until), attempts.c.ended_at >= since),
        (attempts.c.ended_at >= since, attempts.c.leased_at < first, IS_LONG),
    )


def _timing(row: Any) -> AttemptTiming:
    return AttemptTiming(**row._mapping)  # noqa: SLF001 - SQLAlchemy's public name for it
