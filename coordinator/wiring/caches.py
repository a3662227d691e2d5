"""The caches of a coordinator as clients see them: their routes, services and housekeepers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from aiohttp import web

from coordinator.caches.housekeeping import CacheGauges, Housekeeper, SubmissionNeeds
from coordinator.caches.mirroring import Mirroring
from coordinator.caches.services import CacheService, keep_house, open_services
from coordinator.config import DEFAULT_CACHE, Settings
from coordinator.demand.demand import Demand
from coordinator.http.api.caches import CachingApi
from coordinator.http.api.mirrorings import MirrorApi
from coordinator.http.binary_cache.pointers import PointerFiles
from coordinator.http.binary_cache.routes import add_cache_routes
from coordinator.http.binary_cache.uploads import add_upload_routes
from coordinator.http.routing import serve as serve_routes
from coordinator.stores.derivation_logs import DerivationLogs
from coordinator.wiring.core import Core
from coordinator.wiring.sources import open_mirrors
from coordinator.wiring.stores import Stores
from coordinator.wiring.work import Work
from infra.clock import Clock


@dataclass(frozen=True, slots=True)
class ServedCaches:
    """Services, housekeepers and gauges of all caches; those by name."""

    services: Sequence[CacheService]
    keepers: Mapping[str, Housekeeper]
    gauges: Mapping[str, CacheGauges]
    #: Paths from the default cache's upstreams.
    mirroring: Mirroring


async def serve_caches(  # noqa: PLR0917 - collaborators, named by their types
    stack: AsyncExitStack,
    app: web.Application,
    settings: Settings,
    clock: Clock,
    stores: Stores,
    core: Core,
    work: Work,
    demand: Demand,
) -> ServedCaches:
    """Add the routes of all caches to `app`; intake and repair look at the default one's upstreams from now on."""
    services = await open_services(stack, stores.caches, settings.state_dir, clock)
    _add_routes(app, clock, stores, core, services, demand)
    core.intake.pulls.upstreams.extend(services[0].upstreams)
    work.repair_sources.extend(services[0].upstreams)
    await open_mirrors(stack, settings.sources, clock, work.sources, services[0].upstreams)
    needs = SubmissionNeeds(core.views, stores.derivations, core.intake.leases)
    keepers, gauges = keep_house(services, clock, submissions=needs, workers=work.workers)
    serve_routes(app, CachingApi(keepers).handlers())
    mirroring = Mirroring(
        stores.cache,
        services[0].upstreams,
        clock.now,
        expiry=services[0].served.settings.expiry,
        max_bytes=settings.limits.populate_bytes,
    )
    stack.push_async_callback(mirroring.stop)
    serve_routes(app, MirrorApi(mirroring, stores.derivations, stores.cache.store_dir).handlers())
    return ServedCaches(services, keepers, gauges, mirroring)


def _add_routes(  # noqa: PLR0917 - collaborators, named by their types
    app: web.Application,
    clock: Clock,
    stores: Stores,
    core: Core,
    services: Sequence[CacheService],
    demand: Demand,
) -> None:
    """Add the routes of all caches; the farm's logs are those of the default one, whose paths it built."""
    logs = DerivationLogs(stores.derivations, stores.logs, core.views.attempts)
    for each in services:
        add_upload_routes(app, each.served, each.uploads, stores.upload_tokens, clock.now)
    # The default one last: its address is the beginning of all others.
    pointers = PointerFiles(stores.environments)
    for served in reversed(stores.caches):
        if served.name == DEFAULT_CACHE:
            add_cache_routes(app, served, log_for=logs.read, misses=demand, pointers=pointers)
        else:
            add_cache_routes(app, served)
