"""NARs as files: ranges, resume, and the quickest way that each object store allows.

    a directory                   the kernel copies from file to socket (sendfile), or nginx does (`X-Accel-Redirect`)
    a store on another host name  307 to a presigned address of the object; a client that resumes asks us again
    any other store               relayed, block by block

An object never changes, so its name is its entity tag and clients may keep it for ever. HEAD is always answered here:
a presigned address is for one method, and a record is no proof, so the cache looks in the store. No 200 leaves before
the object is open.

`X-Accel-Redirect` is sent only to a proxy that asks for it with `X-Sendfile-Type: X-Accel-Redirect` (the convention of
Rack), because a client that came past the proxy would get an empty body.

uvloop has no sendfile of its own, so `_send_file` calls it on a second descriptor of the connection once the headers
have left. It never waits for the socket; where the file is not in the page cache it waits for the disk, as nginx does.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from contextlib import aclosing
from typing import Final
from urllib.parse import urlsplit

from aiohttp import ETag, web

from coordinator.caches.opening import OpenCache
from coordinator.config import Redirect
from infra.objects.errors import ObjectMissingError, ObjectStoreError

_log = logging.getLogger(__name__)

#: Files, or ranges of them, up to this size leave together with their headers.
SMALL_FILE_BYTES: Final = 64 * 1024
#: Bytes given to one connection before the event loop looks after the others.
SENDFILE_BYTES: Final = 1024 * 1024
#: A client that takes nothing for so long is left (Nix itself gives up after as long), and so is one that is this much
#: behind LEAST_BYTES_PER_S, a modem's pace.
STALL_S: Final = 300.0
LEAST_BYTES_PER_S: Final = 4 * 1024
#: How long a presigned address is good for: long enough to begin.
PRESIGNED_S: Final = 900.0

NAR_HEADERS: Final = {
    "Content-Type": "application/x-nix-nar",
    "Cache-Control": "public, max-age=31536000, immutable",
    "Accept-Ranges": "bytes",
}


class NarAnswers:
    """Answers for the objects of one cache; `headers` are NAR_HEADERS as the cache sends them."""

    def __init__(self, served: OpenCache, headers: Mapping[str, str]) -> None:
        self._served = served
        self._counters = served.cache.counters
        self._headers = headers

    async def answer(self, request: web.Request, key: str, size: int) -> web.StreamResponse:
        """Answer GET or HEAD for an object that should be there with `size` bytes.

        Raises:
            ObjectMissingError: it is not there, or has another size; nothing was sent.
            ObjectStoreError: the store failed before anything was sent.
        """
        objects = self._served.cache.objects
        etag = key.rpartition("/")[2]
        path = objects.local_path(key)
        if path is None:
            return await self._from_remote(request, key, etag, size)
        try:
            file = path.open("rb", buffering=0)
        except OSError as error:
            raise ObjectMissingError(f"cannot open {key} in {objects.url}: {error.strerror}") from None
        with file:
            if os.fstat(file.fileno()).st_size != size:
                raise ObjectMissingError(f"{objects.url} has no whole object {key}")
            return await self._from_file(request, file.fileno(), key, etag, size)

    async def _from_file(self, request: web.Request, file: int, key: str, etag: str, size: int) -> web.StreamResponse:
        response, start, stop = _plan(request, etag, size, self._headers)
        if request.method == "HEAD" or start == stop:
            return response
        self._count(stop - start)
        if self._served.settings.accel_prefix and request.headers.get("X-Sendfile-Type") == "X-Accel-Redirect":
            # nginx takes the range from the request and the bytes from the file.
            accel = f"{self._served.settings.accel_prefix}/{key}"
            return web.Response(headers={**self._headers, "ETag": f'"{etag}"', "X-Accel-Redirect": accel})
        if stop - start <= SMALL_FILE_BYTES:
            return _with_body(response, os.pread(file, stop - start, start))
        return await _send_file(request, response, file, start, stop)

    async def _from_remote(self, request: web.Request, key: str, etag: str, size: int) -> web.StreamResponse:
        objects = self._served.cache.objects
        response, start, stop = _plan(request, etag, size, self._headers)
        if request.method == "HEAD":
            if await objects.head(key) != size:
                raise ObjectMissingError(f"{objects.url} has no whole object {key}")
            return response
        if start == stop:
            return response
        self._count(stop - start)
        location = await self._presigned(request, key)
        if location:
            return web.Response(status=307, headers={"Location": location, "Cache-Control": "no-store"})
        return await self._relay(request, response, key, start, stop)

    def _count(self, size: int) -> None:
        self._counters.nar_requests += 1
        self._counters.nar_bytes += size

    async def _presigned(self, request: web.Request, key: str) -> str:
        """Return an address to send the client to, "" if it must be served here."""
        wish = self._served.settings.redirect
        if wish is Redirect.NEVER:
            return ""
        location = await self._served.cache.objects.presigned_get(key, PRESIGNED_S)
        ours = urlsplit(f"//{request.host}").hostname
        return location if wish is Redirect.ALWAYS or urlsplit(location).hostname != ours else ""

    async def _relay(
        self, request: web.Request, response: web.StreamResponse, key: str, start: int, stop: int
    ) -> web.StreamResponse:
        """Pass an object, or a range of it, through from a remote store."""
        async with aclosing(self._served.cache.objects.get_stream(key, start, stop)) as chunks:
            first = await anext(chunks, b"")
            await response.prepare(request)
            try:
                await response.write(first)
                async for chunk in chunks:
                    await response.write(chunk)
            except ObjectStoreError as error:
                cut(request, error)
                return response
        await response.write_eof()
        return response


def cut(request: web.Request, error: Exception) -> None:
    """Break the connection: the client sees that bytes are missing, and asks for the rest."""
    _log.warning("an answer was cut short: %s", error)
    if request.transport is not None:
        request.transport.abort()


def _plan(
    request: web.Request, etag: str, size: int, headers: Mapping[str, str]
) -> tuple[web.StreamResponse, int, int]:
    """Return the answer's head and the bytes [start, stop) that belong to it; equal where there is no body."""
    tags = request.if_none_match or ()
    if any(tag.value in {etag, "*"} for tag in tags):
        return web.Response(status=304, headers={**headers, "ETag": f'"{etag}"'}), 0, 0
    whole = web.StreamResponse(headers=headers)
    whole.etag = ETag(etag)
    whole.content_length = size
    # A range of something else than the client has is no use to it.
    if "Range" not in request.headers or request.headers.get("If-Range", f'"{etag}"') != f'"{etag}"':
        return whole, 0, size
    wanted = _range(request, size)
    if wanted is None:
        refusal = {"Content-Range": f"bytes */{size}", "Cache-Control": "no-store"}
        return web.Response(status=416, headers=refusal), 0, 0
    start, stop = wanted
    whole.set_status(206)
    whole.content_length = stop - start
    whole.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return whole, start, stop


