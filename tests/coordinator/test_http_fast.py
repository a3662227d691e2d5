"""The short way for narinfos says exactly what the long way says, on any connection."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import socket
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvloop
from aiohttp import web
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from coordinator.caches.opening import OpenCache
from coordinator.config import CacheSettings
from coordinator.http.binary_cache.fast_answers import FastAnswers, FastSite
from coordinator.http.binary_cache.routes import add_cache_routes
from coordinator.http.middleware import is_own_host, require_host
from coordinator.security.tokens import CacheAccess, TokenSet
from infra.cache.cache import Cache
from tests.support.cache import base_name, object_file, open_cache, publish, store_path, uploaded_claim
from tests.support.patience import PATIENCE_S

A, B = store_path("a"), store_path("b")
PUBLIC = "http://farm.example:7878"


@dataclass
class Counting(FastAnswers):
    """Counts what it answered."""

    answered: int = field(default=0)

    def __init__(self, caches: Sequence[OpenCache]) -> None:
        super().__init__(caches, lambda host: is_own_host(host, PUBLIC))
        self.answered = 0

    def answer(self, data: bytes, *, with_nars: bool = True) -> bytes | None:
        found = super().answer(data, with_nars=with_nars)
        self.answered += found is not None
        return found


@dataclass
class Both:
    """One cache, served the short way and the long way."""

    cache: Cache
    fast: Counting
    fast_port: int
    slow_port: int


def narinfo(path: str = A) -> str:
    return f"{base_name(path)[:32]}.narinfo"


async def serve_both(cache: Cache, stack: list[web.AppRunner]) -> Both:
    served = OpenCache("default", "/cache", CacheSettings(), cache, CacheAccess())
    private = OpenCache("team1", "/cache/team1", CacheSettings(), cache, CacheAccess(TokenSet(["t" * 20])))
    fast = Counting([served, private])
    ports = []
    for quick in (True, False):
        app = web.Application(middlewares=[require_host(PUBLIC)])
        for each in (private, served):
            add_cache_routes(app, each)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        stack.append(runner)
        await runner.setup()
        if quick:
            listener = socket.create_server(("127.0.0.1", 0))
            await FastSite(runner, listener, fast).start()
            ports.append(listener.getsockname()[1])
        else:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            ports.append(runner.addresses[0][1])
    return Both(cache, fast, *ports)


@pytest.fixture
async def both(tmp_path: Path) -> AsyncGenerator[Both, None]:
    runners: list[web.AppRunner] = []
    async with open_cache(tmp_path) as cache:
        await publish(cache, A)
        await cache.narinfo(base_name(A)[:32])
        try:
            yield await serve_both(cache, runners)
        finally:
            for runner in runners:
                await runner.cleanup()


async def talk(port: int, pieces: Sequence[bytes]) -> bytes:
    """Send the pieces one after the other, then end; returns all answers without what depends on the time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(b"GET /cache/nix-cache-info HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    except ConnectionError:
        answer = b"reset"
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return re.sub(rb"\r\nDate: [^\r]*", b"", answer)


def request(method: str = "GET", target: str = f"/cache/{narinfo()}", *headers: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/{version}", *headers, "", ""]).encode("latin-1")


NIX = ("Host: localhost:7878", "User-Agent: curl/7.85.0 Nix/2.8.0", "Accept: */*", "Accept-Encoding: gzip, br, zstd")
HOST = "Host: localhost"
REQUESTS = st.sampled_from(
    [
        request("GET", f"/cache/{narinfo()}", *NIX),
        request("HEAD", f"/cache/{narinfo()}", *NIX),
        request("GET", f"/cache/{narinfo()}", "host:  127.0.0.1"),
        request("GET", f"/cache/{narinfo(B)}", *NIX),
        request("GET", f"/cache/team1/{narinfo()}", *NIX),
        request("GET", f"/cache/team1/{narinfo()}", HOST, f"Authorization: Bearer {'t' * 20}"),
        request("GET", f"/cache/%{ord(narinfo()[0]):02x}{narinfo()[1:]}", HOST),
        request("GET", f"/cache/{narinfo()}?x=1", HOST),
        request("GET", f"http://localhost/cache/{narinfo()}", HOST),
        request("GET", f"//cache/{narinfo()}", HOST),
        request("GET", f"/cache/{narinfo()}", "Host: evil.example"),
        request("GET", f"/cache/{narinfo()}", "Host: farm.example"),
        request("GET", f"/cache/{narinfo()}"),
        request("GET", f"/cache/{narinfo()}", HOST, HOST),
        request("GET", f"/cache/{narinfo()}", HOST, "Connection: close"),
        request("GET", f"/cache/{narinfo()}", HOST, "Connection: keep-alive"),
        request("GET", f"/cache/{narinfo()}", HOST, "Connection: upgrade", "Upgrade: websocket"),
        request("GET", f"/cache/{narinfo()}", HOST, "Range: bytes=0-3"),
        request("GET", f"/cache/{narinfo()}", HOST, "If-None-Match: *"),
        request("GET", f"/cache/{narinfo()}", HOST, "Expect: 100-continue"),
        request("GET", f"/cache/{narinfo()}", HOST, "Content-Length: 3") + b"GET",
        request("GET", f"/cache/{narinfo()}", HOST, "Content-Length: 0"),
        request("GET", f"/cache/{narinfo()}", HOST, "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        request("GET", f"/cache/{narinfo()}", HOST, " folded: line"),
        request("GET", f"/cache/{narinfo()}", HOST, "User-Agent: \x01"),
        request("GET", f"/cache/{narinfo()}", HOST, "No colon"),
        request("GET", f"/cache/{narinfo()}", HOST, f"Accept: {'x' * 2000}"),
        request("GET", f"/cache/{narinfo()}", HOST, version="1.0"),
        request("GET", f"/cache/{narinfo()}", HOST, version="2.0"),
        request("get", f"/cache/{narinfo()}", HOST),
        request("POST", "/cache/narinfos", HOST, "Content-Length: 12") + b'{"paths":[]}',
        request("GET", "/cache/nix-cache-info", *NIX),
        request("GET", "/elsewhere", HOST),
        request("GET", f"/cache/{narinfo()}", HOST).replace(b"\r\n", b"\n"),
        b"\r\n" + request("GET", f"/cache/{narinfo()}", HOST),
        b"\x00\x01garbage\r\n\r\n",
    ]
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=6), cuts=st.lists(st.integers(0, 2000), max_size=4))
@example(requests=[request("GET", f"/cache/{narinfo()}", *NIX)] * 3, cuts=[])
async def test_both_ways_answer_the_same_however_requests_are_cut_and_joined(
    both: Both, requests: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(requests)
    marks = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
    for pieces in (requests, [stream[a:b] for a, b in itertools.pairwise(marks)]):
        assert await talk(both.fast_port, pieces) == await talk(both.slow_port, pieces)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0, 400), old=st.integers(0, 3), new=st.binary(max_size=3))
async def test_both_ways_answer_the_same_to_mutated_requests(both: Both, at: int, old: int, new: bytes) -> None:
    plain = request("GET", f"/cache/{narinfo()}", *NIX)
    at %= len(plain)
    mutated = plain[:at] + new + plain[at + old :]
    assert await talk(both.fast_port, [mutated]) == await talk(both.slow_port, [mutated])


async def ask(port: int, *wanted: bytes) -> list[bytes]:
    """Send requests on one connection, each after the answer to the one before; returns the heads."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    heads = []
    for each in wanted:
        writer.write(each)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        if length and each.startswith(b"GET"):
            await reader.readexactly(int(length[1]))
        heads.append(head)
    writer.close()
    await writer.wait_closed()
    return heads


async def test_plain_requests_take_the_short_way_before_and_after_others(both: Both) -> None:
    plain = request("GET", f"/cache/{narinfo()}", *NIX)
    info = request("GET", "/cache/nix-cache-info", *NIX)
    heads = await ask(both.fast_port, plain, info, plain, request("HEAD", f"/cache/{narinfo()}", *NIX), info, plain)
    assert all(head.startswith(b"HTTP/1.1 200 OK\r\n") for head in heads)
    assert both.fast.answered == 4
    assert both.cache.counters.narinfo_hits == 4


async def test_a_small_nar_takes_the_short_way_and_is_answered_as_by_the_long_one(both: Both) -> None:
    claim = await uploaded_claim(both.cache, A)
    wanted = request("GET", f"/cache/{claim.stored.url}", *NIX)
    others = [
        request("HEAD", f"/cache/{claim.stored.url}", *NIX),
        request("GET", f"/cache/{claim.stored.url}", HOST, "Range: bytes=1-"),
        request("GET", f"/cache/{claim.stored.url}.zst", HOST),
        request("GET", f"/cache/team1/{claim.stored.url}", HOST),
    ]
    quick, slow = [
        [await talk(port, [each, wanted]) for each in (wanted, *others)] for port in (both.fast_port, both.slow_port)
    ]
    assert quick == slow
    assert object_file(both.cache, claim).read_bytes() in quick[0]
    # Where two requests come together aiohttp answers both.
    before = both.fast.answered
    await ask(both.fast_port, wanted, wanted)
    assert both.fast.answered == before + 2
    # A file that was cut is absent, whichever way it is asked for.
    object_file(both.cache, claim).write_bytes(b"cut")
    assert [head.split(b" ")[1] for head in await ask(both.fast_port, wanted)] == [b"404"]


async def test_a_path_whose_object_is_lost_is_not_answered_from_memory(both: Both) -> None:
    plain = request("GET", f"/cache/{narinfo()}", *NIX)
    claim = await uploaded_claim(both.cache, A)
    file = object_file(both.cache, claim)
    (before,) = await ask(both.fast_port, plain)
    data = file.read_bytes()
    file.unlink()
    (lost,) = await ask(both.fast_port, plain)
    file.write_bytes(data)
    (back,) = await ask(both.fast_port, plain)
    assert [head.split(b" ")[1] for head in (before, lost, back)] == [b"200", b"404", b"200"]


def test_the_short_way_and_sendfile_work_on_the_loop_that_serves(tmp_path: Path) -> None:
    nar = os.urandom(9_000_000)

    async def story() -> None:
        runners: list[web.AppRunner] = []
        async with open_cache(tmp_path) as cache:
            await publish(cache, A)
            claim = await uploaded_claim(cache, B, nar)
            await cache.publish([claim])
            await cache.narinfo(base_name(A)[:32])
            whole = object_file(cache, claim).read_bytes()
            try:
                served = await serve_both(cache, runners)
                plain = request("GET", f"/cache/{narinfo()}", *NIX)
                wanted = request("GET", f"/cache/{claim.stored.url}", *NIX)
                part = request("GET", f"/cache/{claim.stored.url}", HOST, "Range: bytes=70000-")
                for pieces in ([plain, wanted, plain, part, plain], [wanted + plain + part + plain]):
                    quick, slow = [await talk(port, pieces) for port in (served.fast_port, served.slow_port)]
                    assert quick == slow
                    assert whole in quick
                    assert quick.count(whole[70_000:]) == 2
            finally:
                for runner in runners:
                    await runner.cleanup()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(story())
