"""Handler of the capacity that the farm could use."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api.capacity_routes import CAPACITY
from coordinator.api.route import Route
from coordinator.http.answers import answer
from coordinator.readmodel.capacity import Capacity


class CapacityApi:
    """The handler, with the room that it asks."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of the route."""
        return {CAPACITY: self.capacity}

    async def capacity(self, _request: web.Request) -> web.Response:
        """Say what the farm could use."""
        return answer(await self._capacity.of())
