"""The fleet over Ray: one long-lived detached agent actor per labelled node, reached by short calls.

The only file that imports ray. Ray carries messages and knows which nodes live; it decides nothing. Rules:

* ray reads its settings when it is imported, so the import happens in `RayFleet.connected`, after the environment is
  set.
* Whatever may block (connecting, creating an actor, listing nodes: without bound while the head is away) runs in a
  daemon thread with a deadline; at most `BLOCKED_CALLS` threads may hang at once.
* An actor never restarts and its calls are never retried by Ray: a repeat is this program's decision, and every call of
  the protocol may be repeated.
* A head that was started again without its tables is another cluster. Ray ends the process of a driver that asks it
  something, and lets nodes wait for ever: so driver and nodes look for it first, and end by themselves.
* Only Ray's own word is a death: the actor died, or its node is no longer alive. Everything else is "unknown".
* Messages are plain dicts, lists and bytes; classes cross by reference, so all nodes run the same installation.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from workers.ray_transport.access import (
    LISTEN_DEADLINE_S,
    LOOPBACK,
    RayNodeError,
    check_listens,
    check_token_file,
    is_loopback,
    ray_env,
)
from workers.ray_transport.blocking_calls import BlockingCalls, first_line
from workers.ray_transport.node_records import watch_owner
from workers.ray_transport.nodes import (
    DIRECTORY_VARIABLE,
    ENDED_FILE,
    HEAD_VARIABLE,
    LOOPBACK_VARIABLE,
    PARENT_VARIABLE,
    STOP_GRACE_S,
    WORKER_LABEL,
    ray_temp_dir,
)
from workers.ray_transport.redis import FLAGS_FILE, read_password
from workers.wire.fleet import FleetError, Sink
from workers.wire.messages import CALLS, CallName, FarmInfo
from workers.wire.polling import AgentDead, AgentRoster, AgentUnavailable

if TYPE_CHECKING:
    from workers.agent.agent import Agent

log = logging.getLogger(__name__)

NAMESPACE = "drover"
#: Seconds for connecting to the head, for one look at the nodes, for creating one actor, and for disconnecting.
CONNECT_DEADLINE_S = 60.0
DISCOVER_DEADLINE_S = 20.0
CREATE_DEADLINE_S = 60.0
CLOSE_DEADLINE_S = 20.0
#: Seconds between two looks at Ray's list of nodes.
DISCOVER_EVERY_S = 1.0
#: How often a node looks whether its head still is the one that it joined, seconds.
SAME_HEAD_EVERY_S = 3.0
#: Threads that may hang in Ray at one time.
BLOCKED_CALLS = 16
#: Calls that one agent serves at a time: control must get through while polls are parked.
CONCURRENCY = {"ctl": 50, "io": 50}
#: Calls of the group "io"; all others are control.
_SLOW_CALLS: Final = frozenset[CallName]({"events", "provide"})
#: Pauses between two agents on a node whose agent died although the node lives, seconds; doubling between them.
RECREATE_FIRST_S = 1.0
RECREATE_LONGEST_S = 30.0


class ClusterLostError(FleetError):
    """The head has been started again without its tables: it knows neither us nor the nodes."""


def prepare_node(ray_params: Any, head: bool) -> None:
    """Ray's start hook (RAY_START_HOOK): runs inside `ray start`, before it starts anything.

    Binds the node to loopback where `workers.ray_transport.nodes` asked for it, and ends the node when the program that
    owns it is gone for too long, or its head is another (`ray start` itself would live on). A head is told Redis's
    password.
    """
    parent = os.environ.get(PARENT_VARIABLE, "")
    directory = os.environ.get(DIRECTORY_VARIABLE, "")
    if parent.isdecimal() and directory:
        watch = (Path(directory), int(parent))
        threading.Thread(target=_end_with, args=watch, name="drover-owner-watch", daemon=True).start()
        flags = Path(directory) / FLAGS_FILE
        if head and flags.exists():
            _use_redis_password(ray_params, flags)
        if address := os.environ.get(HEAD_VARIABLE, ""):
            watch_head = (Path(directory), address)
            threading.Thread(target=_end_with_head, args=watch_head, name="drover-head-watch", daemon=True).start()
    if not head and os.environ.get(LOOPBACK_VARIABLE):
        import ray._private.services as ray_services  # noqa: PLC0415 - only inside `ray start`

        # `ray start` takes "this host" for its routable address, also where 127.0.0.1 was asked for (services.py,
        # resolve_ip_for_localhost), and there is no switch.
        ray_services.get_node_ip_address = lambda *_: LOOPBACK
        ray_params.node_ip_address = LOOPBACK


def _use_redis_password(ray_params: Any, flags: Path) -> None:
    """Give Redis's password to `ray start` and to the GCS, in no command line: Ray has no other way, as of 2.60."""
    import ray._private.services as ray_services  # noqa: PLC0415 - only inside `ray start`
    from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER  # noqa: PLC0415

    ray_params.redis_password = read_password(flags)

    def without(start: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *told, **named: start(*told, **{**named, "redis_password": ""})

    def started(command: list[str], process_type: str, *told: Any, **named: Any) -> Any:
        extra = [f"--flagfile={flags}"] if process_type == PROCESS_TYPE_GCS_SERVER else []
        return start_process([*command, *extra], process_type, *told, **named)

    start_process = ray_services.start_ray_process
    ray_services.start_ray_process = started
    ray_services.start_gcs_server = without(ray_services.start_gcs_server)
    ray_services.start_raylet = without(ray_services.start_raylet)


def _end_with(directory: Path, parent: int) -> None:
    watch_owner(directory, parent)
    _end_node()


def _end_with_head(directory: Path, address: str) -> None:
    joined = ""
    while True:
        now = _cluster_at(address)
        if joined and now and now != joined:
            break
        joined = joined or now
        time.sleep(SAME_HEAD_EVERY_S)
    (directory / ENDED_FILE).write_text(_cluster_lost(address))
    _end_node()


def _cluster_at(address: str) -> str:
    """Return the id of the cluster whose head is at `host:port`; "" where none answers."""
    from ray import exceptions  # noqa: PLC0415 - ray reads the environment when it is imported
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # noqa: PLC0415 - no public equal

    host, _, port = address.rpartition(":")
    try:
        # Ray itself takes 40 s to say that nobody listens.
        with socket.create_connection((host.strip("[]"), int(port)), LISTEN_DEADLINE_S):
            pass
        return str(GcsClient(address=address).cluster_id)
    except (OSError, exceptions.RayError):
        return ""


def _cluster_lost(address: str) -> str:
    return f"the Ray head at {address} was started again without its tables and knows nothing of this farm's nodes"


def _end_node() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_GRACE_S)
    # The group holds Ray's servers; the workers' processes end when their raylet is gone.
    os.killpg(0, signal.SIGKILL)


