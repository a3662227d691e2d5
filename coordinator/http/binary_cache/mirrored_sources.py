"""Plain files of the cache by their hash: it is a mirror of sources, in the layout of Nix' `hashed-mirrors`.

    GET PREFIX/mirror/ALGORITHM/HASH     200 with the bytes of the file, 404 where none is here

Nix writes HASH in base 16, the fetchers of nixpkgs as a derivation has it: in base 16, in Nix' base 32, or whole as SRI
(then ALGORITHM may be empty). The file is found by the content address of a path that may be read here, so a reader of
the cache gets nothing that it could not fetch as a NAR. It is unpacked and hashed on its way: the last bytes of one
that is another file are not sent, and the connection breaks.

A stranger may ask where the cache is public, so FILES_AT_ONCE are unpacked at one time; more wait, TURN_S at most, and
are 404 then, which a client takes for "not here".
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Final

from aiohttp import web

from coordinator.http.binary_cache.nars import cut
from infra.cache.cache import Cache
from infra.nix.content import FixedContent
from infra.nix.errors import FormatError
from infra.nix.hashing import DIGEST_SIZES, parse_hash
from infra.nix.nar import NarData, NarEvent, NarFile, NarReader
from infra.objects.errors import CacheError
from infra.objects.nar_reader import fetch_nar

#: Files that are unpacked at one time, and seconds that one waits for its turn.
FILES_AT_ONCE: Final = 4
TURN_S: Final = 10.0
#: A content never changes, and that it is not here may, soon.
_FOUND: Final = {"Content-Type": "application/octet-stream", "Cache-Control": "public, max-age=31536000, immutable"}
_ABSENT: Final = {"Cache-Control": "no-store"}

_log = logging.getLogger(__name__)


class _OtherFileError(Exception):
    """A file is another one than its content address says."""


class MirroredSources:
    """The plain files of one cache; `headers` makes of a found file's headers what this cache sends."""

    def __init__(self, cache: Cache, headers: Callable[[Mapping[str, str]], Mapping[str, str]]) -> None:
        self._cache = cache
        self._found = headers(_FOUND)
        self._turns = asyncio.Semaphore(FILES_AT_ONCE)

    async def file(self, request: web.Request) -> web.StreamResponse:
        """Send a file."""
        content = _content(request.match_info["algorithm"], request.match_info["hash"])
        if content is None:
            return _absent()
        try:
            async with asyncio.timeout(TURN_S):
                await self._turns.acquire()
        except TimeoutError:
            return _absent()
        try:
            return await self._file(request, content)
        finally:
            self._turns.release()

    async def _file(self, request: web.Request, content: FixedContent) -> web.StreamResponse:
        response = web.StreamResponse(headers=self._found)
        try:
            info = (await self._cache.holders([content])).get(content)
            if info is None:
                return _absent()
            async with aclosing(fetch_nar(self._cache.objects, info)) as archive:
                events = _events(archive)
                async with aclosing(events):
                    first = await anext(events, None)
                    if not isinstance(first, NarFile) or first.executable:
                        return _absent()
                    response.content_length = first.size
                    response.etag = content.digest.hex()
                    await response.prepare(request)
                    if request.method != "HEAD":
                        await _send(response, content, events)
        except (CacheError, FormatError, _OtherFileError) as error:
            if not response.prepared:
                _log.warning("%s cannot be sent: %s", content.address, error)
                return _absent()
            cut(request, error)
            return response
        await response.write_eof()
        return response


async def _send(response: web.StreamResponse, content: FixedContent, events: AsyncIterator[NarEvent]) -> None:
    """Send the file; its last bytes once they are known to belong to it. Raises `_OtherFileError`."""
    digest = hashlib.new(content.algo, usedforsecurity=False)
    held = b""
    async for event in events:
        if isinstance(event, NarData):
            if held:
                await response.write(held)
            held = event.data
            await asyncio.to_thread(digest.update, held)
    if digest.digest() != content.digest:
        raise _OtherFileError(f"it is not {content.address}")
    if held:
        await response.write(held)


async def _events(archive: AsyncIterator[bytes]) -> AsyncGenerator[NarEvent, None]:
    reader = NarReader()
    async for data in archive:
        for event in await asyncio.to_thread(reader.feed, data):
            yield event
    reader.close()


def _content(algorithm: str, text: str) -> FixedContent | None:
    """Return the content that an address names, None where it names none."""
    try:
        if algorithm in DIGEST_SIZES:
            text = text if text.startswith(f"{algorithm}-") else f"{algorithm}:{text}"
        elif algorithm:
            return None
        return FixedContent("", *parse_hash(text))
    except FormatError:
        return None


def _absent() -> web.Response:
    return web.Response(status=404, text="not in this cache\n", headers=_ABSENT)
