"""Requests to Ray's autoscaler: the slots that are worth having now, as bundles with the labels of nodes that fit.

A bundle is one slot. A node of a worker offers as many as it has slots, and carries a label for its name, each of its
systems and each of its features (`workers.ray_transport.offers`); node types of an autoscaler have to state the same.
Each request takes the place of the one before, and what is requested and present already brings nothing new. Requests
are hints: what fails is tried again at the next look, and a farm that needs fewer slots says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from coordinator.api.capacity_routes import CapacityView
from infra.clock import Clock
from scheduler.model import ANY_SYSTEM
from workers.ray_transport.offers import SLOT, NodeBundle, labels_of
from workers.wire.fleet import FleetError
from workers.wire.messages import NETWORK_FEATURE

#: Seconds between two looks, and after which the same is requested again: a head that came back without its tables has
#: forgotten it.
LOOK_EVERY_S: Final = 10.0
REPEAT_EVERY_S: Final = 60.0
#: Slots of one request; more wait for the next nodes to come.
MOST_BUNDLES: Final = 1000

_log = logging.getLogger(__name__)


def bundles_of(capacity: CapacityView) -> tuple[NodeBundle, ...]:
    """Return a bundle for each slot that is worth having, those of classes with most work first."""
    bundles: list[NodeBundle] = []
    for each in sorted(capacity.classes, key=lambda each: -each.hours):
        systems = () if each.system == ANY_SYSTEM else (each.system,)
        features = [feature for feature in each.features if feature != NETWORK_FEATURE]
        resources = {SLOT: 1.0} | ({"memory": float(each.memory_bytes)} if each.memory_bytes else {})
        bundles += [NodeBundle(resources, labels_of(systems, features))] * min(each.slots, MOST_BUNDLES)
    return tuple(bundles[:MOST_BUNDLES])


class Autoscaling:
    """Requests what `capacity` says by `request`, again and again."""

    def __init__(
        self,
        capacity: Callable[[], Awaitable[CapacityView]],
        request: Callable[[Sequence[NodeBundle]], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self._capacity = capacity
        self._request = request
        self._clock = clock
        self._requested: tuple[NodeBundle, ...] | None = None
        self._again_at = 0.0
        self._failed = False

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Request what is worth having now, where that has changed or it is time to say it again."""
        bundles, now = bundles_of(await self._capacity()), self._clock.now()
        if bundles == self._requested and now < self._again_at:
            return
        try:
            await self._request(bundles)
        except FleetError as error:
            if not self._failed:
                _log.warning("Ray's autoscaler was not asked for nodes: %s; it is tried again", error)
            self._failed = True
            return
        self._failed = False
        self._requested, self._again_at = bundles, now + REPEAT_EVERY_S
