"""Looking over a whole cache for what is wanted, before anything is collected. Reads only, a page at a time.

What it finds is a proposal: the pages are of different moments. Memory is some integers for each path (`reachability`).
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.cache.catalog.catalog import Catalog
from infra.cache.catalog.database import chunked, conflicts, not_expired, paths, reading, refs, root_paths, roots
from infra.cache.retention.reachability import Marks, within_budget
from infra.cache.retention.roots import UNBUDGETED, RankedRoot, by_use

#: Rows that are read at a time: some 10 ms of the event loop.
PAGE = 4000


class Survey:
    """Wanted paths at one time. `marks` has every path; `expiring` are roots that a size budget has no room for."""

    def __init__(self, catalog: Catalog, now: float) -> None:
        self._catalog = catalog
        self._now = now
        self.marks = Marks()
        self.expiring: list[RankedRoot] = []

    async def take(self, also: frozenset[str], fresh_after: float, max_bytes: int) -> None:
        """Mark what roots name, what `also` names, what was published after `fresh_after`, and what those refer to."""
        async with reading(self._catalog.database) as connection:
            await self._load(connection, fresh_after)
            ranked = await self._rank(connection, max_bytes)
            await self._mark(connection, {root.id: rank for rank, root in enumerate(ranked, start=1)}, also)
            await self._follow(connection)
            if max_bytes:
                limit = within_budget(await self._added(connection, len(ranked)), max_bytes)
                self.expiring = ranked[limit - 1 :]
                self.marks.limit(limit)

    async def objects_of(self, serials: Sequence[int]) -> tuple[int, int]:
        """Return how many objects would be named by no path any more without these, and their bytes."""
        going = set(serials)
        count = size = 0
        async with reading(self._catalog.database) as connection:
            async for file_size, naming in _objects(connection):
                if going.issuperset(naming):
                    count += 1
                    size += file_size
        return count, size

    async def _load(self, connection: AsyncConnection, fresh_after: float) -> None:
        question = sa.select(paths.c.serial, paths.c.tombstoned_at, paths.c.published_at)
        async for page in _pages(connection, question, paths.c.serial):
            for serial, tombstoned_at, published_at in page:
                self.marks.add(serial, tombstoned_at, kept=published_at > fresh_after)

    async def _rank(self, connection: AsyncConnection, max_bytes: int) -> list[RankedRoot]:
        """Return the roots that may be ended to make room, the last used first."""
        if not max_bytes:
            return []
        question = by_use(self._now).where(roots.c.kind.not_in(UNBUDGETED))
        return [RankedRoot(row.id, row.kind, row.name, row.kept_at) for row in await connection.execute(question)]

    async def _mark(self, connection: AsyncConnection, ranks: dict[int, int], also: frozenset[str]) -> None:
        question = (
            sa.select(root_paths.c.root, root_paths.c.hash_part, paths.c.serial)
            .join(roots, roots.c.id == root_paths.c.root)
            .join(paths, paths.c.hash_part == root_paths.c.hash_part)
            .where(not_expired(self._now))
        )
        async for page in _pages(connection, question, root_paths.c.root, root_paths.c.hash_part):
            for root, _, serial in page:
                self.marks.mark(serial, ranks.get(root, 0))
        for chunk in chunked(self._catalog.hash_parts(also)):
            named = sa.select(paths.c.serial).where(paths.c.hash_part.in_(chunk))
            for serial in (await connection.execute(named)).scalars():
                self.marks.mark(serial, 0)

    async def _follow(self, connection: AsyncConnection) -> None:
        question = sa.select(refs.c.referrer, refs.c.reference)
        async for page in _pages(connection, question, refs.c.referrer, refs.c.reference, falling=True):
            self.marks.follow((referrer, reference) for referrer, reference in page)

    async def _added(self, connection: AsyncConnection, ranked: int) -> array[int]:
        """Return the bytes of objects by the lowest rank of the paths that name them."""
        added = array("q", bytes(8 * (ranked + 1)))
        async for file_size, naming in _objects(connection):
            rank = min(self.marks.rank(serial) for serial in naming)
            if rank <= ranked:
                added[rank] += file_size
        return added


async def _objects(connection: AsyncConnection) -> AsyncIterator[tuple[int, list[int]]]:
    """Yield, for each object, its size and the serials of the paths that name it, also as bits that lost."""
    both = sa.union_all(
        sa.select(paths.c.url, paths.c.serial, paths.c.file_size),
        sa.select(conflicts.c.url, conflicts.c.serial, conflicts.c.file_size),
    ).subquery()
    # Two claims on one path may have lost with the same object: equal rows, which a page must not cut in between.
    question = sa.select(both.c.url, both.c.serial, sa.func.max(both.c.file_size)).group_by(both.c.url, both.c.serial)
    url, size = None, 0
    naming: list[int] = []
    async for page in _pages(connection, question, both.c.url, both.c.serial):
        for name, serial, file_size in page:
            if name != url and naming:
                yield size, naming
                naming, size = [], 0
            url, size = name, max(size, file_size)
            naming.append(serial)
    if naming:
        yield size, naming


async def _pages(
    connection: AsyncConnection, question: sa.Select[Any], *key: sa.ColumnElement[Any], falling: bool = False
) -> AsyncIterator[Sequence[Any]]:
    """Yield the rows in the order of `key`, which must be their first columns and unique."""
    ordered = question.order_by(*(column.desc() if falling else column for column in key)).limit(PAGE)
    columns = sa.tuple_(*key)
    page = (await connection.execute(ordered)).all()
    while page:
        yield page
        if len(page) < PAGE:
            return
        last = sa.tuple_(*page[-1][: len(key)], types=[column.type for column in key])
        page = (await connection.execute(ordered.where(columns < last if falling else columns > last))).all()
