"""The routes that steer a worker; the list of workers is a route of `coordinator.http.api.submissions`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from coordinator.api.requests import DrainRequest
from coordinator.api.routes import DRAIN
from coordinator.errors import NotFoundError, UnavailableError
from coordinator.http.bodies import read_model
from coordinator.http.routing import serve
from coordinator.readmodel.views import Views
from workers.wire.fleet import FleetError

#: (worker, on); raises `FleetError`.
Drain = Callable[[str, bool], Awaitable[None]]


def add_worker_routes(app: web.Application, views: Views, drain: Drain) -> None:
    """Serve `DRAIN`."""

    async def handle(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        wish = await read_model(request, DrainRequest) if request.body_exists else DrainRequest()
        if name not in {worker.name for worker in views.workforce.views()}:
            raise NotFoundError(f"there is no worker {name[:80]!r}; `drover workers` lists them.")
        try:
            await drain(name, wish.on)
        except FleetError as error:
            raise UnavailableError(f"worker {name} was not reached: {error}; try again once it answers.") from None
        return web.Response(status=204)

    serve(app, {DRAIN: handle})
