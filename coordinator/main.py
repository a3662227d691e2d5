"""Composition root: every part of the coordinator is made here by constructor calls, and closed in the reverse order.

`open_coordinator` makes a coordinator over any fleet; `coordinator.run` gives it a process.

Order of the start: lock, the right to the journal, stores, replay, engine, names, then HTTP, so that a client that gets
an answer talks to a farm that remembers (while another coordinator has that right, the answer is that this one stands
by); Ray's nodes take seconds and come while clients are already served. Order of the end: HTTP, fleet, dispatch, and
the engine last, because the others wait for it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from secrets import token_urlsafe

from aiohttp import web

from coordinator.caches.housekeeping import Housekeeper, SubmissionNeeds
from coordinator.caches.losses import Losses
from coordinator.caches.opening import OpenCache, open_caches
from coordinator.caches.services import CacheService, keep_house, open_services
from coordinator.caches.worker_repair import WorkerSource
from coordinator.config import DEFAULT_CACHE, LimitSettings, Settings
from coordinator.engine.compaction import Compactor
from coordinator.engine.dispatch import Dispatch
from coordinator.engine.engine import Engine
from coordinator.engine.expiry import Forgetter
from coordinator.engine.log_archiver import LogArchiver
from coordinator.engine.timing_writer import TimingWriter
from coordinator.engine.worker_events import FleetSink
from coordinator.http.api.caches import CachingApi
from coordinator.http.api.events import WatchStreams
from coordinator.http.api.questions import Questions
from coordinator.http.api.submissions import Api, ApiBounds
from coordinator.http.api.timings import TimingApi
from coordinator.http.api.workers import add_worker_routes
from coordinator.http.app import make_app
from coordinator.http.binary_cache.fast_narinfo import FastNarinfos, FastSite, open_gate
from coordinator.http.binary_cache.routes import add_cache_routes
from coordinator.http.binary_cache.uploads import add_upload_routes
from coordinator.http.connections import ConnectionGate, require_room
from coordinator.http.listener import listen, url_of
from coordinator.http.metrics import add_connection_metrics, add_metrics_route
from coordinator.http.middleware import is_host, is_own_host
from coordinator.http.routing import serve as serve_routes
from coordinator.http.standby import serving_standby
from coordinator.http.web.live import LiveStreams
from coordinator.http.web.site import PageActions, PageSources, add_web_routes
from coordinator.intake.intake import Intake
from coordinator.intake.limits import IntakeLimits
from coordinator.intake.submissions import Submissions
from coordinator.journal.codec import decode_notes
from coordinator.journal.journal import Journal
from coordinator.journal.takeover import Lead, lead_journal
from coordinator.observability.metrics import (
    add_cache_metrics,
    add_engine_metrics,
    add_farm_metrics,
    add_loop_metrics,
    add_trace_metrics,
)
from coordinator.observability.trace_exporter import TraceExporter, otlp_wanted
from coordinator.readmodel.explain import FarmExplainer
from coordinator.readmodel.farm_view import farm_view
from coordinator.readmodel.recall import recall_details
from coordinator.readmodel.usual_times import UsualTimes
from coordinator.readmodel.views import Views
from coordinator.security.farm_secrets import API_TOKEN
from coordinator.security.isolation import WeakIsolation
from coordinator.security.sessions import Sessions
from coordinator.security.upload_tokens import UploadTokens
from coordinator.state_lock import StateLock
from coordinator.stores.derivation_logs import DerivationLogs
from coordinator.stores.derivations import DerivationStore
from coordinator.stores.log_archive import LogArchive
from coordinator.stores.logs import LogStore
from coordinator.stores.timings import TimingStore
from infra.cache.cache import Cache
from infra.cache.repair.fsck import RepairSource
from infra.clock import Clock, SystemClock
from infra.loop_watch import LoopWatch
from infra.telemetry import Telemetry
from scheduler.effects import Effect
from scheduler.farm import Farm
from scheduler.policy import Limits
from scheduler.resource_limits import ResourceLimits
from workers.wire.fleet import Fleet
from workers.wire.messages import FarmInfo

#: Seconds that open requests have to end when the coordinator stops.
HTTP_GRACE_S = 2.0
#: Bytes of log beyond the limit that a worker may still send (it counts what it drops and reports the count).
LOG_SLACK_BYTES = 64 * 1024

FleetFactory = Callable[[FarmInfo], AbstractAsyncContextManager[Fleet]]


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
    async with AsyncExitStack() as stack:
        stack.enter_context(StateLock(settings.state_dir))
        listener = stack.enter_context(listen(settings.host, settings.port))
        url = settings.public_url.rstrip("/") or url_of(settings.host, listener)
        standby = serving_standby(listener)
        lead = await stack.enter_async_context(lead_journal(settings, standby, lambda: standing_by(url)))
        stores = await _open_stores(stack, settings, clock, lead)
        info = await _farm_info(settings, url, stores)
        core = await _recover(settings, clock, stores)
        fleet = await stack.enter_async_context(fleet_factory(info))
        work = _connect(settings, clock, stores, core, fleet)
        site = await _make_site(stack, settings, clock, url, info, stores, core, work)
        await site.runner.setup()
        async with asyncio.TaskGroup() as group:
            tasks = _start(group, settings, clock, lead, core, work, site)
            try:
                # Builds go on from here; clients need names too.
                await recall_details(core.views, stores.derivations)
                # Not before: what it makes and throws away would lie between what stays.
                tasks += [group.create_task(each.run(), name="housekeeping") for each in site.keepers]
                await _serve(site, listener, settings, url, stores)
                # Not before: replaying a large journal stalls the loop, and no client waits for it yet.
                stack.enter_context(site.watch)
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


@dataclass(frozen=True, slots=True)
class _Stores:
    """Stores of a coordinator on disk and in databases, and the ways by which workers and clients write to them."""

    journal: Journal
    derivations: DerivationStore
    logs: LogStore
    timings: TimingStore
    #: The default one first.
    caches: Sequence[OpenCache]
    api_token: str
    upload_tokens: UploadTokens
    sessions: Sessions
    #: What the farm's own workers read the default cache with, where that is not public.
    farm_token: str

    @property
    def cache(self) -> Cache:
        """The default cache, which the farm publishes to."""
        return self.caches[0].cache


async def _open_stores(stack: AsyncExitStack, settings: Settings, clock: Clock, lead: Lead) -> _Stores:
    """Open, or make, all that lies below the state directory or in databases; `stack` closes it."""
    secrets, farm_token = lead.secrets, token_urlsafe()
    caches = await open_caches(
        stack, settings, clock, lead.journal.fencing_token, secrets=secrets, farm_token=farm_token
    )
    derivations = DerivationStore.open(settings.database_url("derivations"), settings.store_dir)
    stack.push_async_callback(derivations.close)
    await derivations.prepare()
    log_bytes = settings.limits.log_bytes + LOG_SLACK_BYTES
    logs = LogStore(settings.state_dir / "logs", log_bytes, LogArchive(caches[0].cache.objects, log_bytes))
    stack.push_async_callback(logs.close)
    # Made ready by its writer: a farm starts whatever is wrong with it.
    timings = TimingStore.open(settings.database_url("timings"))
    stack.push_async_callback(timings.close)
    upload_tokens = UploadTokens(secrets.upload_secret.encode())
    sessions = Sessions(secrets.upload_secret, secrets.api_token)
    return _Stores(
        lead.journal, derivations, logs, timings, caches, secrets.api_token, upload_tokens, sessions, farm_token
    )


async def _farm_info(settings: Settings, url: str, stores: _Stores) -> FarmInfo:
    """Return what workers must know of the farm."""
    cache = stores.cache
    return FarmInfo(
        cache_url=f"{url}/cache",
        public_keys=tuple(str(public) for public in cache.public_keys),
        object_store_url=settings.objects_url,
        epoch=stores.journal.epoch,
        store_dir=settings.store_dir,
        cache_token="" if stores.caches[0].access.public else stores.farm_token,
        store_mark=await cache.objects.check_marker(),
        takes_uploads=True,
        compression=cache.compression,
    )


class _EffectRelay:
    """Relay of effects from the engine to dispatch; breaks the circle, because dispatch posts events to the engine."""

    def __init__(self) -> None:
        self.dispatch: Dispatch | None = None

    def submit(self, effects: Sequence[Effect]) -> None:
        """Pass effects on; those of the replay, before there are workers, are not."""
        if self.dispatch is not None:
            self.dispatch.submit(effects)


@dataclass(frozen=True, slots=True)
class _Core:
    """The engine with what it decides from, and the ways in for clients."""

    farm: Farm
    engine: Engine
    views: Views
    explainer: FarmExplainer
    intake: Intake
    submissions: Submissions
    relay: _EffectRelay
    timings: TimingWriter
    usual: UsualTimes
    #: Facts that were replayed.
    replayed: int


async def _recover(settings: Settings, clock: Clock, stores: _Stores) -> _Core:
    """Make the core and replay the journal into it."""
    limits = settings.limits
    farm = Farm(
        Limits(
            failure_ttl_s=limits.failure_ttl_s,
            lease_ttl_s=limits.worker_silence_s,
            give_up_s=limits.give_up_s,
            retries_per_hour=limits.retries_per_hour,
            build=_build_limits(limits),
        )
    )
    explainer = FarmExplainer(farm, stores.logs, clock)
    usual = UsualTimes(stores.timings.usual_builds, clock)
    views = Views(explainer, usual=usual.of)
    relay = _EffectRelay()
    engine = Engine(farm, stores.journal, views, clock, relay.submit)
    notes = decode_notes(await stores.journal.notes())
    replayed = await engine.recover(notes)
    views.add_details({}, notes)
    cache = stores.cache
    writer = TimingWriter(views.timelines, stores.timings, views.named, clock, limits.timings_days, limits.timings_rows)
    intake = Intake(stores.derivations, cache, cache.objects, cache.store_dir, IntakeLimits.of(limits))
    submissions = Submissions(engine, views, intake)
    return _Core(farm, engine, views, explainer, intake, submissions, relay, writer, usual, replayed)


def _build_limits(limits: LimitSettings) -> ResourceLimits:
    return ResourceLimits(
        timeout_s=limits.build_timeout_s,
        silence_s=limits.build_silence_s,
        log_bytes=limits.log_bytes,
        output_bytes=limits.build_output_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """The rooms between the core and the workers."""

    fleet: Fleet
    dispatch: Dispatch
    sink: FleetSink
    losses: Losses
    archiver: LogArchiver
    workers: WorkerSource
    #: Where lost objects are looked for, in order; upstreams are added once they are open.
    repair_sources: list[RepairSource]


def _connect(settings: Settings, clock: Clock, stores: _Stores, core: _Core, fleet: Fleet) -> _Work:
    """Make the rooms between the core and the workers."""
    tokens, views = stores.upload_tokens, core.views
    workers = WorkerSource(fleet, views, stores.cache.objects, tokens.for_path(clock))
    sources: list[RepairSource] = [workers]
    losses = Losses(stores.cache, stores.derivations, core.farm, views, clock, core.submissions.replan, sources)
    dispatch = Dispatch(
        fleet,
        stores.cache,
        stores.derivations,
        core.farm.limits_of,
        core.engine.post,
        losses=losses.check,
        upload_token=tokens.for_lease(clock),
        clock=clock,
        timed=lambda lease, *times: views.timelines.published(lease.step, lease.attempt, *times),
    )
    core.relay.dispatch = dispatch
    weak = WeakIsolation(settings.weak_isolation)
    sink = FleetSink(core.engine, dispatch, core.farm, views, stores.logs, clock, losses.check, weak=weak)
    archiver = LogArchiver(stores.logs, core.farm, clock, settings.limits.log_days)
    return _Work(fleet, dispatch, sink, losses, archiver, workers, sources)


@dataclass(frozen=True, slots=True)
class _Site:
    """HTTP server of a coordinator, and the housekeeping of the caches that it serves."""

    app: web.Application
    runner: web.AppRunner
    gate: ConnectionGate
    streams: WatchStreams
    pages: LiveStreams
    watch: LoopWatch
    exporter: TraceExporter | None
    services: Sequence[CacheService]
    keepers: Sequence[Housekeeper]


async def _make_site(  # noqa: PLR0917 - collaborators, named by their types
    stack: AsyncExitStack,
    settings: Settings,
    clock: Clock,
    url: str,
    info: FarmInfo,
    stores: _Stores,
    core: _Core,
    work: _Work,
) -> _Site:
    """Make the web application with every route; `stack` closes what it needs."""
    gate = open_gate(settings.limits.connections, settings.limits.connections_per_address)
    # Half of all: those who only look must not keep out those who build.
    streams = WatchStreams(core.views, min(settings.limits.watchers, max(1, gate.bounds.total // 2)))
    pages = LiveStreams(min(settings.limits.watchers, max(1, gate.bounds.total // 8)))
    troubled = (stores.journal, work.fleet, work.dispatch, work.archiver, core.timings)
    farm = farm_view(info, (*troubled, *(each.cache for each in stores.caches)))
    api = Api(
        core.engine,
        core.views,
        core.intake,
        core.submissions,
        stores.logs,
        farm,
        streams,
        bounds=ApiBounds.of(settings.limits),
    )
    app = make_app(
        api,
        stores.api_token,
        public_url=url,
        loopback=settings.loopback,
        max_body_bytes=settings.limits.request_bytes,
    )
    telemetry = Telemetry("drover", metadata.version("drover"))
    stack.callback(telemetry.close)
    services = await open_services(stack, stores.caches, settings.state_dir, clock)
    _add_caches(app, clock, stores, core, services)
    core.intake.pulls.upstreams.extend(services[0].upstreams)
    work.repair_sources.extend(services[0].upstreams)
    needs = SubmissionNeeds(core.views, stores.derivations, core.intake.leases)
    keepers, gauges = keep_house(services, clock, submissions=needs, workers=work.workers)
    serve_routes(app, CachingApi(keepers).handlers())
    add_cache_metrics(telemetry, {each.name: each.cache for each in stores.caches}, gauges)
    add_farm_metrics(telemetry, core.views, farm, core.explainer.holding)
    add_engine_metrics(telemetry, core.engine.meter, settings.state_dir)
    add_connection_metrics(telemetry, gate)
    exporter = _trace_exporter(stack, settings, clock, core)
    add_trace_metrics(telemetry, exporter)
    watch = LoopWatch()
    add_loop_metrics(telemetry, watch)
    add_metrics_route(app, telemetry)
    app.middlewares.append(require_room(gate))
    serve_routes(app, TimingApi(core.views, stores.timings, core.timings, clock).handlers())
    questions = Questions(core.views, farm, core.explainer.open_needs, core.explainer.queues)
    serve_routes(app, questions.handlers())
    add_worker_routes(app, core.views, work.fleet.drain)
    queues = core.explainer.queues
    read = PageSources(core.views, farm, queues, core.farm, stores.cache, stores.logs, stores.timings)
    acts = PageActions(core.submissions, work.fleet.drain, keepers)
    add_web_routes(app, read, acts, clock, stores.sessions, pages, url)
    runner = web.AppRunner(app, shutdown_timeout=HTTP_GRACE_S, access_log=None)
    return _Site(app, runner, gate, streams, pages, watch, exporter, services, tuple(keepers.values()))


def _trace_exporter(stack: AsyncExitStack, settings: Settings, clock: Clock, core: _Core) -> TraceExporter | None:
    """Make the exporter of traces where they go anywhere; it gets what the writer of timings takes."""
    if not otlp_wanted(settings.otlp_endpoint):
        return None
    # Not before: it brings a second HTTP client with it.
    from infra.otlp import OtlpSender  # noqa: PLC0415

    sender = OtlpSender(settings.otlp_endpoint, "drover", metadata.version("drover"))
    stack.callback(sender.close)
    exporter = TraceExporter(sender.send, core.views, clock)
    core.timings.on_changed = exporter.attempts_ended
    return exporter


def _add_caches(
    app: web.Application, clock: Clock, stores: _Stores, core: _Core, services: Sequence[CacheService]
) -> None:
    """Add the routes of all caches; the farm's logs are those of the default one, whose paths it built."""
    logs = DerivationLogs(stores.derivations, stores.logs, core.views.attempts)
    for each in services:
        add_upload_routes(app, each.served, each.uploads, stores.upload_tokens, clock.now)
    # The default one last: its address is the beginning of all others.
    for served in reversed(stores.caches):
        add_cache_routes(app, served, log_for=logs.read if served.name == DEFAULT_CACHE else None)