class AgentHost:
    """The actor: hosts the node's `Agent`, made from the settings that the node's environment names.

    Ray runs every concurrency group of an actor in an event loop and thread of its own. The agent knows one loop only,
    so all calls are handed to a thread that is the agent's. It is opened by the first call; a failure to open it is the
    answer of that call, and the next one tries again. Its remote methods are `CALLS`, set below.
    """

    def __init__(self) -> None:
        self._agent: Agent | None = None
        self._loop = asyncio.new_event_loop()
        self._opening = asyncio.Lock()
        threading.Thread(target=self._loop.run_forever, name="drover-agent", daemon=True).start()

    async def answer(self, name: CallName, epoch: int, arguments: Sequence[Any]) -> Any:
        """Have the agent answer in its loop, and return its answer in ours."""

        async def run() -> Any:
            agent = await self._opened()
            return await agent.answer(name, epoch, *arguments)

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), self._loop))

    async def _opened(self) -> Agent:
        async with self._opening:
            if self._agent is None:
                from workers.agent.agent import open_agent  # noqa: PLC0415 - coordinators need not load the agent's tools

                self._agent = await open_agent()
            return self._agent


def _actor_method(name: CallName) -> Callable[..., Awaitable[Any]]:
    async def method(self: AgentHost, *arguments: Any) -> Any:
        # `hello` carries the epoch in its message, every other call before its arguments.
        epoch, rest = (0, arguments) if name == "hello" else (arguments[0], arguments[1:])
        return await self.answer(name, epoch, rest)

    method.__name__ = name
    return method


