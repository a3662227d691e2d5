"""One request and its answer as it comes, against a server that is bytes on a socket."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from infra.exchange import MAX_HEAD_BYTES, BadAnswerError, exchange, streaming
from tests.support.patience import PATIENCE_S
from tests.support.served import served

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def _talking(talk: Talk) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except ConnectionError:
            # The client has read enough.
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"


def _answering(data: bytes, *, stays: bool = False) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        await writer.drain()
        if stays:
            await reader.read()

    return talk


async def _got(url: str, body: AsyncIterator[bytes] | None = None, silence_s: float | None = 30.0) -> tuple[int, bytes]:
    method = "GET" if body is None else "PUT"
    async with streaming(
        method, url, params={"a": "b c"}, headers={}, body=body, connect_s=30.0, silence_s=silence_s
    ) as answer:
        return answer.status, b"".join([piece async for piece in answer.pieces()])


async def _pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def test_a_body_is_sent_as_it_is_made_and_the_answer_read_as_it_comes() -> None:
    heard: list[object] = []
    echoed = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        heard.extend([request.method, request.query["a"], request.headers.get("Transfer-Encoding")])
        response = web.StreamResponse()
        await response.prepare(request)
        async for piece in request.content.iter_any():
            await response.write(piece.upper())
            echoed.set()
        await response.write_eof()
        return response

    async def made() -> AsyncIterator[bytes]:
        yield b"first "
        # What is made later follows from what was answered before.
        async with asyncio.timeout(PATIENCE_S):
            await echoed.wait()
        yield b""
        yield b"x" * (3 * MAX_HEAD_BYTES)

    async with served(handle) as server:
        assert await _got(f"{server}/x", made()) == (200, b"FIRST " + b"X" * (3 * MAX_HEAD_BYTES))
    assert heard == ["PUT", "b c", "chunked"]


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef", b"abc"),
        (b"HTTP/1.0 200 OK\r\n\r\nto the end", b"to the end"),
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n0\r\n\r\n",
            b"ab",
        ),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
)
async def test_a_body_ends_where_the_head_says(answer: bytes, body: bytes) -> None:
    async with _talking(_answering(answer)) as url:
        assert (await _got(url))[1] == body
        whole = await exchange("GET", url, params={}, headers={}, body=None, connect_s=30.0)
        assert whole.body == body


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", ConnectionResetError),
        (b"HTTP/1.1 200 OK\r\nContent-Le", ConnectionResetError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", ConnectionResetError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", ConnectionResetError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n", BadAnswerError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\nab\r\n", BadAnswerError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", BadAnswerError),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", BadAnswerError),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 9, BadAnswerError),
        (b"x" * (2 * MAX_HEAD_BYTES), BadAnswerError),
    ],
)
async def test_what_is_cut_short_is_told_from_what_is_no_answer(answer: bytes, error: type[Exception]) -> None:
    async with _talking(_answering(answer)) as url:
        with pytest.raises(error):
            await _got(url)
        with pytest.raises(error):
            await exchange("GET", url, params={}, headers={}, body=None, connect_s=30.0)


async def test_a_silence_ends_the_wait_for_head_and_for_more() -> None:
    for begun in (b"", b"HTTP/1.1 200 OK\r\n\r\nsome"):
        async with _talking(_answering(begun, stays=True)) as url:
            with pytest.raises(TimeoutError):
                await _got(url, silence_s=0.1)


async def test_an_answer_that_comes_early_ends_the_sending() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * MAX_HEAD_BYTES
            await asyncio.sleep(0)

    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"
    async with _talking(_answering(refusal, stays=True)) as url:
        assert await _got(url, endless()) == (413, b"no")


async def test_a_fault_of_the_body_is_raised_though_the_server_waits_for_the_rest() -> None:
    class BodyError(Exception):
        pass

    async def failing() -> AsyncIterator[bytes]:
        yield b"some"
        raise BodyError

    async with _talking(_answering(b"", stays=True)) as url:
        with pytest.raises(BodyError):
            await _got(url, failing(), silence_s=None)


async def test_a_server_that_goes_while_it_is_sent_to_is_a_lost_connection() -> None:
    async def hang_up(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async with _talking(hang_up) as url:
        with pytest.raises(ConnectionError):
            await _got(url, _pieces(*[b"x" * MAX_HEAD_BYTES] * 200), silence_s=None)


def test_a_build_loads_no_http_library() -> None:
    code = "import sys, coordinator.cli.build, coordinator.cli.log; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
