"""Metrics, traces and the watch over the event loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import metadata

from coordinator.api.models import FarmView
from coordinator.caches.housekeeping import CacheGauges
from coordinator.config import Settings
from coordinator.http.connections import ConnectionGate
from coordinator.http.metrics import add_connection_metrics
from coordinator.observability.metrics import (
    add_cache_metrics,
    add_capacity_metrics,
    add_engine_metrics,
    add_farm_metrics,
    add_loop_metrics,
    add_time_metrics,
    add_trace_metrics,
)
from coordinator.observability.trace_exporter import TraceExporter, otlp_wanted
from coordinator.wiring.core import Core
from coordinator.wiring.stores import Stores
from infra.clock import Clock
from infra.loop_watch import LoopWatch
from infra.telemetry import Telemetry

#: What metrics and traces call this program.
SERVICE_NAME = "drover"


@dataclass(frozen=True, slots=True)
class Observation:
    """Metrics, traces (where they are sent anywhere) and the watch over the event loop."""

    telemetry: Telemetry
    exporter: TraceExporter | None
    #: To be entered once clients are served.
    watch: LoopWatch


def observe(  # noqa: PLR0917 - collaborators, named by their types
    stack: AsyncExitStack,
    settings: Settings,
    clock: Clock,
    stores: Stores,
    core: Core,
    gate: ConnectionGate,
    farm: Callable[[], FarmView],
    gauges: Mapping[str, CacheGauges],
) -> Observation:
    """Make all that observes, and connect every metric with the room that its numbers come from."""
    telemetry = Telemetry(SERVICE_NAME, metadata.version("drover"))
    stack.callback(telemetry.close)
    exporter = _trace_exporter(stack, settings, clock, core)
    watch = LoopWatch()
    add_cache_metrics(telemetry, {each.name: each.cache for each in stores.caches}, gauges)
    add_farm_metrics(telemetry, core.views, farm, core.explainer.holding)
    add_capacity_metrics(telemetry, core.capacity)
    add_engine_metrics(telemetry, core.engine.meter, settings.state_dir)
    add_time_metrics(telemetry, core.views.timelines.meter, core.submissions.meter)
    add_connection_metrics(telemetry, gate)
    add_trace_metrics(telemetry, exporter)
    add_loop_metrics(telemetry, watch)
    return Observation(telemetry, exporter, watch)


def _trace_exporter(stack: AsyncExitStack, settings: Settings, clock: Clock, core: Core) -> TraceExporter | None:
    """Make the exporter of traces where they go anywhere; it gets what the writer of timings takes."""
    if not otlp_wanted(settings.otlp_endpoint):
        return None
    # Not before: it brings a second HTTP client with it.
    from infra.otlp import OtlpSender  # noqa: PLC0415

    sender = OtlpSender(settings.otlp_endpoint, SERVICE_NAME, metadata.version("drover"))
    stack.callback(sender.close)
    exporter = TraceExporter(sender.send, core.views, clock)
    core.timings.on_changed = exporter.attempts_ended
    return exporter
