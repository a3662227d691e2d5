"""Watch streams: a submission's changes as server-sent events.

Rules:
1. What is new is rendered once for all streams of a submission, at once where that costs little, and the less often the
   more it costs (`pause_s`): a burst of a thousand finished steps is a few writes, and a thousand watchers cost the
   loop a thousand writes and no more. The end of a submission waits for nothing. What a snapshot costs, only the next
   one waits for: changes follow it at once.
2. A stream that begins gets a snapshot. So does one that has left more than `BEHIND_BYTES` unread, once it reads again:
   nothing is queued for it meanwhile.
3. A connection that takes nothing for `coordinator.http.connections.UNREAD_S` is closed and counted there.
4. Silence is filled with comments, so that both sides notice a connection that is gone.
5. What was written ends with an `id:`. A stream whose `Last-Event-ID` names it goes on behind it without a snapshot, as
   far as the newest `KEPT_BYTES` reach back: for `LINGER_S` after the last stream, and in one life of the program.
   Where a part was cut by the break it comes once more, which changes nothing: events say how things are.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from aiohttp import web

from coordinator.api.models import Ended, WatchEvent
from coordinator.errors import UnavailableError
from coordinator.http.answers import json_of
from coordinator.http.api.pages import rendered
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from coordinator.readmodel.watcher import Watcher
from scheduler.pauses import Pause

#: Seconds between two writes of one stream: at least, and at most where there is something new.
LEAST_PAUSE_S: Final = 0.05
PAUSE_S: Final = 0.2
#: Seconds of silence before a comment.
COMMENT_S: Final = 10.0
#: What writing costs the loop, in seconds: for each byte rendered, and for each stream.
RENDERED_BYTE_S: Final = 0.15e-6
WRITTEN_STREAM_S: Final = 30e-6
#: A pause is so many times what the writes before it cost, those of all feeds alike: they take a fortieth of the loop.
REST_FACTOR: Final = 40.0
#: Bytes that wait for one stream before it gets a snapshot instead. Streams share them: they are rendered once.
BEHIND_BYTES: Final = 256 * 1024
#: Digits of the number of a part.
MAX_NUMBER: Final = 16
#: Bytes of the newest parts that are kept for streams that come back.
KEPT_BYTES: Final = 256 * 1024
#: Seconds for which a submission without a stream is followed, because its client may come back; and how many are.
LINGER_S: Final = 30.0
LINGERING: Final = 100
#: Streams that are woken before the loop is given back: each is a write of some 30 us.
WOKEN_AT_ONCE: Final = 100


def pause_s(size: int, streams: int, feeds: int) -> float:
    """Return the seconds until the next write after one of `size` bytes to so many streams, beside so many feeds."""
    cost_s = size * RENDERED_BYTE_S + streams * WRITTEN_STREAM_S
    return min(max(LEAST_PAUSE_S, REST_FACTOR * cost_s * feeds), PAUSE_S)


class _Stream:
    """Parts that wait for one connection."""

    __slots__ = ("behind", "fresh", "parts", "size", "woken")

    def __init__(self) -> None:
        #: It has nothing that changes would make sense with, and gets a snapshot next.
        self.fresh = True
        #: So much waited for it that all was dropped; once it reads again it becomes fresh.
        self.behind = False
        self.parts: list[bytes] = []
        self.size = 0
        self.woken = asyncio.Event()

    def give(self, part: bytes) -> None:
        """Queue what is new, or drop all where that is too much."""
        self.parts.append(part)
        self.size += len(part)
        if self.size > BEHIND_BYTES and len(self.parts) > 1:
            self.parts, self.size, self.behind = [], 0, True
        self.woken.set()

    def take(self) -> bytes:
        """Return and forget what waits."""
        self.woken.clear()
        data = b"".join(self.parts)
        self.parts, self.size = [], 0
        return data


class _Feed:
    """The changes of one submission, for all its streams."""

    def __init__(self, views: Views, submission: SubmissionRow, feeds: Callable[[], int]) -> None:
        """`feeds` counts those of all submissions."""
        self._views = views
        self._feeds = feeds
        self.submission = submission
        self._changed = False
        #: A stream wants a snapshot: it need not wait for the next turn.
        self._wanted = False
        #: One of both is true, and it is time for it; the next changes are due from this time of the loop on.
        self._woken = asyncio.Event()
        self._due = 0.0
        self.streams: dict[_Stream, None] = {}
        #: The last event is in all streams that are not behind.
        self.over = False
        #: Ends this feed unless a stream comes before.
        self.lingering: asyncio.TimerHandle | None = None
        #: Of the ids: what tells this feed from any other one, and the number of the newest part.
        self._name = secrets.token_hex(8)
        self._number = 0
        #: The newest parts, and how many bytes they have.
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self.task = asyncio.create_task(self._run(), name="watch feed")

    def want(self, stream: _Stream) -> None:
        """Have a snapshot rendered for a stream, which counts among the streams from now on."""
        stream.fresh, stream.behind = True, False
        self.streams[stream] = None
        self._wanted = True
        self._woken.set()

    def join(self, stream: _Stream, last_id: str) -> None:
        """Give a stream what came after the part that `last_id` names, or a snapshot where that is not kept."""
        name, _, number = last_id.partition("-")
        known = name == self._name and number.isascii() and number.isdigit() and len(number) < MAX_NUMBER
        behind = self._number - int(number) if known else -1
        if not 0 <= behind <= len(self._kept):
            self.want(stream)
            return
        stream.fresh = False
        self.streams[stream] = None
        for part in list(self._kept)[len(self._kept) - behind :]:
            stream.give(part)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            with self._views.watch(self.submission, self._stir) as watcher:
                due = anew_due = loop.time()
                while not self.over:
                    await self._wait_until(max(due, anew_due) if watcher.is_behind else due)
                    is_due = self._is_due(max(due, anew_due) if watcher.is_behind else due)
                    if is_due and (self._changed or watcher.is_behind):
                        self._changed = False
                        await self._views.recipes.fetch(watcher.failed())
                        anew, there = watcher.is_behind, set(self.streams)
                        events = self._keep(b"".join(await rendered(watcher.events(), _frame)))
                        self.over = watcher.over
                        known = [each for each in self.streams if not each.fresh or (anew and each in there)]
                        await self._give(events, known)
                        due = loop.time() + pause_s(0 if anew else len(events), len(known), self._feeds())
                        if anew:
                            anew_due = loop.time() + pause_s(len(events), len(known), self._feeds())
                    self._wanted = False
                    if fresh := [each for each in self.streams if each.fresh]:
                        await self._views.recipes.fetch(watcher.failed(anew=True))
                        begun = b"".join(await rendered(self._begin(watcher), _frame))
                        await self._give(begun + self._id(), fresh)
        finally:
            self.over = True
            for stream in self.streams:
                stream.woken.set()

    def _keep(self, events: bytes) -> bytes:
        """Return what is new with its id, and keep it for streams that come back."""
        self._number += 1
        part = events + self._id()
        self._kept.append(part)
        self._kept_bytes += len(part)
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft())
        return part

    def _id(self) -> bytes:
        return f"id: {self._name}-{self._number}\n\n".encode()

    def _begin(self, watcher: Watcher) -> Iterator[WatchEvent | Pause]:
        """Yield what a stream begins with that goes on with the watcher's next events, and pauses."""
        yield (yield from watcher.snapshot())
        if self.over:
            yield Ended(submission=self._views.submission_view(self.submission))

    async def _wait_until(self, due: float) -> None:
        """Wait until a stream wants a snapshot, or something has changed and the time for it has come."""
        self._due = due
        self._woken.clear()
        self._wake_if_due()
        if self._woken.is_set():
            return
        loop = asyncio.get_running_loop()
        timer = loop.call_at(due, self._come_due) if loop.time() < due else None
        try:
            await self._woken.wait()
        finally:
            if timer is not None:
                timer.cancel()

    def _stir(self) -> None:
        """Something has changed."""
        self._changed = True
        self._wake_if_due()

    def _come_due(self) -> None:
        """The time for changes has come."""
        self._due = 0.0
        self._wake_if_due()

    def _wake_if_due(self) -> None:
        if self._wanted or (self._changed and self._is_due(self._due)):
            self._woken.set()

    def _is_due(self, due: float) -> bool:
        """Return whether what has changed is written now; the end of a submission waits for nothing."""
        submission = self.submission
        return submission.ended or submission.withdrawn or asyncio.get_running_loop().time() >= due

    async def _give(self, part: bytes, streams: list[_Stream]) -> None:
        for count, stream in enumerate(streams, 1):
            stream.fresh = False
            if not stream.behind:
                stream.give(part)
            if not count % WOKEN_AT_ONCE:
                await asyncio.sleep(0)


