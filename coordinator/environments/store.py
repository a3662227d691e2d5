"""Store of tracked environments, in SQLite or PostgreSQL.

Each call is one transaction that may be done twice: what it writes it states whole. So a coordinator that is killed
between any two of them goes on where it was. Each that writes is conditional on the coordinator's epoch, inside its
transaction: one that was taken over from, and comes back, writes nothing (`EnvironmentsFencedError`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import orjson
import zstandard
from pydantic import TypeAdapter
from sqlalchemy import Table, delete, func, insert, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.environments import tables
from coordinator.environments.coverage import CoverageGap, SystemCoverage, TrendDay
from coordinator.environments.model import NAME, Environment, EnvironmentRevision, PollState
from coordinator.environments.pointers import SystemPointer
from coordinator.errors import CoordinatorError
from coordinator.wishes.model import WishList
from infra.cache.catalog.database import FencingToken
from infra.database import open_engine, patiently, reason

#: Bytes of one content, unpacked: some 100,000 packages.
MAX_CONTENT_BYTES: Final = 128 * 1024 * 1024
_LEVEL: Final = 3

_T = TypeVar("_T")

_ENVIRONMENT: Final = TypeAdapter(Environment)
_REVISION: Final = TypeAdapter(EnvironmentRevision)
_POINTER: Final = TypeAdapter(SystemPointer)
_CONTENT: Final = TypeAdapter(WishList)


class EnvironmentsError(CoordinatorError):
    """The database of environments cannot be used."""

    code = "environments"
    status = 503


class EnvironmentsFencedError(EnvironmentsError):
    """Another coordinator has taken over; nothing was written."""

    code = "fenced"

    def __init__(self) -> None:
        super().__init__("another coordinator has taken over the environments; nothing was written.")


@dataclass(frozen=True, slots=True)
class CoverageAssessment:
    """The coverage of one revision, as it was looked at last."""

    revision: int
    at: float
    systems: tuple[SystemCoverage, ...]
    #: The oldest first.
    gaps: tuple[CoverageGap, ...]

    def of(self, system: str) -> SystemCoverage:
        """Return the coverage of a system."""
        return next((each for each in self.systems if each.system == system), SystemCoverage(system))


_ASSESSMENT: Final = TypeAdapter(CoverageAssessment)


class EnvironmentStore:
    """The tables of environments. Every method raises `EnvironmentsError` where the database fails for long."""

    def __init__(self, engine: AsyncEngine, fence: FencingToken) -> None:
        self._engine = engine
        self._fence = fence

    @classmethod
    def open(cls, url: str, fence: FencingToken) -> EnvironmentStore:
        """Return a store on an engine of its own, written under `fence`; `close` disposes of it."""
        # A pointer that was served must not go back by a power cut.
        return cls(open_engine(url, synchronous="FULL"), fence)

    async def prepare(self) -> None:
        """Create the tables where they are missing, and begin the epoch: from now on earlier ones write nothing.

        Raises:
            EnvironmentsFencedError: A later epoch has begun.
            EnvironmentsError: The database fails, or a newer release wrote it.
        """
        try:
            async with self._engine.connect() as connection:
                found = await connection.run_sync(tables.format_of)
            if found > tables.FORMAT:
                raise EnvironmentsError(
                    f"the database of environments was written by a newer version of drover (format {found}, this one "
                    f"reads {tables.FORMAT}); start the newer version. Nothing was changed."
                )
            async with self._engine.begin() as connection:
                if connection.dialect.name == "postgresql":
                    # Two that start at one time must not both create tables.
                    await connection.execute(select(func.pg_advisory_xact_lock(func.hashtext("drover-environments"))))
                if await connection.run_sync(tables.format_of) < tables.FORMAT:
                    await connection.run_sync(tables.metadata.create_all)
                    await connection.execute(insert(tables.meta).values(format=tables.FORMAT))
                await self._begin_epoch(connection)
        except (SQLAlchemyError, OSError) as error:
            raise EnvironmentsError(f"cannot open the database of environments: {reason(error)}.") from None

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    # Environments.

    async def environments(self) -> list[Environment]:
        """Return all environments, by name."""
        query = select(tables.environments.c.body).order_by(tables.environments.c.name)
        return [_ENVIRONMENT.validate_json(body) for (body,) in await self._rows(query)]

    async def environment(self, name: str) -> Environment | None:
        """Return one environment."""
        if not NAME.fullmatch(name):
            # Databases refuse some texts, each others.
            return None
        query = select(tables.environments.c.body).where(tables.environments.c.name == name)
        rows = await self._rows(query)
        return _ENVIRONMENT.validate_json(rows[0][0]) if rows else None

    async def save(self, environment: Environment) -> None:
        """Write an environment."""

        async def write(connection: AsyncConnection) -> None:
            await _replace(connection, tables.environments, {"name": environment.name}, body=_json(environment))

        await self._write(write)

    async def forget(self, name: str) -> None:
        """Remove an environment with all that is kept of it."""

        async def write(connection: AsyncConnection) -> None:
            for table in tables.OF_ENVIRONMENT:
                await connection.execute(delete(table).where(table.c.environment == name))
            await connection.execute(delete(tables.environments).where(tables.environments.c.name == name))

        await self._write(write)

    # Revisions.

    async def revisions(self, name: str) -> list[EnvironmentRevision]:
        """Return the revisions that are remembered, the newest first."""
        table = tables.revisions
        query = select(table.c.body).where(table.c.environment == name).order_by(table.c.number.desc())
        return [_REVISION.validate_json(body) for (body,) in await self._rows(query)]

    async def contents(self, name: str, numbers: Collection[int]) -> dict[int, WishList]:
        """Return what revisions consist of."""
        table = tables.revisions
        query = select(table.c.number, table.c.content)
        rows = await self._rows(query.where(table.c.environment == name, table.c.number.in_(list(numbers))))
        # In a thread, as all that is as large as an environment may be.
        return await asyncio.to_thread(
            lambda: {number: _CONTENT.validate_json(_unpacked(content)) for number, content in rows}
        )

    async def add_revision(self, environment: Environment, revision: EnvironmentRevision, content: WishList) -> None:
        """Write a revision, and the environment that has seen it."""
        key = {"environment": environment.name, "number": revision.number}
        packed = await asyncio.to_thread(lambda: _packed(_CONTENT.dump_json(content)))

        async def write(connection: AsyncConnection) -> None:
            await _replace(connection, tables.revisions, key, body=_json(revision), content=packed)
            await _replace(connection, tables.environments, {"name": environment.name}, body=_json(environment))

        await self._write(write)

    async def drop_revisions(self, name: str, numbers: Collection[int]) -> None:
        """Forget revisions."""
        table = tables.revisions

        async def write(connection: AsyncConnection) -> None:
            these = (table.c.environment == name) & table.c.number.in_(list(numbers))
            await connection.execute(delete(table).where(these))

        if numbers:
            await self._write(write)

    # Pointers.

    async def pointers(self, name: str) -> dict[str, SystemPointer]:
        """Return the pointers of an environment by system."""
        table = tables.pointers
        query = select(table.c.system, table.c.body).where(table.c.environment == name).order_by(table.c.system)
        return {system: _POINTER.validate_json(body) for system, body in await self._rows(query)}

    async def save_pointers(self, name: str, pointers: Iterable[SystemPointer]) -> None:
        """Write pointers; those of other systems stay."""
        values = list(pointers)

        async def write(connection: AsyncConnection) -> None:
            for each in values:
                key = {"environment": name, "system": each.system}
                await _replace(connection, tables.pointers, key, body=_json(each))

        if values:
            await self._write(write)

    # Coverage.

    async def assessment(self, name: str) -> CoverageAssessment | None:
        """Return the last assessment of an environment."""
        table = tables.assessments
        rows = await self._rows(select(table.c.body).where(table.c.environment == name))
        if not rows:
            return None
        return await asyncio.to_thread(lambda: _ASSESSMENT.validate_json(_unpacked(rows[0][0])))

    async def save_assessment(self, name: str, found: CoverageAssessment, day: int, keep_days: int) -> None:
        """Write an assessment as the last one, and as that of its day; days older than `keep_days` are forgotten."""
        packed = await asyncio.to_thread(lambda: _packed(_json(found)))

        async def write(connection: AsyncConnection) -> None:
            values = {"revision": found.revision, "at": found.at, "body": packed}
            await _replace(connection, tables.assessments, {"environment": name}, **values)
            for each in found.systems:
                key = {"environment": name, "system": each.system, "day": day}
                counts = {way: getattr(each, way) for way in ("here", "upstream", "local", "impossible")}
                await _replace(connection, tables.trend, key, **counts)
            old = (tables.trend.c.environment == name) & (tables.trend.c.day <= day - keep_days)
            await connection.execute(delete(tables.trend).where(old))

        await self._write(write)

    async def stamp(self, name: str = "") -> tuple[object, ...]:
        """Return a value that differs once what is shown of an environment, or of any, does; reads no content."""
        pointers, looks, revisions = tables.pointers.c, tables.assessments.c, tables.revisions.c
        named: tuple[tuple[Any, Any], ...] = (
            (select(pointers.environment, pointers.system, pointers.body), pointers.environment),
            (select(looks.environment, looks.revision, looks.at), looks.environment),
            (select(revisions.environment, revisions.number), revisions.environment),
        )
        found = [await self.environment(name)] if name else await self.environments()
        # That a source was looked at again is not shown.
        shown = [each and replace(each, poll=PollState(trouble=each.poll.trouble)) for each in found]
        rows = [await self._rows(query.where(column == name) if name else query) for query, column in named]
        return (shown, *(frozenset(map(tuple, each)) for each in rows))

    async def trend(self, name: str) -> dict[str, list[TrendDay]]:
        """Return the days that are known of each system, the oldest first."""
        table = tables.trend
        found: dict[str, list[TrendDay]] = {}
        for row in await self._rows(select(table).where(table.c.environment == name).order_by(table.c.day)):
            counts = SystemCoverage(row.system, row.here, row.upstream, row.local, row.impossible)
            found.setdefault(row.system, []).append(TrendDay(row.day, counts))
        return found

    async def _rows(self, query: Any) -> Sequence[Any]:
        async def read() -> Sequence[Any]:
            async with self._engine.connect() as connection:
                return (await connection.execute(query)).all()

        return await _translated(read)

    async def _write(self, write: Callable[[AsyncConnection], Awaitable[None]]) -> None:
        async def transaction() -> None:
            async with self._engine.begin() as connection:
                await write(connection)
                # Last: SQLite is locked for writing by now, and PostgreSQL lets no epoch begin before the commit.
                if await _reigning(connection) != self._fence:
                    raise EnvironmentsFencedError

        await _translated(transaction)

    async def _begin_epoch(self, connection: AsyncConnection) -> None:
        now = await _reigning(connection)
        if now is not None and now.journal == self._fence.journal and now.epoch > self._fence.epoch:
            raise EnvironmentsFencedError
        if now != self._fence:
            values = {"journal": self._fence.journal, "epoch": self._fence.epoch}
            await connection.execute(delete(tables.reign))
            await connection.execute(insert(tables.reign).values(**values))


async def _reigning(connection: AsyncConnection) -> FencingToken | None:
    row = (await connection.execute(select(tables.reign).with_for_update(read=True))).one_or_none()
    return None if row is None else FencingToken(row.journal, row.epoch)


async def _translated(call: Callable[[], Awaitable[_T]]) -> _T:
    try:
        return await patiently(call, "environments are looked after")
    except (SQLAlchemyError, OSError) as error:
        raise EnvironmentsError(f"the database of environments failed: {reason(error)}.") from None


async def _replace(connection: AsyncConnection, table: Table, key: Mapping[str, object], **values: object) -> None:
    same = [table.c[name] == value for name, value in key.items()]
    await connection.execute(delete(table).where(*same))
    await connection.execute(insert(table).values(**key, **values))


def _json(value: object) -> bytes:
    return orjson.dumps(value)


def _packed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL).compress(data)


def _unpacked(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_CONTENT_BYTES)
