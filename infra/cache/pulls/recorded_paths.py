"""Recorded paths: what an upstream has, by its signed narinfo, and this cache has not and does not claim to have.

A record is what was true when it was made. It is believed for RECORD_S; a path that is published here later is here,
whatever is recorded of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from infra.cache.cache import Cache
from infra.cache.catalog.database import chunked, reading, recorded, writing
from infra.cache.pulls.closure_search import FoundPath
from infra.nix.store_path import hash_part_of

#: How long a record is believed: upstreams delete what is old.
RECORD_S: Final = 7 * 24 * 3600.0
#: Records that are kept, the newest; some 1 KiB each.
MAX_RECORDED: Final = 500_000
#: Records of one statement: rendering it holds the event loop for some milliseconds.
AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True)
class RecordedPath:
    """A path that an upstream had."""

    store_path: str
    #: Address of the upstream.
    upstream: str
    narinfo: bytes
    recorded_at: float


class RecordedPaths:
    """The records beside one cache. Every method may raise MetadataError."""

    def __init__(self, cache: Cache, now: Callable[[], float]) -> None:
        self._cache = cache
        self._now = now

    async def record(self, found: Sequence[FoundPath]) -> None:
        """Record what was found, in the place of earlier records of the same paths."""
        now = self._now()
        for chunk in chunked(found, AT_ONCE):
            rows = await asyncio.to_thread(_rows, chunk, now)
            async with writing(self._cache.database) as connection:
                names = [row["hash_part"] for row in rows]
                await connection.execute(recorded.delete().where(recorded.c.hash_part.in_(names)))
                await connection.execute(recorded.insert(), rows)
        async with writing(self._cache.database) as connection:
            count = (await connection.execute(sa.select(sa.func.count()).select_from(recorded))).scalar_one()
            gone = recorded.c.recorded_at < now - RECORD_S
            if count > MAX_RECORDED:
                newest = sa.select(recorded.c.recorded_at).order_by(recorded.c.recorded_at.desc())
                edge = (await connection.execute(newest.offset(MAX_RECORDED).limit(1))).scalar_one()
                gone |= recorded.c.recorded_at <= edge
            await connection.execute(recorded.delete().where(gone))

    async def known(self, store_paths: Collection[str]) -> dict[str, RecordedPath]:
        """Return the records of those of the full store paths that have one and are not published here."""
        return await self.of(await self._cache.missing(store_paths))

    async def of(self, store_paths: Collection[str]) -> dict[str, RecordedPath]:
        """Return the records of full store paths that are not published here."""
        wanted = set(store_paths)
        found: dict[str, RecordedPath] = {}
        async with reading(self._cache.database) as connection:
            for chunk in chunked(list(wanted), AT_ONCE):
                question = sa.select(
                    recorded.c.store_path, recorded.c.upstream, recorded.c.narinfo, recorded.c.recorded_at
                ).where(
                    recorded.c.hash_part.in_([hash_part_of(path) for path in chunk]),
                    recorded.c.recorded_at >= self._now() - RECORD_S,
                )
                for values in await connection.execute(question):
                    record = RecordedPath(*values)
                    if record.store_path in wanted:
                        found[record.store_path] = record
        return found


def _rows(found: Sequence[FoundPath], now: float) -> list[dict[str, Any]]:
    return [
        {
            "hash_part": each.info.hash_part,
            "store_path": each.info.store_path,
            "upstream": each.upstream.url,
            "narinfo": each.info.render(),
            "recorded_at": now,
        }
        for each in found
    ]
