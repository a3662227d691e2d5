"""The route `/metrics`: what `infra.telemetry` exposes, as Prometheus reads it."""

from __future__ import annotations

from aiohttp import web

from coordinator.api.routes import METRICS
from coordinator.http.routing import serve
from infra.telemetry import CONTENT_TYPE, Telemetry


def add_metrics_route(app: web.Application, telemetry: Telemetry) -> None:
    """Serve `/metrics`, without a token as Prometheus expects: there are numbers in it and the names of caches."""

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=telemetry.expose(), headers={"Content-Type": CONTENT_TYPE})

    serve(app, {METRICS: metrics})
