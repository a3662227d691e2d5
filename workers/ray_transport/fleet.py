"""The fleet over Ray: one long-lived detached agent actor per labelled node, reached by short calls.

The calls of each step go over a connection beside Ray (`line`), which is only faster.

Ray carries messages and knows which nodes live; it decides nothing. Rules:

* ray reads its settings when it is imported, so the first import happens in `RayDriver`, after the environment is set.
* Whatever may block (connecting, creating an actor, listing nodes: without bound while the head is away) runs in a
  daemon thread with a deadline; at most `BLOCKED_CALLS` threads may hang at once.
* An actor never restarts and its calls are never retried by Ray: a repeat is this program's decision, and every call of
  the protocol may be repeated.
* A head that was started again without its tables is another cluster. Ray ends the process of a driver that asks it
  something, and lets nodes wait for ever: so driver and nodes look for it first, and end by themselves.
* A node that Ray drains gets no new leases: its agent is told to drain. What runs there runs on; what the end of the
  node ends is lost with it, and done elsewhere.
* Ray takes a node with an agent for busy. So where an autoscaler is asked for nodes, an agent ends once it has had
  nothing to do for a while and nothing that fits its node is asked for; its node has another one as soon as it is.
* Only Ray's own word is a death: the actor died, or its node is no longer alive. Everything else is "unknown".
* Messages are plain dicts, lists and bytes; classes cross by reference, so all nodes run the same installation.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.retry import Outage
from workers.ray_transport.access import RayNodeError, check_token_file, is_loopback
from workers.ray_transport.blocking_calls import BlockingCalls
from workers.ray_transport.driver import ActorCalls, ClusterLostError, ListedNode, RayDriver
from workers.ray_transport.head_port import check_listens
from workers.ray_transport.offers import NodeBundle
from workers.wire.fleet import FleetError, FleetEvent, Sink, WorkerConnected, WorkerGone, WorkerSpoke
from workers.wire.messages import FarmInfo, LeaseOrder
from workers.wire.polling import AgentRoster, AgentUnavailable

_log = logging.getLogger(__name__)

#: Seconds for connecting to the head, for one look at the nodes, for creating one actor, and for disconnecting.
CONNECT_DEADLINE_S = 60.0
DISCOVER_DEADLINE_S = 20.0
CREATE_DEADLINE_S = 60.0
CLOSE_DEADLINE_S = 20.0
#: Seconds between two looks at Ray's list of nodes; so many times as long once it has been the same for a while.
DISCOVER_EVERY_S = 1.0
LONGER_WHEN_QUIET = 4
QUIET_AFTER_S = 30.0
#: Seconds without work after which an agent ends where an autoscaler may end its node, and what is said of it.
REST_AFTER_S = 120.0
RESTS = "nothing is there to be done on it, and Ray may end its node; it is back once something is"
#: Threads that may hang in Ray at one time.
BLOCKED_CALLS = 16
#: Pauses between two agents on a node whose agent died although the node lives, seconds; doubling between them.
RECREATE_FIRST_S = 1.0
RECREATE_LONGEST_S = 30.0


@dataclass(slots=True, eq=False)
class _Node:
    """A node as Ray lists it; `dead` is fulfilled with the reason once Ray confirms its death."""

    node_id: str
    worker: str
    labels: Mapping[str, str]
    dead: asyncio.Future[str]
    #: Clear while it has no agent, for want of anything to do.
    wanted: asyncio.Event
    #: When its agent last had something to do or was wanted, and Ray's handle of it.
    busy_at: float = 0.0
    agent: Any = None


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
        rest_after_s: float = REST_AFTER_S,
    ) -> None:
        super().__init__(farm)
        self._rest_after_s = rest_after_s
        #: What was requested last; None while no autoscaler is asked.
        self._requested: Sequence[NodeBundle] | None = None
        self._token_file = token_file
        self._cluster = cluster
        self._discover_every_s = discover_every_s
        self._epoch = farm.epoch
        #: The head's `host:port`, once it is known.
        self._address = ""
        self._ray: RayDriver | None = None
        #: The head does not answer.
        self._outage = Outage(
            _log, "what runs goes on, workers that come wait until it is back", over="the Ray head answers again"
        )
        #: Living nodes that get no work, by node id, and the message about each.
        self._seconds: dict[str, str] = {}
        #: Nodes that are served or known to be dead, by node id; dead ones stay, Ray never revives an id.
        self._nodes: dict[str, _Node] = {}
        #: Ids of nodes that Ray drains and whose agents know it, or are being told.
        self._drained: set[str] = set()
        self._blocking = BlockingCalls(BLOCKED_CALLS)

    @property
    def trouble(self) -> str:
        """See `Fleet.trouble`."""
        return self._outage.trouble or "; ".join(self._seconds.values())

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

        def connect() -> RayDriver:
            ray = RayDriver(self._token_file, loopback=is_loopback(address.rpartition(":")[0]))
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
                _log.warning("%s", failure)
            finally:
                _take_signals_back()

    async def run(self, sink: Sink) -> None:
        """See `Fleet.run`. Raises what `cluster` raises too."""
        before: list[ListedNode] = []
        changed_at = time.monotonic()
        async with self._cluster(), asyncio.TaskGroup() as serving:
            while True:
                # The dead first: they may make room for others of their name.
                nodes = sorted(await self._list(), key=lambda listed: (listed.alive, listed.node_id))
                for node in nodes:
                    self._look_at(node, sink, serving)
                self._let_rest(serving)
                if nodes != before or self._outage.trouble:
                    before, changed_at = nodes, time.monotonic()
                quiet = time.monotonic() - changed_at > QUIET_AFTER_S
                await asyncio.sleep(self._discover_every_s * (LONGER_WHEN_QUIET if quiet else 1))

    async def request_nodes(self, bundles: Sequence[NodeBundle]) -> None:
        """Have the cluster's autoscaler provide nodes for all of these, in place of what was requested before.

        It is a hint, and none where the cluster has no autoscaler. Raises `FleetError`.
        """
        ray = self._driver
        self._requested = bundles
        for node in self._nodes.values():
            self._is_wanted(node)
        await self._blocking.run("asking the autoscaler", DISCOVER_DEADLINE_S, lambda: ray.request_nodes(bundles))

    async def start_many(self, worker: str, orders: Sequence[LeaseOrder]) -> None:
        """See `Fleet.start_many`."""
        for node in self._nodes.values():
            if node.worker == worker:
                node.busy_at = time.monotonic()
        await super().start_many(worker, orders)

    def _is_wanted(self, node: _Node) -> bool:
        """Return whether a node fits what is requested; it gets an agent then, if it has none."""
        requested = self._requested
        wanted = requested is None or any(each.labels.items() <= node.labels.items() for each in requested)
        if wanted:
            node.busy_at = time.monotonic()
            node.wanted.set()
        return wanted

    def _let_rest(self, serving: asyncio.TaskGroup) -> None:
        """End the agents that have had nothing to do for long, on nodes that fit nothing that is requested."""
        for node in self._nodes.values():
            idle_s = time.monotonic() - node.busy_at
            if node.dead.done() or self._is_wanted(node) or node.agent is None or idle_s < self._rest_after_s:
                continue
            node.wanted.clear()
            serving.create_task(self._end_agent(node), name=f"rest {node.worker}")

    async def _end_agent(self, node: _Node) -> None:
        ray, agent, node.agent = self._driver, node.agent, None
        try:
            await self._blocking.run(
                f"ending the agent of {node.worker}", CREATE_DEADLINE_S, lambda: ray.end_agent(agent)
            )
        except FleetError as error:
            _log.warning("worker %s does not rest: %s", node.worker, error)
            node.wanted.set()

    async def _list(self) -> list[ListedNode]:
        """Return all nodes; none while the head is away: agents are still reached, and new ones can wait."""
        try:
            listed = await self._blocking.run("listing nodes", DISCOVER_DEADLINE_S, self._driver.nodes)
            if listed is None:
                # For its reason.
                await self._check_head()
                return []
        except ClusterLostError:
            raise
        except FleetError as error:
            self._outage.begin(str(error))
            return []
        self._outage.end()
        return listed

    async def _check_head(self) -> None:
        try:
            await check_listens(self._address)
        except RayNodeError as error:
            raise FleetError(str(error)) from None

    @property
    def _driver(self) -> RayDriver:
        if self._ray is None:
            raise FleetError("the Ray fleet is not connected")
        return self._ray

    def _look_at(self, listed: ListedNode, sink: Sink, serving: asyncio.TaskGroup) -> None:
        known = self._nodes.get(listed.node_id)
        if listed.alive and known is None and not self._is_second(listed):
            dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            node = _Node(listed.node_id, listed.worker, listed.labels, dead, asyncio.Event())
            # It may have an agent with builds.
            node.wanted.set()
            self._nodes[listed.node_id] = node
            serving.create_task(self._serve(node, sink), name=f"serve {listed.worker}")
        elif listed.draining and known is not None and listed.node_id not in self._drained:
            self._drained.add(listed.node_id)
            serving.create_task(self._drain(listed), name=f"drain {listed.worker}")
        elif not listed.alive:
            self._seconds.pop(listed.node_id, None)
            self._drained.discard(listed.node_id)
            if known is not None and not known.dead.done():
                known.dead.set_result(listed.death)

    async def _drain(self, listed: ListedNode) -> None:
        """Let a node that Ray drains have no new leases; the next look tries again where its agent is not reached."""
        try:
            await self.drain(listed.worker, on=True)
        except FleetError:
            self._drained.discard(listed.node_id)
        else:
            ends = time.strftime(" and ends it at %H:%M:%S", time.localtime(listed.ends_at)) if listed.ends_at else ""
            _log.warning("Ray drains the node of worker %s%s; it gets no new work", listed.worker, ends)

    def _is_second(self, listed: ListedNode) -> bool:
        """Return whether another living node has the worker's name: two would take each other's leases in turn."""
        if not any(node.worker == listed.worker and not node.dead.done() for node in self._nodes.values()):
            self._seconds.pop(listed.node_id, None)
            return False
        if listed.node_id not in self._seconds:
            reason = f"two Ray nodes are called {listed.worker}; the later one gets no work until the other is gone"
            _log.warning("%s", reason)
            self._seconds[listed.node_id] = reason
        return True

    async def _serve(self, node: _Node, sink: Sink) -> None:
        """Keep one agent on the node for as long as the node lives."""
        ray = self._driver
        pause_s = RECREATE_FIRST_S

        async def receive(event: FleetEvent) -> None:
            if isinstance(event, WorkerConnected) or (
                isinstance(event, WorkerSpoke) and (event.batch.leases or event.batch.events)
            ):
                node.busy_at = time.monotonic()
            if isinstance(event, WorkerGone) and not node.wanted.is_set():
                event = replace(event, reason=RESTS)
            await sink(event)

        try:
            while not node.dead.done():
                await _first_of(node.wanted, node.dead)
                began = node.busy_at = time.monotonic()
                try:
                    handle = await self._blocking.run(
                        f"creating the agent of {node.worker}", CREATE_DEADLINE_S, lambda: ray.agent(node.node_id)
                    )
                    node.agent = handle
                    calls = ActorCalls(ray, handle, node.dead, self._epoch)
                    try:
                        await self.serve(node.worker, calls, receive)
                    finally:
                        await calls.close()
                except AgentUnavailable as error:
                    _log.warning("worker %s has no agent: %s", node.worker, error)
                if time.monotonic() - began > RECREATE_LONGEST_S:
                    pause_s = RECREATE_FIRST_S
                await asyncio.wait((node.dead,), timeout=pause_s)
                pause_s = min(pause_s * 2, RECREATE_LONGEST_S)
        finally:
            if not node.dead.done():
                # Cancelled: a later `run` shall find the node again.
                del self._nodes[node.node_id]


async def _first_of(wanted: asyncio.Event, dead: asyncio.Future[str]) -> None:
    """Wait for either."""
    waiting = asyncio.ensure_future(wanted.wait())
    try:
        await asyncio.wait((waiting, dead), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


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
