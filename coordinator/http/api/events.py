"""Watch streams: a submission's changes as server-sent events.

Each stream reads from one watcher of the views, at most every `PAUSE_S`, so a burst of a thousand finished steps is one
write; a reader that is slower than that gets a fresh snapshot instead of a growing queue. Silence is filled with
comments, so that both sides notice a connection that is gone.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from coordinator.api.models import WatchEvent
from coordinator.errors import UnavailableError
from coordinator.http.answers import json_of
from coordinator.http.api.pages import rendered
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views

#: Seconds between two writes of one stream, and of silence before a comment.
PAUSE_S = 0.2
COMMENT_S = 10.0


class WatchStreams:
    """All open watch streams; at most `limit`."""

    def __init__(self, views: Views, limit: int) -> None:
        self._views = views
        self._limit = limit
        self._open: set[asyncio.Event] = set()
        self._stopping = False

    def stop(self) -> None:
        """End all streams at their next look; clients connect again to the next coordinator."""
        self._stopping = True
        for woken in self._open:
            woken.set()

    async def serve(self, request: web.Request, submission: SubmissionRow) -> web.StreamResponse:
        """Stream until the submission has ended or the client is gone. Raises `UnavailableError`."""
        if len(self._open) >= self._limit:
            raise UnavailableError("too many clients are watching; try again later.")
        woken = asyncio.Event()
        self._open.add(woken)
        try:
            with self._views.watch(submission, woken.set) as watcher:
                response = web.StreamResponse(
                    headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
                )
                await response.prepare(request)
                while not self._stopping:
                    woken.clear()
                    await self._views.recipes.fetch(watcher.failed())
                    frames = await rendered(watcher.events(), _frame)
                    await response.write(b"".join(frames))
                    if watcher.over:
                        break
                    await self._silence(response, woken)
                    await asyncio.sleep(PAUSE_S)
                await response.write_eof()
                return response
        except ConnectionError:
            # The client went away: nothing is wrong, and there is no one to answer.
            return web.Response()
        finally:
            self._open.discard(woken)

    async def _silence(self, response: web.StreamResponse, woken: asyncio.Event) -> None:
        """Wait for a change, with a comment now and then."""
        while not woken.is_set():
            try:
                async with asyncio.timeout(COMMENT_S):
                    await woken.wait()
            except TimeoutError:
                await response.write(b": still here\n\n")


def _frame(event: WatchEvent) -> bytes:
    return b"event: " + event.type.encode() + b"\ndata: " + json_of(event) + b"\n\n"
