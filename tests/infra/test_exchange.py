"""One request and its answer by hand: what HTTP allows is read, what breaks or lies is one typed error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from infra.exchange import MAX_BODY_BYTES, Answer, BadAnswerError, Connections, exchange
from tests.support.patience import PATIENCE_S


@asynccontextmanager
async def answering(raw: bytes, requests: list[bytes]) -> AsyncIterator[str]:
    """A server that reads one request with a body of two bytes, sends `raw` and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2))
        writer.write(raw)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api"


async def ask(raw: bytes, requests: list[bytes] | None = None) -> Answer:
    async with answering(raw, [] if requests is None else requests) as url:
        return await exchange("POST", url, params={"a": "b c"}, headers={"X": "y"}, body=b"{}", connect_s=PATIENCE_S)


async def test_a_request_names_its_host_and_length_and_asks_for_one_answer() -> None:
    requests: list[bytes] = []
    await ask(b"HTTP/1.1 204 No Content\r\n\r\n", requests)
    first, *fields = requests[0].decode().split("\r\n")
    assert first == "POST /api?a=b+c HTTP/1.1"
    assert {"Connection: close", "X: y", "Content-Length: 2"} < set(fields)


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 5\r\n\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=1\r\nllo\r\n0\r\n\r\n",
        b"\r\nhello",
    ],
)
async def test_a_body_is_read_by_its_length_by_chunks_or_to_the_end(rest: bytes) -> None:
    answer = await ask(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nLink: <x>\r\n" + rest)
    assert (answer.status, answer.headers["link"], answer.body) == (404, "<x>", b"hello")


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-server\r\n\r\n",
        b"HTTP/1.1 fine\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % (MAX_BODY_BYTES + 1),
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
        b"x" * 200_000,
    ],
)
async def test_answers_that_are_malformed_or_too_large_are_refused(raw: bytes) -> None:
    with pytest.raises(BadAnswerError):
        await ask(raw)


@pytest.mark.parametrize(
    "raw",
    [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel"],
)
async def test_an_answer_that_breaks_off_is_a_broken_connection(raw: bytes) -> None:
    with pytest.raises(ConnectionResetError):
        await ask(raw)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
#: More than the buffers of two sockets take while nothing is read.
LARGE = bytes(32 * 1024 * 1024)


@asynccontextmanager
async def serving(scripts: Sequence[Sequence[bytes]], seen: list[tuple[int, int]]) -> AsyncIterator[str]:
    """A server whose connection number N answers `scripts[N]` in turn, each after a whole request, and then closes.

    `seen` gets the connection's number and the body's size of each request.
    """
    numbers = iter(range(len(scripts)))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(numbers)
        for answer in scripts[number]:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            seen.append((number, len(await reader.readexactly(size))))
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/up?a=%2F"


async def test_a_connection_is_kept_for_the_next_request() -> None:
    seen: list[tuple[int, int]] = []
    async with serving([[OK, OK]], seen) as url, Connections(connect_s=PATIENCE_S, silence_s=PATIENCE_S) as connections:
        for body in (b"one", memoryview(LARGE)):
            assert (await connections.ask("PUT", url, headers={}, body=body)).body == b"ok"
    assert seen == [(0, 3), (0, len(LARGE))]


async def test_a_request_is_sent_again_where_the_server_had_closed_the_kept_connection() -> None:
    seen: list[tuple[int, int]] = []
    async with (
        serving([[OK, b""], [OK]], seen) as url,
        Connections(connect_s=PATIENCE_S, silence_s=PATIENCE_S) as connections,
    ):
        # The second answer never begins: the connection is closed instead.
        for _ in range(2):
            assert (await connections.ask("POST", url, headers={}, body=b"x")).status == 200
    assert seen == [(0, 1), (0, 1), (1, 1)]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\n\r\nok",
    ],
)
async def test_a_connection_is_not_kept_where_its_server_means_to_close_it(answer: bytes) -> None:
    seen: list[tuple[int, int]] = []
    async with (
        serving([[answer], [answer]], seen) as url,
        Connections(connect_s=PATIENCE_S, silence_s=PATIENCE_S) as connections,
    ):
        for _ in range(2):
            assert (await connections.ask("POST", url, headers={})).body == b"ok"
    assert [number for number, _ in seen] == [0, 1]


async def test_a_refusal_is_read_although_the_body_is_not_taken() -> None:
    refusing = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await refusing.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, Connections(connect_s=PATIENCE_S, silence_s=PATIENCE_S) as connections:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        answer = await connections.ask("POST", url, headers={}, body=LARGE)
        refusing.set()
    assert (answer.status, answer.body) == (413, b"no")


async def test_a_server_that_takes_nothing_is_given_up() -> None:
    given_up = asyncio.Event()

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await given_up.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1024)
    async with server, Connections(connect_s=PATIENCE_S, silence_s=0.2) as connections:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(TimeoutError):
            await connections.ask("POST", url, headers={}, body=LARGE)
        given_up.set()
