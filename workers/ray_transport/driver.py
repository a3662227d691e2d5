"""Ray as the fleet uses it, typed: this process as a driver, and the calls of one actor."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.ray_transport.access import ray_env
from workers.ray_transport.actor import CONCURRENCY, SLOW_CALLS, AgentHost
from workers.ray_transport.blocking_calls import first_line
from workers.ray_transport.cluster_identity import cluster_at, cluster_lost
from workers.ray_transport.line import (
    LINE_CALLS,
    LINE_FIELD,
    CallFailedError,
    LineLostError,
    LineTooSmallError,
    read_offer,
)
from workers.ray_transport.line_keeper import LineKeeper
from workers.ray_transport.node_process import ray_temp_dir
from workers.ray_transport.nodes import WORKER_LABEL
from workers.ray_transport.offers import NodeBundle
from workers.ray_transport.timer_slack import with_ray_slack
from workers.wire.fleet import FleetError
from workers.wire.messages import CallName
from workers.wire.polling import AgentDead, AgentUnavailable

_log = logging.getLogger(__name__)

NAMESPACE = "drover"


class ClusterLostError(FleetError):
    """The head has been started again without its tables: it knows neither us nor the nodes."""


@dataclass(frozen=True, slots=True)
class ListedNode:
    """A node of a worker as Ray lists it; `death` is the reason that it is no longer alive."""

    node_id: str
    worker: str
    alive: bool
    death: str
    labels: Mapping[str, str]
    #: Ray wants to end it, for good: its autoscaler, a cloud that takes the machine back, or `ray drain-node`.
    draining: bool = False
    #: Unix time at which it is ended whatever runs there; 0.0: none is said.
    ends_at: float = 0.0


class RayDriver:
    """The part of Ray that the product uses, typed; every method but `call` may block."""

    def __init__(self, token_file: Path, *, loopback: bool) -> None:
        os.environ.update(ray_env(token_file, base={}, loopback=loopback))
        import ray  # noqa: PLC0415 - ray reads the environment when it is imported

        self._ray: Any = ray
        self._actor_class: Any = None
        self._address = ""
        self._cluster = ""

    def init(self, address: str, node_dir: Path | None) -> None:
        """Connect as a driver."""
        with with_ray_slack():
            self._init(address, node_dir)

    def _init(self, address: str, node_dir: Path | None) -> None:
        ray = self._ray
        if ray.is_initialized():
            raise FleetError("this process is already connected to a Ray cluster")
        # `init` retries a refused token for 20 s and then only says that it could not connect.
        try:
            self._cluster = str(ray._raylet.GcsClient(address=address).cluster_id.hex())  # noqa: SLF001 - no public equal
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

    def nodes(self) -> list[ListedNode] | None:
        """Return all nodes that carry a worker's label, dead ones too; None while the head does not answer.

        Raises `ClusterLostError`.
        """
        if not (now := cluster_at(self._address)):
            return None
        if now != self._cluster:
            raise ClusterLostError(f"{cluster_lost(self._address)}; start coordinator and workers again")
        draining: dict[str, int] = self._ray._private.state.state.get_draining_nodes()  # noqa: SLF001 - as Ray's own libraries
        return [
            ListedNode(
                node_id=str(node["NodeID"]),
                worker=str(node["Labels"][WORKER_LABEL]),
                alive=bool(node["Alive"]),
                death=str(node.get("DeathReasonMessage") or "no reason given"),
                labels=dict(node["Labels"]),
                draining=bool(node["Alive"]) and node["NodeID"] in draining,
                ends_at=draining.get(node["NodeID"], 0) / 1000,
            )
            for node in self._ray.nodes()
            if WORKER_LABEL in (node.get("Labels") or {})
        ]

    def request_nodes(self, bundles: Sequence[NodeBundle]) -> None:
        """Have the cluster's autoscaler, where it has one, provide nodes for all of these; none: only what is used."""
        from ray.autoscaler.sdk import request_resources  # noqa: PLC0415 - as in __init__

        request_resources(
            bundles=[dict(bundle.resources) for bundle in bundles],
            bundle_label_selectors=[dict(bundle.labels) for bundle in bundles],
        )

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

    def end_agent(self, handle: Any) -> None:
        """End an agent for good; its node may have another one."""
        self._ray.kill(handle)

    def send(self, handle: Any, method: str, group: str, arguments: Sequence[Any]) -> Awaitable[Any]:
        """Send one call, from any thread, and return what an event loop waits for: its answer."""
        reference: Awaitable[Any] = getattr(handle, method).options(concurrency_group=group).remote(*arguments)
        return reference

    def translate(self, error: Exception) -> AgentDead | AgentUnavailable:
        """Return what a failed call means for the agent."""
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


class ActorCalls:
    """`AgentCalls` of one actor: through Ray, or over a line while there is one. Must be closed."""

    def __init__(self, ray: RayDriver, handle: Any, dead: asyncio.Future[str], epoch: int) -> None:
        self._ray = ray
        self._handle = handle
        self._dead = dead
        self._epoch = epoch
        self._lines = LineKeeper()
        dead.add_done_callback(self._died)

    async def call(self, name: CallName, *arguments: Any, large: bool = False) -> Any:
        """Send, and wait for the answer or the node's death: what comes first."""
        self._raise_if_dead()
        sent = arguments if name == "hello" else (self._epoch, *arguments)
        if name in LINE_CALLS and not large and (line := self._lines.line) is not None:
            try:
                return await line.call(name, sent)
            except CallFailedError as error:
                raise AgentUnavailable(f"the agent failed: {error}") from None
            except (LineLostError, LineTooSmallError) as error:
                # Each of these calls may be repeated, whatever became of it.
                _log.debug("`%s` goes through Ray: %s", name, error)
        answer = await self._through_ray(name, sent, large=large)
        if name == "hello" and isinstance(answer, dict):
            self._lines.offered(read_offer(answer.pop(LINE_FIELD, None)))
        return answer

    @property
    def has_line(self) -> bool:
        """True while calls go over a line."""
        return self._lines.line is not None

    def hang_up(self) -> None:
        """End the line, if there is one: what is on its way goes through Ray, as all does until there is another."""
        if self._lines.line is not None:
            self._lines.line.hang_up()

    async def close(self) -> None:
        """End the line for good."""
        self._dead.remove_done_callback(self._died)
        await self._lines.close()

    async def _through_ray(self, name: CallName, sent: Sequence[Any], *, large: bool) -> Any:
        self._raise_if_dead()

        def send() -> Awaitable[Any]:
            return self._ray.send(self._handle, name, "io" if name in SLOW_CALLS else "ctl", sent)

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
            # Not cancelled in Ray: a poll without a waiter ends by itself after its wait.
            answer.cancel()

    def _died(self, _: asyncio.Future[str]) -> None:
        """Let calls over a line to a machine that is gone fail now: it may never say so itself."""
        self.hang_up()

    def _raise_if_dead(self) -> None:
        if self._dead.done():
            raise AgentDead(f"Ray reports that the node is dead: {self._dead.result()}")


async def _answered(reference: Awaitable[Any]) -> Any:
    return await reference


def _log_raylet(data: dict[str, Any], *_: Any, **__: Any) -> None:
    for line in data.get("lines", ()):
        _log.info("ray: %s", str(line).partition("\n")[0])
