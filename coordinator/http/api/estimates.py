"""Handlers for when a submission ends, what bounds that, and how much the farm does."""

from __future__ import annotations

from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api import routes
from coordinator.api.route import Route
from coordinator.errors import BadRequestError
from coordinator.http.answers import answer
from coordinator.readmodel.critical_path import submission_eta
from coordinator.readmodel.etas import Etas
from coordinator.readmodel.throughput import SPANS, Throughput
from coordinator.readmodel.views import Views
from infra.slices import in_slices
from scheduler.farm import Farm

#: Seconds for which an answer waits for the end to be worked out.
WAIT_S: Final = 5.0


class EstimateApi:
    """The handlers, with the rooms that they ask."""

    def __init__(self, views: Views, farm: Farm, etas: Etas, throughput: Throughput) -> None:
        self._views = views
        self._farm = farm
        self._etas = etas
        self._throughput = throughput

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {routes.ETA: self.eta, routes.THROUGHPUT: self.throughput}

    async def eta(self, request: web.Request) -> web.Response:
        """Say when a submission ends, and what bounds that."""
        row = self._views.submission(request.match_info["id"])
        await self._etas.wait_for([row], WAIT_S)
        return answer(await in_slices(submission_eta(self._views, self._farm, self._etas, row)))

    async def throughput(self, request: web.Request) -> web.Response:
        """Say what ended in the last hour or day."""
        wanted = request.query.get("span", "hour")
        span = next((span for span in SPANS if span.name == wanted), None)
        if span is None:
            raise BadRequestError("`span` is one of hour, day.")
        return answer(await self._throughput.of(span))
