"""The transport-independent half of a fleet adapter: greet an agent, poll it, acknowledge what is safe.

An adapter is an `AgentRoster`: it finds agents and gives each to `serve` as `AgentCalls`, which carries one call.
`serve` keeps exactly one `events` call outstanding per agent and hands everything to the sink in order:

    hello -> WorkerConnected;  events -> WorkerSpoke, acknowledged with the next call, after the sink returned;
    AgentUnavailable -> WorkerSilent once, then hello again with growing pauses until it answers;
    NotKnownError from the sink -> hello again; nothing is acknowledged;
    AgentDead -> WorkerGone, and `serve` returns.

Unknown is never dead: only the transport may raise `AgentDead`. How long silence is suffered is the scheduler's affair.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from pydantic import ValidationError

from infra.retry import Backoff, Outage
from workers.wire.fleet import FleetError, NotKnownError, Sink, WorkerConnected, WorkerGone, WorkerSilent, WorkerSpoke
from workers.wire.messages import (
    BULK_BATCH_BYTES,
    LONG_POLL_S,
    OUTPUTS,
    PROTOCOL_VERSION,
    Batch,
    CallName,
    FarmInfo,
    Hello,
    InputHint,
    Introduction,
    Lease,
    LeaseOrder,
    Output,
)

_log = logging.getLogger(__name__)

#: Seconds that one short call (everything but `events`) may take.
CALL_DEADLINE_S = 20.0
#: Seconds for sending a NAR again, which may be large.
PROVIDE_DEADLINE_S = 3600.0
#: Seconds that `events` may take beyond its own wait.
POLL_GRACE_S = 20.0
#: First and longest pause between two tries to reach a silent agent, seconds; it doubles between them.
RETRY_FIRST_S = 0.2
RETRY_LONGEST_S = 5.0
#: Seconds before an agent is greeted again that the farm takes for another one: two of one name must not take turns
#: without end at full speed.
GREET_AGAIN_S = 1.0
#: Leases in one `start_many` or `cancel` call; more are split.
ORDERS_PER_CALL = 256
#: Bytes of derivations in one `start_many` call, unless it has one lease only.
DERIVATION_BYTES_PER_CALL = 16 * 1024 * 1024
#: Bytes of derivations from which on a call is made ready, and copied, beside the event loop.
LARGE_CALL_BYTES = 1024 * 1024


class AgentUnavailable(FleetError):  # noqa: N818 - a state of the agent, like the transport's own word for it
    """The call did not get through or was not answered in time; whether it took effect is unknown."""


class AgentDead(FleetError):  # noqa: N818 - as above
    """The transport has confirmed that the agent behind this handle is gone for good."""


class AgentCalls(Protocol):
    """One agent over some transport, for one coordinator's epoch."""

    async def call(self, name: CallName, *arguments: Any, large: bool = False) -> Any:
        """Send one call of `workers.wire.messages` and return its answer, both in plain containers.

        `large` marks arguments of more than LARGE_CALL_BYTES, which the event loop should not copy. Safe to cancel. The
        caller keeps the deadline, so the transport may wait without one. Raises `AgentUnavailable` or `AgentDead` only.
        """


async def _in_time(calls: AgentCalls, deadline_s: float, name: CallName, *arguments: Any, large: bool = False) -> Any:
    try:
        async with asyncio.timeout(deadline_s):
            return await calls.call(name, *arguments, large=large)
    except TimeoutError:
        raise AgentUnavailable(f"the agent did not answer `{name}` within {deadline_s:.0f} s") from None


async def greet(calls: AgentCalls, farm: FarmInfo) -> Hello:
    """Introduce both sides. Raises `AgentUnavailable` (also for an answer that cannot be read) or `AgentDead`."""
    answer = await _in_time(calls, CALL_DEADLINE_S, "hello", farm.dump())
    try:
        # Before all else, which another protocol may say in another way.
        if (spoken := Introduction.model_validate(answer).protocol) != PROTOCOL_VERSION:
            raise AgentUnavailable(
                f"the agent speaks protocol {spoken}, this coordinator {PROTOCOL_VERSION}; update the older one"
            )
        return Hello.model_validate(answer)
    except ValidationError as error:
        raise AgentUnavailable(f"the agent's greeting cannot be read ({error.error_count()} errors)") from None


