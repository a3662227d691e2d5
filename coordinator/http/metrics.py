"""The route `/metrics`: the text that `infra.telemetry` exposes to Prometheus, and the metrics of connections."""

from __future__ import annotations

from aiohttp import web

from coordinator.api.routes import METRICS
from coordinator.http.connections import ConnectionGate
from coordinator.http.routing import serve
from coordinator.observability import metric_table as table
from infra.telemetry import CONTENT_TYPE, Telemetry


def add_metrics_route(app: web.Application, telemetry: Telemetry) -> None:
    """Serve `/metrics`, without a token as Prometheus expects: there are numbers in it and the names of caches."""

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=telemetry.expose(), headers={"Content-Type": CONTENT_TYPE})

    serve(app, {METRICS: metrics})


def add_connection_metrics(telemetry: Telemetry, gate: ConnectionGate) -> None:
    """Show what the gate of connections counts."""
    telemetry.show(table.CONNECTIONS, lambda: [(len(gate), {})])
    telemetry.show(
        table.CONNECTIONS_CLOSED,
        lambda: [
            (gate.evicted, {"reason": "evicted"}),
            (gate.refused, {"reason": "refused"}),
            (gate.silent, {"reason": "silent"}),
        ],
    )
    telemetry.show(table.REQUESTS_ABANDONED, lambda: [(gate.abandoned, {})])