def _start(  # noqa: PLR0917 - collaborators, named by their types
    group: asyncio.TaskGroup, settings: Settings, clock: Clock, lead: Lead, core: _Core, work: _Work, site: _Site
) -> list[asyncio.Task[None]]:
    """Start what runs for as long as the coordinator does; returns the tasks in the order in which they are to end."""
    engine, journal = core.engine, lead.journal
    return [
        # First, because it waits for the engine.
        group.create_task(Forgetter(engine, core.views, settings.limits, clock).run(), name="forgetting"),
        group.create_task(work.fleet.run(work.sink), name="fleet"),
        group.create_task(work.dispatch.run(), name="dispatch"),
        group.create_task(engine.run(), name="engine"),
        group.create_task(work.losses.run(), name="losses"),
        group.create_task(work.archiver.run(), name="log archiver"),
        *(group.create_task(each.uploads.run(), name="uploads") for each in site.services),
        group.create_task(lead.leadership.hold(journal), name="leadership"),
        group.create_task(Compactor(settings.database_url("journal"), journal).run(), name="compaction"),
        group.create_task(core.usual.run(), name="usual times"),
        # Last: they write and send what the others have left.
        group.create_task(core.timings.run(), name="timings"),
        *([group.create_task(site.exporter.run(), name="traces")] if site.exporter else []),
    ]


async def _serve(site: _Site, listener: socket.socket, settings: Settings, url: str, stores: _Stores) -> None:
    """Begin to answer on the socket."""
    own_host = partial(is_own_host, public_url=url) if settings.loopback else is_host
    await FastSite(site.runner, listener, FastNarinfos(stores.caches, own_host), site.gate).start()
