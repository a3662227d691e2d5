"""Uploads by `nix copy --to http://HOST/cache[/NAME]` (infra/nix/FORMATS.md 6.1), for holders of a writer token.

    PUT PREFIX/nar/<file hash>.nar[.zst …]     hashed while it comes; stored if it has the hash in its name
    PUT PREFIX/<hash>.narinfo                  a claim: the object is read back whole, verified, signed by us, shown
    PUT PREFIX/log/<derivation>                kept beside the cache, bounded, for `nix log`
    PUT PREFIX/<hash>.ls, PREFIX/debuginfo/…   taken and dropped: no key vouches for them
    PUT PREFIX/realisations/…  build-trace-v2/…  signed by us, if their paths are here
    PUT PREFIX/nix-cache-info                  taken if it names our store directory

Nix retries a 5xx or 429 with an empty body and the old Content-Length (2.8), and then hangs. So: a PUT without a
token, too large or without room is refused before `100 Continue`; after that every refusal is a 4xx that Nix does not
retry, with one sentence. A body that ends early or falls silent leaves nothing.

HEAD (and GET) of an object succeeds for its writers from the moment it is whole, so that a second run need
not send it again: `RecentUploads`, which claims only what this process stored and still finds in the store.

A client's signatures are not kept: trust in what this cache serves comes from its own keys. Nix before 2.32 sends no
Content-Encoding; later ones only by a setting (`narinfo-compression` and its like), and that is refused: what a
stranger may inflate is no bounded work.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api import cache_routes
from coordinator.api.route import Right, Route
from coordinator.caches.opening import OpenCache
from coordinator.http.binary_cache.access import challenge, may_write
from coordinator.http.bodies import BodyEncodedError, Pace, refuse_encoding
from coordinator.http.routing import serve_below
from infra.cache.publishing.claims import AlreadyPublished, Conflict, Published, PublishOutcome
from infra.cache.publishing.realisations import Registered
from infra.nix import narinfo as narinfo_format
from infra.nix import realisation as realisation_format
from infra.nix.base32 import SHA256_PATTERN
from infra.nix.errors import FormatError
from infra.nix.narinfo import NarInfo
from infra.nix.realisation import MAX_REALISATION_BYTES, RealisationLayout
from infra.nix.store_path import parse_base_name
from infra.objects.compression import MAX_NAR_BYTES
from infra.objects.errors import CacheError
from infra.objects.hashed_put import WrongBytesError, put_hashed
from infra.objects.store import INCOMING, ObjectStore

_log = logging.getLogger(__name__)

#: Root kind of uploads by `nix copy`. One root a path: the protocol has no notion of a closure.
PUT: Final = "put"
#: Bodies that are taken at one time; further ones wait before `100 Continue`.
MAX_UPLOADS: Final = 32
#: A body that is silent for so long, or this far behind `bodies.LEAST_BYTES_PER_S`, is given up.
SILENCE_S: Final = 30.0
#: A narinfo with MAX_REFERENCES references.
MAX_NARINFO_BYTES: Final = 8 * 1024 * 1024
MAX_CACHE_INFO_BYTES: Final = 4096
#: What is taken and dropped.
MAX_DROPPED_BYTES: Final = 256 * 1024 * 1024
MAX_LOG_BYTES: Final = 64 * 1024 * 1024
#: Objects whose upload is remembered.
RECENT_UPLOADS: Final = 10_000
#: Room that stays free in a directory store.
RESERVE_BYTES: Final = 64 * 1024 * 1024

_NAR_KEY: Final = re.compile(rf"nar/(?P<hash>{SHA256_PATTERN})\.nar(?:\.(?:zst|xz|bz2))?")


class UploadRefusedError(Exception):
    """A request is refused: the answer's status, which is never one that Nix retries, and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class RecentUploads:
    """Objects that were stored whole by this process, not published yet perhaps, at most RECENT_UPLOADS."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def add(self, key: str, size_bytes: int) -> None:
        """Note an object."""
        self._sizes[key] = size_bytes
        self._sizes.move_to_end(key)
        if len(self._sizes) > RECENT_UPLOADS:
            self._sizes.popitem(last=False)

    async def size(self, key: str) -> int | None:
        """Return the size of a noted object that is still there, None for every other. Raises `ObjectStoreError`."""
        size = self._sizes.get(key)
        if size is not None and await self._store.head(key) != size:
            del self._sizes[key]
            return None
        return size


def log_key(derivation: str) -> str:
    """Return where the uploaded log of a derivation (base name) lies. Raises `FormatError` for any other text."""
    parsed = parse_base_name(derivation)
    if not parsed.is_derivation:
        raise FormatError("not a derivation", offset=0, subject="store path")
    # Names may hold characters that keys may not; the hash part alone says which derivation it is.
    return f"log/{parsed.hash_part}"


class CachePuts:
    """The handlers of one cache that has writers."""

    def __init__(self, served: OpenCache, now: Callable[[], float] = time.time) -> None:
        self._served = served
        self._cache = served.cache
        self._now = now
        self.recent = RecentUploads(served.cache.objects)
        self._slots = asyncio.Semaphore(MAX_UPLOADS)

    def add_to(self, app: web.Application) -> None:
        """Serve the routes for writers."""
        handlers: dict[Route[Any], Handler] = {
            cache_routes.PUT_CACHE_INFO: self.cache_info,
            cache_routes.PUT_NARINFO: self.narinfo,
            cache_routes.PUT_NAR: self.nar,
            cache_routes.PUT_LOG: self.log,
            cache_routes.PUT_LISTING: self.drop,
            cache_routes.PUT_DEBUG_INFO: self.drop,
            cache_routes.PUT_REALISATION: self.realisation_by_hash,
            cache_routes.PUT_BUILD_TRACE: self.realisation_by_derivation,
        }
        serve_below(app, self._served.prefix, handlers, {Right.WRITE: self._guarded}, _not_yet)

    async def nar(self, request: web.Request) -> web.StreamResponse:
        """Store an object."""
        key = f"nar/{request.match_info['file']}"
        named = _NAR_KEY.fullmatch(key)
        if named is None:
            raise UploadRefusedError(
                400, "an object is called nar/<hash of its bytes>.nar, .nar.zst, .nar.xz or .nar.bz2"
            )
        size = _length(request, MAX_NAR_BYTES)
        if size == 0:
            raise UploadRefusedError(400, "an object cannot be empty")
        await asyncio.to_thread(self._find_room, size)
        async with self._slots, aclosing(_body(request, size, size)) as chunks:
            await put_hashed(self._cache.objects, key, f"sha256:{named['hash']}", size, chunks)
        self.recent.add(key, size)
        self._cache.counters.uploaded_bytes += size
        return _done()

    async def narinfo(self, request: web.Request) -> web.StreamResponse:
        """Publish a path."""
        text = await self._whole(request, MAX_NARINFO_BYTES)
        try:
            claim = await self._claim(await asyncio.to_thread(narinfo_format.parse, text, self._cache.store_dir))
        except FormatError as error:
            raise UploadRefusedError(400, f"the narinfo cannot be read: {error}") from None
        if claim.hash_part != request.match_info["hash_part"]:
            raise UploadRefusedError(400, f"the narinfo is that of {claim.store_path}, not of the path in the address")
        # Before it is published: from then on a collection could take it.
        await self._cache.keep(PUT, claim.base_name, [claim.store_path], self._served.settings.expiry(self._now()))
        (outcome,) = await self._cache.publish([claim])
        return _answer(outcome)

    async def realisation_by_hash(self, request: web.Request) -> web.StreamResponse:
        """Sign and store a realisation as Nix up to 2.34 sends it."""
        return await self._realisation(request, RealisationLayout.BY_HASH, request.match_info["key"])

    async def realisation_by_derivation(self, request: web.Request) -> web.StreamResponse:
        """Sign and store a realisation as Nix from 2.35 on sends it."""
        key = f"{request.match_info['derivation']}/{request.match_info['output']}"
        return await self._realisation(request, RealisationLayout.BY_DERIVATION, key)

    async def _realisation(self, request: web.Request, layout: RealisationLayout, key: str) -> web.StreamResponse:
        body = await self._whole(request, MAX_REALISATION_BYTES)
        try:
            # A megabyte of it takes 30 ms.
            offered = await asyncio.to_thread(realisation_format.parse, layout, key, body)
        except FormatError as error:
            raise UploadRefusedError(400, f"the realisation cannot be read: {error}") from None
        registration = await self._cache.register(offered)
        match registration.outcome:
            case Registered.CONFLICT:
                return _refusal(409, f"{offered.key} was realised as {registration.about} before; the first stays")
            case Registered.MISSING:
                return _refusal(422, f"{offered.key} is not taken: {registration.about} is not in this cache")
            case _:
                return _done()

    async def log(self, request: web.Request) -> web.StreamResponse:
        """Keep a build's log; a later one replaces it."""
        try:
            key = log_key(request.match_info["derivation"])
        except FormatError as error:
            raise UploadRefusedError(400, f"that is not the name of a derivation: {error}") from None
        size = _length(request, MAX_LOG_BYTES)
        async with self._slots, aclosing(_body(request, size, MAX_LOG_BYTES)) as chunks:
            # A log that was cut must not replace one that is whole, and a stream that raises leaves nothing.
            await self._cache.objects.put_stream(key, chunks)
        return _done()

    async def cache_info(self, request: web.Request) -> web.StreamResponse:
        """Take what names our store directory: a client may send what it thinks is missing."""
        text = await self._whole(request, MAX_CACHE_INFO_BYTES)
        ours = self._cache.store_dir.path
        store_dirs = [line.partition(b":")[2].strip() for line in text.splitlines() if line.startswith(b"StoreDir:")]
        if store_dirs != [ours.encode()]:
            raise UploadRefusedError(409, f"this cache is for the store directory {ours}; it cannot be changed")
        return _done()

    async def drop(self, request: web.Request) -> web.StreamResponse:
        """Take a body and forget it."""
        size = _length(request, MAX_DROPPED_BYTES)
        async with self._slots, aclosing(_body(request, size, MAX_DROPPED_BYTES)) as chunks:
            async for _ in chunks:
                pass
        return _done()

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            if not may_write(request, self._served.access):
                answer: web.StreamResponse = challenge(self._served.name)
            else:
                answer = await self._taken(handler, request)
            if answer.status >= 400:
                # The client may be in the middle of its body: what it sends next on this connection means nothing.
                answer.force_close()
            return answer

        return guarded

    async def _taken(self, handler: Handler, request: web.Request) -> web.StreamResponse:
        try:
            refuse_encoding(request)
            return await handler(request)
        except UploadRefusedError as error:
            return _refusal(error.status, str(error))
        except BodyEncodedError as error:
            return _refusal(error.status, str(error))
        except WrongBytesError as error:
            return _refusal(400, str(error))
        except CacheError as error:
            _log.warning("an upload to the cache %s failed: %s", self._served.name, error)
            return _refusal(424, f"the cache could not store it: {error}")

    async def _whole(self, request: web.Request, limit: int) -> bytes:
        size = _length(request, limit)
        async with self._slots, aclosing(_body(request, size, limit)) as chunks:
            data = bytearray()
            async for chunk in chunks:
                data += chunk
            return bytes(data)

    async def _claim(self, info: NarInfo) -> NarInfo:
        """Return what a client's narinfo claims; sizes and hashes of the object that it omits are looked up."""
        stored = info.stored
        named = _NAR_KEY.fullmatch(stored.url)
        if named is None:
            raise UploadRefusedError(400, f"URL must be the object that was uploaded before, not {stored.url[:80]!r}")
        file_hash = stored.file_hash or f"sha256:{named['hash']}"
        file_size = stored.file_size or await self._cache.objects.head(stored.url) or 0
        return replace(info, stored=replace(stored, file_hash=file_hash, file_size=file_size))

    def _find_room(self, size: int) -> None:
        """Refuse what a directory store certainly has no room for; blocks."""
        directory = self._cache.objects.local_path(INCOMING)
        if directory is None:
            return
        while not directory.exists():
            directory = directory.parent
        if shutil.disk_usage(directory).free < size + RESERVE_BYTES:
            raise UploadRefusedError(413, "the cache's disk has no room for it")


