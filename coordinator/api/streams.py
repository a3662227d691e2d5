r"""The two batched streams of a client: all missing derivations in one request, all missing sources in another.

`coordinator.api.sent_streams` writes them, this module reads them. Both are one zstd frame around a magic line, records
and an end mark (integers are little-endian, four bytes):

    derivations := "drover-derivations-1\n" { length name, length bytes } 0
    sources     := "drover-sources-1\n"     { length header, nar }        0

`name` is the .drv's base name; `header` is the JSON of `SourceHeader`, and exactly `nar_size` bytes of NAR follow it.
The end mark distinguishes a whole stream from one that was cut at a record's edge; anything after it, compressed or
not, is an error. Members stand inputs first in both streams.

Memory is bounded on both sides: the reader inflates a few whole blocks at a time (`zstd_blocks`; 2 MiB at zstd's
greatest ratio where none is known), holds one derivation at most beyond that, and passes a NAR on in pieces as it
comes. For a derivation of more than `LARGE_BYTES` the reader first asks its caller for room.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Final

import zstandard
from pydantic import TypeAdapter, ValidationError

from coordinator.api.sent_streams import (
    DERIVATIONS_MAGIC,
    INT_BYTES,
    MAX_NAME_BYTES,
    PIECE_BYTES,
    SOURCES_MAGIC,
    FramingError,
    SourceHeader,
)
from coordinator.api.zstd_blocks import BlockCutter
from infra.records import record
from infra.validation import first_fault

MAX_HEADER_BYTES = 1024 * 1024
#: Blocks of a frame that are inflated at one time, 256 KiB of them at most.
BLOCKS_AT_ONCE = 2
#: A larger derivation comes alone, and only once there is room for it.
LARGE_BYTES = 1024 * 1024
#: Seconds within which a large derivation must come once it has its room: others wait for that.
LARGE_WITHIN_S = 300.0
#: Inflated bytes after which a stream gives the loop back; all streams take such turns between two looks at the others.
_TURN_BYTES = 1024 * 1024
#: What a reader's frame may ask for; the fast levels stay at 2 MiB.
MAX_WINDOW_BYTES = 8 * 1024 * 1024
_HEADERS: Final = TypeAdapter(SourceHeader)


@record(frozen=True, slots=True)
class StreamLimits:
    """Bounds of one stream; an error names the bound."""

    max_records: int
    max_record_bytes: int
    #: Of the inflated stream.
    max_bytes: int


async def read_derivations(
    body: AsyncIterable[bytes],
    limits: StreamLimits,
    room_for: Callable[[int], AbstractAsyncContextManager[None]] = lambda _: nullcontext(),
) -> AsyncGenerator[list[tuple[str, bytes]]]:
    """Yield the members of a derivations stream in batches, in the order in which they were sent.

    A derivation of more than `LARGE_BYTES` is a batch of its own; `room_for(its size)` is held from before it is
    inflated until the next batch is read.

    Raises:
        FramingError: the stream is not one; batches before the fault have been yielded.
    """
    stream = _Inflater(body, limits.max_bytes)
    await stream.magic(DERIVATIONS_MAGIC)
    parser = _derivation_parser(limits)
    next(parser)
    while True:
        batch, used, next_step = parser.send(stream.view())
        stream.drop(used)
        if batch:
            yield batch
        if next_step is None:
            break
        name, size = next_step
        if size <= LARGE_BYTES:
            await stream.fill()
            continue
        async with room_for(size):
            try:
                async with asyncio.timeout(LARGE_WITHIN_S):
                    large = await stream.large(size)
            except TimeoutError:
                raise FramingError(
                    f"{name} has {size} bytes and did not come within {LARGE_WITHIN_S:.0f} s; send it again"
                ) from None
            yield [(name, large)]
            del large
    await stream.finish()


#: What a parser wants next: more bytes ("", 0), the body of one large derivation (its name and size), or nothing.
_Wanted = tuple[str, int] | None


def _derivation_parser(
    limits: StreamLimits,
) -> Generator[tuple[list[tuple[str, bytes]], int, _Wanted], bytes, None]:
    """Take what is there of the stream, give (whole records, bytes used, what comes next); keeps only the count."""
    count = 0
    data = yield [], 0, ("", 0)
    while True:
        batch: list[tuple[str, bytes]] = []
        at, end = 0, len(data)
        wanted: _Wanted = ("", 0)
        while end - at >= INT_BYTES:
            name_size = int.from_bytes(data[at : at + INT_BYTES], "little")
            body_at = at + INT_BYTES + name_size + INT_BYTES
            if name_size == 0:
                at, wanted = at + INT_BYTES, None
                break
            if name_size > MAX_NAME_BYTES:
                raise FramingError(f"record {count} has a name of {name_size} bytes; at most {MAX_NAME_BYTES}")
            if body_at > end:
                break
            size = int.from_bytes(data[body_at - INT_BYTES : body_at], "little")
            if size > limits.max_record_bytes:
                name = data[at + INT_BYTES : body_at - INT_BYTES].decode(errors="replace")
                raise FramingError(f"{name} has {size} bytes; a derivation may have {limits.max_record_bytes}")
            if body_at + size > end and size <= LARGE_BYTES:
                break
            count += 1
            if count > limits.max_records:
                raise FramingError(f"the stream holds more than {limits.max_records} derivations, the limit")
            name = _ascii(data[at + INT_BYTES : body_at - INT_BYTES], count - 1)
            if size > LARGE_BYTES:
                at, wanted = body_at, (name, size)
                break
            batch.append((name, data[body_at : body_at + size]))
            at = body_at + size
        data = yield batch, at, wanted


def _ascii(name: bytes, record: int) -> str:
    try:
        return name.decode("ascii")
    except UnicodeDecodeError:
        raise FramingError(f"record {record} has a name that is not ASCII") from None


class Source:
    """One source of a stream; its NAR must be read to the end before the next source is taken."""

    def __init__(self, header: SourceHeader, stream: _Inflater) -> None:
        self.header = header
        self._stream = stream
        self.left = header.nar_size

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the NAR's bytes, `header.nar_size` in all."""
        while self.left:
            piece = await self._stream.some(min(self.left, PIECE_BYTES))
            self.left -= len(piece)
            yield piece


