"""Handler for plans of wish lists."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api.limits import MAX_PLANNED
from coordinator.api.plan_routes import PLAN
from coordinator.api.requests import PlanQuery
from coordinator.api.route import Route
from coordinator.http.answers import json_of
from coordinator.http.bodies import BodyBounds, read_model
from coordinator.plans.planner import MAX_WISHES, Planner

#: Some 1.5 KB, thirty elements and six containers for each wish; thirty elements and four for each derivation.
_PLAN: Final = BodyBounds(
    32 * 1024 * 1024, items=30 * (MAX_WISHES + MAX_PLANNED), containers=6 * MAX_WISHES + 4 * MAX_PLANNED
)


class PlanApi:
    """The handler, with what makes plans."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {PLAN: self.plan}

    async def plan(self, request: web.Request) -> web.Response:
        """Say what became of each wish."""
        view = await self._planner.of(await read_model(request, PlanQuery, _PLAN))
        return web.Response(body=await asyncio.to_thread(json_of, view), content_type="application/json")
