"""Replay of a journal into a core and a read model, piece by piece."""

from __future__ import annotations

import asyncio

from coordinator.journal.journal import Journal
from coordinator.readmodel.views import Views
from scheduler.farm import Farm


async def replay(journal: Journal, farm: Farm, views: Views) -> int:
    """Replay `journal`, from its newest snapshot on, into an empty farm and its views; returns the number of facts.

    Raises `JournalError`.
    """
    count = 0
    async for piece in journal.load():
        farm.replay(piece.facts)
        # A batch may be split between frames, so nothing ends before the last of them.
        views.fold(piece.facts, settle=False)
        if piece.records:
            views.restore(piece.records)
        count += len(piece.facts)
        # A long replay must not keep signals and supervisors waiting.
        await asyncio.sleep(0)
    views.settle()
    return count
