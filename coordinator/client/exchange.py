"""One HTTP/1.1 request and its whole answer, on a connection of its own.

Most commands ask one or two short questions. For those the import of aiohttp took longer than all else together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlencode, urlsplit

#: Bytes of an answer's status line and header fields, and of one line between chunks.
MAX_HEAD_BYTES: Final = 64 * 1024
#: Bytes of an answer's body; the longest are pages of lists.
MAX_BODY_BYTES: Final = 256 * 1024 * 1024
#: Statuses below 200 announce another answer; so many are passed over.
_MAX_INTERIM: Final = 8


class AddressError(ValueError):
    """A text is no address of an HTTP server."""


class BadAnswerError(Exception):
    """The bytes received are no answer of an HTTP server, or exceed every answer of a coordinator."""


@dataclass(frozen=True, slots=True)
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
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise AddressError(url) from error
    if parts.scheme not in {"http", "https"} or not host:
        raise AddressError(url)
    tls = parts.scheme == "https"
    async with asyncio.timeout(connect_s):
        reader, writer = await asyncio.open_connection(
            host, port or (443 if tls else 80), ssl=tls or None, limit=MAX_HEAD_BYTES
        )
    try:
        target = quote(parts.path, safe="/%:@!$&'()*+,;=~") + (f"?{urlencode(params)}" if params else "")
        fields = {"Host": parts.netloc.rpartition("@")[2], "Connection": "close", **headers}
        if body is not None:
            fields["Content-Length"] = str(len(body))
        elif method in {"POST", "PUT"}:
            fields["Content-Length"] = "0"
        head = "".join([f"{method} {target} HTTP/1.1\r\n", *(f"{name}: {value}\r\n" for name, value in fields.items())])
        writer.write(head.encode("latin-1") + b"\r\n" + (body or b""))
        return await _read(reader, writer)
    except (asyncio.IncompleteReadError, EOFError):
        raise ConnectionResetError("the connection ended early") from None
    except (asyncio.LimitOverrunError, ValueError) as error:
        raise BadAnswerError("what answered is no HTTP server") from error
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Answer:
    sent = asyncio.ensure_future(writer.drain())
    try:
        for _ in range(_MAX_INTERIM):
            status, headers = _parsed(await reader.readuntil(b"\r\n\r\n"))
            if status >= 200:
                return Answer(status, headers, await _body(reader, status, headers))
    finally:
        # An answer may come before all is sent: a refusal.
        sent.cancel()
        await asyncio.gather(sent, return_exceptions=True)
    raise ValueError("nothing but interim answers")


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    version, status, *_ = first.split(" ", 2)
    if not version.startswith("HTTP/1."):
        raise ValueError(first)
    fields = (line.partition(":") for line in lines if line)
    return int(status), {name.strip().lower(): value.strip() for name, _, value in fields}


async def _body(reader: asyncio.StreamReader, status: int, headers: Mapping[str, str]) -> bytes:
    if status in {204, 304}:
        return b""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = bytearray()
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            _bounded(len(body) + size)
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        return bytes(body)
    if "content-length" in headers:
        length = int(headers["content-length"])
        _bounded(length)
        return await reader.readexactly(length)
    body = bytearray()
    while piece := await reader.read(MAX_HEAD_BYTES):
        body += piece
        _bounded(len(body))
    return bytes(body)


def _bounded(size: int) -> None:
    if not 0 <= size <= MAX_BODY_BYTES:
        raise BadAnswerError(f"the answer has more than {MAX_BODY_BYTES} bytes")
