"""Expiry of submissions that ended long ago, and of the steps that no other submission refers to.

A submission is forgotten a while after it ended: it is no longer listed, and its steps leave core, read model and
journal unless something else refers to them (`scheduler.references`). Beyond a number of steps the oldest go earlier.
Never forgotten is what runs, what ended only just now, and a failure for as long as it counts as known. What was built
stays in the cache as the cache's own settings say, and derivations and logs stay where they are.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from coordinator.config import LimitSettings
from coordinator.engine.engine import Engine
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from infra.clock import Clock
from scheduler.events import SubmissionExpired

DAY_S: Final = 86400.0
#: Seconds between two looks.
LOOK_S: Final = 60.0
#: For so long everybody can see what became of a submission, however many there are.
AT_LEAST_S: Final = 3600.0

_log = logging.getLogger(__name__)


class Forgetter:
    """Has a farm forget, as `history_days` and `history_steps` say."""

    def __init__(self, engine: Engine, views: Views, limits: LimitSettings, clock: Clock) -> None:
        self._engine = engine
        self._views = views
        self._limits = limits
        self._clock = clock

    async def run(self) -> None:
        """Serve until cancelled. Raises `UnavailableError` once the engine stops."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Forget what is due now, the oldest first. Raises `UnavailableError`."""
        over = [row for row in self._views.submission_rows() if row.ended or row.withdrawn]
        before = self._views.step_total()
        for row in sorted(over, key=lambda row: row.touched_at):
            if not self._is_due(row):
                break
            await self._engine.offer(SubmissionExpired(row.id))
        if forgotten := before - self._views.step_total():
            _log.info("%d steps that no submission refers to any more were forgotten", forgotten)

    def _is_due(self, row: SubmissionRow) -> bool:
        age_s = self._clock.now() - row.touched_at
        days, steps = self._limits.history_days, self._limits.history_steps
        if days and age_s >= days * DAY_S:
            return True
        return bool(steps) and self._views.step_total() > steps and age_s >= AT_LEAST_S
