"""Live parts of pages: server-sent events with the parts that changed since the browser last got them.

Rules: 1. A page that many watch is rendered once a `PAUSE_S` for all of them, and less often where that takes long: a
watched page may cost a hundredth of a processor. 2. Nothing is queued for a browser: one
that does not read holds back its own stream alone, and gets the present state when it reads again. 3. Streams are
bounded in number; a page without one stays as it was when it was loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Final

import orjson
from aiohttp import web

from coordinator.errors import UnavailableError
from coordinator.http.web.guards import HEADERS

#: A page is rendered again after so many times what it took, but within `REST_MOST_S`.
REST_FACTOR: Final = 100.0
REST_MOST_S: Final = 5.0
#: Seconds between two looks at a page, and of silence before a comment.
PAUSE_S: Final = 1.0
COMMENT_S: Final = 10.0
#: Milliseconds after which a browser connects again.
_RETRY: Final = b"retry: 3000\n\n"
#: The last frame of a stream.
END: Final = b"event: end\ndata: -\n\n"

#: Renders the parts of a page; the second value is true once they will not change any more.
Parts = Callable[[], Awaitable[tuple[Mapping[str, str], bool]]]


def rest_s(took_s: float) -> float:
    """Return the seconds for which a page is not rendered again, by those that it took."""
    return min(max(PAUSE_S / 2, REST_FACTOR * took_s), REST_MOST_S)


@dataclass(slots=True, eq=False)
class _Watched:
    """A page that is watched, with its parts as last rendered."""

    render: Parts
    readers: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    parts: Mapping[str, str] = field(default_factory=dict)
    over: bool = False
    rests_until: float = float("-inf")

    async def look(self) -> None:
        """Render anew where that was not done just now."""
        loop = asyncio.get_running_loop()
        async with self.lock:
            began = loop.time()
            if began >= self.rests_until:
                self.parts, self.over = await self.render()
                ended = loop.time()
                self.rests_until = ended + rest_s(ended - began)


class LiveStreams:
    """All streams of live parts; at most `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open = 0
        self._watched: dict[str, _Watched] = {}
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End all streams; browsers connect again to the coordinator that comes next."""
        self._stopping.set()

    async def serve(self, request: web.Request, render: Parts) -> web.StreamResponse:
        """Stream the parts of the page at this address until they are final or the browser is gone.

        Raises `UnavailableError`.
        """
        self._require_room()
        watched = self._watched.setdefault(request.path_qs, _Watched(render))
        watched.readers += 1
        try:
            # What cannot be rendered at all is an error of the request.
            await watched.look()
            return await self.serve_frames(request, self._frames(watched))
        finally:
            watched.readers -= 1
            if not watched.readers:
                self._watched.pop(request.path_qs, None)

    async def serve_frames(self, request: web.Request, frames: AsyncGenerator[bytes, None]) -> web.StreamResponse:
        """Stream frames, of which empty ones say that nothing is new; the next is asked for once one is taken.

        Raises `UnavailableError`.
        """
        self._require_room()
        self._open += 1
        try:
            response = web.StreamResponse(
                headers={**HEADERS, "Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
            )
            await response.prepare(request)
            await response.write(_RETRY)
            async with aclosing(frames):
                await self._send(response, frames)
            await response.write_eof()
        except ConnectionError:
            # The browser went away: nothing is wrong.
            return web.Response()
        else:
            return response
        finally:
            self._open -= 1

    def _require_room(self) -> None:
        if self._open >= self._limit:
            raise UnavailableError("too many browsers are watching; reload the page to see what is new.")

    async def _send(self, response: web.StreamResponse, frames: AsyncIterator[bytes]) -> None:
        loop = asyncio.get_running_loop()
        written_at = loop.time()
        async for frame in frames:
            if self._stopping.is_set():
                return
            silent = loop.time() - written_at >= COMMENT_S
            if frame or silent:
                await response.write(frame or b": still here\n\n")
                written_at = loop.time()

    async def _frames(self, watched: _Watched) -> AsyncGenerator[bytes, None]:
        """Yield the parts that changed since the last time, at most one frame a `PAUSE_S`."""
        sent: dict[str, int] = {}
        while True:
            await watched.look()
            fresh = {name: part for name, part in watched.parts.items() if sent.get(name) != hash(part)}
            sent.update((name, hash(part)) for name, part in fresh.items())
            over = watched.over
            yield b"event: parts\ndata: " + orjson.dumps(fresh) + b"\n\n" if fresh else b""
            if over:
                yield END
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_S):
                    await self._stopping.wait()
