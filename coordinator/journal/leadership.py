"""Election of the one coordinator that works on a database; the others stand by.

With PostgreSQL that is a session-level advisory lock, which the server gives back when the session ends, however it
does. Three ways of ending are seen to: a process that dies (at once), a machine or network that dies (the server's TCP
keepalives, some 15 s) and a process that is paused (the session sends a statement every `BEAT_S`; the server ends one
that has been idle for `IDLE_MS`). The lock only decides who begins. What keeps two from writing is the journal's epoch,
which workers and caches check as well.

A leader whose session is lost, because the database was restarted say, tries to get the lock again. Where no other
coordinator began an epoch meanwhile its state is still the truth, and it goes on. A file needs none of this: the lock
on the state directory is enough.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import ClassVar, Final, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.errors import CoordinatorError
from coordinator.journal.errors import FencedError, JournalError
from coordinator.journal.journal import Journal
from infra.database import PATIENCE_S, may_pass, reason
from infra.retry import Outage, retrying

#: Seconds between two beats: a leader sends a query over its session, one that stands by tries to take the lock.
BEAT_S: Final = 2.0
#: How long a beat may take.
BEAT_WITHIN_S: Final = 10.0
#: After how long the server ends a session that does not speak (PostgreSQL 14 or newer), in milliseconds.
IDLE_MS: Final = 15_000

#: One lock for each schema of a database, as tables are found by `search_path`.
_KEY: Final = "hashtextextended('drover coordinator of ' || current_schema(), 0)"
_SESSION: Final = (
    f"SET idle_session_timeout = {IDLE_MS}",
    "SET tcp_keepalives_idle = 5",
    "SET tcp_keepalives_interval = 3",
    "SET tcp_keepalives_count = 3",
)

_log = logging.getLogger(__name__)


class LeadershipLostError(CoordinatorError):
    """This coordinator is no longer the one that works on the database."""

    code: ClassVar[str] = "leadership_lost"


class Leadership(Protocol):
    """The right to work on a database."""

    async def acquire(self, standing_by: Callable[[], Awaitable[None]]) -> None:
        """Wait for the right; `standing_by` is called again and again while another has it. What it raises ends it."""

    async def hold(self, journal: Journal) -> None:
        """Keep the right until cancelled. Raises `LeadershipLostError` or `FencedError` where it is lost."""

    async def release(self) -> None:
        """Give the right back."""


def open_leadership(engine: AsyncEngine, *, patience_s: float = PATIENCE_S, beat_s: float = BEAT_S) -> Leadership:
    """Return what decides who works on the database of `engine`."""
    if engine.dialect.name == "postgresql":
        return SessionLock(engine, patience_s=patience_s, beat_s=beat_s)
    return SoleUser()


class SoleUser:
    """For a database that only one process can have."""

    async def acquire(self, standing_by: Callable[[], Awaitable[None]]) -> None:
        """See `Leadership`."""

    async def hold(self, journal: Journal) -> None:
        """See `Leadership`."""

    async def release(self) -> None:
        """See `Leadership`."""


class SessionLock:
    """An advisory lock of PostgreSQL, held by a session of its own."""

    def __init__(self, engine: AsyncEngine, *, patience_s: float, beat_s: float) -> None:
        self._engine = engine
        self._patience_s = patience_s
        self._beat_s = beat_s
        self._session: AsyncConnection | None = None

    async def acquire(self, standing_by: Callable[[], Awaitable[None]]) -> None:
        """See `Leadership`. Waits for a database that is away while it stands by, not before."""
        stood_by = False
        outage = Outage(_log, "still standing by", over="the journal's database answers again")
        while True:
            try:
                if await self._try():
                    return
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                await self.release()
                if not stood_by or not may_pass(error):
                    raise LeadershipLostError(f"the journal's database does not answer: {reason(error)}.") from None
                outage.begin(f"the journal's database does not answer: {reason(error)}")
            else:
                stood_by = True
                outage.end()
                await standing_by()
            await asyncio.sleep(self._beat_s)

    async def hold(self, journal: Journal) -> None:
        """See `Leadership`."""
        while True:
            await asyncio.sleep(self._beat_s)
            try:
                async with asyncio.timeout(BEAT_WITHIN_S):
                    await self._beat()
                    # The lock may have been had again in the moment in which another coordinator took over.
                    await journal.check_epoch()
            except FencedError:
                await self.release()
                raise
            except (JournalError, SQLAlchemyError, OSError, TimeoutError) as error:
                await self._again(journal, reason(error))

    async def release(self) -> None:
        """See `Leadership`."""
        session, self._session = self._session, None
        if session is not None:
            # Not back into the pool: the lock lives as long as the session does.
            await session.invalidate()
            await session.close()

    async def _again(self, journal: Journal, lost: str) -> None:
        async def take() -> None:
            await self.release()
            async with asyncio.timeout(BEAT_WITHIN_S):
                got = await self._try()
            # In any case: another coordinator may have taken over, written and ended.
            await journal.check_epoch()
            if not got:
                raise LeadershipLostError("another coordinator holds it")

        outage = Outage(_log, "taking it again", over="the journal's lock is held again")
        outage.begin(f"the session that holds the journal's lock is lost: {lost}")
        try:
            await retrying(take, self._patience_s, outage, _passing)
        except Exception as error:
            await self.release()
            if not (cause := _passing(error)):
                raise
            raise LeadershipLostError(f"the journal's lock is lost and cannot be had again: {cause}.") from None

    async def _try(self) -> bool:
        if self._session is None:
            session = await self._engine.connect()
            self._session = await session.execution_options(isolation_level="AUTOCOMMIT")
            for statement in _SESSION:
                await self._session.exec_driver_sql(statement)
        answer = await self._session.execute(sa.text(f"SELECT pg_try_advisory_lock({_KEY})"))
        return bool(answer.scalar_one())

    async def _beat(self) -> None:
        if self._session is not None:
            await self._session.execute(sa.text("SELECT 1"))


def _passing(error: Exception) -> str:
    """Return what keeps the lock from being had, as far as it may pass; "" for all else."""
    if isinstance(error, FencedError):
        return ""
    if isinstance(error, (LeadershipLostError, JournalError, SQLAlchemyError, OSError, TimeoutError)):
        return reason(error)
    return ""
