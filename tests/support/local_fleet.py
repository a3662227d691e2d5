"""A fleet of agents in this process: for tests of a coordinator and for looking into a farm with a debugger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from workers.agent.agent import Agent
from workers.errors import WorkerError
from workers.wire.fleet import Fleet, Sink
from workers.wire.messages import LONG_POLL_S, CallName, FarmInfo
from workers.wire.polling import AgentRoster, AgentUnavailable


class LocalCalls:
    """`AgentCalls` of an agent in the same process and event loop."""

    def __init__(self, agent: Agent, epoch: int) -> None:
        self._agent = agent
        self._epoch = epoch

    async def call(self, name: CallName, *arguments: Any, large: bool = False) -> Any:  # noqa: ARG002
        """See `AgentCalls`; nothing is copied."""
        try:
            return await self._agent.answer(name, self._epoch, *arguments)
        except WorkerError as error:
            raise AgentUnavailable(str(error)) from error


class InProcessFleet(AgentRoster):
    """The `Fleet` port over agents that somebody else starts and closes."""

    def __init__(self, farm: FarmInfo, agents: Sequence[Agent], *, long_poll_s: float = LONG_POLL_S) -> None:
        super().__init__(farm)
        self._agents = tuple(agents)
        self._epoch = farm.epoch
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
                    self.serve(agent.name, LocalCalls(agent, self._epoch), sink, long_poll_s=self._long_poll_s),
                    name=f"poll {agent.name}",
                )
            await asyncio.Event().wait()


@asynccontextmanager
async def no_workers(info: FarmInfo) -> AsyncIterator[Fleet]:
    """Give a farm a fleet without agents."""
    yield InProcessFleet(info, [])
