"""The fleet of `drover up`: a Ray head, a node for the coordinator's driver, and the workers of this machine.

All of them are programs of their own that outlive the coordinator: an end on purpose (`stopping`) ends them, any other
leaves head and workers running, and the next `drover up` with the same state directory takes them over
(`workers.ray_transport.node_records`) with the builds on them. Their records, and the head's tables, lie in
`STATE_DIR/ray`.

The head is started again when it dies, at the same address and with the same tables, while nodes and driver wait for
it. A worker's node is started again too; its builds are lost and go elsewhere. Without its own node the coordinator
ends, because its driver cannot change nodes.

With `ray_address` the head is somebody else's (`serve_head`, which is `drover head`), so that it and the workers do not
end with the coordinator's machine, and several coordinators can lead the same workers in turn.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from coordinator.config import ConfigError, Settings, WorkerConfig
from coordinator.errors import StoppedError
from coordinator.security.tokens import read_source
from coordinator.state_lock import StateLock
from infra.cache.publishing.keys import forget_keys
from infra.retry import Backoff
from infra.validation import first_fault
from workers.agent.settings import WorkerSettings
from workers.errors import WorkerError
from workers.ray_transport.access import NodeHealth, make_token_file
from workers.ray_transport.fleet import RayFleet
from workers.ray_transport.node_process import Handover, RayNode
from workers.ray_transport.nodes import RayHead, RayJoiningNode, RayWorkerNode
from workers.ray_transport.redis import RedisStore, RedisUnusableError
from workers.wire.messages import FarmInfo

#: How often the head is started again before it is given up; a worker's node is never given up.
START_AGAIN_TRIES = 8
#: Ports of a head that has none yet. They lie below those that Linux and macOS give to connections, which would take
#: one between the look and the start of Ray. After so many tries the system chooses.
HEAD_PORTS = range(20_000, 32_768)
HEAD_PORT_TRIES = 20
#: Seconds between two starts of a dead node: they double from the first to the longest.
START_AGAIN_S = 1.0
START_AGAIN_LONGEST_S = 60.0

_log = logging.getLogger(__name__)


class RayCluster:
    """The Ray nodes of a farm: started or taken over, supervised, at last ended or left to their builds.

    `fleet` reaches the workers on them. Its `run` brings the nodes up while the coordinator already answers.
    """

    def __init__(self, settings: Settings, info: FarmInfo, stopping: Callable[[], bool]) -> None:
        self._settings = settings
        self._stopping = stopping
        self.fleet = RayFleet(token_file=settings.ray_token_file, farm=info, cluster=self._running)

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        """Start or take over the nodes and connect; at the end, end them if `stopping`, else leave what builds need.

        Raises `CoordinatorError` or `WorkerError`, or a group with one.
        """
        settings, token_file = self._settings, self._settings.ray_token_file
        (settings.state_dir / "ray").mkdir(mode=0o700, exist_ok=True)
        async with AsyncExitStack() as stack:
            head: RayHead | None = None
            nodes: list[RayJoiningNode] = []
            workers: list[RayWorkerNode] = []
            up = False
            try:
                if settings.ray_address:
                    address = settings.ray_address
                else:
                    head = _own_head(settings)
                    address = await _start_head(stack, settings, head)
                own = RayJoiningNode(
                    head=address, token_file=token_file, host=settings.ray_host, keep=_keep(settings, "coordinator")
                )
                workers = [_worker_node(settings, worker, address, token_file) for worker in settings.workers]
                nodes = [own, *workers]
                async with asyncio.TaskGroup() as starting:
                    for node in nodes:
                        starting.create_task(_enter(stack, node))
                # Disconnected before any node stops: Ray ends a connected process at once when its node does.
                async with self.fleet.connected(address, own.directory):
                    up = True
                    async with _supervised(head, own, workers):
                        yield
            finally:
                if not self._stopping():
                    # Our own has no builds on it, and who knows whether we come back: another coordinator may lead now.
                    for left in (*workers, *filter(None, (head,))):
                        if up or left.adopted:
                            left.detach()
                # At once, not one after the other: each takes seconds. The head last, the others would miss it.
                await asyncio.gather(*(node.stop() for node in nodes), return_exceptions=True)


@asynccontextmanager
async def _supervised(
    head: RayHead | None, own: RayJoiningNode, workers: Sequence[RayWorkerNode]
) -> AsyncIterator[None]:
    """Start again what dies meanwhile. Raises `StoppedError`, in a group, where the farm cannot go on."""
    async with asyncio.TaskGroup() as watching:
        watches = [_watch_own(own), *(_watch_worker(node) for node in workers)]
        if head is not None:
            watches.append(_watch_head(head))
        tasks = [watching.create_task(watch) for watch in watches]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def serve_head(settings: Settings, ready: Callable[[str], None], stop: asyncio.Event) -> None:
    """Run a head by itself until `stop` is set; `ready` receives its address. For `ray_address` of coordinators.

    Raises `CoordinatorError` or `WorkerError` where it cannot start, or cannot be started again after it died.
    """
    with StateLock(settings.state_dir):
        async with AsyncExitStack() as stack:
            head = _own_head(settings)
            ready(await _start_head(stack, settings, head))
            watch, stopped = asyncio.ensure_future(_watch_head(head)), asyncio.ensure_future(stop.wait())
            try:
                await asyncio.wait((watch, stopped), return_when=asyncio.FIRST_COMPLETED)
                if watch.done():
                    await watch
            finally:
                watch.cancel()
                stopped.cancel()


def _own_head(settings: Settings) -> RayHead:
    settings.ray_token_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return RayHead(
        token_file=make_token_file(settings.ray_token_file),
        host=settings.ray_host,
        port=_head_port(settings),
        health=NodeHealth.after(settings.ray_silence_s),
        tables=_redis(settings) if settings.ray_redis else _tables(settings),
        keep=_keep(settings, "head"),
    )


def _tables(settings: Settings) -> Path:
    return settings.state_dir / "ray" / "tables"


def _redis(settings: Settings) -> RedisStore:
    source = settings.ray_redis_password
    password = read_source(source).strip() if source else ""
    # Nothing that is started inherits it.
    forget_keys([source])
    return RedisStore(settings.ray_redis, settings.ray_redis_namespace, password)


async def _start_head(stack: AsyncExitStack, settings: Settings, head: RayHead) -> str:
    """Start a head, or take it over; `stack` ends it. Returns its address."""
    _tables(settings).parent.mkdir(mode=0o700, exist_ok=True)
    try:
        await stack.enter_async_context(head)
    except RedisUnusableError as error:
        raise StoppedError(f"{error} (see ray_redis and ray_redis_password)") from None
    except WorkerError as error:
        way = "choose another ray_redis_namespace" if settings.ray_redis else f"remove {_tables(settings)}"
        raise StoppedError(f"{error}; if this repeats, {way} (builds that run now are then done again)") from None
    # For `drover worker --head` on other machines, and for the next start; says nothing that is secret.
    (settings.state_dir / "ray-address").write_text(head.address + "\n")
    return head.address


def _keep(settings: Settings, name: str) -> Handover:
    return Handover(settings.state_dir / "ray" / name, settings.ray_outlive_s)


def _worker_node(settings: Settings, worker: WorkerConfig, head: str, token_file: Path) -> RayWorkerNode:
    return RayWorkerNode(
        name=worker.name,
        host=settings.ray_host,
        head=head,
        token_file=token_file,
        settings_file=write_worker_settings(settings, worker, (head.rpartition(":")[0], settings.host)),
        keep=_keep(settings, f"worker-{worker.name}"),
    )


def worker_state_dir(settings: Settings, worker: str) -> Path:
    """Return the directory of a worker's agent."""
    return settings.state_dir / "workers" / worker / "state"