async def _not_yet(_request: web.Request) -> None:
    """Let the handler send `100 Continue`, once it has looked at the request."""


def _length(request: web.Request, limit: int) -> int:
    size = request.content_length
    if size is None:
        raise UploadRefusedError(411, "the request must say its Content-Length")
    if size > limit:
        raise UploadRefusedError(413, f"{size} bytes are too many; the limit is {limit}")
    return size


async def _body(request: web.Request, size: int, limit: int) -> AsyncGenerator[bytes, None]:
    """Ask for the body and yield it.

    Raises `UploadRefusedError` if it ends before `size`, comes too slowly, or is more than `limit`.
    """
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # aiohttp counts what was written to know whether an answer has begun.
        request.writer.output_size = 0
    pace = Pace(request, SILENCE_S)
    while True:
        try:
            chunk = await pace.read()
        except TimeoutError:
            raise UploadRefusedError(400, "the body came too slowly; what came is thrown away") from None
        except (ConnectionError, web.RequestPayloadError):
            raise UploadRefusedError(400, "the body ended early; what came is thrown away") from None
        if not chunk:
            break
        if pace.taken > limit:
            raise UploadRefusedError(413, f"it is more than {limit} bytes")
        yield chunk
    if pace.taken != size:
        raise UploadRefusedError(400, f"{pace.taken} bytes came, {size} were announced; they are thrown away")


def _answer(outcome: PublishOutcome) -> web.StreamResponse:
    match outcome:
        case Published() | AlreadyPublished():
            return _done()
        case Conflict():
            sentence = f"{outcome.store_path} was published with other bits (NAR {outcome.published_nar_hash})"
            return _refusal(409, f"{sentence}; the first stays, this one ({outcome.offered_nar_hash}) is recorded")
        case _:
            return _refusal(422, f"{outcome.store_path} is not published: {outcome.message}")


def _done() -> web.Response:
    return web.Response(status=200, text="", headers={"Cache-Control": "no-store"})


def _refusal(status: int, sentence: str) -> web.Response:
    return web.Response(status=status, text=f"{sentence}\n", headers={"Cache-Control": "no-store"})
