"""Snapshots of the journal: written in parts, read again, swept, and the frames that they stand for pruned.

A snapshot counts once its row is there, which is written last. The last `SNAPSHOTS_KEPT` are kept with the frames since
the oldest of them. Every transaction is fenced.
"""

from __future__ import annotations

import logging
import secrets
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Final

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.journal import tables
from coordinator.journal.codec import Record
from coordinator.journal.errors import JournalError, translated
from coordinator.journal.frames import decoded, encoded_parts
from scheduler.facts import Fact

#: Snapshots that are kept, with the frames since the oldest of them.
SNAPSHOTS_KEPT: Final = 2
#: Frames removed at one time.
_PRUNE_FRAMES: Final = 500

_log = logging.getLogger(__name__)


class _DamagedPartError(JournalError):
    """A part of a snapshot is not what was written."""


class Snapshots:
    """The snapshots in one database; `fence` raises `FencedError` in a transaction of an epoch that is over."""

    def __init__(self, engine: AsyncEngine, fence: Callable[[AsyncConnection], Awaitable[None]]) -> None:
        self._engine = engine
        self._fence = fence

    async def save(self, seq: int, facts: Iterable[Fact], records: Iterable[Record]) -> None:
        """Store what stands for all frames up to `seq`, read it again, then remove what it makes needless.

        Each part is a commit of its own, so that `append` waits for none of it. May be cut off at any moment: the next
        snapshot removes what is left of this one.

        Raises:
            FencedError: another coordinator has taken over.
            JournalError: it cannot be stored, or does not come back as it was given.
        """
        name = secrets.token_hex(8)
        count = 0
        with translated("write a snapshot of"):
            await self._sweep(keep=SNAPSHOTS_KEPT)
            for kind, items, body in encoded_parts(facts, records):
                row = {"snapshot": name, "part": count, "kind": kind, "items": items, "crc": zlib.crc32(body)}
                async with self._engine.begin() as connection:
                    await connection.execute(insert(tables.parts).values(**row, body=body))
                    await self._fence(connection)
                count += 1
            async with self._engine.begin() as connection:
                await connection.execute(insert(tables.snapshots).values(snapshot=name, seq=seq, parts=count))
                await self._fence(connection)
        if not await self._is_whole(name, count, deeply=True):
            with translated("write a snapshot of"):
                async with self._engine.begin() as connection:
                    await connection.execute(delete(tables.snapshots).where(tables.snapshots.c.snapshot == name))
                    await self._fence(connection)
            raise JournalError("a snapshot of the journal does not come back as it was written; check the disk.")
        with translated("write a snapshot of"):
            await self._sweep(keep=SNAPSHOTS_KEPT)
            await self._prune()

    async def ends(self) -> list[int]:
        """Return the last frame of every snapshot, newest first."""
        with translated("read"):
            async with self._engine.connect() as connection:
                rows = await connection.execute(select(tables.snapshots.c.seq).order_by(tables.snapshots.c.seq.desc()))
        return [seq for (seq,) in rows]

    async def newest(self) -> tuple[str, int] | None:
        """Return name and last frame of the newest snapshot whose checksums are right, None where there is none.

        Raises `JournalError` where all are damaged and the frames before them are gone.
        """
        query = select(tables.snapshots).order_by(tables.snapshots.c.seq.desc(), tables.snapshots.c.snapshot)
        with translated("read"):
            async with self._engine.connect() as connection:
                rows = (await connection.execute(query)).all()
        for row in rows:
            if await self._is_whole(row.snapshot, row.parts):
                return row.snapshot, row.seq
            _log.warning("the journal's snapshot up to frame %d is damaged; starting from what was before it", row.seq)
        if rows and not await self._begins():
            raise JournalError("every snapshot of the journal is damaged; restore the database from a backup.")
        return None

    async def _begins(self) -> bool:
        """Return whether the first frame is still there."""
        with translated("read"):
            async with self._engine.connect() as connection:
                return bool((await connection.execute(select(func.min(tables.frames.c.seq)))).scalar_one_or_none() == 1)

    async def _is_whole(self, name: str, parts: int, *, deeply: bool = False) -> bool:
        """Return whether all parts are there with the right checksums, and, where requested, can be decoded."""
        count = 0
        try:
            async for kind, items, body in self.parts(name):
                count += 1
                if deeply:
                    decoded(kind, items, body, "a part of the snapshot")
        except _DamagedPartError:
            return False
        return count == parts

    async def parts(self, name: str) -> AsyncIterator[tuple[int, int, bytes]]:
        """Yield kind, number of items and body of every part in order. Raises `_DamagedPartError`."""
        part = 0
        while True:
            query = select(tables.parts).where(tables.parts.c.snapshot == name, tables.parts.c.part == part)
            with translated("read"):
                async with self._engine.connect() as connection:
                    row = (await connection.execute(query)).one_or_none()
            if row is None:
                return
            if zlib.crc32(row.body) != row.crc:
                raise _DamagedPartError(f"the journal's snapshot {name} is damaged at part {part}.")
            yield row.kind, row.items, row.body
            part += 1

    async def _sweep(self, keep: int) -> None:
        """Remove all but the newest `keep` snapshots, and parts that belong to none."""
        newest = (
            select(tables.snapshots.c.snapshot)
            .order_by(tables.snapshots.c.seq.desc(), tables.snapshots.c.snapshot)
            .limit(keep)
        )
        async with self._engine.begin() as connection:
            kept = [name for (name,) in await connection.execute(newest)]
            await connection.execute(delete(tables.snapshots).where(tables.snapshots.c.snapshot.not_in(kept)))
            await self._fence(connection)
        query = select(tables.parts.c.snapshot, tables.parts.c.part).where(tables.parts.c.snapshot.not_in(kept))
        async with self._engine.connect() as connection:
            needless = (await connection.execute(query)).all()
        for name, part in needless:
            async with self._engine.begin() as connection:
                await connection.execute(
                    delete(tables.parts).where(tables.parts.c.snapshot == name, tables.parts.c.part == part)
                )
                await self._fence(connection)

    async def _prune(self) -> None:
        """Remove the frames that the oldest of enough snapshots stands for."""
        kept = await self.ends()
        if len(kept) < SNAPSHOTS_KEPT:
            return
        while True:
            oldest = (
                select(tables.frames.c.seq)
                .where(tables.frames.c.seq <= kept[-1])
                .order_by(tables.frames.c.seq)
                .limit(_PRUNE_FRAMES)
            )
            async with self._engine.begin() as connection:
                gone = await connection.execute(
                    delete(tables.frames).where(tables.frames.c.seq.in_(oldest.scalar_subquery()))
                )
                await self._fence(connection)
            if gone.rowcount < _PRUNE_FRAMES:
                return