def write_worker_settings(settings: Settings, worker: WorkerConfig, farm_hosts: Sequence[str] = ()) -> Path:
    """Write what a worker's agent reads at its start; returns the file's path. Raises `ConfigError`.

    Builds do not reach the hosts in `farm_hosts`.
    """
    directory = settings.state_dir / "workers" / worker.name
    file = directory / "settings.json"
    values = worker.model_dump()
    try:
        made = WorkerSettings(
            **values
            | {
                "state_dir": worker_state_dir(settings, worker.name),
                "store": worker.store or str(directory / "store"),
                "farm_hosts": tuple(host.strip("[]") for host in farm_hosts if host),
                "nix_options": {**settings.nix_options, **worker.nix_options},
            }
        )
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(made.model_dump_json(indent=2) + "\n")
    except ValidationError as error:
        raise ConfigError(f"worker {worker.name}: {first_fault(error).message}.") from None
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}.") from None
    return file


def _head_port(settings: Settings) -> int:
    """The head's port: the configured one, the one of the last time, or a free one; a restarted head needs the same."""
    if settings.ray_port:
        return settings.ray_port
    try:
        host, _, port = (settings.state_dir / "ray-address").read_text().strip().rpartition(":")
        if host.strip("[]") == settings.ray_host:
            return int(port)
    except (OSError, ValueError):
        pass
    family = socket.AF_INET6 if ":" in settings.ray_host else socket.AF_INET
    for wanted in (*(secrets.choice(HEAD_PORTS) for _ in range(HEAD_PORT_TRIES)), 0):
        with socket.socket(family) as probe, suppress(OSError):
            probe.bind((settings.ray_host, wanted))
            free: int = probe.getsockname()[1]
            return free
    raise ConfigError(f"the Ray head cannot listen on {settings.ray_host}; set ray_host to an address of this machine.")


async def _enter(stack: AsyncExitStack, node: RayNode) -> None:
    await stack.enter_async_context(node)


async def _watch_head(head: RayHead) -> NoReturn:
    while True:
        _log.warning("%s; it is started again and running builds go on", await head.wait_failed())
        if error := await _start_again(head, START_AGAIN_TRIES):
            raise StoppedError(f"the Ray head could not be started again {START_AGAIN_TRIES} times: {error}")


async def _watch_worker(node: RayWorkerNode) -> NoReturn:
    while True:
        _log.warning("%s; it is started again and its builds are done elsewhere", await node.wait_failed())
        await _start_again(node)


async def _watch_own(node: RayJoiningNode) -> NoReturn:
    raise StoppedError(f"{await node.wait_failed()}; run `drover up` again, running builds go on")


async def _start_again(node: RayNode, tries: int | None = None) -> str:
    """Start a node that died, so many times or until it comes; returns why it does not, empty where it runs."""
    backoff = Backoff(START_AGAIN_S, START_AGAIN_LONGEST_S)
    while True:
        await node.stop()
        try:
            await node.start()
        except WorkerError as error:
            tries = None if tries is None else tries - 1
            if tries == 0:
                return str(error)
            pause_s = backoff.next_s()
            _log.warning("%s; it is tried again in %.1f s", error, pause_s)
            await asyncio.sleep(pause_s)
        else:
            return ""
