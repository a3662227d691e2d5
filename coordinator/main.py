"""The composition root: every room is made here, by plain constructor calls, and closed in the reverse order.

`open_coordinator` makes a coordinator over any fleet and is what tests use; `serve` runs one until it is told to stop;
`run_up` is `drover up`: the same over a Ray head and worker nodes of its own.

Order of the start: lock, stores, journal and replay, engine, then HTTP, so that whoever gets an answer talks to a farm
that remembers; Ray's nodes take seconds and come while clients are already served. Order of the end: HTTP, fleet,
dispatch, and the engine last, because the others wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import uvloop
from aiohttp import web
from pydantic import ValidationError

from coordinator.caches import OpenCache, open_caches
from coordinator.config import DEFAULT_CACHE, ConfigError, LimitSettings, Settings, WorkerConfig
from coordinator.derivations import DerivationStore
from coordinator.dispatch import Dispatch
from coordinator.engine import Engine
from coordinator.errors import CoordinatorError, UnavailableError
from coordinator.explain import FarmExplainer
from coordinator.http.api import Api
from coordinator.http.app import make_app
from coordinator.http.auth import load_token
from coordinator.http.cache import LogFor, add_cache_routes
from coordinator.http.sse import WatchStreams
from coordinator.intake import Intake, IntakeLimits
from coordinator.journal import Journal, StateLock, database_engine
from coordinator.logs import LogStore
from coordinator.metrics import CacheGauges, add_cache_metrics, add_farm_metrics, add_metrics_route
from coordinator.schema import FarmView
from coordinator.sink import FleetSink
from coordinator.views import Views
from infra.cache import Cache
from infra.cache.errors import CacheError
from infra.clock import Clock, SystemClock
from infra.telemetry import Telemetry
from scheduler.effects import Effect
from scheduler.farm import Farm
from workers.errors import WorkerError
from workers.fleet import Fleet, FleetError, Sink
from workers.protocol import FarmInfo, Lease, LeaseOrder
from workers.ray_access import make_token_file
from workers.ray_nodes import RayHead, RayWorkerNode
from workers.settings import WorkerSettings

#: Seconds that open requests have to end when the coordinator stops.
HTTP_GRACE_S = 2.0
#: Bytes of log beyond the limit that a worker may still send (it counts what it drops and says so).
LOG_SLACK_BYTES = 64 * 1024

_log = logging.getLogger(__name__)

FleetFactory = Callable[[FarmInfo], AbstractAsyncContextManager[Fleet]]


class StoppedError(CoordinatorError):
    """A part of the farm ended that it cannot live without."""

    code = "stopped"


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


@asynccontextmanager
async def open_coordinator(
    settings: Settings, fleet_factory: FleetFactory, *, clock: Clock | None = None
) -> AsyncIterator[Coordinator]:
    """Run a coordinator for as long as the block does.

    Raises `CoordinatorError`, `CacheError` or `WorkerError` with one sentence where it cannot start, and a group with
    one of these where a part of it fails later (the block is then cancelled).
    """
    clock = clock or SystemClock()
    async with AsyncExitStack() as stack:
        stack.enter_context(StateLock(settings.state_dir))
        token_file = settings.state_dir / "api-token"
        token = load_token(token_file)
        listener = stack.enter_context(_listen(settings))
        url = settings.public_url.rstrip("/") or _url(settings.host, listener)

        farm_token = secrets.token_urlsafe()
        caches = await open_caches(stack, settings, clock, api_token=token, farm_token=farm_token)
        stores = await _open_stores(stack, settings, caches[0].cache)
        info = FarmInfo(
            cache_url=f"{url}/cache",
            public_keys=tuple(str(public) for public in stores.cache.public_keys),
            object_store_url=settings.objects_url,
            store_dir=settings.store_dir,
            cache_token="" if caches[0].access.public else farm_token,
        )
        farm = Farm()
        views = Views(FarmExplainer(farm, stores.logs, clock))
        outbox = _Outbox()
        engine = Engine(farm, stores.journal, views, clock, outbox.hand)
        replayed = await engine.recover(stores.derivations)
        intake = Intake(
            stores.derivations,
            stores.cache,
            stores.cache.objects,
            stores.cache.store_dir,
            _intake_limits(settings.limits),
        )
        fleet = await stack.enter_async_context(fleet_factory(info))
        dispatch = Dispatch(fleet, stores.cache, stores.derivations, settings.limits, engine.post)
        outbox.to = dispatch
        sink = FleetSink(engine, dispatch, views, stores.logs, clock)

        streams = WatchStreams(views, settings.limits.watchers)
        api = Api(engine, views, intake, stores.logs, _farm_view(info), streams)
        app = make_app(
            api, token, public_url=url, loopback=settings.loopback, max_body_bytes=settings.limits.request_bytes
        )
        # The default one last: its address is the beginning of all others.
        for each in reversed(caches):
            log_for = _log_reader(views, stores.logs, settings.store_dir) if each.name == DEFAULT_CACHE else None
            add_cache_routes(app, each, log_for=log_for)
        telemetry = Telemetry("drover", metadata.version("drover"))
        stack.callback(telemetry.close)
        add_farm_metrics(telemetry, views)
        add_cache_metrics(
            telemetry, {each.name: each.cache for each in caches}, {each.name: CacheGauges() for each in caches}
        )
        add_metrics_route(app, telemetry)
        runner = web.AppRunner(app, shutdown_timeout=HTTP_GRACE_S, access_log=None)
        await runner.setup()
        async with asyncio.TaskGroup() as group:
            serving = [
                group.create_task(fleet.run(sink), name="fleet"),
                group.create_task(dispatch.run(), name="dispatch"),
                group.create_task(engine.run(), name="engine"),
            ]
            try:
                await web.SockSite(runner, listener).start()
                ready = Ready(url, info.cache_url, info.public_keys, token_file, replayed)
                yield Coordinator(ready, engine, views, intake, stores.cache, stores.journal, tuple(caches))
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


async def _open_stores(stack: AsyncExitStack, settings: Settings, cache: Cache) -> _Stores:
    """Open, or make, everything else below the state directory; `stack` closes it."""
    derivations = DerivationStore.open(settings.database_url("derivations"), settings.store_dir)
    stack.push_async_callback(derivations.close)
    await derivations.prepare()
    logs = LogStore(settings.state_dir / "logs", settings.limits.log_bytes + LOG_SLACK_BYTES)
    stack.push_async_callback(logs.close)
    database = database_engine(settings.database_url("journal"))
    stack.push_async_callback(database.dispose)
    journal = Journal(database)
    await journal.prepare()
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
) -> None:
    """Run a coordinator until `stop` is set; `ready` is called once it answers.

    Raises `CoordinatorError` with one sentence where it cannot start or go on.
    """
    try:
        async with open_coordinator(settings, fleet_factory) as coordinator:
            ready(coordinator.ready)
            await stop.wait()
    except BaseExceptionGroup as group:
        raise _cause(group) from None
    except (CacheError, WorkerError, FleetError) as error:
        raise StoppedError(str(error)) from None


def run_up(settings: Settings, ready: Callable[[Ready], None]) -> None:
    """Be `drover up`: coordinator, Ray head and the configured workers, until SIGINT or SIGTERM.

    Raises `CoordinatorError` with one sentence where the farm cannot start or go on.
    """

    async def run() -> None:
        stop = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        await serve(settings, lambda info: nullcontext(RayFarm(settings, info)), ready=ready, stop=stop)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


class RayFarm:
    """The fleet of `drover up`: Ray with nodes of its own, which start while the coordinator already answers."""

    def __init__(self, settings: Settings, info: FarmInfo) -> None:
        self._settings = settings
        self._info = info
        #: Set while Ray is connected.
        self._fleet: Fleet | None = None

    async def run(self, sink: Sink) -> None:
        """Start the nodes, serve, and end the nodes when cancelled. Raises `WorkerError`, or a group with one."""
        async with ray_farm(self._settings, self._info) as fleet:
            self._fleet = fleet
            try:
                await fleet.run(sink)
            finally:
                self._fleet = None

    async def start_many(self, worker: str, orders: Sequence[LeaseOrder]) -> None:
        """See `Fleet`."""
        await self._connected.start_many(worker, orders)

    async def cancel(self, worker: str, leases: Sequence[Lease]) -> None:
        """See `Fleet`."""
        await self._connected.cancel(worker, leases)

    async def drain(self, worker: str, *, on: bool) -> None:
        """See `Fleet`."""
        await self._connected.drain(worker, on=on)

    @property
    def _connected(self) -> Fleet:
        if self._fleet is None:
            raise FleetError("the farm's Ray nodes are not running yet, or no longer")
        return self._fleet


@asynccontextmanager
async def ray_farm(settings: Settings, info: FarmInfo) -> AsyncIterator[Fleet]:
    """Start a Ray head and one node for each configured worker, connect, and end them all with the block.

    A node that ends is told of in the log, its builds go elsewhere; without its head the farm ends.
    """
    # ray is imported only where a farm runs on it: the client's commands share this package.
    from workers.ray_fleet import RayFleet  # noqa: PLC0415

    token_file = make_token_file(settings.state_dir / "ray-token")
    async with AsyncExitStack() as stack:
        head = await stack.enter_async_context(
            RayHead(token_file=token_file, host=settings.ray_host, port=settings.ray_port)
        )
        # For `drover worker --head` on other machines; says nothing that is secret.
        (settings.state_dir / "ray-address").write_text(head.address + "\n")
        nodes = [
            RayWorkerNode(
                name=worker.name,
                host=settings.ray_host,
                head=head.address,
                token_file=token_file,
                settings_file=write_worker_settings(settings, worker),
            )
            for worker in settings.workers
        ]
        async with asyncio.TaskGroup() as starting:
            for node in nodes:
                starting.create_task(_enter(stack, node))
        fleet = await stack.enter_async_context(RayFleet(address=head.address, token_file=token_file, farm=info))
        async with asyncio.TaskGroup() as watching:
            tasks = [watching.create_task(_watch_head(head))]
            tasks += [watching.create_task(_watch_node(node)) for node in nodes]
            try:
                yield fleet
            finally:
                for task in tasks:
                    task.cancel()
                # At once, not one after the other: each takes seconds. Leaving the contexts then finds them ended,
                # and meets again whatever went wrong here.
                await asyncio.gather(*(node.stop() for node in nodes), return_exceptions=True)


def write_worker_settings(settings: Settings, worker: WorkerConfig) -> Path:
    """Write what a worker's agent reads at its start; returns the file's path. Raises `ConfigError`."""
    directory = settings.state_dir / "workers" / worker.name
    file = directory / "settings.json"
    told = worker.model_dump()
    try:
        made = WorkerSettings(
            **told
            | {
                "state_dir": directory / "state",
                "store": worker.store or str(directory / "store"),
                "nix_options": {**settings.nix_options, **worker.nix_options},
            }
        )
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(made.model_dump_json(indent=2) + "\n")
    except ValidationError as error:
        reason = error.errors(include_url=False, include_context=False, include_input=False)[0]["msg"]
        raise ConfigError(f"worker {worker.name}: {reason.removeprefix('Value error, ')}.") from None
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}.") from None
    return file


async def _enter(stack: AsyncExitStack, node: RayWorkerNode) -> None:
    await stack.enter_async_context(node)


async def _watch_head(head: RayHead) -> None:
    raise StoppedError(f"the Ray head ended: {await head.wait_failed()}")


async def _watch_node(node: RayWorkerNode) -> None:
    _log.warning("a worker's Ray node ended: %s", await node.wait_failed())


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; choose another with --listen."
        ) from None


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _intake_limits(limits: LimitSettings) -> IntakeLimits:
    return IntakeLimits(max_derivations=limits.graph_size, max_sources=limits.graph_size)


def _farm_view(info: FarmInfo) -> FarmView:
    return FarmView(
        version=metadata.version("drover"),
        cache_url=info.cache_url,
        public_keys=info.public_keys,
        store_dir=info.store_dir,
    )


def _log_reader(views: Views, logs: LogStore, store_dir: str) -> LogFor:
    """Return what finds the log of a .drv (base name) for `nix log`."""

    def read(base_name: str) -> AsyncIterator[bytes] | None:
        found = views.attempt_of_drv(f"{store_dir}/{base_name}")
        return logs.read(*found) if found is not None and logs.exists(*found) else None

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
