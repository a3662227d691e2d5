"""Another farm's cache as an upstream over HTTP, which lies about chosen paths on request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from aiohttp import web
from aiohttp.test_utils import TestServer

from infra.cache.cache import Cache
from infra.nix import narinfo as narinfo_format
from infra.nix.signing import SecretKey
from infra.nix.store_path import hash_part_of
from tests.support.cache import STORE_DIR, open_cache, secret_key

#: What signs the narinfos of every such upstream.
UPSTREAM_KEY = secret_key("elsewhere-1", 9)


class Lie(StrEnum):
    """Ways in which an upstream is wrong about a path."""

    #: Its NAR is of the right size and has another byte.
    WRONG_NAR = "wrong nar"
    #: Its narinfo is signed by a key of the same name that is another one.
    WRONG_KEY = "wrong key"
    #: The narinfo of another path is sent, validly signed.
    OTHER_PATH = "other path"
    #: The answer to the question for its narinfo is 500.
    ERROR = "error"
    #: A redirection leads to itself.
    CIRCLE = "circle"
    #: The connection is closed in the middle of the NAR.
    CUT = "cut"
    #: No narinfo at all.
    GARBAGE = "garbage"


@dataclass
class LyingUpstream:
    """A cache served over HTTP. Paths with a lie are by hash part."""

    cache: Cache
    url: str = ""
    lies: dict[str, Lie] = field(default_factory=dict)
    #: All is answered 503 after so many NARs.
    gone_after: int | None = None
    nars: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    #: While it is clear no NAR is sent.
    open: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set once a NAR was asked for.
    wanted: asyncio.Event = field(default_factory=asyncio.Event)

    def lie(self, path: str, how: Lie) -> None:
        self.lies[hash_part_of(path)] = how

    async def answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if self.gone_after is not None and len(self.nars) >= self.gone_after:
            return web.Response(status=503)
        if name == "nix-cache-info":
            return web.Response(text=f"StoreDir: {STORE_DIR.path}\nWantMassQuery: 1\nPriority: 40\n")
        if name.endswith(".narinfo"):
            self.asked.append(name)
            return await self._narinfo(name.removesuffix(".narinfo"))
        self.wanted.set()
        await self.open.wait()
        self.nars.append(name)
        return await self._nar(request, name)

    async def _narinfo(self, part: str) -> web.StreamResponse:
        text = await self.cache.narinfo(part)
        match self.lies.get(part):
            case Lie.ERROR:
                return web.Response(status=500)
            case Lie.CIRCLE:
                raise web.HTTPFound(f"/{part}.narinfo")
            case Lie.GARBAGE:
                return web.Response(body=b"<html>welcome to this hotel</html>\n")
            case Lie.OTHER_PATH:
                other = next(each for each in await self._parts() if each != part and each not in self.lies)
                text = await self.cache.narinfo(other)
            case Lie.WRONG_KEY if text is not None:
                info = narinfo_format.parse(text, STORE_DIR)
                text = info.signed((secret_key(UPSTREAM_KEY.name, 3).sign(info.path.fingerprint()),)).render()
        return web.Response(status=404) if text is None else web.Response(body=text)

    async def _nar(self, request: web.Request, name: str) -> web.StreamResponse:
        data = bytes(await self.cache.objects.get_bytes(name))
        for part, how in self.lies.items():
            text = await self.cache.narinfo(part)
            if text is None or narinfo_format.parse(text, STORE_DIR).stored.url != name:
                continue
            if how is Lie.WRONG_NAR:
                data = data[:-1] + bytes([data[-1] ^ 1])
            if how is Lie.CUT:
                response = web.StreamResponse(headers={"Content-Length": str(len(data))})
                await response.prepare(request)
                await response.write(data[: len(data) // 2])
                assert request.transport is not None
                request.transport.close()
                return response
        return web.Response(body=data)

    async def _parts(self) -> Sequence[str]:
        return [hash_part_of(path) for path in self.known]

    #: Full paths of which narinfos may be sent for others.
    known: list[str] = field(default_factory=list)


@asynccontextmanager
async def lying_upstream(directory: Path, key: SecretKey = UPSTREAM_KEY) -> AsyncIterator[LyingUpstream]:
    """Serve an empty cache in a new directory."""
    await asyncio.to_thread(directory.mkdir)
    async with open_cache(directory, [key]) as cache:
        made = LyingUpstream(cache)
        made.open.set()
        app = web.Application()
        app.router.add_get("/{name:.*}", made.answer)
        async with TestServer(app) as server:
            made.url = str(server.make_url("/")).rstrip("/")
            yield made
