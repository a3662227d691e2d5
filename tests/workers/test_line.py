"""Lines beside Ray: who may speak over one, what goes over it, and that whatever is lost with it goes through Ray."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, cast

import msgspec
import pytest

from tests.support.patience import PATIENCE_S
from workers.ray_transport.driver import ActorCalls, RayDriver
from workers.ray_transport.line import (
    LINE_FIELD,
    MOST_FRAME_BYTES,
    NUMBER_BYTES,
    CallFailedError,
    Line,
    LineLostError,
    LineOffer,
    LineTooSmallError,
    proof,
    read_offer,
)
from workers.ray_transport.line_server import MOST_LINES, LineServer
from workers.wire.messages import CallName
from workers.wire.polling import AgentDead, AgentUnavailable

HERE = "127.0.0.1"
EPOCH = 7


class Agent:
    """Answers calls with what they asked, once it may; keeps all that it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[CallName, list[Any]]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.more = asyncio.Event()
        self.answer_with: Callable[[Sequence[Any]], Any] = list

    async def answer(self, name: CallName, arguments: Sequence[Any]) -> Any:
        self.asked.append((name, list(arguments)))
        self.more.set()
        if name == "events":
            await self.may_answer.wait()
        return self.answer_with(arguments)

    async def was_asked(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.asked) < count:
                self.more.clear()
                await self.more.wait()


@asynccontextmanager
async def listening(agent: Agent) -> AsyncIterator[LineOffer]:
    server = LineServer(agent.answer)
    try:
        yield await server.listen(HERE)
    finally:
        await server.close()


class Ray:
    """The part of `RayDriver` that calls need, over one agent; `calls` are those that came this way."""

    def __init__(self, agent: Agent, offer: LineOffer | None) -> None:
        self._agent = agent
        self._offer = offer
        self.calls: list[str] = []

    def send(self, _handle: object, method: CallName, _group: str, arguments: Sequence[Any]) -> Awaitable[Any]:
        self.calls.append(method)
        return self._answer(method, arguments)

    async def _answer(self, method: CallName, arguments: Sequence[Any]) -> Any:
        if method != "hello":
            return await self._agent.answer(method, arguments)
        offered = {} if self._offer is None else {LINE_FIELD: msgspec.to_builtins(self._offer, builtin_types=(bytes,))}
        return {"worker": "w", **offered}

    def translate(self, error: Exception) -> AgentUnavailable:
        return AgentUnavailable(str(error))


@asynccontextmanager
async def greeted(agent: Agent, offer: LineOffer | None) -> AsyncIterator[tuple[ActorCalls, Ray, asyncio.Future[str]]]:
    """Calls to an agent after its greeting, which has its line where there is one."""
    ray = Ray(agent, offer)
    dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    calls = ActorCalls(cast("RayDriver", ray), object(), dead, EPOCH)
    try:
        # What polls the agent knows nothing of lines.
        assert await calls.call("hello", {}) == {"worker": "w"}
        await until(lambda: calls.has_line or offer is None)
        yield calls, ray, dead
    finally:
        await calls.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for takes some turns of this loop
            await asyncio.sleep(0)


async def ended(line: Line) -> str:
    async with asyncio.timeout(PATIENCE_S):
        return await line.ended


async def test_calls_share_a_line_and_none_waits_for_another() -> None:
    agent = Agent()
    async with listening(agent) as offer:
        line = await Line.connect(offer)
        agent.may_answer.clear()
        poll = asyncio.create_task(line.call("events", [EPOCH, 1, 2, 3.5]))
        assert await line.call("start_many", [EPOCH, [{"derivation": b"\xff\0", "inputs": ("a", "b")}]]) == [
            EPOCH,
            [{"derivation": b"\xff\0", "inputs": ["a", "b"]}],
        ]
        agent.may_answer.set()
        assert await poll == [EPOCH, 1, 2, 3.5]
        line.hang_up()
        await ended(line)
        with pytest.raises(LineLostError):
            await line.call("cancel", [EPOCH, []])


async def test_a_call_that_the_agent_cannot_answer_says_why() -> None:
    agent = Agent()

    def refuse(_: object) -> None:
        raise ValueError("a later coordinator leads")

    agent.answer_with = refuse
    async with listening(agent) as offer:
        line = await Line.connect(offer)
        with pytest.raises(CallFailedError, match="a later coordinator leads"):
            await line.call("cancel", [EPOCH, []])
        line.hang_up()


async def test_what_is_larger_than_a_line_carries_leaves_it_usable() -> None:
    agent = Agent()
    async with listening(agent) as offer:
        line = await Line.connect(offer)
        with pytest.raises(LineTooSmallError):
            await line.call("start_many", [EPOCH, bytes(MOST_FRAME_BYTES)])
        agent.answer_with = lambda _: bytes(MOST_FRAME_BYTES)
        with pytest.raises(LineTooSmallError):
            await line.call("events", [EPOCH])
        agent.answer_with = list
        assert await line.call("events", [EPOCH]) == [EPOCH]
        line.hang_up()


