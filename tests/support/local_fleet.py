"""A fleet of agents in this process: for tests of a coordinator and for looking into a farm with a debugger."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from workers.agent.agent import Agent
from workers.errors import WorkerError
from workers.wire.fleet import Sink
from workers.wire.messages import LONG_POLL_S, FarmInfo, Lease, LeaseOrder, Output
from workers.wire.polling import AgentRoster, AgentUnavailable

T = TypeVar("T")


class LocalCalls:
    """`AgentCalls` of an agent in the same process and event loop."""

    def __init__(self, agent: Agent, epoch: int) -> None:
        self._agent = agent
        self._epoch = epoch

    async def hello(self, farm: dict[str, Any]) -> dict[str, Any]:
        """See `AgentCalls`."""
        return await _told(self._agent.hello(farm))

    async def start_many(self, orders: list[dict[str, Any]]) -> None:
        """See `AgentCalls`."""
        await _told(self._now.start_many(orders))

    async def events(self, ack: int, max_bytes: int, wait_s: float) -> dict[str, Any]:
        """See `AgentCalls`."""
        return await _told(self._now.events(ack, max_bytes, wait_s))

    async def cancel(self, leases: list[dict[str, Any]]) -> None:
        """See `AgentCalls`."""
        await _told(self._now.cancel(leases))

    async def drain(self, on: bool) -> None:
        """See `AgentCalls`."""
        await _told(self._now.drain(on))

    async def provide(self, paths: list[str], token: str) -> list[dict[str, Any]]:
        """See `AgentCalls`."""
        return await _told(self._now.provide(paths, token))

    @property
    def _now(self) -> Agent:
        """The agent, for a call at once. Raises `AgentUnavailable` where it follows a later coordinator."""
        try:
            self._agent.require_reign(self._epoch)
        except WorkerError as error:
            raise AgentUnavailable(str(error)) from error
        return self._agent


async def _told(call: Awaitable[T]) -> T:
    try:
        return await call
    except WorkerError as error:
        raise AgentUnavailable(str(error)) from error


class InProcessFleet:
    """The `Fleet` port over agents that somebody else starts and closes."""

    def __init__(self, farm: FarmInfo, agents: Sequence[Agent], *, long_poll_s: float = LONG_POLL_S) -> None:
        self._agents = tuple(agents)
        self._epoch = farm.epoch
        self._roster = AgentRoster(farm)
        self._long_poll_s = long_poll_s

    @property
    def trouble(self) -> str:
        """See `Fleet`."""
        return ""

    async def run(self, sink: Sink) -> None:
        """Serve until cancelled. What the sink raises ends it."""
        async with asyncio.TaskGroup() as group:
            for agent in self._agents:
                group.create_task(
                    self._roster.serve(agent.name, LocalCalls(agent, self._epoch), sink, long_poll_s=self._long_poll_s),
                    name=f"poll {agent.name}",
                )
            await asyncio.Event().wait()

    async def start_many(self, worker: str, orders: Sequence[LeaseOrder]) -> None:
        """See `Fleet`."""
        await self._roster.start_many(worker, orders)

    async def cancel(self, worker: str, leases: Sequence[Lease]) -> None:
        """See `Fleet`."""
        await self._roster.cancel(worker, leases)

    async def drain(self, worker: str, *, on: bool) -> None:
        """See `Fleet`."""
        await self._roster.drain(worker, on=on)

    async def provide(self, worker: str, paths: Sequence[str], token: str) -> tuple[Output, ...]:
        """See `Fleet`."""
        return await self._roster.provide(worker, paths, token)
