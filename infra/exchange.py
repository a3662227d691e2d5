"""HTTP/1.1 requests and their whole answers, without a framework, whose import takes longer than most commands.

`exchange` sends one request on a connection of its own. `Connections` keeps connections for the requests that follow.
`streaming` sends a body as it is made and gives an answer as it comes, on a connection of its own.
An answer is taken as soon as it comes, also before all of a body was sent: a refusal comes so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Final, Self, TypeAlias
from urllib.parse import quote, urlencode, urlsplit

from infra.records import record

#: Bytes of an answer's status line and header fields, and of one line between chunks.
MAX_HEAD_BYTES: Final = 64 * 1024
#: Bytes of an answer's body; the longest are pages of lists.
MAX_BODY_BYTES: Final = 256 * 1024 * 1024
#: Connections to one server that are kept without a request.
MAX_IDLE: Final = 8
#: Bytes of a body given to the system at a time: what it does not take at once is copied.
_SLICE_BYTES: Final = 256 * 1024
#: Statuses below 200 announce another answer; so many are passed over.
_MAX_INTERIM: Final = 8

_Server: TypeAlias = tuple[bool, str, int]


class AddressError(ValueError):
    """A text is no address of an HTTP server."""


class BadAnswerError(Exception):
    """The bytes received are no answer of an HTTP server, or exceed every answer of a coordinator."""


@record(frozen=True, slots=True)
class Answer:
    """Names of header fields are in lower case; of a field that came twice the last value counts."""

    status: int
    headers: Mapping[str, str]
    body: bytes


async def exchange(
    method: str,
    url: str,
    *,
    params: Mapping[str, str],
    headers: Mapping[str, str],
    body: bytes | None,
    connect_s: float,
) -> Answer:
    """Send one request and return its answer; redirections are answers like others.

    Raises:
        AddressError: `url` is none of http or https with a host.
        BadAnswerError: what answered is no HTTP server, or the answer is too large.
        OSError, TimeoutError: no connection, none within `connect_s`, or it broke.
    """
    server, host, path, _ = _address(url)
    target = quote(path, safe="/%:@!$&'()*+,;=~") + (f"?{urlencode(params)}" if params else "")
    connection = await _Connection.open(server, connect_s)
    try:
        head = _head(method, target, {"Host": host, "Connection": "close", **headers}, body)
        return await connection.ask(head, body, _nothing)
    finally:
        connection.close()


class Connections:
    """Requests on connections that are kept; an asynchronous context manager. Belongs to one event loop."""

    def __init__(self, *, connect_s: float, silence_s: float) -> None:
        """Open a connection within `connect_s`; fail where nothing is taken or answered for `silence_s`."""
        self._connect_s = connect_s
        self._silence_s = silence_s
        self._idle: dict[_Server, list[_Connection]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close what is kept."""
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    async def ask(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | memoryview | None = None,
        silence_s: float | None = None,
    ) -> Answer:
        """Send one request and return its answer; `url` is sent as it stands, so it must be quoted.

        A connection that was kept and ends before the first byte of an answer had been closed by the server meanwhile:
        the request is sent again, once, on a new one.

        Raises: as `exchange`; TimeoutError also where nothing is taken or answered for `silence_s`.
        """
        server, host, path, query = _address(url)
        head = _head(method, f"{path}?{query}" if query else path, {"Host": host, **headers}, body)
        while True:
            connection, is_kept = self._kept(server), True
            if connection is None:
                connection, is_kept = await _Connection.open(server, self._connect_s), False
            try:
                answer = await self._ask(connection, head, body, silence_s or self._silence_s)
            except ConnectionError:
                connection.close()
                if is_kept and not connection.is_answering:
                    continue
                raise
            except BaseException:
                connection.close()
                raise
            self._keep(server, connection)
            return answer

    async def _ask(
        self, connection: _Connection, head: bytes, body: bytes | memoryview | None, silence_s: float
    ) -> Answer:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(silence_s) as silence:

            def on_progress() -> None:
                if not silence.expired():
                    silence.reschedule(loop.time() + silence_s)

            return await connection.ask(head, body, on_progress)

    def _kept(self, server: _Server) -> _Connection | None:
        connections = self._idle.get(server, [])
        while connections:
            connection = connections.pop()
            if connection.is_alive:
                return connection
            connection.close()
        return None

    def _keep(self, server: _Server, connection: _Connection) -> None:
        connections = self._idle.setdefault(server, [])
        if connection.is_alive and len(connections) < MAX_IDLE:
            connections.append(connection)
        else:
            connection.close()


