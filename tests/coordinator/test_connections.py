"""Connections are bounded, and which one goes for a new one is just."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from coordinator.api.route import Right, Route
from coordinator.http import connections
from coordinator.http.binary_cache.fast_answers import FastAnswers, FastSite
from coordinator.http.connections import ConnectionBounds, ConnectionGate, require_room
from coordinator.http.middleware import require_token
from coordinator.http.routing import serve as serve_routes
from coordinator.security.clients import ClientTokens
from tests.support.patience import PATIENCE_S

TOKEN = "t" * 20
#: More than the sockets of both sides hold.
LARGE_BYTES = 32 * 1024 * 1024


@dataclass
class Site:
    gate: ConnectionGate
    port: int
    #: Lets the handler of `/nar/x` and `/slow` end; `begun` is set once one began.
    end: asyncio.Event
    begun: asyncio.Event
    clients: list[Client] = field(default_factory=list)

    async def connect(self, path: str | None = None, head: str = "") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self.clients.append(client)
        if path is not None:
            client.writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode())
        return client


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def status(self) -> int:
        head = await self.reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"Content-Length: (\d+)", head)
        await self.reader.readexactly(int(found[1]) if found else 0)
        return int(head.split()[1])

    async def closed(self) -> bool:
        """Wait for the end of the connection."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True


@asynccontextmanager
async def serve(bounds: ConnectionBounds) -> AsyncGenerator[Site, None]:
    end, begun = asyncio.Event(), asyncio.Event()

    async def last(_request: web.Request) -> web.Response:
        begun.set()
        await end.wait()
        return web.Response(text="done")

    async def quick(_request: web.Request) -> web.Response:
        return web.Response(text="here")

    async def large(_request: web.Request) -> web.Response:
        return web.Response(body=bytes(LARGE_BYTES))

    gate = ConnectionGate(bounds)
    clients: list[Client] = []
    app = web.Application(middlewares=[require_room(gate), require_token(ClientTokens(TOKEN))])
    handlers = {"/nar/x": last, "/slow": last, "/quick": quick, "/large": large}
    serve_routes(app, {Route[None]("GET", address, Right.NONE): handler for address, handler in handlers.items()})
    serve_routes(app, {Route[None]("GET", "/api/x", Right.API): quick})
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    try:
        await FastSite(runner, listener, FastAnswers((), lambda _: False), gate).start()
        yield Site(gate, port, end, begun, clients)
    finally:
        end.set()
        await runner.cleanup()
        for client in clients:
            client.writer.close()
            with suppress(ConnectionError):
                await client.writer.wait_closed()


async def test_the_longest_idle_strangers_connection_goes_for_a_new_one() -> None:
    async with serve(ConnectionBounds(3, 3)) as site:
        operator = await site.connect("/api/x", f"Authorization: Bearer {TOKEN}\r\n")
        assert await operator.status() == 200
        older, newer = await site.connect("/quick"), await site.connect("/quick")
        assert (await older.status(), await newer.status()) == (200, 200)
        another = await site.connect("/quick")
        assert await another.status() == 200
        assert await older.closed()
        assert (len(site.gate), site.gate.evicted) == (3, 1)
        for client in (operator, newer):
            client.writer.write(b"GET /quick HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert await client.status() == 200


async def test_where_all_are_busy_a_new_one_is_closed_and_those_go_on() -> None:
    async with serve(ConnectionBounds(1, 1)) as site:
        busy = await site.connect("/slow")
        await site.begun.wait()
        assert await (await site.connect("/quick")).closed()
        assert site.gate.refused == 1
        site.end.set()
        assert await busy.status() == 200


async def test_one_address_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_is_loopback", lambda _: False)
    async with serve(ConnectionBounds(100, 2)) as site:
        first = await site.connect("/quick")
        assert await first.status() == 200
        rest = [await site.connect("/quick") for _ in range(2)]
        assert [await each.status() for each in rest] == [200, 200]
        assert await first.closed()


async def test_downloads_of_strangers_leave_room() -> None:
    async with serve(ConnectionBounds(8, 8)) as site:
        busy = []
        for _ in range(6):
            busy.append(await site.connect("/nar/x"))
            await site.begun.wait()
            site.begun.clear()
        assert await (await site.connect("/nar/x")).status() == 503
        assert await (await site.connect("/api/x", f"Authorization: Bearer {TOKEN}\r\n")).status() == 200


@pytest.mark.parametrize("sent", [b"", b"GET /quick HTTP/1.1\r\nHost: local"])
async def test_a_head_comes_in_time(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 1.0)
    async with serve(ConnectionBounds(8, 8)) as site:
        fresh, kept = await site.connect(), await site.connect("/quick")
        assert await kept.status() == 200
        fresh.writer.write(sent)
        kept.writer.write(b"GET /")
        assert await fresh.closed()
        assert await kept.closed()
        assert site.gate.silent == 2


async def test_a_client_that_does_not_read_its_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "UNREAD_S", 0.2)
    async with serve(ConnectionBounds(8, 8)) as site:
        client = await site.connect("/large")
        async with asyncio.timeout(PATIENCE_S):
            # It is counted before its connection has ended.
            while not site.gate.silent or len(site.gate):  # noqa: ASYNC110 - this happens at the other end
                await asyncio.sleep(0.02)
        assert site.gate.silent == 1
        with suppress(ConnectionError):
            assert len(await client.reader.read()) < LARGE_BYTES


def test_bounds_lie_below_the_limit_of_descriptors() -> None:
    assert ConnectionBounds.within(65_536, 4096, 256) == ConnectionBounds(4096, 256)
    assert ConnectionBounds.within(1024, 4096, 256) == ConnectionBounds(256, 256)
    assert ConnectionBounds.within(256, 4096, 256) == ConnectionBounds(64, 64)
