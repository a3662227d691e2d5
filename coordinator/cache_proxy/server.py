"""The proxy over HTTP: what Nix asks of a cache.

    nix-cache-info         always answered: Nix must not give the proxy up because an upstream is away
    HASH.narinfo           as the upstream signed it, with an address of the proxy's own for the NAR
    nar/NAME               verified; ranges where all of it is on disk
    HASH.ls, log/, realisations/, build-trace-v2/    passed on from the first upstream that has it, not kept
    anything else          404

404 is the answer to every trouble, and fast: Nix asks its next cache or builds, while a 5xx would fail its build
(infra/nix/FORMATS.md 6.2). A request under a foreign host name is refused, since a page in a browser can send one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from contextlib import aclosing
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from coordinator.cache_proxy.lookups import NarinfoLookups
from coordinator.cache_proxy.model import NAR_NAME, KnownPath
from coordinator.cache_proxy.nars import WHOLE_BYTES, NarDownload, ProxyNars
from coordinator.cache_proxy.prefetch import NarPrefetch
from coordinator.cache_proxy.upstream import NarCutError
from infra.nix.store_path import HASH_PART_PATTERN

#: Before a farm (30) and cache.nixos.org (40): Nix asks the lowest number first.
PRIORITY: Final = 20
#: Largest file that is passed on.
PASSED_ON_BYTES: Final = 16 * 1024 * 1024
#: Files up to this size leave together with their headers.
SMALL_BYTES: Final = 128 * 1024
_NAR_HEADERS: Final = {"Content-Type": "application/x-nix-nar", "Cache-Control": "no-store"}
_PASSED_ON: Final = rf"(?:{HASH_PART_PATTERN}[.]ls|log/[^/]+|realisations/[^/]+[.]doi|build-trace-v2/[^/]+/[^/]+[.]doi)"

_log = logging.getLogger(__name__)


class ProxySite:
    """The handlers."""

    def __init__(self, lookups: NarinfoLookups, nars: ProxyNars, prefetch: NarPrefetch, store_dir: str) -> None:
        self._lookups = lookups
        self._nars = nars
        self._prefetch = prefetch
        self._info = f"StoreDir: {store_dir}\nWantMassQuery: 1\nPriority: {PRIORITY}\n"

    def application(self, own_hosts: frozenset[str]) -> web.Application:
        """Return what serves them to requests under these host names; any name where there are none."""
        app = web.Application(middlewares=[_only_for(own_hosts)] if own_hosts else [])
        app.router.add_get("/nix-cache-info", self.cache_info)
        app.router.add_get(f"/{{hash_part:{HASH_PART_PATTERN}}}.narinfo", self.narinfo)
        app.router.add_get(f"/nar/{{name:{NAR_NAME}}}", self.nar)
        app.router.add_get(f"/{{address:{_PASSED_ON}}}", self.pass_on)
        app.router.add_route("*", "/{anything:.*}", self.nothing)
        return app

    async def cache_info(self, _request: web.Request) -> web.Response:
        """Say what this cache is."""
        return web.Response(text=self._info, content_type="text/x-nix-cache-info")

    async def narinfo(self, request: web.Request) -> web.Response:
        """Answer what an upstream has under a hash part."""
        known = await self._lookups.find(request.match_info["hash_part"])
        if known is None:
            return _not_found()
        if request.method == "GET":
            self._prefetch.asked(known)
        return web.Response(body=known.text, content_type="text/x-nix-narinfo", headers={"Cache-Control": "no-store"})

    async def nar(self, request: web.Request) -> web.StreamResponse:
        """Send a NAR: of the disk, or while it comes."""
        name = request.match_info["name"]
        known = await self._lookups.find(name[:32])
        if known is None or known.nar_name != name:
            return _not_found()
        if request.method == "HEAD":
            size = known.info.stored.file_size
            return web.Response(headers={**_NAR_HEADERS, **({"Content-Length": str(size)} if size else {})})
        content = self._nars.in_memory(known)
        if content is not None and "Range" not in request.headers:
            self._prefetch.taken(known)
            return web.Response(body=content, headers=_NAR_HEADERS)
        return await self._send_file(request, known)

    async def _send_file(self, request: web.Request, known: KnownPath) -> web.StreamResponse:
        plain = "Range" not in request.headers
        path = await self._nars.on_disk(known)
        download = None if path is not None else self._nars.download(known)
        # After its own: what Nix waits for goes before what it will want.
        self._prefetch.taken(known)
        if download is not None and known.info.stored.file_size > WHOLE_BYTES and plain:
            return await self._send_while_it_comes(request, known, download)
        if download is not None and plain and await asyncio.shield(download.done):
            content = self._nars.in_memory(known)
            if content is not None:
                # Its file is hardly written yet.
                return web.Response(body=content, headers=_NAR_HEADERS)
        path = path or await self._nars.whole(known)
        try:
            if path is None:
                return _not_found()
            if not plain or path.stat().st_size > SMALL_BYTES:
                return web.FileResponse(path, headers=_NAR_HEADERS)
            return web.Response(body=path.read_bytes(), headers=_NAR_HEADERS)
        except OSError:
            # Others needed its room just now.
            return _not_found()

    async def _send_while_it_comes(
        self, request: web.Request, known: KnownPath, download: NarDownload
    ) -> web.StreamResponse:
        answer = web.StreamResponse(headers={**_NAR_HEADERS, "Content-Length": str(known.info.stored.file_size)})
        try:
            async with aclosing(self._nars.chunks(download)) as chunks:
                async for chunk in chunks:
                    if not answer.prepared:
                        await answer.prepare(request)
                    await answer.write(chunk)
        except (NarCutError, OSError) as error:
            if not answer.prepared:
                return _not_found()
            if not isinstance(error, ConnectionError):
                _log.warning("an answer was cut short: %s", error)
            if request.transport is not None:
                request.transport.abort()
            return answer
        await answer.write_eof()
        return answer

    async def pass_on(self, request: web.Request) -> web.Response:
        """Answer with a small file of the first upstream that has it."""
        for upstream in self._lookups.upstreams.values():
            if not upstream.is_away:
                content = await upstream.small(request.rel_url.raw_path.lstrip("/"), PASSED_ON_BYTES)
                if content is not None:
                    kind = "text/plain" if request.path.startswith("/log/") else "application/json"
                    return web.Response(body=content, content_type=kind)
        return _not_found()

    async def nothing(self, _request: web.Request) -> web.Response:
        """Answer for every other address."""
        return _not_found()


def own_hosts(listen: str, port: int) -> frozenset[str]:
    """Return the host names under which requests are answered; none, which is any, unless it is this machine's own."""
    if not is_loopback(listen):
        return frozenset()
    names = ("127.0.0.1", "localhost", "[::1]", f"[{listen}]" if ":" in listen else listen)
    return frozenset((*names, *(f"{name}:{port}" for name in names)))


def is_loopback(listen: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(listen).is_loopback
    except ValueError:
        return listen == "localhost"


def _only_for(hosts: frozenset[str]) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.host.lower() not in hosts:
            return web.Response(status=421, text="this proxy answers under its own address only\n")
        return await handler(request)

    return check


def _not_found() -> web.Response:
    return web.Response(status=404, text="not here\n", headers={"Cache-Control": "no-store"})
