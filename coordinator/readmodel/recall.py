"""Recall of step details after a restart: what the derivation store holds for people and no fact holds."""

from __future__ import annotations

import asyncio
import gc
from typing import Final

from coordinator.readmodel.views import Views
from coordinator.stores.derivations import DerivationStore

#: Keys in one question for step details: some 10 ms, which others must wait.
_DETAILS_ASKED: Final = 2_000


async def recall_details(views: Views, derivations: DerivationStore) -> None:
    """Learn the details of all steps that have none, while the engine runs. Raises `DerivationsError`."""
    keys = views.nameless()
    for start in range(0, len(keys), _DETAILS_ASKED):
        views.add_details(await derivations.steps(keys[start : start + _DETAILS_ASKED]))
        await asyncio.sleep(0)
    # It stays too, as do Ray and the routes, which came after the journal: a full collection of the 44,000 objects
    # of an empty farm holds the loop for 20 ms.
    gc.freeze()