class WatchStreams:
    """All open watch streams; at most `limit`."""

    def __init__(self, views: Views, limit: int) -> None:
        self._views = views
        self._limit = limit
        self._open = 0
        self._feeds: dict[str, _Feed] = {}
        #: Feeds without a stream.
        self._lingering = 0
        self._stopping = False

    def stop(self) -> None:
        """End all streams at their next look; clients connect again to the next coordinator."""
        self._stopping = True
        for feed in list(self._feeds.values()):
            for stream in feed.streams:
                stream.woken.set()
            if feed.lingering is not None:
                self._end(feed)

    async def serve(self, request: web.Request, submission: SubmissionRow) -> web.StreamResponse:
        """Stream until the submission has ended or the client is gone, from `Last-Event-ID` on where that is known.

        Raises:
            UnavailableError: Too many streams are open.
        """
        if self._open >= self._limit:
            raise UnavailableError("too many clients are watching; try again later.")
        self._open += 1
        stream, feed = _Stream(), self._feed(submission)
        feed.join(stream, request.headers.get("Last-Event-ID", ""))
        try:
            response = web.StreamResponse(
                headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
            )
            await response.prepare(request)
            await self._send(response, stream, feed)
            await response.write_eof()
        except ConnectionError:
            # The client went away: nothing is wrong, and there is no one to answer.
            return web.Response()
        else:
            return response
        finally:
            self._open -= 1
            del feed.streams[stream]
            if not feed.streams:
                self._leave(feed)

    def _leave(self, feed: _Feed) -> None:
        """Follow a submission without a stream a little longer, or no more."""
        if feed.over or self._stopping or self._lingering >= LINGERING:
            self._end(feed)
            return
        self._lingering += 1
        feed.lingering = asyncio.get_running_loop().call_later(LINGER_S, self._end, feed)

    def _end(self, feed: _Feed) -> None:
        self._stay(feed)
        feed.task.cancel()
        if self._feeds.get(feed.submission.id) is feed:
            del self._feeds[feed.submission.id]

    def _stay(self, feed: _Feed) -> None:
        if feed.lingering is not None:
            feed.lingering.cancel()
            feed.lingering = None
            self._lingering -= 1

    async def _send(self, response: web.StreamResponse, stream: _Stream, feed: _Feed) -> None:
        while not self._stopping:
            over = feed.over
            if data := stream.take():
                await response.write(data)
            if stream.behind and over:
                # The feed has ended and renders nothing for it.
                with self._views.watch(feed.submission, lambda: None) as watcher:
                    await self._views.recipes.fetch(watcher.failed())
                    await response.write(b"".join(await rendered(watcher.events(), _frame)))
                return
            if stream.behind:
                feed.want(stream)
            if over and not stream.parts:
                if feed.task.done():
                    # What stopped it, if it did not come to its end.
                    feed.task.result()
                return
            await self._silence(response, stream.woken)

    def _feed(self, submission: SubmissionRow) -> _Feed:
        feed = self._feeds.get(submission.id)
        if feed is None or feed.over or feed.submission is not submission:
            if feed is not None and feed.lingering is not None:
                self._end(feed)
            feed = self._feeds[submission.id] = _Feed(self._views, submission, lambda: len(self._feeds))
        self._stay(feed)
        return feed

    async def _silence(self, response: web.StreamResponse, woken: asyncio.Event) -> None:
        """Wait for a change, with a comment now and then."""
        while not woken.is_set():
            try:
                async with asyncio.timeout(COMMENT_S):
                    await woken.wait()
            except TimeoutError:
                await response.write(b": still here\n\n")


def _frame(event: WatchEvent | Pause) -> bytes:
    return (
        b"" if isinstance(event, Pause) else b"event: " + event.type.encode() + b"\ndata: " + json_of(event) + b"\n\n"
    )
