"""Takeover of the journal: wait for the right to work on it, load the farm's secrets, begin a new epoch.

While another coordinator has that right, this one stands by. It compares its secrets with those of the farm at each
beat, because the other may have begun just now and files may change: a coordinator that could not take over ends at
once, not on the day of need.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from coordinator.config import Settings
from coordinator.journal.errors import JournalError
from coordinator.journal.journal import Journal
from coordinator.journal.leadership import Leadership, open_leadership
from coordinator.security.farm_secrets import Secrets, Succession
from infra.database import open_engine


@dataclass(frozen=True, slots=True)
class Lead:
    """A journal under a new epoch, the right to it, and the farm's secrets."""

    journal: Journal
    leadership: Leadership
    secrets: Secrets


@asynccontextmanager
async def lead_journal(
    settings: Settings,
    standby: AbstractAsyncContextManager[Callable[[], None]],
    standing_by: Callable[[], None],
) -> AsyncIterator[Lead]:
    """Take the journal over and give it back at the end of the block.

    `standby` serves clients meanwhile, from the call of what it gives until it is left; that and `standing_by` are
    called once, where there is something to wait for.

    Raises:
        JournalError: the journal cannot be read or written.
        LeadershipLostError: its database does not answer.
        SuccessionError, TokenError, CacheError: the farm's secrets are other ones, or cannot be used.
    """
    async with AsyncExitStack() as stack:
        database = open_engine(settings.database_url("journal"))
        stack.push_async_callback(database.dispose)
        journal = Journal(database)
        await journal.prepare()
        leadership = open_leadership(database)
        stack.push_async_callback(leadership.release)
        succession = Succession(settings)
        stood_by = False
        async with standby as answer:

            async def wait() -> None:
                nonlocal stood_by
                with suppress(JournalError):
                    await succession.check(await journal.fingerprints())
                if not stood_by:
                    stood_by = True
                    answer()
                    standing_by()

            await leadership.acquire(wait)
        secrets = await succession.load(await journal.fingerprints(), stood_by=stood_by)
        await journal.take_over(secrets.fingerprints)
        yield Lead(journal, leadership, secrets)
