"""Reader of request bodies: bounded bytes, bounded time, bounded shape, one error.

Every JSON body of every route comes through `read_model`. What it costs is bounded before each step, because the sender
of a public route is a stranger:

    bytes        `BodyBounds.size_bytes`, and BODIES_BYTES over all requests that are being read
    time         PATIENCE_S of waiting at a time, and in all PATIENCE_S more than LEAST_BYTES_PER_S needs (`Pace`)
    encoding     none: a compressed body is 415, so nothing is ever inflated here
    shape        commas, brackets and keys are counted before parsing, depth and the keys of each object after it
    errors       sequences of the models fail fast and objects have at most MAX_KEYS keys, so few errors are collected

Bodies over INLINE_BYTES are parsed beside the event loop, one at a time, so that their memory does not add up.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ValidationError

from coordinator.errors import BadRequestError, CoordinatorError, UnavailableError
from infra.collector import collector_paused
from infra.validation import first_fault

#: Bodies up to this size are parsed in the event loop: some hundred microseconds.
INLINE_BYTES: Final = 32 * 1024
#: Bytes of all JSON bodies that are being read at one time.
BODIES_BYTES: Final = 512 * 1024 * 1024
#: Seconds to wait for bytes of a JSON body, and of a stream, whose sender reads them from a disk as it goes.
PATIENCE_S: Final = 30.0
STREAM_PATIENCE_S: Final = 60.0
#: Least pace of any body: a modem's. It bounds how long one request can hold its connection and memory.
LEAST_BYTES_PER_S: Final = 4 * 1024
#: Arrays and objects in each other; the API's deepest request has four.
MAX_DEPTH: Final = 16
#: Keys of one object; the API's widest request has five.
MAX_KEYS: Final = 32
#: Characters of a field's name, and of a parser's sentence, in an answer.
SHOWN_CHARACTERS: Final = 120

_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"(?:\s*+(:))?', re.DOTALL)
#: One thread: what two large bodies take at once would add up.
_PARSER: Final = ThreadPoolExecutor(1, thread_name_prefix="bodies")
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class BodyBounds:
    """Bounds on a body of one route: bytes, elements (as commas), arrays with objects (as opening brackets)."""

    size_bytes: int
    items: int
    containers: int


#: A request of a few fields.
SMALL: Final = BodyBounds(size_bytes=16 * 1024, items=64, containers=16)


class BodyTooLargeError(CoordinatorError):
    """A body has more bytes than its route takes."""

    code: ClassVar[str] = "too_large"
    status: ClassVar[int] = 413


class BodyEncodedError(CoordinatorError):
    """A body is compressed."""

    code: ClassVar[str] = "encoded_body"
    status: ClassVar[int] = 415


class BodySlowError(CoordinatorError):
    """A body comes too slowly."""

    code: ClassVar[str] = "too_slow"
    status: ClassVar[int] = 408


def refuse_encoding(request: web.BaseRequest) -> None:
    """Raise `BodyEncodedError` for a request that has a Content-Encoding."""
    if any(value.strip().lower() != "identity" for value in request.headers.getall("Content-Encoding", ())):
        raise BodyEncodedError("this coordinator takes no Content-Encoding; send the body as it is.")


class Pace:
    """Reader of one request's body that gives up a silent or slow sender; our own work between reads does not count."""

    def __init__(self, request: web.BaseRequest, patience_s: float) -> None:
        """`patience_s`: how long nothing may come, and how far the body may be behind LEAST_BYTES_PER_S."""
        self._content = request.content
        self._patience_s = patience_s
        self._waited_s = 0.0
        #: Bytes that came.
        self.taken = 0

    async def read(self) -> bytes:
        """Return the next bytes, b"" at the end. Raises `TimeoutError`, or what aiohttp does where the body breaks."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        behind_s = self._waited_s - self.taken / LEAST_BYTES_PER_S
        async with asyncio.timeout(self._patience_s - max(0.0, behind_s)):
            chunk = await self._content.readany()
        self._waited_s += loop.time() - began_s
        self.taken += len(chunk)
        return chunk


async def body_chunks(request: web.Request, patience_s: float) -> AsyncGenerator[bytes, None]:
    """Yield a body as it comes, within the bounds of `Pace`.

    Raises:
        BodyEncodedError: it is compressed.
        BodySlowError: the sender kept us waiting for too long; our own work on the chunks does not count.
        BadRequestError: it ended too early.
    """
    refuse_encoding(request)
    pace = Pace(request, patience_s)
    while True:
        try:
            chunk = await pace.read()
        except TimeoutError:
            raise BodySlowError(f"after {pace.taken} bytes the body came too slowly; send it again.") from None
        except web.RequestPayloadError:
            raise BadRequestError("the request's body ended too early; send it again.") from None
        if not chunk:
            return
        yield chunk


class _InFlight:
    """Bytes of the bodies that are being read, over all requests of this process."""

    def __init__(self) -> None:
        self._bytes = 0

    def take(self, count: int) -> None:
        if self._bytes + count > BODIES_BYTES:
            raise UnavailableError("too many large requests are being read; try again later.")
        self._bytes += count

    def give_back(self, count: int) -> None:
        self._bytes -= count


_in_flight: Final = _InFlight()


async def read_model(request: web.Request, model: type[_Model], bounds: BodyBounds = SMALL) -> _Model:
    """Read and check a JSON body.

    Raises:
        BadRequestError: it is no such request; the sentence names the first field that is wrong.
        BodyTooLargeError, BodyEncodedError, BodySlowError: see there.
        UnavailableError: BODIES_BYTES are being read.
    """
    refuse_encoding(request)
    if (request.content_length or 0) > bounds.size_bytes:
        raise _too_large(bounds)
    data = bytearray()
    try:
        async with aclosing(body_chunks(request, PATIENCE_S)) as chunks:
            async for chunk in chunks:
                if len(data) + len(chunk) > bounds.size_bytes:
                    raise _too_large(bounds)
                _in_flight.take(len(chunk))
                data += chunk
        if len(data) <= INLINE_BYTES:
            return parse_model(data, model, bounds)
        with collector_paused():
            parsed = await asyncio.get_running_loop().run_in_executor(_PARSER, _parse_apart, data, model, bounds)
        if isinstance(parsed, BadRequestError):
            raise parsed
        return parsed
    finally:
        _in_flight.give_back(len(data))


def parse_model(data: bytes | bytearray, model: type[_Model], bounds: BodyBounds = SMALL) -> _Model:
    """Return the model that a JSON text is. Raises `BadRequestError`."""
    if data.count(b",") > bounds.items or data.count(b"[") + data.count(b"{") > bounds.containers:
        raise BadRequestError(f"the request has more than {bounds.items} elements; ask in parts.")
    # Without a colon no string is a key, and a body of quotes alone need not be read.
    keys = sum(found.end(1) >= 0 for found in _STRING.finditer(data)) if b":" in data else 0
    if keys > MAX_KEYS * data.count(b"{"):
        # Before they are made: a million of them take 300 MB.
        raise _too_wide()
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the request's body is wrong: {error.msg[:SHOWN_CHARACTERS]}.") from None
    _check_keys(keys, value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = first_fault(error)
        where = first.place[:SHOWN_CHARACTERS] or "body"
        raise BadRequestError(f"the request's {where} is wrong: {first.message[:SHOWN_CHARACTERS]}.") from None


def _parse_apart(data: bytearray, model: type[_Model], bounds: BodyBounds) -> _Model | BadRequestError:
    """Return the model, or why there is none, in the parser's thread.

    The error is a new one, without a traceback: that would keep what was parsed, and to release a million objects would
    hold the event loop for 30 ms.
    """
    try:
        return parse_model(data, model, bounds)
    except BadRequestError as error:
        return BadRequestError(str(error))


def _check_keys(written: int, value: Any) -> None:
    """Refuse what is deep, wide, or names a key twice (parsers differ in which of the two counts).

    `written`: keys of the text that became `value`.
    """
    level, keys = [value], 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                keys += len(each)
                if len(each) > MAX_KEYS:
                    raise _too_wide()
            members = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
            below.extend(member for member in members if isinstance(member, dict | list))
        if not below:
            break
        level = below
    else:
        raise BadRequestError(f"the request is nested deeper than {MAX_DEPTH}.")
    if written != keys:
        raise BadRequestError("the request has an object with one key twice.")


def _too_wide() -> BadRequestError:
    return BadRequestError(f"the request has an object with more than {MAX_KEYS} keys.")


def _too_large(bounds: BodyBounds) -> BodyTooLargeError:
    return BodyTooLargeError(f"the request's body is larger than {bounds.size_bytes} bytes; ask in parts.")