@pytest.mark.parametrize(
    "says",
    [
        # No number; a number that claims to be large; a proof of another secret; HTTP.
        b"\0\0\0\x03abc",
        b"\xff\xff\xff\xff" + bytes(NUMBER_BYTES),
        (NUMBER_BYTES.to_bytes(4, "big") + bytes(NUMBER_BYTES)) * 2,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["short", "large", "unproven", "http"],
)
async def test_a_stranger_gets_no_answer(says: bytes) -> None:
    agent = Agent()
    async with listening(agent) as offer:
        reader, writer = await asyncio.open_connection(HERE, offer.port)
        called = msgspec.msgpack.encode((1, "cancel", [EPOCH, []]))
        writer.write(says + len(called).to_bytes(4, "big") + called)
        async with asyncio.timeout(PATIENCE_S):
            try:
                heard = await reader.read()
            except ConnectionResetError:
                heard = b""
        # At most what answers a number, which shows nothing to one that lacks the secret.
        assert len(heard) in {0, 4 + 2 * NUMBER_BYTES}
        assert not agent.asked
        writer.close()


async def test_a_listener_that_does_not_know_the_secret_is_no_agent() -> None:
    secret = secrets.token_bytes(NUMBER_BYTES)
    told: list[bytes] = []
    refused = asyncio.Event()

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = (await reader.readexactly(4 + NUMBER_BYTES))[4:]
        answered = bytes(NUMBER_BYTES)
        # The proof of the other side, and of another secret.
        frame = answered + proof(bytes(NUMBER_BYTES), "agent", asked, answered)
        writer.write(len(frame).to_bytes(4, "big") + frame)
        with suppress(ConnectionResetError):
            told.append(await reader.read())
        refused.set()
        writer.close()

    async with await asyncio.start_server(pretend, HERE, 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(LineLostError, match="secret"):
            await Line.connect(LineOffer(host=HERE, port=port, secret=secret))
        await until(refused.is_set)
    assert b"".join(told) == b""


async def test_strangers_cannot_take_more_room_than_there_is() -> None:
    agent = Agent()
    async with listening(agent) as offer, AsyncExitStack() as strangers:
        for _ in range(MOST_LINES):
            _, writer = await asyncio.open_connection(HERE, offer.port)
            strangers.callback(writer.close)
        with pytest.raises(LineLostError):
            await Line.connect(offer)


async def test_only_calls_that_may_be_repeated_go_over_a_line() -> None:
    agent = Agent()
    async with listening(agent) as offer, greeted(agent, offer) as (calls, ray, _):
        await calls.call("start_many", [])
        await calls.call("events", 0, 1, 2.0)
        await calls.call("cancel", [])
        assert ray.calls == ["hello"]
        await calls.call("drain", True)
        await calls.call("start_many", [], large=True)
        assert ray.calls == ["hello", "drain", "start_many"]
        assert {arguments[0] for _, arguments in agent.asked} == {EPOCH}
        line = await Line.connect(offer)
        with pytest.raises(LineLostError):
            await line.call("drain", [EPOCH, True])


async def test_a_call_whose_line_breaks_is_made_again_through_ray() -> None:
    agent = Agent()
    agent.may_answer.clear()
    async with AsyncExitStack() as stack:
        offer = await stack.enter_async_context(listening(agent))
        calls, ray, _ = await stack.enter_async_context(greeted(agent, offer))
        poll = asyncio.create_task(calls.call("events", 0, 1, 2.0))
        await agent.was_asked(1)
        calls.hang_up()
        await agent.was_asked(2)
        agent.may_answer.set()
        assert await poll == [EPOCH, 0, 1, 2.0]
        assert ray.calls == ["hello", "events"]
        # The next greeting brings a line again, at once.
        await calls.call("hello", {})
        await until(lambda: calls.has_line)


async def test_a_call_that_takes_too_long_ends_its_line() -> None:
    agent = Agent()
    agent.may_answer.clear()
    async with listening(agent) as offer, greeted(agent, offer) as (calls, ray, _):
        poll = asyncio.create_task(calls.call("events", 0, 1, 2.0))
        await agent.was_asked(1)
        poll.cancel()
        await asyncio.wait((poll,))
        await until(lambda: not calls.has_line)
        await calls.call("cancel", [])
        assert ray.calls == ["hello", "cancel"]


async def test_the_death_of_a_node_ends_a_call_over_its_line() -> None:
    agent = Agent()
    agent.may_answer.clear()
    async with listening(agent) as offer, greeted(agent, offer) as (calls, _, dead):
        poll = asyncio.create_task(calls.call("events", 0, 1, 2.0))
        await agent.was_asked(1)
        dead.set_result("its machine is gone")
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(AgentDead, match="its machine is gone"):
                await poll


async def test_an_agent_that_offers_no_line_is_reached_through_ray() -> None:
    agent = Agent()
    async with greeted(agent, None) as (calls, ray, _):
        assert await calls.call("events", 0, 1, 2.0) == [EPOCH, 0, 1, 2.0]
        assert ray.calls == ["hello", "events"]


@pytest.mark.parametrize(
    "found",
    [
        None,
        "127.0.0.1:80",
        {"host": HERE, "port": 80},
        {"host": HERE, "port": 80, "secret": b"short"},
        {"host": HERE, "port": 1 << 16, "secret": bytes(NUMBER_BYTES)},
        {"host": "", "port": 80, "secret": bytes(NUMBER_BYTES)},
    ],
)
def test_an_offer_that_makes_no_sense_is_none(found: object) -> None:
    assert read_offer(found) is None


def test_the_secret_is_not_shown() -> None:
    offer = read_offer({"host": HERE, "port": 80, "secret": b"s" * NUMBER_BYTES, "of a newer agent": 1})
    assert offer is not None
    assert "sss" not in repr(offer)
