"""A sender or reader slower than a modem loses its request; one as quick as that does not, whatever we do meanwhile."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from pydantic import BaseModel

from coordinator.caches.opening import OpenCache
from coordinator.config import CacheSettings
from coordinator.http import bodies
from coordinator.http.binary_cache import nars
from coordinator.http.binary_cache.routes import add_cache_routes
from coordinator.http.bodies import BodySlowError, body_chunks, read_model
from coordinator.security.tokens import CacheAccess
from tests.support.cache import open_cache, store_path, uploaded_claim

#: Seconds after which a body is given up here, and only in these tests.
PATIENCE_S = 0.2
#: More than the sockets of both sides hold.
LARGE_BYTES = 8 * 1024 * 1024
#: The reader's part of that.
SOCKET_BYTES = 64 * 1024

HEAD = b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"


class _Anything(BaseModel):
    pass


async def _json(request: web.Request) -> None:
    await read_model(request, _Anything)


async def _stream(request: web.Request) -> None:
    async for _ in body_chunks(request, bodies.PATIENCE_S):
        pass


Reader = Callable[[web.Request], Awaitable[None]]


@asynccontextmanager
async def connected(app: web.Application) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Serve an application and connect to it."""
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = socket.socket()
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
        await asyncio.get_running_loop().sock_connect(client, runner.addresses[0])
        reader, writer = await asyncio.open_connection(sock=client, limit=4096)
        stack.callback(writer.close)
        yield reader, writer


@asynccontextmanager
async def sending_to(read: Reader) -> AsyncGenerator[tuple[asyncio.StreamWriter, asyncio.Future[bytes]]]:
    """Begin a body that `read` reads; gives the answer's first line too: 408 where it was given up."""

    async def handle(request: web.Request) -> web.Response:
        try:
            await read(request)
        except BodySlowError:
            return web.Response(status=408)
        return web.Response(status=204)

    app = web.Application()
    app.router.add_put("/", handle)
    async with connected(app) as (reader, writer):
        writer.write(HEAD)
        yield writer, asyncio.ensure_future(reader.readline())


@pytest.mark.parametrize("read", [_json, _stream])
async def test_a_sender_that_falls_silent_is_given_up(read: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE_S", PATIENCE_S)
    async with sending_to(read) as (writer, answer):
        writer.write(b"{")
        assert b" 408 " in await answer


@pytest.mark.parametrize("read", [_json, _stream])
async def test_a_sender_that_trickles_is_given_up(read: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE_S", PATIENCE_S)
    async with sending_to(read) as (writer, answer):
        # A byte at a time is never silence, and less than the least pace.
        while not (await asyncio.wait([answer], timeout=0.01))[0]:
            writer.write(b" ")
        assert b" 408 " in answer.result()


async def test_a_sender_at_the_least_pace_is_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE_S", 1.5)
    monkeypatch.setattr(bodies, "LEAST_BYTES_PER_S", 100)
    said, rest_s = b"", 1.5
    # A machine that is held up for as long as the patience is no sender at the least pace.
    while not said or (b" 408 " in said and rest_s > 0.5):
        rest_s = 0.0
        async with sending_to(_stream) as (writer, answer):
            # In all for longer than the patience.
            for _ in range(10):
                began_s = time.monotonic()
                writer.write(b"x" * 100)
                await asyncio.wait([answer], timeout=0.2)
                rest_s = max(rest_s, time.monotonic() - began_s)
            said = await answer
    assert b" 204 " in said


async def test_our_own_work_on_a_body_is_not_the_senders_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE_S", PATIENCE_S)

    async def slowly(request: web.Request) -> None:
        async for _ in body_chunks(request, bodies.PATIENCE_S):
            await asyncio.sleep(2 * PATIENCE_S)

    async with sending_to(slowly) as (writer, answer):
        writer.write(b"x" * 1000)
        assert b" 204 " in await answer


@asynccontextmanager
async def downloading(root: Path) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Ask for a NAR that no socket holds, and read the beginning of the answer."""
    async with open_cache(root) as cache:
        claim = await uploaded_claim(cache, store_path("large"), os.urandom(LARGE_BYTES))
        await cache.publish([claim])
        app = web.Application()
        add_cache_routes(app, OpenCache("default", "/cache", CacheSettings(), cache, CacheAccess()), log_for=_no_log)
        async with connected(app) as (reader, writer):
            writer.write(f"GET /cache/{claim.stored.url} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert b" 200 " in await reader.readline()
            yield reader, writer


async def _no_log(_derivation: str) -> None:
    return None


async def test_a_reader_that_takes_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nars, "STALL_S", PATIENCE_S)
    cut = asyncio.Event()
    monkeypatch.setattr(nars, "cut", _noting(cut))
    async with downloading(tmp_path) as (reader, _writer):
        await cut.wait()
        assert await _rest(reader) < LARGE_BYTES


async def test_a_reader_that_takes_too_little_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nars, "STALL_S", PATIENCE_S)
    # More than anybody takes, so that a reader that never rests is too slow.
    monkeypatch.setattr(nars, "LEAST_BYTES_PER_S", 2**40)
    async with downloading(tmp_path) as (reader, _writer):
        taken = 0
        try:
            while piece := await reader.read(4096):
                taken += len(piece)
                await asyncio.sleep(0.001)
        except ConnectionError:
            pass
        assert taken < LARGE_BYTES


async def test_a_reader_that_rests_for_less_than_the_bound_gets_it_all(tmp_path: Path) -> None:
    async with downloading(tmp_path) as (reader, _writer):
        await asyncio.sleep(PATIENCE_S)
        assert await _rest(reader) >= LARGE_BYTES


def _noting(cut: asyncio.Event) -> Callable[[web.Request, Exception], None]:
    do = nars.cut

    def note(request: web.Request, error: Exception) -> None:
        do(request, error)
        cut.set()

    return note


async def _rest(reader: asyncio.StreamReader) -> int:
    """Read until the end, however it comes, or until a large answer is whole; returns how much came."""
    taken = 0
    try:
        while taken < LARGE_BYTES and (piece := await reader.read(2**20)):
            taken += len(piece)
    except ConnectionError:
        pass
    return taken
