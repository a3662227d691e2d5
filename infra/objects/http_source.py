"""An object over HTTP as a source that a thread may block on: what verifies a NAR reads from anywhere.

A transfer that breaks off goes on where it was, by a range request for the rest; redirects are followed anew each time,
so that presigned addresses may be short-lived. A 404 with `Retry-After` is our own cache's answer that it cannot look
just now. Every wait is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import CancelledError
from contextlib import aclosing

import aiohttp

from infra.nix.narinfo import NarInfo
from infra.objects.errors import ObjectMissingError, ObjectStoreError
from infra.objects.nar_reader import read_verified
from infra.objects.verification import VerifiedNar
from infra.retry import Backoff

#: Tries without progress, and the first pause between two in seconds (it doubles).
TRIES = 5
PAUSE_S = 0.2
#: Seconds to connect, and without a byte.
CONNECT_S = 10.0
SILENCE_S = 60.0
#: Bytes that wait to be read.
BUFFER_BYTES = 1024 * 1024


class HttpSource:
    """A `BlockingSource` for a thread other than the event loop's; made in the loop, closed in the loop."""

    def __init__(self, session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> None:
        self._session = session
        self._url = url
        self._headers = headers
        self._loop = asyncio.get_running_loop()
        self._response: aiohttp.ClientResponse | None = None
        self._offset = 0
        self._closed = False

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most `size`; b"" at the end.

        Raises:
            ObjectMissingError: there is no such object.
            ObjectStoreError: it cannot be read.
        """
        try:
            return asyncio.run_coroutine_threadsafe(self._read(size), self._loop).result()
        except CancelledError:
            raise ObjectStoreError("the transfer was given up") from None

    def close(self) -> None:
        """Let go of the object; a read that waits fails."""
        self._closed = True
        if self._response is not None:
            self._response.close()
            self._response = None

    async def _read(self, size: int) -> bytes:
        backoff = Backoff(PAUSE_S)
        problem = ""
        for attempt in range(TRIES):
            if self._closed:
                break
            try:
                if self._response is None:
                    self._response = await self._ask()
                data = await self._response.content.read(size)
            except TimeoutError:
                problem = f"was silent for {SILENCE_S:.0f} s"
            except aiohttp.ClientResponseError as error:
                problem = f"answered with status {error.status}"
            except aiohttp.ClientError as error:
                problem = f"broke off ({type(error).__name__})"
            else:
                self._offset += len(data)
                return data
            if self._response is not None:
                self._response.close()
                self._response = None
            if attempt + 1 < TRIES:
                await backoff.pause()
        raise ObjectStoreError(f"{self._url.partition('?')[0]} cannot be read: the server {problem or 'was left'}")

    async def _ask(self) -> aiohttp.ClientResponse:
        headers = dict(self._headers)
        if self._offset:
            headers["Range"] = f"bytes={self._offset}-"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        response = await self._session.get(
            self._url, headers=headers, timeout=timeout, read_bufsize=BUFFER_BYTES, auto_decompress=False
        )
        if response.status == (206 if self._offset else 200):
            return response
        response.close()
        if response.status == 416:
            # All of it was read, and only its end was not seen: what is missing shows when it is verified.
            raise ObjectStoreError(f"{self._url.partition('?')[0]} has another length than it said")
        if response.status in {401, 403, 404, 410} and "Retry-After" not in response.headers:
            raise ObjectMissingError(f"{self._url.partition('?')[0]} is not there (status {response.status})")
        raise aiohttp.ClientResponseError(response.request_info, (), status=response.status)


async def fetch_nar_over_http(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], narinfo: NarInfo
) -> AsyncGenerator[bytes, None]:
    """Yield the NAR whose object is at `url`, as `fetch_nar` does."""
    source = HttpSource(session, url, headers)
    async with aclosing(read_verified(VerifiedNar(source, narinfo), interruptible=True)) as chunks:
        async for data in chunks:
            yield data
