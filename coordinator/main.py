"""Composition root: the life of a coordinator from top to bottom; `coordinator.wiring` makes its parts.

`open_coordinator` makes a coordinator over any fleet; `coordinator.run` gives it a process.

Order of the start: lock, the right to the journal, stores, replay, engine, names, then HTTP, so that a client that gets
an answer talks to a farm that remembers (while another coordinator has that right, the answer is that this one stands
by); Ray's nodes take seconds and come while clients are already served. Order of the end: HTTP, fleet, dispatch, and
the engine last, because the others wait for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from coordinator.caches.opening import OpenCache
from coordinator.config import Settings
from coordinator.engine.engine import Engine
from coordinator.http.listener import listen, url_of
from coordinator.http.standby import serving_standby
from coordinator.intake.intake import Intake
from coordinator.journal.journal import Journal
from coordinator.journal.takeover import lead_journal
from coordinator.readmodel.recall import recall_details
from coordinator.readmodel.views import Views
from coordinator.security.farm_secrets import API_TOKEN
from coordinator.state_lock import StateLock
from coordinator.wiring.core import recover
from coordinator.wiring.site import make_site, serve_site
from coordinator.wiring.stores import farm_info, open_stores
from coordinator.wiring.tasks import start_housekeeping, start_tasks
from coordinator.wiring.work import connect_workers
from infra.cache.cache import Cache
from infra.clock import Clock, SystemClock
from infra.collector import long_collections_kept_rare
from infra.compiled import finder
from infra.thread_switches import switching_often
from workers.wire.fleet import Fleet
from workers.wire.messages import FarmInfo

FleetFactory = Callable[[FarmInfo], AbstractAsyncContextManager[Fleet]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """Address of a running coordinator; `token_file` holds the API token."""

    url: str
    cache_url: str
    public_keys: tuple[str, ...]
    token_file: Path
    #: Facts that were replayed.
    replayed: int


@dataclass(frozen=True, slots=True)
class Coordinator:
    """The rooms of a running coordinator, for those who run it."""

    ready: Ready
    engine: Engine
    views: Views
    intake: Intake
    cache: Cache
    journal: Journal
    #: All caches, `cache` (the default one) first.
    caches: tuple[OpenCache, ...]
    #: What answers over HTTP, with every route.
    app: web.Application


@asynccontextmanager
async def open_coordinator(
    settings: Settings,
    fleet_factory: FleetFactory,
    *,
    clock: Clock | None = None,
    standing_by: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[Coordinator]:
    """Run a coordinator for as long as the block does.

    Where another one works on the same database this one waits for it to end, answers that it stands by, and calls
    `standing_by` with its address.

    Raises `CoordinatorError`, `CacheError` or `WorkerError` with one sentence where it cannot start, and a group with
    one of these where a part of it fails later (the block is then cancelled).
    """
    clock = clock or SystemClock()
    if stale := finder.fault():
        _log.warning("%s", stale)
    async with AsyncExitStack() as stack:
        stack.enter_context(switching_often())
        stack.enter_context(long_collections_kept_rare())
        stack.enter_context(StateLock(settings.state_dir))
        listener = stack.enter_context(listen(settings.host, settings.port))
        url = settings.public_url.rstrip("/") or url_of(settings.host, listener)
        standby = serving_standby(listener)
        lead = await stack.enter_async_context(lead_journal(settings, standby, lambda: standing_by(url)))
        stores = await open_stores(stack, settings, clock, lead)
        info = await farm_info(settings, url, stores)
        core = await recover(settings, clock, stores)
        fleet = await stack.enter_async_context(fleet_factory(info))
        work = connect_workers(settings, clock, stores, core, fleet)
        site = await make_site(stack, settings, clock, url, info, stores, core, work)
        await site.runner.setup()
        async with asyncio.TaskGroup() as group:
            tasks = start_tasks(group, settings, clock, lead, core, work, site)
            try:
                # Builds go on from here; clients need names too.
                await recall_details(core.views, stores.derivations)
                # Not before: what it makes and throws away would lie between what stays.
                tasks += start_housekeeping(group, site)
                await serve_site(site, listener, settings, url, stores)
                # Not before: replaying a large journal stalls the loop, and no client waits for it yet.
                stack.enter_context(site.observation.watch)
                yield Coordinator(
                    Ready(url, info.cache_url, info.public_keys, settings.secrets / API_TOKEN, core.replayed),
                    core.engine,
                    core.views,
                    core.intake,
                    stores.cache,
                    stores.journal,
                    tuple(stores.caches),
                    site.app,
                )
            finally:
                site.streams.stop()
                site.pages.stop()
                await site.runner.cleanup()
                for task in tasks:
                    task.cancel()
                    await asyncio.wait([task])