# One method a call: Ray names a call by its method, and an actor may be older than the coordinator that reaches it.
for _name in CALLS:
    setattr(AgentHost, _name, _actor_method(_name))


@dataclass(frozen=True, slots=True)
class _Node:
    """A node as Ray lists it; `dead` is fulfilled with the reason once Ray confirms its death."""

    node_id: str
    worker: str
    dead: asyncio.Future[str]


@dataclass(frozen=True, slots=True)
class _Listed:
    node_id: str
    worker: str
    alive: bool
    death: str


class _Ray:
    """What is used of ray, typed; every method but `call` may block."""

    def __init__(self, token_file: Path, *, loopback: bool) -> None:
        os.environ.update(ray_env(token_file, base={}, loopback=loopback))
        import ray  # noqa: PLC0415 - ray reads the environment when it is imported

        self._ray: Any = ray
        self._actor_class: Any = None
        self._address = ""
        self._cluster = ""

    def init(self, address: str, node_dir: Path | None) -> None:
        """Connect as a driver."""
        ray = self._ray
        if ray.is_initialized():
            raise FleetError("this process is already connected to a Ray cluster")
        # `init` retries a refused token for 20 s and then only says that it could not connect.
        try:
            self._cluster = str(ray._raylet.GcsClient(address=address).cluster_id)  # noqa: SLF001 - no public equal
        except ray.exceptions.AuthenticationError:
            raise FleetError(f"the Ray head at {address} refuses this farm's token") from None
        logging.getLogger("ray").setLevel(logging.ERROR)
        # Ray prints raylets' complaints to standard output, which belongs to the program.
        ray._private.worker.print_to_stdstream = _log_raylet  # noqa: SLF001 - no public switch
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=False,
            # Ray has no other way to choose among the nodes of one host.
            _temp_dir=str(ray_temp_dir(node_dir)) if node_dir else None,
        )
        self._address = address
        self._actor_class = ray.remote(concurrency_groups=CONCURRENCY)(AgentHost)

    def shutdown(self) -> None:
        """Disconnect; detached agents live on."""
        self._ray.shutdown()

    def nodes(self) -> list[_Listed]:
        """Return all nodes that carry a worker's label, dead ones too; none while the head does not answer.

        Raises `ClusterLostError`.
        """
        if not (now := _cluster_at(self._address)):
            return []
        if now != self._cluster:
            raise ClusterLostError(f"{_cluster_lost(self._address)}; start coordinator and workers again")
        return [
            _Listed(
                node_id=str(node["NodeID"]),
                worker=str(node["Labels"][WORKER_LABEL]),
                alive=bool(node["Alive"]),
                death=str(node.get("DeathReasonMessage") or "no reason given"),
            )
            for node in self._ray.nodes()
            if WORKER_LABEL in (node.get("Labels") or {})
        ]

    def agent(self, node_id: str) -> Any:
        """Return the handle of the node's agent, made if there is none."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415 - as in __init__

        options = self._actor_class.options(
            name=f"agent-{node_id}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        return options.remote()

    def send(self, handle: Any, method: str, group: str, arguments: Sequence[Any]) -> Awaitable[Any]:
        """Send one call, from any thread, and return what an event loop waits for: its answer."""
        reference: Awaitable[Any] = getattr(handle, method).options(concurrency_group=group).remote(*arguments)
        return reference

    def translate(self, error: Exception) -> AgentDead | AgentUnavailable:
        """Say what a failed call means for the agent."""
        known = self._ray.exceptions
        text = first_line(error)
        match error:
            case known.ActorDiedError() | known.NodeDiedError():
                return AgentDead(f"Ray reports that the agent died: {text}")
            case known.ActorUnschedulableError() | known.TaskUnschedulableError():
                return AgentDead(f"the agent's node is gone: {text}")
            case known.ActorUnavailableError() | known.GetTimeoutError():
                return AgentUnavailable(f"Ray does not reach the agent: {text}")
            case known.RayTaskError():
                return AgentUnavailable(f"the agent failed: {text}")
            case _:
                return AgentUnavailable(f"Ray failed: {type(error).__name__}: {text}")


class _ActorCalls:
    """`AgentCalls` of one actor."""

    def __init__(self, ray: _Ray, handle: Any, dead: asyncio.Future[str], epoch: int) -> None:
        self._ray = ray
        self._handle = handle
        self._dead = dead
        self._epoch = epoch

    async def call(self, name: CallName, *arguments: Any, large: bool = False) -> Any:
        """Send, and wait for the answer or the node's death: what comes first."""
        self._raise_if_dead()
        sent = arguments if name == "hello" else (self._epoch, *arguments)

        def send() -> Awaitable[Any]:
            return self._ray.send(self._handle, name, "io" if name in _SLOW_CALLS else "ctl", sent)

        try:
            answer = asyncio.ensure_future(_answered(await asyncio.to_thread(send) if large else send()))
        except Exception as error:
            raise self._ray.translate(error) from error
        try:
            await asyncio.wait((answer, self._dead), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self._raise_if_dead()
            return await answer
        except FleetError:
            raise
        except Exception as error:
            raise self._ray.translate(error) from error
        finally:
            # Ray is not told: a poll that nobody awaits ends by itself after its wait.
            answer.cancel()

    def _raise_if_dead(self) -> None:
        if self._dead.done():
            raise AgentDead(f"Ray reports that the node is dead: {self._dead.result()}")


async def _answered(reference: Awaitable[Any]) -> Any:
    return await reference


class RayFleet(AgentRoster):
    """`workers.wire.fleet.Fleet` over a Ray cluster, to which it is `connected` while it runs.

    `cluster` surrounds every `run`: it brings the cluster's nodes and the connection where the caller has not.
    """

    def __init__(
        self,
        *,
        token_file: Path,
        farm: FarmInfo,
        cluster: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
        discover_every_s: float = DISCOVER_EVERY_S,
    ) -> None:
        super().__init__(farm)
        self._token_file = token_file
        self._cluster = cluster
        self._discover_every_s = discover_every_s
        self._epoch = farm.epoch
        #: The head's `host:port`, once it is known.
        self._address = ""
        self._ray: _Ray | None = None
        self._trouble = ""
        #: Living nodes that get no work, by node id, and what is said of each.
        self._seconds: dict[str, str] = {}
        #: Nodes that are served or known to be dead, by node id; dead ones stay, Ray never revives an id.
        self._nodes: dict[str, _Node] = {}
        self._blocking = BlockingCalls(BLOCKED_CALLS)

    @property
    def trouble(self) -> str:
        """See `Fleet.trouble`."""
        return self._trouble or "; ".join(self._seconds.values())

    @asynccontextmanager
    async def connected(self, address: str, node_dir: Path | None = None) -> AsyncIterator[None]:
        """Connect to the head at `host:port`, and disconnect at the end; agents and builds go on.

        A process can be connected to one cluster at a time (Ray's limit), through a Ray node of its host: the one with
        the private directory `node_dir`, or any, the head's first. Raises `FleetError`: no head there, or it refuses
        the token.
        """
        check_token_file(self._token_file)
        self._address = address
        await self._check_head()

        def connect() -> _Ray:
            ray = _Ray(self._token_file, loopback=is_loopback(address.rpartition(":")[0]))
            ray.init(address, node_dir)
            return ray

        try:
            ray = self._ray = await self._blocking.run(f"connecting to {address}", CONNECT_DEADLINE_S, connect)
        finally:
            _take_signals_back()
        try:
            yield
        finally:
            self._ray = None
            try:
                await self._blocking.run("disconnecting", CLOSE_DEADLINE_S, ray.shutdown)
            except FleetError as failure:
                log.warning("%s", failure)
            finally:
                _take_signals_back()

    async def run(self, sink: Sink) -> None:
        """See `Fleet.run`. Raises what `cluster` raises too."""
        async with self._cluster(), asyncio.TaskGroup() as serving:
            while True:
                # The dead first: they may make room for others of their name.
                for node in sorted(await self._list(), key=lambda listed: listed.alive):
                    self._look_at(node, sink, serving)
                await asyncio.sleep(self._discover_every_s)

    async def _list(self) -> list[_Listed]:
        """Return all nodes; none while the head is away: agents are still reached, and new ones can wait."""
        try:
            await self._check_head()
            listed = await self._blocking.run("listing nodes", DISCOVER_DEADLINE_S, self._driver.nodes)
        except ClusterLostError:
            raise
        except FleetError as error:
            if not self._trouble:
                log.warning("%s; what runs goes on, workers that come wait until it is back", error)
            self._trouble = str(error)
            return []
        if self._trouble:
            log.warning("the Ray head at %s answers again", self._address)
        self._trouble = ""
        return listed

    async def _check_head(self) -> None:
        try:
            await check_listens(self._address)
        except RayNodeError as error:
            raise FleetError(str(error)) from None

    @property
    def _driver(self) -> _Ray:
        if self._ray is None:
            raise FleetError("the Ray fleet is not connected")
        return self._ray

    def _look_at(self, listed: _Listed, sink: Sink, serving: asyncio.TaskGroup) -> None:
        known = self._nodes.get(listed.node_id)
        if listed.alive and known is None and not self._is_second(listed):
            dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            node = self._nodes[listed.node_id] = _Node(listed.node_id, listed.worker, dead)
            serving.create_task(self._serve(node, sink), name=f"serve {listed.worker}")
        elif not listed.alive:
            self._seconds.pop(listed.node_id, None)
            if known is not None and not known.dead.done():
                known.dead.set_result(listed.death)

    def _is_second(self, listed: _Listed) -> bool:
        """Whether another living node has the worker's name: two would take each other's leases in turn."""
        if not any(node.worker == listed.worker and not node.dead.done() for node in self._nodes.values()):
            self._seconds.pop(listed.node_id, None)
            return False
        if listed.node_id not in self._seconds:
            said = f"two Ray nodes are called {listed.worker}; the later one gets no work until the other is gone"
            log.warning("%s", said)
            self._seconds[listed.node_id] = said
        return True

    async def _serve(self, node: _Node, sink: Sink) -> None:
        """Keep one agent on the node for as long as the node lives."""
        ray = self._driver
        pause_s = RECREATE_FIRST_S
        try:
            while not node.dead.done():
                began = time.monotonic()
                try:
                    handle = await self._blocking.run(
                        f"creating the agent of {node.worker}", CREATE_DEADLINE_S, lambda: ray.agent(node.node_id)
                    )
                    await self.serve(node.worker, _ActorCalls(ray, handle, node.dead, self._epoch), sink)
                except AgentUnavailable as error:
                    log.warning("worker %s has no agent: %s", node.worker, error)
                if time.monotonic() - began > RECREATE_LONGEST_S:
                    pause_s = RECREATE_FIRST_S
                await asyncio.wait((node.dead,), timeout=pause_s)
                pause_s = min(pause_s * 2, RECREATE_LONGEST_S)
        finally:
            if not node.dead.done():
                # Cancelled: a later `run` shall find the node again.
                del self._nodes[node.node_id]


def _take_signals_back() -> None:
    """Undo what Ray does to signals behind Python's back.

    Connecting installs a handler in C that prints a stack trace at SIGTERM, and disconnecting leaves the default
    action, which is death; in both cases Python goes on believing in its own handler. (From another thread this cannot
    be mended; a program that runs its loop there handles no signals in it either.)
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            if handler is not None:
                signal.signal(number, handler)
                signal.siginterrupt(number, False)


def _log_raylet(data: dict[str, Any], *_: Any, **__: Any) -> None:
    for line in data.get("lines", ()):
        log.info("ray: %s", str(line).partition("\n")[0])
