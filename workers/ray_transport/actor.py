"""The actor on each node, which hosts the node's `Agent` and has one remote method for each worker call."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from workers.ray_transport.line import LINE_FIELD, LineOffer
from workers.ray_transport.line_server import LineServer
from workers.ray_transport.signal_looks import SignalLooks
from workers.ray_transport.timer_slack import USUAL_SLACK_NS, set_timer_slack
from workers.wire.messages import CALLS, CallName

if TYPE_CHECKING:
    from workers.agent.agent import Agent

_log = logging.getLogger(__name__)

#: Calls that one agent serves at a time: control must get through while polls are parked.
CONCURRENCY = {"ctl": 50, "io": 50}
#: Set where Ray uses TLS, which lines do not.
TLS_VARIABLE = "RAY_USE_TLS"
#: Calls of the group "io"; all others are control.
SLOW_CALLS: Final = frozenset[CallName]({"events", "provide"})


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
        #: Where it listens for lines; None where it cannot, or before it was greeted.
        self._lines: LineServer | None = None
        self._line: LineOffer | None = None
        self._looks = SignalLooks()
        if (raylet := sys.modules.get("ray._raylet")) is not None:
            self._looks.take_over(raylet)
        threading.Thread(target=self._run, name="drover-agent", daemon=True).start()

    def _run(self) -> None:
        # Builds inherit it, and would sleep for longer than they mean to.
        set_timer_slack(USUAL_SLACK_NS)
        self._loop.run_forever()

    async def answer(self, name: CallName, epoch: int, arguments: Sequence[Any]) -> Any:
        """Have the agent answer in its loop, and return its answer in ours."""

        async def run() -> Any:
            with self._looks.call():
                agent = await self._opened()
                answer = await agent.answer(name, epoch, *arguments)
            if name == "hello" and (offer := await self._offer()) is not None:
                # For the coordinator's end of the transport; what does not know it passes over it.
                answer[LINE_FIELD] = msgspec.to_builtins(offer, builtin_types=(bytes,))
            return answer

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), self._loop))

    async def _opened(self) -> Agent:
        async with self._opening:
            if self._agent is None:
                from workers.agent.agent import open_agent  # noqa: PLC0415 - coordinators need not load the agent's tools

                self._agent = await open_agent()
            return self._agent

    async def _offer(self) -> LineOffer | None:
        """Listen for lines, once; return what a greeting says of it."""
        if self._lines is None and not os.environ.get(TLS_VARIABLE):
            self._lines = LineServer(self._answer_over_line)
            try:
                self._line = await self._lines.listen(_address())
            except OSError as error:
                _log.warning("no lines to this worker, so each call goes through Ray: %s", error)
        return self._line

    async def _answer_over_line(self, name: CallName, arguments: Sequence[Any]) -> Any:
        epoch, *rest = arguments
        return await (await self._opened()).answer(name, epoch, *rest)


def _address() -> str:
    """Return the address by which Ray's other processes reach this one."""
    import ray  # noqa: PLC0415 - as in `driver`; here it is loaded

    address: Any = ray.util.get_node_ip_address
    return str(address())


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
