"""The API behind `drover demand`."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api.demand_routes import DEMAND
from coordinator.api.route import Route
from coordinator.demand.demand import Demand
from coordinator.errors import UnavailableError
from coordinator.http.api.pages import answer_page, cut, limit_of, position_of
from infra.objects.errors import CacheError


class DemandApi:
    """The handler."""

    def __init__(self, demand: Demand) -> None:
        self._demand = demand

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {DEMAND: self.demand}

    async def demand(self, request: web.Request) -> web.Response:
        """List what people wait for."""
        position, limit = position_of(request), limit_of(request)
        try:
            page = cut(await self._demand.wanted(), position, limit)
        except CacheError as error:
            raise UnavailableError(f"{error}; try again.") from error
        return await answer_page(request, page, self._demand.view)
