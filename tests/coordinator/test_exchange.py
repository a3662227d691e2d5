"""One request and its answer by hand: what HTTP allows is read, what breaks or lies is one typed error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from coordinator.client.exchange import MAX_BODY_BYTES, Answer, BadAnswerError, exchange


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
        return await exchange("POST", url, params={"a": "b c"}, headers={"X": "y"}, body=b"{}", connect_s=10.0)


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
