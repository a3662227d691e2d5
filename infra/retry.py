"""Retries: pauses that grow, the time within which something is tried again, and outages that people see meanwhile."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

#: Pauses between attempts, in seconds: they double from the first to the longest.
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0
#: Part of a pause that chance may take away, so that many that failed at once do not come back at once.
SPREAD: Final = 0.5

T = TypeVar("T")


def spread(pause_s: float) -> float:
    """Return a pause shortened by chance."""
    return pause_s * random.uniform(1 - SPREAD, 1)  # noqa: S311 - chance that keeps no secret


class Backoff:
    """Pauses that double from `first_s` to `longest_s` seconds, each shortened by chance."""

    def __init__(self, first_s: float = FIRST_PAUSE_S, longest_s: float = LONGEST_PAUSE_S) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._next_s = first_s

    def next_s(self) -> float:
        """Return the next pause, in seconds."""
        pause_s = min(self._next_s, self._longest_s)
        self._next_s = pause_s * 2
        return spread(pause_s)

    async def pause(self) -> None:
        """Wait for the next pause."""
        await asyncio.sleep(self.next_s())

    def reset(self) -> None:
        """Begin with the first pause again: an attempt succeeded."""
        self._next_s = self._first_s


class RetryBudget:
    """The time within which attempts are made: `pause` waits before the next one, or returns that the time is over."""

    def __init__(self, within_s: float, backoff: Backoff | None = None) -> None:
        self._until = asyncio.get_running_loop().time() + within_s
        self._backoff = backoff or Backoff()

    async def pause(self) -> bool:
        """Wait and return True, or False at once where the time is over."""
        left_s = self._until - asyncio.get_running_loop().time()
        if left_s <= 0:
            return False
        await asyncio.sleep(min(self._backoff.next_s(), left_s))
        return True


class Outage:
    """Trouble that lasts: shown for as long as it does; its beginning and its end are logged, once each.

    Args:
        log: The logger of what suffers from it.
        meanwhile: What follows while it lasts.
        over: What is true again after it.
    """

    def __init__(self, log: logging.Logger, meanwhile: str, over: str) -> None:
        self._log = log
        self._meanwhile = meanwhile
        self._over = over
        #: What is out of order, as it failed last; "" while nothing is.
        self.trouble = ""

    def begin(self, trouble: str) -> bool:
        """Note that something failed; returns whether that is news."""
        news = not self.trouble
        self.trouble = trouble
        if news:
            self._log.warning("%s; %s", trouble, self._meanwhile)
        return news

    def end(self) -> None:
        """Note that it works."""
        if self.trouble:
            self.trouble = ""
            self._log.warning("%s", self._over)


async def retrying(
    call: Callable[[], Awaitable[T]], within_s: float, outage: Outage, trouble_of: Callable[[Exception], str]
) -> T:
    """Return what `call` returns, which is called again while it fails in a way that may pass.

    Only for what may be done twice. The time runs from the first failure.

    Args:
        call: One attempt.
        within_s: Seconds within which attempts are made again.
        outage: Begins with a failure and ends with an attempt that succeeds.
        trouble_of: The sentence for a failure that may pass, "" for one that is raised at once.

    Raises:
        Exception: What `call` raised last.
    """
    budget: RetryBudget | None = None
    while True:
        try:
            result = await call()
        except Exception as error:
            trouble = trouble_of(error)
            if not trouble:
                raise
            outage.begin(trouble)
            budget = budget or RetryBudget(within_s)
            if not await budget.pause():
                raise
        else:
            outage.end()
            return result
