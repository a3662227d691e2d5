"""The routes that steer a worker; the list of workers is a route of `coordinator.http.api.submissions`."""

from __future__ import annotations

from aiohttp import web

from coordinator.api.requests import DrainRequest
from coordinator.api.routes import DRAIN
from coordinator.fleet.draining import Drain, drain_worker
from coordinator.http.bodies import read_model
from coordinator.http.routing import serve
from coordinator.readmodel.views import Views


def add_worker_routes(app: web.Application, views: Views, drain: Drain) -> None:
    """Serve `DRAIN`."""

    async def handle(request: web.Request) -> web.Response:
        wish = await read_model(request, DrainRequest) if request.body_exists else DrainRequest()
        await drain_worker(views, drain, request.match_info["name"], on=wish.on)
        return web.Response(status=204)

    serve(app, {DRAIN: handle})