async def poll_agent(
    name: str,
    calls: AgentCalls,
    farm: FarmInfo,
    sink: Sink,
    *,
    on_hello: Callable[[Hello], None] | None = None,
    long_poll_s: float = LONG_POLL_S,
) -> None:
    """Serve one agent until it is dead (returns after `WorkerGone`) or this task is cancelled.

    `name` stands for the worker until its `Hello` names it. `on_hello` runs before the sink receives `WorkerConnected`,
    so that the adapter can route orders to it. What the sink raises is raised here.
    """
    hello: Hello | None = None
    ack = 0
    silence = Outage(_log, "it is asked again", over=f"worker {name} answers again")
    backoff = Backoff(RETRY_FIRST_S, RETRY_LONGEST_S)
    while True:
        try:
            previous, hello = hello, await greet(calls, farm)
            if previous is None or previous.incarnation != hello.incarnation:
                ack = 0
            name = hello.worker
            if on_hello is not None:
                on_hello(hello)
            await sink(WorkerConnected(hello))
            while True:
                asked_at = time.monotonic()
                batch = await _next_batch(calls, ack, long_poll_s)
                took_s = time.monotonic() - asked_at
                backoff.reset()
                silence.end()
                if batch.incarnation != hello.incarnation:
                    break
                await sink(WorkerSpoke(name, batch, took_s))
                ack = batch.last
        except AgentDead as error:
            await sink(WorkerGone(name, hello.incarnation if hello else "", str(error)))
            return
        except NotKnownError as error:
            _log.warning("%s; it is greeted again", error)
            await asyncio.sleep(GREET_AGAIN_S)
        except AgentUnavailable as error:
            if silence.begin(f"worker {name} does not answer: {error}"):
                await sink(WorkerSilent(name, hello.incarnation if hello else "", str(error)))
            await backoff.pause()


async def _next_batch(calls: AgentCalls, ack: int, wait_s: float) -> Batch:
    answer = await _in_time(calls, wait_s + POLL_GRACE_S, "events", ack, BULK_BATCH_BYTES, wait_s)
    try:
        return Batch.model_validate(answer)
    except ValidationError as error:
        raise AgentUnavailable(f"the agent's events cannot be read ({error.error_count()} errors)") from None


class AgentRoster:
    """The agents that answer now, by worker name: the sending half of a `Fleet`, which every adapter inherits."""

    def __init__(self, farm: FarmInfo) -> None:
        self._farm = farm
        #: Only agents whose greeting has been read; an entry goes when its `serve` ends.
        self._calls: dict[str, AgentCalls] = {}

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of the agents that have been greeted and are not known to be gone."""
        return tuple(self._calls)

    async def serve(self, name: str, calls: AgentCalls, sink: Sink, *, long_poll_s: float = LONG_POLL_S) -> None:
        """`poll_agent`, and route orders to the agent meanwhile; a later one of the same name takes the route."""
        names: set[str] = set()

        def connected(hello: Hello) -> None:
            names.add(hello.worker)
            self._calls[hello.worker] = calls

        try:
            await poll_agent(name, calls, self._farm, sink, on_hello=connected, long_poll_s=long_poll_s)
        finally:
            for known in names:
                if self._calls.get(known) is calls:
                    del self._calls[known]

    async def start_many(self, worker: str, orders: Sequence[LeaseOrder]) -> None:
        """Hand over leases. Raises `FleetError` where the worker is unknown or could not be reached in time."""
        for portion in _portions(orders):
            large = sum(len(order.derivation) for order in portion) > LARGE_CALL_BYTES
            part = await asyncio.to_thread(_dumped, portion) if large else _dumped(portion)
            await _in_time(self.calls_of(worker), CALL_DEADLINE_S, "start_many", part, large=large)

    async def cancel(self, worker: str, leases: Sequence[Lease]) -> None:
        """Stop builds. Raises `FleetError` as `start_many`."""
        for first in range(0, len(leases), ORDERS_PER_CALL):
            part = [lease.dump() for lease in leases[first : first + ORDERS_PER_CALL]]
            await _in_time(self.calls_of(worker), CALL_DEADLINE_S, "cancel", part)

    async def drain(self, worker: str, *, on: bool) -> None:
        """Set or clear "no new work". Raises `FleetError` as `start_many`."""
        await _in_time(self.calls_of(worker), CALL_DEADLINE_S, "drain", on)

    async def fetch_ahead(self, worker: str, hint: InputHint) -> None:
        """Let a worker fetch inputs ahead of their lease. Raises `FleetError` as `start_many`."""
        await _in_time(self.calls_of(worker), CALL_DEADLINE_S, "fetch_ahead", hint.dump())

    async def provide(self, worker: str, paths: Sequence[str], token: str) -> tuple[Output, ...]:
        """Have paths uploaded again. Raises `FleetError` as `start_many`, and where the answer makes no sense."""
        outputs = await _in_time(self.calls_of(worker), PROVIDE_DEADLINE_S, "provide", list(paths), token)
        try:
            return OUTPUTS.validate_python(tuple(outputs))
        except (ValidationError, TypeError):
            raise AgentUnavailable(f"worker {worker} gave an answer that makes no sense") from None

    def calls_of(self, worker: str) -> AgentCalls:
        """Return the calls to an agent that has been greeted. Raises `AgentUnavailable`."""
        calls = self._calls.get(worker)
        if calls is None:
            raise AgentUnavailable(f"worker {worker} is not connected")
        return calls


def _dumped(orders: Sequence[LeaseOrder]) -> list[dict[str, Any]]:
    return [order.dump() for order in orders]


def _portions(orders: Sequence[LeaseOrder]) -> Iterator[list[LeaseOrder]]:
    """Split leases into calls, in their order."""
    portion: list[LeaseOrder] = []
    size = 0
    for order in orders:
        size += len(order.derivation)
        if portion and (len(portion) == ORDERS_PER_CALL or size > DERIVATION_BYTES_PER_CALL):
            yield portion
            portion, size = [], len(order.derivation)
        portion.append(order)
    if portion:
        yield portion
