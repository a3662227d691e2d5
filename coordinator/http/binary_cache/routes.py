"""The binary cache over HTTP: what Nix clients of any version ask.

`coordinator.api.cache_routes` has the routes; `coordinator.http.binary_cache.puts` answers writers, and
`coordinator.http.binary_cache.closures` one question of our own, that for the narinfos of a whole closure.

A private cache answers 401 to a client without a token (`coordinator.http.binary_cache.access`). HEAD is answered
wherever GET is, and the same. What is unknown, malformed, lost or cannot be looked up just now is 404 with `no-store`:
a client then asks its next cache or builds, while any 5xx would fail its build (infra/nix/FORMATS.md 6.2). For the same
reason no 200 leaves before its first bytes are at hand. Workers, who have no other cache, distinguish what fails just
now from what is lost by its `Retry-After` (`infra.objects.http_source`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from hashlib import blake2b
from typing import Any, Final, TypeAlias

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api import cache_routes
from coordinator.api.route import Right, Route
from coordinator.caches.opening import OpenCache
from coordinator.http.binary_cache.access import challenge, may_read, may_write
from coordinator.http.binary_cache.closures import ClosureAnswers, MissMeter
from coordinator.http.binary_cache.mirrored_sources import MirroredSources
from coordinator.http.binary_cache.nars import NAR_HEADERS, NarAnswers, cut
from coordinator.http.binary_cache.pointers import PointerFiles
from coordinator.http.binary_cache.puts import CachePuts, log_key
from coordinator.http.routing import serve_below
from infra.cache.listing import Listings
from infra.nix.errors import FormatError
from infra.nix.realisation import RealisationLayout, parse_key
from infra.objects.errors import CacheError, ObjectMissingError, ObjectStoreError

#: `Retry-After` of what fails just now, in seconds.
RETRY_AFTER_S: Final = 5

_log = logging.getLogger(__name__)

#: Gives the log of a derivation (base name of the .drv), None if there is none.
LogFor: TypeAlias = Callable[[str], Awaitable[AsyncIterator[bytes] | None]]

_JSON_HEADERS: Final = {"Content-Type": "application/json", "Cache-Control": "public, max-age=60"}
_LOG_HEADERS: Final = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-cache"}


def add_cache_routes(
    app: web.Application,
    served: OpenCache,
    *,
    log_for: LogFor | None = None,
    misses: MissMeter | None = None,
    pointers: PointerFiles | None = None,
) -> None:
    """Serve a cache below its prefix. Where one prefix begins another, the longer one must be added first."""
    handlers = CacheRoutes(served, log_for, misses, pointers)
    serve_below(app, served.prefix, handlers.handlers(), {Right.READ: handlers.for_readers})
    if handlers.puts is not None:
        handlers.puts.add_to(app)


class CacheRoutes:
    """The handlers."""

    def __init__(
        self,
        served: OpenCache,
        log_for: LogFor | None,
        misses: MissMeter | None = None,
        pointers: PointerFiles | None = None,
    ) -> None:
        self._misses = misses
        self._served = served
        self._pointers = pointers
        self._cache = served.cache
        self._log_for = log_for
        self._listings = Listings(served.cache)
        self._closures = ClosureAnswers(served.cache, misses)
        self._mirrored = MirroredSources(served.cache, self._headers)
        self._nars = NarAnswers(served, self._headers(NAR_HEADERS))
        #: None where no token may write.
        self.puts = CachePuts(served) if served.access.writable else None

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route for readers, the one for every other address last."""
        return {
            cache_routes.CACHE_INFO: self.cache_info,
            cache_routes.NARINFO: self.narinfo,
            cache_routes.NAR: self.nar,
            cache_routes.LISTING: self.listing,
            cache_routes.BUILD_LOG: self.log,
            cache_routes.REALISATION: self.realisation_by_hash,
            cache_routes.BUILD_TRACE: self.realisation_by_derivation,
            cache_routes.NARINFOS: self._closures.answer,
            cache_routes.STABLE_JSON: self.nothing if self._pointers is None else self._pointers.json,
            cache_routes.STABLE_NIX: self.nothing if self._pointers is None else self._pointers.nix,
            cache_routes.MIRRORED: self._mirrored.file,
            cache_routes.NOTHING: self.nothing,
        }

    def for_readers(self, handler: Handler) -> Handler:
        """Return `handler`, for those only who may read."""
        access, name = self._served.access, self._served.name
        if access.public:
            return handler

        async def guarded(request: web.Request) -> web.StreamResponse:
            return await handler(request) if may_read(request, access) else challenge(name)

        return guarded

    async def cache_info(self, _request: web.Request) -> web.Response:
        """Say what this cache is; clients ask it first and remember it for days."""
        text = f"StoreDir: {self._cache.store_dir.path}\nWantMassQuery: 1\nPriority: {self._served.settings.priority}\n"
        return web.Response(text=text, content_type="text/x-nix-cache-info")

    async def narinfo(self, request: web.Request) -> web.Response:
        """Answer what is known of one path."""
        hash_part = request.match_info["hash_part"]
        try:
            text = await self._cache.narinfo(hash_part)
        except CacheError as error:
            return _unavailable(error)
        if text is None:
            self._cache.counters.narinfo_misses += 1
            if self._misses is not None:
                self._misses.missed(hash_part, request.remote or "")
            return _not_found()
        if self._misses is not None:
            self._misses.found(hash_part)
        self._cache.counters.narinfo_hits += 1
        headers = self._headers(narinfo_headers(text))
        if any(tag.value in {headers["ETag"].strip('"'), "*"} for tag in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=text, headers=headers)

    async def listing(self, request: web.Request) -> web.Response:
        """Answer what files a NAR holds."""
        try:
            text = await self._listings.listing(request.match_info["hash_part"])
        except CacheError as error:
            return _unavailable(error)
        return _not_found() if text is None else web.Response(body=text, headers=self._headers(_JSON_HEADERS))

    async def realisation_by_hash(self, request: web.Request) -> web.Response:
        """Answer a realisation as Nix up to 2.34 asks for it."""
        return await self._realisation(RealisationLayout.BY_HASH, request.match_info["key"])

    async def realisation_by_derivation(self, request: web.Request) -> web.Response:
        """Answer a realisation as Nix from 2.35 on asks for it."""
        key = f"{request.match_info['derivation']}/{request.match_info['output']}"
        return await self._realisation(RealisationLayout.BY_DERIVATION, key)

    async def _realisation(self, layout: RealisationLayout, key: str) -> web.Response:
        try:
            body = await self._cache.realisation(layout, parse_key(layout, key))
        except FormatError:
            return _not_found()
        except CacheError as error:
            return _unavailable(error)
        return _not_found() if body is None else web.Response(body=body, headers=self._headers(_JSON_HEADERS))

    async def nar(self, request: web.Request) -> web.StreamResponse:
        """Send a NAR's object, or a range of it."""
        key = f"nar/{request.match_info['file']}"
        try:
            size = await self._cache.object_size(key)
            if size is None and self.puts is not None and may_write(request, self._served.access):
                size = await self.puts.recent.size(key)
            return _not_found() if size is None else await self._nars.answer(request, key, size)
        except ObjectMissingError:
            return _not_found()
        except CacheError as error:
            return _unavailable(error)

    async def log(self, request: web.Request) -> web.StreamResponse:
        """Send a build's log; a log that is still written is sent as far as it goes."""
        name = request.match_info["derivation"]
        if request.query_string:
            # Nix (2.8) does not encode the name, which may have a question mark in it.
            name += f"?{request.query_string}"
        try:
            uploaded = log_key(name)
        except FormatError:
            return _not_found()
        chunks = await self._log_for(name) if self._log_for is not None else None
        try:
            if chunks is None and await self._cache.objects.head(uploaded) is None:
                return _not_found()
        except CacheError as error:
            return _unavailable(error)
        response = web.StreamResponse(headers=self._headers(_LOG_HEADERS))
        await response.prepare(request)
        if request.method != "HEAD":
            try:
                async for chunk in chunks or self._cache.objects.get_stream(uploaded):
                    await response.write(chunk)
            except ObjectStoreError as error:
                cut(request, error)
                return response
        await response.write_eof()
        return response

    async def nothing(self, _request: web.Request) -> web.Response:
        """Answer for every other address."""
        return _not_found()

    def _headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return `headers` as this cache sends them: what is private is for the client's own cache only."""
        if self._served.access.public:
            return headers
        return {**headers, "Cache-Control": headers["Cache-Control"].replace("public", "private")}


def narinfo_headers(text: bytes) -> dict[str, str]:
    """Return the headers of a public cache's narinfo; its text can change when keys do, or its object is repaired."""
    tag = blake2b(text, digest_size=12).hexdigest()
    return {"Content-Type": "text/x-nix-narinfo", "Cache-Control": "public, max-age=60", "ETag": f'"{tag}"'}


def _not_found() -> web.Response:
    return web.Response(status=404, text="not in this cache\n", headers={"Cache-Control": "no-store"})


def _unavailable(error: CacheError) -> web.Response:
    _log.warning("answered 404 because the cache failed: %s", error)
    answer = _not_found()
    answer.headers["Retry-After"] = str(RETRY_AFTER_S)
    return answer
