"""Archiver of build logs: moves those of ended attempts from this machine to the object store, and expires old ones.

Rules:
1. It looks at what lies on this machine and at what runs, not at events, so that a restart or a take-over misses none.
2. A log is moved once its attempt has ended and nothing was written for SETTLE_S: late chunks of a worker that was
   lost for a while need not bring it back. A log that was brought back for a reader goes again after that time.
3. Of a failed attempt the last lines stay here, because failures are shown with them.
4. An object store that is away costs room on this machine's disk and nothing else: logs stay until it takes them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterable
from typing import Final

from coordinator.stores.logs import LocalLog, LogError, LogStore
from infra.clock import Clock
from infra.objects.errors import ObjectStoreError
from scheduler.farm import Farm
from scheduler.model import LeaseId, StepKey

#: Seconds between two looks at the logs of this machine.
SWEEP_S: Final = 30.0
#: Seconds after the last write before a log is moved.
SETTLE_S: Final = 60.0
#: Seconds between two looks at the age of archived logs.
EXPIRE_S: Final = 6 * 3600.0
#: Failed steps, the newest ones, whose last lines a coordinator that takes over has at once.
TAILS_AT_START: Final = 500

_DAY_S: Final = 86400.0
_log = logging.getLogger(__name__)


class LogArchiver:
    """Keeps the logs of one farm in order. `keep_days` 0 keeps archived logs for ever."""

    def __init__(self, logs: LogStore, farm: Farm, clock: Clock, keep_days: float) -> None:
        self._logs = logs
        #: For reading only: the engine owns it.
        self._farm = farm
        self._clock = clock
        self._keep_days = keep_days
        self._next_expiry = 0.0
        #: Why logs wait on this machine, as `drover status` shows it; "" while all is well.
        self.trouble = ""

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._fetch_tails(list(itertools.islice(self._farm.failed(), TAILS_AT_START)))
        while True:
            await self.sweep()
            await asyncio.sleep(SWEEP_S)

    async def sweep(self) -> None:
        """Move what is due, and delete what is too old."""
        try:
            for log in await self._logs.local():
                await self._look_at(log)
            await self._expire()
        except ObjectStoreError as error:
            if not self.trouble:
                _log.warning("build logs stay in the state directory: %s", error)
            self.trouble = f"build logs stay in the state directory until the object store takes them: {error}"
        except OSError as error:
            _log.warning("cannot read a build log: %s", error.strerror)
        else:
            if self.trouble:
                _log.info("the object store takes build logs again")
            self.trouble = ""

    async def _look_at(self, log: LocalLog) -> None:
        lease = LeaseId(StepKey(log.step), log.attempt)
        failed = self._farm.ended_in_failure(lease)
        if log.is_tail:
            if not failed:
                await self._logs.forget_tail(log)
        elif not self._farm.is_open(lease) and self._clock.now() - log.written_at >= SETTLE_S:
            await self._logs.archive(log, keep_tail=failed)

    async def _expire(self) -> None:
        now = self._clock.now()
        if not self._keep_days or now < self._next_expiry:
            return
        self._next_expiry = now + EXPIRE_S
        if expired := await self._logs.expire(now - self._keep_days * _DAY_S):
            _log.info("%d build logs older than %g days were deleted", expired, self._keep_days)

    async def _fetch_tails(self, failed: Iterable[LeaseId]) -> None:
        try:
            for lease in failed:
                await self._logs.keep_tail(lease.step, lease.attempt)
        except LogError as error:
            _log.warning("failures are shown without their last lines: %s", error)
