"""A real HTTP proxy in front of a server, which fails on request: what a store does on a bad day.

It speaks bytes, one connection at a time from end to end, and looks at no more than where a request begins; signatures
stay good because `Host` is passed on as the client wrote it.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from types import TracebackType
from typing import Self

_HEAD_BYTES = 64 * 1024
_CHUNK = 64 * 1024


class Fault(StrEnum):
    """Fate of a request."""

    #: Answered 503 without being passed on.
    UNAVAILABLE = "unavailable"
    #: The connection is closed without an answer.
    CUT = "cut"
    #: The connection is closed in the middle of the request's body (at once where it has none).
    CUT_BODY = "cut body"
    #: The connection is closed in the middle of the answer.
    CUT_ANSWER = "cut answer"
    #: Nothing is answered, the connection stays open.
    SILENT = "silent"


class FaultyProxy:
    """An async context; `endpoint` is its address."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._fault: Fault | None = None
        self._left = 0
        #: Only requests whose first line matches fail.
        self._where = re.compile("")
        #: Requests that failed, and first lines of all that came.
        self.failed = 0
        self.requests: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def fail(self, fault: Fault, times: int = 1, where: str = "") -> None:
        """Let the next `times` requests whose first line has the pattern `where` in it fail."""
        self._fault, self._left, self.failed = fault, times, 0
        self._where = re.compile(where)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_HEAD_BYTES)
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._one(reader, writer):
                    pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Pass on one request; false where the connection is to be closed."""
        head = await reader.readuntil(b"\r\n\r\n")
        line = head.split(b"\r\n", 1)[0].decode("latin-1")
        self.requests.append(line)
        length = _length(head)
        fault = self._next(line)
        if fault in {Fault.CUT, Fault.SILENT}:
            if fault is Fault.SILENT:
                await asyncio.sleep(3600)
            return False
        if b"100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?i)expect: *100-continue\r\n", b"", head)
        if fault is Fault.UNAVAILABLE:
            await _copy(reader, None, length)
            writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
            return False
        upstream, downstream = await asyncio.open_connection("127.0.0.1", self._port, limit=_HEAD_BYTES)
        try:
            downstream.write(re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n")
            if fault is Fault.CUT_BODY:
                await _copy(reader, downstream, length // 2)
                return False
            await _copy(reader, downstream, length)
            await self._answer(upstream, writer, cut=fault is Fault.CUT_ANSWER)
            return False
        finally:
            downstream.close()

    async def _answer(self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, *, cut: bool) -> None:
        head = await upstream.readuntil(b"\r\n\r\n")
        writer.write(head)
        left = _length(head) // 2 if cut else None
        while left is None or left > 0:
            data = await upstream.read(_CHUNK if left is None else min(left, _CHUNK))
            if not data:
                break
            writer.write(data)
            await writer.drain()
            if left is not None:
                left -= len(data)

    def _next(self, line: str) -> Fault | None:
        if not self._left or not self._where.search(line):
            return None
        self._left -= 1
        self.failed += 1
        return self._fault


@contextmanager
def proxy_in_thread(port: int) -> Iterator[FaultyProxy]:
    """Run a proxy beside a test that has no event loop; `fail` and the counts may be used from the test's thread."""
    proxy = FaultyProxy(port)
    begun = threading.Event()
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        async with proxy:
            begun.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        begun.wait()
        yield proxy
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


def _length(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)
    return int(found.group(1)) if found else 0


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter | None, length: int) -> None:
    while length:
        data = await reader.read(min(length, _CHUNK))
        if not data:
            raise ConnectionResetError
        length -= len(data)
        if writer is not None:
            writer.write(data)
            await writer.drain()
