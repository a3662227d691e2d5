"""Demand: what readers of the default cache miss."""

from __future__ import annotations

from contextlib import AsyncExitStack

from coordinator.config import Settings
from coordinator.demand.demand import Demand
from coordinator.stores.known_outputs import KnownOutputs
from coordinator.wiring.core import Core
from coordinator.wiring.stores import Stores
from infra.clock import Clock


async def open_demand(stack: AsyncExitStack, settings: Settings, clock: Clock, stores: Stores, core: Core) -> Demand:
    """Open what finds derivations by the paths that are asked for; `stack` closes it."""
    outputs = KnownOutputs.open(settings.database_url("derivations"), settings.store_dir)
    stack.push_async_callback(outputs.close)
    await outputs.prepare()
    return Demand(settings.demand, stores.cache, outputs, core.views, core.submissions, clock)
