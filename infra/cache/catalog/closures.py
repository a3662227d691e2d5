"""Closures of published paths by pages: which paths an answer holds, then their narinfos, a few at a time.

A page is chosen by serial numbers alone, which cost a few bytes each; their texts are read while they are sent. The
paths of the question come first, then what they reach from the newest down: a path is published after all that it
refers to, so the next page goes on below the smallest serial of this one, whatever is published meanwhile. Inside a
page references come first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.cache.catalog.catalog import CLOSURE_IN_MEMORY, Catalog, reached_serials
from infra.cache.catalog.database import chunked, paths, reading
from infra.nix.store_path import HASH_PART_LENGTH, base_name_of, hash_part_of

#: Paths whose texts are read together.
TEXTS_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True)
class PageBounds:
    """Bounds of one page. The paths of the question are always in the first one, whatever their size."""

    paths: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ClosurePage:
    """Paths of one page, references first.

    Attributes:
        serials: The paths.
        unknown: Names of the question that are not published; on the first page.
        after: Names the next page; 0 on the last one.
    """

    serials: tuple[int, ...]
    unknown: tuple[str, ...]
    after: int


async def find_page(
    catalog: Catalog, names: Collection[str], bounds: PageBounds, *, recursive: bool, after: int
) -> ClosurePage:
    """Return a page of the closure of `names`, which are base names or hash parts alone; `after` is 0 on the first one.

    Raises:
        ClosureTooLargeError: more than MAX_CLOSURE paths are reached.
    """
    async with reading(catalog.database) as connection:
        asked = await _asked(connection, names)
        unknown = tuple(sorted(name for name in set(names) if asked.get(name, 0) == 0))
        roots = {serial for serial in asked.values() if serial}
        first = not after
        page = set(roots) if first else set()
        further: list[int] = []
        if recursive:
            reached = await reached_serials(connection, roots)
            further = sorted((serial for serial in reached - roots if first or serial < after), reverse=True)
        left = bounds.paths - len(page)
        taken = await _within(connection, further[: max(0, left)], bounds.size_bytes)
        # A page that holds nothing of the question holds one path at least, so that the pages come to an end.
        taken = taken or (further[:1] if not page else [])
        more = len(taken) < len(further)
    lowest = min(taken) if taken else max(further, default=0) + 1
    return ClosurePage(tuple(sorted(page | set(taken))), unknown if first else (), lowest if more else 0)


async def read_page(catalog: Catalog, serials: Sequence[int]) -> tuple[list[bytes], list[str]]:
    """Return the narinfos of some paths of a page, in order, and the base names of those that cannot be fetched."""
    forgotten = catalog.forgotten
    async with reading(catalog.database) as connection:
        rows = await catalog.numbered(connection, serials)
    present = await catalog.fetchable(rows)
    if len(present) <= CLOSURE_IN_MEMORY:
        catalog.remember(present, forgotten)
    here = {row.serial for row in present}
    return (
        [row.narinfo for row in rows if row.serial in here],
        [row.base_name for row in rows if row.serial not in here],
    )


async def _asked(connection: AsyncConnection, names: Iterable[str]) -> dict[str, int]:
    """Return the serial of each name that is published."""
    by_part: dict[str, list[str]] = {}
    for name in names:
        part = name if len(name) == HASH_PART_LENGTH else hash_part_of(name)
        by_part.setdefault(part, []).append(name)
    found: dict[str, int] = {}
    for chunk in chunked(list(by_part)):
        question = sa.select(paths.c.serial, paths.c.hash_part, paths.c.store_path).where(paths.c.hash_part.in_(chunk))
        for serial, part, store_path in await connection.execute(question):
            found |= dict.fromkeys((name for name in by_part[part] if name in {part, base_name_of(store_path)}), serial)
    return found


async def _within(connection: AsyncConnection, serials: Sequence[int], size_bytes: int) -> list[int]:
    """Return the first of `serials` whose narinfos have at most so many bytes together."""
    sizes: dict[int, int] = {}
    for chunk in chunked(serials):
        question = sa.select(paths.c.serial, sa.func.length(paths.c.narinfo)).where(paths.c.serial.in_(chunk))
        rows = await connection.execute(question)
        sizes.update((serial, size) for serial, size in rows)
    taken: list[int] = []
    for serial in serials:
        # A path that was deleted meanwhile has no size, and no text either.
        size_bytes -= sizes.get(serial, 0)
        if size_bytes < 0:
            break
        taken.append(serial)
    return taken