async def read_sources(body: AsyncIterable[bytes], limits: StreamLimits) -> AsyncIterator[Source]:
    """Yield the members of a sources stream in the order in which they were sent.

    What a consumer leaves unread of a NAR is skipped.

    Raises:
        FramingError: the stream is not one; sources before the fault have been yielded.
    """
    stream = _Inflater(body, limits.max_bytes)
    await stream.magic(SOURCES_MAGIC)
    count = 0
    while size := int.from_bytes(await stream.exactly(INT_BYTES), "little"):
        if size > MAX_HEADER_BYTES:
            raise FramingError(f"source {count} has a header of {size} bytes; at most {MAX_HEADER_BYTES}")
        count += 1
        if count > limits.max_records:
            raise FramingError(f"the stream holds more than {limits.max_records} sources, the limit")
        try:
            header = _HEADERS.validate_json(await stream.exactly(size))
        except ValidationError as error:
            place, why = first_fault(error)
            raise FramingError(f"the header of source {count - 1} is wrong at {place or 'JSON'}: {why}") from None
        if header.nar_size > limits.max_record_bytes:
            raise FramingError(
                f"the source {header.path} has {header.nar_size} bytes; at most {limits.max_record_bytes} are taken"
            )
        source = Source(header, stream)
        yield source
        async for _ in source.chunks():
            pass
    await stream.finish()


class _Inflater:
    """Inflates a body into a buffer, a few blocks at a time."""

    def __init__(self, body: AsyncIterable[bytes], max_bytes: int) -> None:
        self._chunks = aiter(body)
        self._frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
        #: Compressed bytes not yet inflated, from `_taken` on.
        self._waiting = b""
        self._taken = 0
        self._plain = bytearray()
        self._total = 0
        self._max_bytes = max_bytes
        self._blocks = BlockCutter(BLOCKS_AT_ONCE)
        #: Bytes inflated since the loop was given back.
        self._held = 0

    async def fill(self) -> None:
        """Inflate at least one byte more; FramingError where there is none."""
        # What came is taken together while it stays small: fewer turns for the reader above.
        before = len(self._plain)
        if self._held >= _TURN_BYTES:
            self._held = 0
            await asyncio.sleep(0)
        while len(self._plain) - before < PIECE_BYTES:
            if self._taken >= len(self._waiting):
                if len(self._plain) > before:
                    return
                try:
                    self._waiting = await anext(self._chunks)
                except StopAsyncIteration:
                    raise FramingError("the stream was cut short; send it again") from None
                self._taken = 0
                continue
            if self._frame.eof:
                if len(self._plain) > before:
                    return
                raise FramingError("the stream ended before its end mark; send it again")
            self._inflate_blocks()

    def _inflate_blocks(self) -> None:
        piece = self._waiting[self._taken : self._taken + self._blocks.cut(self._waiting, self._taken)]
        try:
            data = self._frame.decompress(piece)
        except zstandard.ZstdError:
            raise FramingError("the stream is not valid zstd") from None
        self._taken += len(piece) - len(self._frame.unused_data)
        self._total += len(data)
        self._held += len(data)
        if self._total > self._max_bytes:
            raise FramingError(f"the stream is longer than {self._max_bytes} bytes, the limit")
        self._plain += data

    def view(self) -> bytes:
        return bytes(self._plain)

    def drop(self, count: int) -> None:
        del self._plain[:count]

    async def some(self, most: int) -> bytes:
        """Return between one and `most` bytes."""
        if not self._plain:
            await self.fill()
        piece = bytes(self._plain[:most])
        del self._plain[: len(piece)]
        return piece

    async def exactly(self, count: int) -> bytes:
        while len(self._plain) < count:
            await self.fill()
        piece = bytes(self._plain[:count])
        del self._plain[:count]
        return piece

    async def large(self, count: int) -> bytes:
        """Return `count` bytes as `exactly` does, copied piece by piece and put together beside the loop."""
        pieces: list[bytes] = []
        while count:
            pieces.append(await self.some(min(count, PIECE_BYTES)))
            count -= len(pieces[-1])
        return await asyncio.to_thread(b"".join, pieces)

    async def magic(self, expected: bytes) -> None:
        if await self.exactly(len(expected)) != expected:
            raise FramingError(f"the stream does not begin with {expected.decode().strip()}")

    async def finish(self) -> None:
        """The end mark has been read: nothing may follow, and the frame must end (its check sum with it)."""
        while not self._frame.eof and not self._plain:
            if self._taken >= len(self._waiting):
                try:
                    self._waiting = await anext(self._chunks)
                except StopAsyncIteration:
                    raise FramingError("the stream was cut short; send it again") from None
                self._taken = 0
            if self._taken < len(self._waiting):
                self._inflate_blocks()
        if self._plain or self._taken < len(self._waiting):
            raise FramingError("something follows the stream's end mark")
        async for rest in self._chunks:
            if rest:
                raise FramingError("something follows the stream's end mark")