def _range(request: web.Request, size: int) -> tuple[int, int] | None:
    """Return the wanted bytes as (start, stop), None if there are none such."""
    try:
        wanted = request.http_range
    except ValueError:
        return None
    start = 0 if wanted.start is None else wanted.start
    if start < 0:
        return max(0, size + start), size
    stop = size if wanted.stop is None else min(wanted.stop, size)
    return (start, stop) if start < stop else None


def _with_body(head: web.StreamResponse, body: bytes) -> web.Response:
    """Return the same answer, ready to leave in one write."""
    headers = head.headers.copy()
    headers.popall("Content-Length", None)
    return web.Response(status=head.status, headers=headers, body=body)


async def _send_file(
    request: web.Request, response: web.StreamResponse, file: int, start: int, stop: int
) -> web.StreamResponse:
    """Send bytes of an open file without seeing them; who stalls, or whose file ends early, loses the connection."""
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client has left")
    connection = os.dup(transport.get_extra_info("socket").fileno())
    try:
        # Nothing may be waiting in the transport when bytes go past it.
        transport.set_write_buffer_limits(high=0)
        writer = await response.prepare(request)
        if writer is not None:
            await writer.drain()
        await _copy(connection, file, start, stop)
    except ConnectionError:
        # The client left, as clients do.
        return response
    except (TimeoutError, OSError) as error:
        cut(request, error)
        return response
    finally:
        os.close(connection)
        if not transport.is_closing():
            # uvloop raises where the connection is gone.
            transport.set_write_buffer_limits()
    await response.write_eof()
    return response


async def _copy(connection: int, file: int, start: int, stop: int) -> None:
    """Copy from file to socket whenever the socket takes more. Raises `OSError` or `TimeoutError`."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    at, began_s = start, loop.time()

    def send() -> None:
        nonlocal at
        try:
            sent = os.sendfile(connection, file, at, min(stop - at, SENDFILE_BYTES))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            if not ended.done():
                ended.set_exception(error)
            return
        at += sent
        stall.reschedule(min(loop.time(), began_s + (at - start) / LEAST_BYTES_PER_S) + STALL_S)
        if not ended.done() and (at >= stop or sent == 0):
            if at < stop:
                ended.set_exception(OSError(f"the object ended after {at} bytes"))
            else:
                ended.set_result(None)

    async with asyncio.timeout(STALL_S) as stall:
        loop.add_writer(connection, send)
        try:
            await ended
        finally:
            loop.remove_writer(connection)