class _Connection:
    """One connection, for one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        #: Whether the next request can be sent on it.
        self._may_stay = True
        #: Whether bytes of the present answer have come.
        self.is_answering = False

    @classmethod
    async def open(cls, server: _Server, connect_s: float) -> _Connection:
        """Connect. Raises `OSError`, `TimeoutError`."""
        tls, host, port = server
        async with asyncio.timeout(connect_s):
            reader, writer = await asyncio.open_connection(host, port, ssl=tls or None, limit=MAX_HEAD_BYTES)
        return cls(reader, writer)

    @property
    def is_alive(self) -> bool:
        """True as long as the server has not ended it, and the next answer is not to be told from this one's rest."""
        return self._may_stay and not self.reader.at_eof() and not self.writer.is_closing()

    def close(self) -> None:
        """Close, without waiting."""
        self.writer.close()

    async def ask(self, head: bytes, body: bytes | memoryview | None, on_progress: Callable[[], None]) -> Answer:
        """Send a request and return its answer. Raises `BadAnswerError`, `OSError`."""
        self.is_answering = False
        sending = asyncio.ensure_future(self._send(head, body, on_progress))
        try:
            with _answer_errors():
                return await self._read(on_progress)
        finally:
            # An answer that came before all was sent leaves the rest of the body in the way.
            self._may_stay = self._may_stay and sending.done()
            sending.cancel()
            await asyncio.wait([sending])
            if sending.cancelled() or sending.exception() is not None:
                self._may_stay = False

    async def _send(self, head: bytes, body: bytes | memoryview | None, on_progress: Callable[[], None]) -> None:
        view = memoryview(body or b"")
        if len(view) <= _SLICE_BYTES:
            self.writer.write(head + view)
            await self.writer.drain()
            return
        self.writer.write(head)
        for at in range(0, len(view), _SLICE_BYTES):
            self.writer.write(view[at : at + _SLICE_BYTES])
            await self.writer.drain()
            on_progress()

    async def _read(self, on_progress: Callable[[], None]) -> Answer:
        def begun() -> None:
            self.is_answering = True
            on_progress()

        version, status, headers = await _answer_head(self.reader, begun)
        if version == "HTTP/1.0" or headers.get("connection", "").lower() == "close":
            self._may_stay = False
        body = bytearray()
        async with aclosing(_pieces(self.reader, status, headers, MAX_BODY_BYTES)) as pieces:
            async for piece in pieces:
                body += piece
                on_progress()
        return Answer(status, headers, bytes(body))


class StreamedAnswer:
    """An answer whose body is read as it comes."""

    def __init__(
        self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader, silence_s: float | None
    ) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader
        self._silence_s = silence_s

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body's bytes as they come. Raises as `exchange`, `TimeoutError` after a silence."""
        async with aclosing(_pieces(self._reader, self.status, self.headers)) as pieces:
            while True:
                with _answer_errors():
                    async with asyncio.timeout(self._silence_s):
                        piece = await anext(pieces, b"")
                if not piece:
                    return
                yield piece


@asynccontextmanager
async def streaming(
    method: str,
    url: str,
    *,
    params: Mapping[str, str],
    headers: Mapping[str, str],
    body: AsyncIterator[bytes] | None,
    connect_s: float,
    silence_s: float | None,
) -> AsyncIterator[StreamedAnswer]:
    """Send one request, its body as it is made, and give its answer once that begins.

    An answer may begin before the body has ended, which then is not sent on. Raises as `exchange`, `TimeoutError` after
    `silence_s` without a byte of the answer, and what `body` raises, which must be none of these.
    """
    server, host, path, _ = _address(url)
    target = quote(path, safe="/%:@!$&'()*+,;=~") + (f"?{urlencode(params)}" if params else "")
    fields = {"Host": host, "Connection": "close", **headers}
    connection = await _Connection.open(server, connect_s)
    reader, writer = connection.reader, connection.writer
    sending: asyncio.Task[None] | None = None
    try:
        if body is None:
            writer.write(_head(method, target, fields, None))
            sending = asyncio.create_task(writer.drain())
        else:
            writer.write(_head(method, target, {**fields, "Transfer-Encoding": "chunked"}, None))
            sending = asyncio.create_task(_send_pieces(writer, body), name="body of a request")
        with _answer_errors():
            status, found = await _begun(reader, sending, silence_s)
        yield StreamedAnswer(status, found, reader, silence_s)
    finally:
        if sending is not None:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        connection.close()


