"""The HTTP server of a coordinator with every route: API, caches, metrics and pages."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

from aiohttp import web

from coordinator.api.models import FarmView
from coordinator.caches.housekeeping import Housekeeper
from coordinator.config import Settings
from coordinator.demand.demand import Demand
from coordinator.environments.tracker import EnvironmentTracker
from coordinator.http.api.capacity import CapacityApi
from coordinator.http.api.demand import DemandApi
from coordinator.http.api.estimates import EstimateApi
from coordinator.http.api.evaluations import EvaluationApi
from coordinator.http.api.events import WatchStreams
from coordinator.http.api.openapi import add_openapi_route
from coordinator.http.api.plans import PlanApi
from coordinator.http.api.questions import Questions
from coordinator.http.api.rebuilds import RebuildApi
from coordinator.http.api.sources import SourcesApi
from coordinator.http.api.submissions import Api, ApiBounds
from coordinator.http.api.timings import TimingApi
from coordinator.http.api.workers import add_worker_routes
from coordinator.http.app import make_app
from coordinator.http.binary_cache.fast_answers import FastAnswers, FastSite, open_gate
from coordinator.http.connections import ConnectionGate, require_room
from coordinator.http.metrics import add_metrics_route
from coordinator.http.middleware import is_host, is_own_host
from coordinator.http.routing import serve as serve_routes
from coordinator.http.web.live import LiveStreams
from coordinator.http.web.site import PageActions, PageSources, add_web_routes
from coordinator.intake.forecast import Forecaster
from coordinator.learning.learned_times import times_of
from coordinator.plans.lookup import Lookup
from coordinator.plans.planner import Planner
from coordinator.readmodel.comparisons import Comparisons
from coordinator.readmodel.farm_view import farm_view
from coordinator.sources.listing import SourceListing
from coordinator.wiring.caches import ServedCaches, serve_caches
from coordinator.wiring.core import Core
from coordinator.wiring.demand import open_demand
from coordinator.wiring.environments import serve_environments
from coordinator.wiring.observability import Observation, observe
from coordinator.wiring.remote import open_remote
from coordinator.wiring.stores import Stores
from coordinator.wiring.work import Work
from infra.cache.likeness import Likenesses
from infra.cache.pulls.recorded_paths import RecordedPaths
from infra.clock import Clock
from workers.wire.messages import FarmInfo

#: Seconds that open requests have to end when the coordinator stops.
HTTP_GRACE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Site:
    """HTTP server of a coordinator, what observes it, and the caches that it serves."""

    app: web.Application
    runner: web.AppRunner
    gate: ConnectionGate
    streams: WatchStreams
    pages: LiveStreams
    observation: Observation
    caches: ServedCaches
    demand: Demand
    environments: EnvironmentTracker


async def make_site(  # noqa: PLR0917 - collaborators, named by their types
    stack: AsyncExitStack,
    settings: Settings,
    clock: Clock,
    url: str,
    info: FarmInfo,
    stores: Stores,
    core: Core,
    work: Work,
) -> Site:
    """Make the web application with every route; `stack` closes what it needs."""
    limits = settings.limits
    gate = open_gate(limits.connections, limits.connections_per_address)
    # Half of all: those who only look must not keep out those who build.
    streams = WatchStreams(core.views, min(limits.watchers, max(1, gate.bounds.total // 2)))
    pages = LiveStreams(min(limits.watchers, max(1, gate.bounds.total // 8)))
    troubled = (stores.journal, work.fleet, work.dispatch, work.archiver, core.timings)
    farm = farm_view(info, (*troubled, *(each.cache for each in stores.caches)))
    app = _api_app(settings, url, stores, core, farm, streams)
    demand = await open_demand(stack, settings, clock, stores, core)
    serve_routes(app, DemandApi(demand).handlers())
    listing = SourceListing(core.views, stores.derivations, core.intake.fixed, work.sources)
    serve_routes(app, SourcesApi(listing).handlers())
    caches = await serve_caches(stack, app, settings, clock, stores, core, work, demand)
    observation = observe(stack, settings, clock, stores, core, gate, farm, caches.gauges)
    add_metrics_route(app, observation.telemetry)
    app.middlewares.append(require_room(gate))
    evaluations = await open_remote(stack, settings, core)
    serve_routes(app, EvaluationApi(evaluations).handlers())
    planner = _add_questions(app, clock, stores, core, work, farm, caches.mirroring.records)
    environments = serve_environments(app, settings, clock, stores, core, caches, planner, evaluations)
    add_openapi_route(app)
    _add_pages(app, clock, url, stores, core, work, farm, caches.keepers, demand, pages)
    runner = web.AppRunner(app, shutdown_timeout=HTTP_GRACE_S, access_log=None)
    return Site(app, runner, gate, streams, pages, observation, caches, demand, environments)


async def serve_site(site: Site, listener: socket.socket, settings: Settings, url: str, stores: Stores) -> None:
    """Begin to answer on the socket."""
    own_host = partial(is_own_host, public_url=url) if settings.loopback else is_host
    await FastSite(site.runner, listener, FastAnswers(stores.caches, own_host), site.gate).start()


def _api_app(  # noqa: PLR0917 - collaborators, named by their types
    settings: Settings, url: str, stores: Stores, core: Core, farm: Callable[[], FarmView], streams: WatchStreams
) -> web.Application:
    """Make the application with what submits and what watches."""
    api = Api(
        core.engine,
        core.views,
        core.intake,
        core.submissions,
        core.growth,
        stores.logs,
        farm,
        streams,
        bounds=ApiBounds.of(settings.limits),
    )
    return make_app(
        api,
        stores.clients,
        public_url=url,
        loopback=settings.loopback,
        max_body_bytes=settings.limits.request_bytes,
    )


def _add_questions(  # noqa: PLR0917 - collaborators, named by their types
    app: web.Application,
    clock: Clock,
    stores: Stores,
    core: Core,
    work: Work,
    farm: Callable[[], FarmView],
    records: RecordedPaths,
) -> Planner:
    """Add what asks for timings, for reasons, and for workers; returns what makes plans."""
    serve_routes(app, TimingApi(core.views, stores.timings, core.timings, clock).handlers())
    say, etas, throughput = core.explainer, core.etas, core.throughput
    questions = Questions(core.views, farm, say.open_needs, say.queues, say.placing, core.runs, etas, throughput)
    serve_routes(app, questions.handlers())
    serve_routes(app, EstimateApi(core.views, core.farm, etas, throughput).handlers())
    serve_routes(app, CapacityApi(core.capacity).handlers())
    costs, flush = stores.timings.usual_costs, core.timings.flush
    forecaster = Forecaster(core.intake, stores.cache, core.views, core.farm, costs, flush)
    forecaster.times = lambda name, system: times_of(core.learner.learned, name, system)
    rebuilds = RebuildApi(forecaster, Likenesses(stores.cache), Comparisons(stores.derivations))
    serve_routes(app, rebuilds.handlers())
    # The list of upstreams is the one that `serve_caches` has filled.
    upstreams = core.intake.pulls.upstreams
    lookup = Lookup(stores.cache, upstreams, records, stores.cache.store_dir.path, time.monotonic)
    planner = Planner(stores.derivations, lookup, forecaster, core.views, stores.cache)
    serve_routes(app, PlanApi(planner).handlers())
    add_worker_routes(app, core.views, work.fleet.drain)
    return planner


def _add_pages(  # noqa: PLR0917 - collaborators, named by their types
    app: web.Application,
    clock: Clock,
    url: str,
    stores: Stores,
    core: Core,
    work: Work,
    farm: Callable[[], FarmView],
    keepers: Mapping[str, Housekeeper],
    demand: Demand,
    streams: LiveStreams,
) -> None:
    """Add the pages for browsers."""
    queues = core.explainer.queues
    read = PageSources(
        core.views,
        farm,
        queues,
        core.farm,
        stores.cache,
        stores.logs,
        stores.timings,
        core.runs,
        core.etas,
        core.throughput,
        demand,
        stores.environments,
    )
    act = PageActions(core.submissions, work.fleet.drain, keepers)
    add_web_routes(app, read, act, clock, stores.sessions, streams, url)
