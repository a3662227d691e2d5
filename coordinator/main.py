"""The composition root: every room is made here, by plain constructor calls, and closed in the reverse order.

`open_coordinator` makes a coordinator over any fleet and is what tests use; `serve` runs one until it is told to stop;
`run_up` is `drover up`: the same over a Ray head and worker nodes of its own.

Order of the start: lock, the right to the journal, stores, replay, engine, names, then HTTP, so that whoever gets an
answer talks to a farm that remembers (while another coordinator has that right, the answer is that this one stands
by); Ray's nodes take seconds and come while clients are already served. Order of the end: HTTP, fleet, dispatch, and
the engine last, because the others wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from secrets import token_urlsafe
from typing import Protocol

import uvloop
from aiohttp import web

from coordinator.api.models import FarmView
from coordinator.caches.housekeeping import CacheGauges, Housekeeper, SubmissionNeeds
from coordinator.caches.losses import Losses
from coordinator.caches.opening import OpenCache, open_caches
from coordinator.caches.worker_repair import WorkerSource
from coordinator.config import DEFAULT_CACHE, ConfigError, LimitSettings, Settings, UploadRoute
from coordinator.engine.compaction import Compactor
from coordinator.engine.dispatch import Dispatch
from coordinator.engine.engine import Engine
from coordinator.engine.expiry import Forgetter
from coordinator.engine.worker_events import FleetSink
from coordinator.errors import CoordinatorError, StoppedError, UnavailableError
from coordinator.fleet.ray_cluster import RayFarm, worker_state_dir
from coordinator.http.api.caches import CachingApi
from coordinator.http.api.events import WatchStreams
from coordinator.http.api.submissions import Api, ApiBounds
from coordinator.http.api.workers import add_worker_routes
from coordinator.http.app import make_app
from coordinator.http.binary_cache.fast_narinfo import FastNarinfos, FastSite, open_gate
from coordinator.http.binary_cache.routes import LogFor, add_cache_routes
from coordinator.http.binary_cache.uploads import add_upload_routes
from coordinator.http.connections import ConnectionGate, require_room
from coordinator.http.metrics import add_metrics_route
from coordinator.http.middleware import is_host, is_own_host
from coordinator.http.standby import serving_standby
from coordinator.intake.intake import Intake
from coordinator.intake.limits import IntakeLimits
from coordinator.intake.submissions import Submissions
from coordinator.journal.codec import decode_notes
from coordinator.journal.errors import JournalError
from coordinator.journal.journal import Journal
from coordinator.journal.leadership import Leadership, open_leadership
from coordinator.observability.metrics import add_cache_metrics, add_farm_metrics
from coordinator.readmodel.explain import FarmExplainer
from coordinator.readmodel.recall import recall_details
from coordinator.readmodel.views import Views
from coordinator.security.farm_secrets import API_TOKEN, Secrets, Succession
from coordinator.security.isolation import WeakIsolation
from coordinator.security.upload_tokens import UploadTokens
from coordinator.state_lock import StateLock
from coordinator.stores.derivations import DerivationStore
from coordinator.stores.logs import LogStore
from infra.cache.cache import Cache
from infra.cache.pulls.upstream import Upstream
from infra.cache.repair.fsck import RepairSource
from infra.cache.uploads.s3_direct import direct_uploads
from infra.cache.uploads.uploads import Uploads
from infra.clock import Clock, SystemClock
from infra.database import open_engine
from infra.loop_watch import LoopWatch
from infra.nix.errors import FormatError
from infra.nix.signing import PublicKey
from infra.objects.errors import CacheError
from infra.telemetry import Telemetry
from scheduler.effects import Effect
from scheduler.farm import Farm
from scheduler.policy import Limits
from scheduler.resource_limits import ResourceLimits
from workers.agent.stopping import stop_agents
from workers.errors import WorkerError
from workers.wire.fleet import Fleet, FleetError
from workers.wire.messages import FarmInfo

#: Seconds that open requests have to end when the coordinator stops.
HTTP_GRACE_S = 2.0
#: Bytes of log beyond the limit that a worker may still send (it counts what it drops and says so).
LOG_SLACK_BYTES = 64 * 1024

_log = logging.getLogger(__name__)

FleetFactory = Callable[[FarmInfo], AbstractAsyncContextManager[Fleet]]


@dataclass(frozen=True, slots=True)
class Ready:
    """Where a running coordinator is found; `token_file` holds the API token."""

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
        listener = stack.enter_context(_listen(settings))
        url = settings.public_url.rstrip("/") or _url(settings.host, listener)
        journal, leadership, secrets = await _open_journal(stack, settings, listener, lambda: standing_by(url))

        tokens = UploadTokens(secrets.upload_secret.encode())
        farm_token = token_urlsafe()
        caches = await open_caches(stack, settings, clock, journal.reign, secrets=secrets, farm_token=farm_token)
        stores = await _open_stores(stack, settings, caches[0].cache, journal)
        info = FarmInfo(
            cache_url=f"{url}/cache",
            public_keys=tuple(str(public) for public in stores.cache.public_keys),
            object_store_url=settings.objects_url,
            epoch=journal.epoch,
            store_dir=settings.store_dir,
            cache_token="" if caches[0].access.public else farm_token,
            store_mark=await stores.cache.objects.check_marker(),
            takes_uploads=True,
            compression=stores.cache.compression,
        )
        farm = Farm(
            Limits(
                failure_ttl_s=settings.limits.failure_ttl_s,
                lease_ttl_s=settings.limits.worker_silence_s,
                give_up_s=settings.limits.give_up_s,
                retries_per_hour=settings.limits.retries_per_hour,
                build=_build_limits(settings.limits),
            )
        )
        views = Views(FarmExplainer(farm, stores.logs, clock))
        outbox = _Outbox()
        engine = Engine(farm, stores.journal, views, clock, outbox.hand)
        replayed = await _recover(engine, views, stores.journal)
        intake = Intake(
            stores.derivations,
            stores.cache,
            stores.cache.objects,
            stores.cache.store_dir,
            IntakeLimits.of(settings.limits),
        )
        fleet = await stack.enter_async_context(fleet_factory(info))
        work = _connect(fleet, engine, farm, views, stores, clock, tokens, Submissions(engine, views, intake), settings)
        outbox.to = work.dispatch

        gate = open_gate(settings.limits.connections, settings.limits.connections_per_address)
        # Half of all: those who only look must not keep out those who build.
        streams = WatchStreams(views, min(settings.limits.watchers, max(1, gate.bounds.total // 2)))
        api = Api(
            engine,
            views,
            intake,
            stores.logs,
            _farm_view(info, (journal, fleet, work.dispatch, *(each.cache for each in caches))),
            streams,
            bounds=ApiBounds.of(settings.limits),
        )
        app = make_app(
            api,
            secrets.api_token,
            public_url=url,
            loopback=settings.loopback,
            max_body_bytes=settings.limits.request_bytes,
        )
        telemetry = Telemetry("drover", metadata.version("drover"))
        stack.callback(telemetry.close)
        log_for = _log_reader(views, stores)
        services = await _serve_caches(stack, app, caches, settings, clock, tokens, log_for)
        intake.pulls.upstreams.extend(services[0].upstreams)
        work.repair_sources.extend(services[0].upstreams)
        keepers = _look_after(
            app,
            services,
            clock,
            telemetry,
            submissions=SubmissionNeeds(views, stores.derivations, intake.leases),
            workers=work.workers,
        )
        watch = _show_metrics(app, views, telemetry, gate)
        add_worker_routes(app, views, lambda worker, on: fleet.drain(worker, on=on))
        runner = web.AppRunner(app, shutdown_timeout=HTTP_GRACE_S, access_log=None)
        await runner.setup()
        async with asyncio.TaskGroup() as group:
            serving = [
                # First, because it waits for the engine.
                group.create_task(Forgetter(engine, views, settings.limits, clock).run(), name="forgetting"),
                group.create_task(fleet.run(work.sink), name="fleet"),
                group.create_task(work.dispatch.run(), name="dispatch"),
                group.create_task(engine.run(), name="engine"),
                group.create_task(work.losses.run(), name="losses"),
                *(group.create_task(each.uploads.run(), name="uploads") for each in services),
                group.create_task(leadership.hold(journal), name="leadership"),
                group.create_task(Compactor(settings.database_url("journal"), journal).run(), name="compaction"),
            ]
            try:
                # Builds go on from here; whoever asks must be told names too.
                await recall_details(views, stores.derivations)
                # Not before: what it makes and throws away would lie between what stays.
                serving += [group.create_task(each.run(), name="housekeeping") for each in keepers]
                await FastSite(runner, listener, FastNarinfos(caches, _own_host(settings, url)), gate).start()
                # Not before: replaying a large journal holds up nobody.
                stack.enter_context(watch)
                yield Coordinator(
                    Ready(url, info.cache_url, info.public_keys, settings.secrets / API_TOKEN, replayed),
                    engine,
                    views,
                    intake,
                    stores.cache,
                    stores.journal,
                    tuple(caches),
                    app,
                )
            finally:
                streams.stop()
                await runner.cleanup()
                for task in serving:
                    task.cancel()
                    await asyncio.wait([task])


@dataclass(frozen=True, slots=True)
class _Stores:
    """What a coordinator keeps on disk."""

    cache: Cache
    derivations: DerivationStore
    logs: LogStore
    journal: Journal


@dataclass(frozen=True, slots=True)
class _Work:
    """The rooms between the core and the workers."""

    dispatch: Dispatch
    sink: FleetSink
    losses: Losses
    workers: WorkerSource
    #: Where lost objects are looked for, in order; upstreams are added once they are open.
    repair_sources: list[RepairSource]


def _connect(  # noqa: PLR0917 - collaborators, named by their types
    fleet: Fleet,
    engine: Engine,
    farm: Farm,
    views: Views,
    stores: _Stores,
    clock: Clock,
    tokens: UploadTokens,
    submissions: Submissions,
    settings: Settings,
) -> _Work:
    """Make the rooms between the core and the workers."""
    workers = WorkerSource(fleet, views, stores.cache.objects, tokens.for_path(clock))
    sources: list[RepairSource] = [workers]
    losses = Losses(stores.cache, stores.derivations, views, clock, submissions.replan, sources)
    dispatch = Dispatch(
        fleet,
        stores.cache,
        stores.derivations,
        farm.limits_of,
        engine.post,
        losses=losses.check,
        upload_token=tokens.for_lease(clock),
    )
    weak = WeakIsolation(settings.weak_isolation)
    sink = FleetSink(engine, dispatch, farm, views, stores.logs, clock, losses.check, weak=weak)
    return _Work(dispatch, sink, losses, workers, sources)


async def _open_journal(
    stack: AsyncExitStack, settings: Settings, listener: socket.socket, standing_by: Callable[[], None]
) -> tuple[Journal, Leadership, Secrets]:
    """Wait for the right to work on the journal and begin a reign over it; `stack` gives both back."""
    database = open_engine(settings.database_url("journal"))
    stack.push_async_callback(database.dispose)
    journal = Journal(database)
    await journal.prepare()
    leadership = open_leadership(database)
    stack.push_async_callback(leadership.release)
    succession = Succession(settings)
    stood_by = False
    async with serving_standby(listener) as answer:

        async def wait() -> None:
            nonlocal stood_by
            # Each time: the one that works may have begun just now, and secrets may be changed under us.
            with suppress(JournalError):
                await succession.check(await journal.marks())
            if not stood_by:
                stood_by = True
                answer()
                standing_by()

        await leadership.acquire(wait)
    secrets = await succession.load(await journal.marks(), stood_by=stood_by)
    await journal.take_over(secrets.marks)
    return journal, leadership, secrets


async def _recover(engine: Engine, views: Views, journal: Journal) -> int:
    """Bring core and views to where the journal ends; returns the number of facts."""
    notes = decode_notes(await journal.notes())
    replayed = await engine.recover(notes)
    views.know({}, notes)
    return replayed


async def _open_stores(stack: AsyncExitStack, settings: Settings, cache: Cache, journal: Journal) -> _Stores:
    """Open, or make, everything else below the state directory; `stack` closes it."""
    derivations = DerivationStore.open(settings.database_url("derivations"), settings.store_dir)
    stack.push_async_callback(derivations.close)
    await derivations.prepare()
    logs = LogStore(settings.state_dir / "logs", settings.limits.log_bytes + LOG_SLACK_BYTES)
    stack.push_async_callback(logs.close)
    return _Stores(cache, derivations, logs, journal)


class _Outbox:
    """Breaks the one circle of the composition: the engine hands effects to dispatch, which posts events to it."""

    def __init__(self) -> None:
        self.to: Dispatch | None = None

    def hand(self, effects: Sequence[Effect]) -> None:
        if self.to is not None:
            self.to.hand(effects)


async def serve(
    settings: Settings,
    fleet_factory: FleetFactory,
    *,
    ready: Callable[[Ready], None],
    stop: asyncio.Event,
    wind_down: Callable[[Coordinator], Awaitable[None]] | None = None,
    standing_by: Callable[[str], None] = lambda _: None,
) -> None:
    """Run a coordinator until `stop` is set; `ready` is called once it answers, `wind_down` before it ends.

    `standing_by` is told the address where it has to wait for another coordinator to end.

    Raises `CoordinatorError` with one sentence where it cannot start or go on.
    """
    begun = False

    async def run() -> None:
        nonlocal begun
        async with open_coordinator(settings, fleet_factory, standing_by=standing_by) as coordinator:
            begun = True
            ready(coordinator.ready)
            await stop.wait()
            if wind_down is not None:
                await wind_down(coordinator)

    work, stopping = asyncio.create_task(run()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not begun:
            # It may be waiting for another coordinator to end.
            work.cancel()
        await work
    except asyncio.CancelledError:
        work.cancel()
        await asyncio.wait((work,))
        if not stop.is_set():
            raise
    except BaseExceptionGroup as group:
        raise _cause(group) from None
    except (CacheError, WorkerError, FleetError) as error:
        raise StoppedError(str(error)) from None
    finally:
        stopping.cancel()


def run_up(settings: Settings, ready: Callable[[Ready], None], standing_by: Callable[[str], None]) -> None:
    """Be `drover up`: coordinator, Ray head and the configured workers, until SIGINT or SIGTERM.

    The first signal lets running builds finish within the grace and hands the others back, the second does so at once.

    Raises `CoordinatorError` with one sentence where the farm cannot start or go on.
    """

    async def run() -> None:
        stop, hurry = asyncio.Event(), asyncio.Event()

        def asked() -> None:
            (hurry if stop.is_set() else stop).set()

        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, asked)

        async def wind_down(coordinator: Coordinator) -> None:
            online = {
                worker.name for worker in coordinator.views.workforce.views() if worker.state in ("online", "draining")
            }
            ours = [worker_state_dir(settings, worker.name) for worker in settings.workers if worker.name in online]
            await stop_agents(ours, settings.stop_grace_s, hurry.is_set)

        def fleet(info: FarmInfo) -> AbstractAsyncContextManager[Fleet]:
            return nullcontext(RayFarm(settings, info, stop.is_set))

        await serve(settings, fleet, ready=ready, stop=stop, wind_down=wind_down, standing_by=standing_by)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


@dataclass(frozen=True, slots=True)
class _ServedCache:
    """A cache with what takes uploads into it and where else its paths may be had."""

    served: OpenCache
    uploads: Uploads
    upstreams: Sequence[Upstream]


async def _serve_caches(  # noqa: PLR0917 - collaborators, named by their types
    stack: AsyncExitStack,
    app: web.Application,
    caches: Sequence[OpenCache],
    settings: Settings,
    clock: Clock,
    tokens: UploadTokens,
    log_for: LogFor,
) -> list[_ServedCache]:
    """Add the routes of all caches. `log_for` is for the default one, whose paths the farm built."""
    services = []
    for each in caches:
        upstreams = await _upstreams(stack, each, clock)
        uploads = _uploads(each, settings, clock, upstreams)
        add_upload_routes(app, each, uploads, tokens, clock.now)
        services.append(_ServedCache(each, uploads, upstreams))
    # The default one last: its address is the beginning of all others.
    for each in reversed(caches):
        add_cache_routes(app, each, log_for=log_for if each.name == DEFAULT_CACHE else None)
    return services


def _show_metrics(app: web.Application, views: Views, telemetry: Telemetry, gate: ConnectionGate) -> LoopWatch:
    add_farm_metrics(telemetry, views)
    add_metrics_route(app, telemetry)
    app.middlewares.append(require_room(gate))
    gate.show(telemetry)
    watch = LoopWatch()
    watch.show(telemetry)
    return watch


def _look_after(
    app: web.Application,
    services: Sequence[_ServedCache],
    clock: Clock,
    telemetry: Telemetry,
    *,
    submissions: SubmissionNeeds,
    workers: WorkerSource,
) -> list[Housekeeper]:
    """Give each cache a housekeeper, its commands and its metrics. What the farm builds lives in the default one."""
    gauges = {each.served.name: CacheGauges() for each in services}
    keepers = {
        each.served.name: Housekeeper(
            each.served.cache,
            each.served.settings,
            gauges[each.served.name],
            clock,
            submissions=submissions if each.served.name == DEFAULT_CACHE else None,
            sources=(workers, *each.upstreams) if each.served.name == DEFAULT_CACHE else each.upstreams,
        )
        for each in services
    }
    app.add_routes(CachingApi(keepers).routes())
    add_cache_metrics(telemetry, {each.served.name: each.served.cache for each in services}, gauges)
    return list(keepers.values())


def _uploads(served: OpenCache, settings: Settings, clock: Clock, upstreams: Sequence[Upstream]) -> Uploads:
    objects = served.cache.objects
    direct = None if served.settings.uploads is UploadRoute.RELAY else direct_uploads(objects)
    spool = settings.state_dir / "uploads" / served.name
    return Uploads(served.cache, spool, clock.now, direct=direct, expiry=served.settings.expiry, upstreams=upstreams)


async def _upstreams(stack: AsyncExitStack, served: OpenCache, clock: Clock) -> list[Upstream]:
    """Open the upstreams of a cache; `stack` closes them. Raises `ConfigError`."""
    opened = []
    for told in served.settings.upstreams:
        try:
            keys = [PublicKey.parse(text) for text in told.public_keys]
        except FormatError as error:
            raise ConfigError(f"a public key of the upstream {told.url} is not one: {error.message}.") from None
        upstream = Upstream(told.url, keys, served.cache.store_dir, clock.now)
        opened.append(await stack.enter_async_context(upstream))
    return opened


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; choose another with --listen."
        ) from None


def _own_host(settings: Settings, url: str) -> Callable[[str], bool]:
    """Return what tells whether a `Host` header is to be answered."""
    return partial(is_own_host, public_url=url) if settings.loopback else is_host


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _build_limits(limits: LimitSettings) -> ResourceLimits:
    return ResourceLimits(
        timeout_s=limits.build_timeout_s,
        silence_s=limits.build_silence_s,
        log_bytes=limits.log_bytes,
        output_bytes=limits.build_output_bytes,
    )


class _Troubled(Protocol):
    """Whoever may have to wait for something outside."""

    @property
    def trouble(self) -> str:
        """Why it waits at the moment, "" while all is well."""


def _farm_view(info: FarmInfo, rooms: Sequence[_Troubled]) -> Callable[[], FarmView]:
    """Return what says how to use the farm, and what is wrong with it now."""
    version = metadata.version("drover")
    return lambda: FarmView(
        version=version,
        cache_url=info.cache_url,
        public_keys=info.public_keys,
        store_dir=info.store_dir,
        troubles=tuple(room.trouble for room in rooms if room.trouble),
    )


def _log_reader(views: Views, stores: _Stores) -> LogFor:
    """Return what finds the log of a .drv (base name) for `nix log`."""

    async def read(base_name: str) -> AsyncIterator[bytes] | None:
        node = (await stores.derivations.nodes([base_name])).get(base_name)
        if node is None:
            return None
        attempt = views.attempts(node.step)
        return stores.logs.read(node.step, attempt) if stores.logs.exists(node.step, attempt) else None

    return read


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that made the others: a part that only lost its engine is not it."""
    flat: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack.extend(error.exceptions)
        else:
            flat.append(error)
    telling = [
        error for error in flat if isinstance(error, CoordinatorError) and not isinstance(error, UnavailableError)
    ]
    if telling:
        return telling[0]
    said = [error for error in flat if isinstance(error, (CacheError, WorkerError, FleetError))]
    return StoppedError(str(said[0])) if said else next(iter(flat))