async def _begun(
    reader: asyncio.StreamReader, sending: asyncio.Task[None], silence_s: float | None
) -> tuple[int, dict[str, str]]:
    """Return the head of the answer; raises at once what the body of the request raises."""
    reading = asyncio.ensure_future(_answer_head(reader))
    try:
        async with asyncio.timeout(silence_s):
            await asyncio.wait((reading, sending), return_when=asyncio.FIRST_COMPLETED)
            # A connection that breaks under the body may have brought the reason before that.
            if not reading.done() and not isinstance(sending.exception(), OSError):
                sending.result()
            _version, status, headers = await reading
            return status, headers
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def _nothing() -> None:
    pass


async def _answer_head(
    reader: asyncio.StreamReader, begun: Callable[[], None] = _nothing
) -> tuple[str, int, dict[str, str]]:
    """Return version, status and fields of an answer; `begun` is called for each head, those of interim answers too."""
    for _ in range(_MAX_INTERIM):
        version, status, headers = _parsed(await reader.readuntil(b"\r\n\r\n"))
        begun()
        if status >= 200:
            return version, status, headers
    raise ValueError("nothing but interim answers")


async def _send_pieces(writer: asyncio.StreamWriter, body: AsyncIterator[bytes]) -> None:
    async for piece in body:
        if piece:
            writer.writelines((b"%x\r\n" % len(piece), piece, b"\r\n"))
            await writer.drain()
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def _pieces(
    reader: asyncio.StreamReader, status: int, headers: Mapping[str, str], most_bytes: int | None = None
) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of a body, some at a time; nothing of one that says that it has more than `most_bytes`."""
    total = 0
    if status in {204, 304}:
        return
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            total += size
            _require_bounded(total, most_bytes)
            async for piece in _exactly(reader, size):
                yield piece
            if await reader.readexactly(2) != b"\r\n":
                raise ValueError("a chunk is longer than it says")
        # Fields may follow, and an empty line does.
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
    elif "content-length" in headers:
        total = int(headers["content-length"])
        _require_bounded(total, most_bytes)
        async for piece in _exactly(reader, total):
            yield piece
    else:
        while piece := await reader.read(MAX_HEAD_BYTES):
            total += len(piece)
            _require_bounded(total, most_bytes)
            yield piece


async def _exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    if size < 0:
        raise ValueError("a size is negative")
    while size > 0:
        piece = await reader.read(min(size, MAX_HEAD_BYTES))
        if not piece:
            raise EOFError
        size -= len(piece)
        yield piece


@contextmanager
def _answer_errors() -> Iterator[None]:
    try:
        yield
    except (asyncio.IncompleteReadError, EOFError):
        raise ConnectionResetError("the connection ended early") from None
    except (asyncio.LimitOverrunError, ValueError) as error:
        raise BadAnswerError("what answered is no HTTP server") from error


def _address(url: str) -> tuple[_Server, str, str, str]:
    """Return server, `Host`, path and query. Raises `AddressError`."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise AddressError(url) from error
    if parts.scheme not in {"http", "https"} or not host:
        raise AddressError(url)
    tls = parts.scheme == "https"
    return (tls, host, port or (443 if tls else 80)), parts.netloc.rpartition("@")[2], parts.path or "/", parts.query


def _head(method: str, target: str, headers: Mapping[str, str], body: bytes | memoryview | None) -> bytes:
    fields = dict(headers)
    if "Transfer-Encoding" not in fields and (body is not None or method in {"POST", "PUT"}):
        fields["Content-Length"] = str(len(body or b""))
    lines = [f"{method} {target} HTTP/1.1\r\n", *(f"{name}: {value}\r\n" for name, value in fields.items())]
    return "".join(lines).encode("latin-1") + b"\r\n"


def _parsed(head: bytes) -> tuple[str, int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    version, status, *_ = first.split(" ", 2)
    if not version.startswith("HTTP/1."):
        raise ValueError(first)
    fields = (line.partition(":") for line in lines if line)
    return version, int(status), {name.strip().lower(): value.strip() for name, _, value in fields}


def _require_bounded(size: int, most_bytes: int | None) -> None:
    if most_bytes is not None and size > most_bytes:
        raise BadAnswerError(f"the answer has more than {most_bytes} bytes")
