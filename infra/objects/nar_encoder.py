"""NAR bytes into the bytes of an object: NAR -> sha256 -> codec -> sha256, at constant memory.

Compression is deterministic for one version and level, however the NAR was cut. This module knows no store, so that a
client that only sends imports none.
"""

from __future__ import annotations

import asyncio
import lzma
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import field, replace
from hashlib import sha256
from itertools import chain
from typing import Final, Protocol

import zstandard

from infra.nix.hashing import sha256_text
from infra.nix.narinfo import NarInfo, StoredNar
from infra.nix.path_info import PathInfo
from infra.objects.compression import COMPRESSION, Compression, nar_key
from infra.objects.errors import CacheError
from infra.objects.object_files import INLINE_BYTES
from infra.records import record

#: zstd's own default: 2 to 3 times faster than a local disk needs, within a few per cent of the size of higher levels.
LEVEL = 3
#: xz's preset: 32 MiB of memory for each NAR under way, where its default (6) takes 94.
XZ_PRESET = 3
#: NAR bytes that are hashed and compressed at a time.
BLOCK_BYTES = 1024 * 1024
#: NAR bytes that one thread which reads and writes too encodes at a time. What comes of them is small enough for memory
#: that is used again: with BLOCK_BYTES the faults of new memory cost as much as hashing (22 ms for 5 MB, measured).
SLICE_BYTES = 256 * 1024
#: NAR bytes per zstd frame, a multiple of both: a reader may seek to, or unpack in parallel, whole frames.
FRAME_BYTES = 16 * BLOCK_BYTES
#: Compressed bytes that a thread makes of files at a time: each change of threads costs as much as compressing 100 KB.
MADE_BYTES = 4 * 1024 * 1024


@record(frozen=True, slots=True)
class UploadedNar:
    """A NAR in the object store, as it was measured on the way: its hash `sha256:<nix32>`, its bytes, its object.

    `packing_s` is how long its upload waited for its bytes to be read, hashed and compressed.
    """

    nar_hash: str
    nar_size: int
    stored: StoredNar
    packing_s: float = field(default=0.0, compare=False)

    def narinfo(self, path: PathInfo) -> NarInfo:
        """Return what a cache may claim of `path` with this NAR, whatever hash and size a client claims."""
        return NarInfo(replace(path, nar_hash=self.nar_hash, nar_size=self.nar_size), self.stored)


class _Codec(Protocol):
    """Compresses one NAR."""

    def whole(self, nar: bytes) -> bytes:
        """Compress all there is."""

    def add(self, block: bytes | memoryview) -> bytes:
        """Compress the next block, which the caller may overwrite then; what comes out may be empty."""

    def finish(self) -> bytes:
        """Return the last compressed bytes."""


_of_thread: Final = threading.local()


def _zstd_compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)


class _ZstdFrames:
    """Frames of FRAME_BYTES of the NAR; a whole one states its content size."""

    def __init__(self) -> None:
        self._compressor: zstandard.ZstdCompressor | None = None
        self._frame: zstandard.ZstdCompressionObj | None = None
        self._frame_size = 0

    def whole(self, nar: bytes) -> bytes:
        # A context costs as much as a small NAR, so each thread keeps one.
        if not hasattr(_of_thread, "compressor"):
            _of_thread.compressor = _zstd_compressor()
        data: bytes = _of_thread.compressor.compress(nar)
        return data

    def add(self, block: bytes | memoryview) -> bytes:
        if self._frame is None:
            self._compressor = self._compressor or _zstd_compressor()
            self._frame = self._compressor.compressobj()
        data = self._frame.compress(block)
        self._frame_size += len(block)
        return data + self.finish() if self._frame_size >= FRAME_BYTES else data

    def finish(self) -> bytes:
        data = b"" if self._frame is None else self._frame.flush()
        self._frame = None
        self._frame_size = 0
        return data


class _XzStream:
    """One stream."""

    def __init__(self) -> None:
        self._compressor = lzma.LZMACompressor(lzma.FORMAT_XZ, preset=XZ_PRESET)

    def whole(self, nar: bytes) -> bytes:
        return self._compressor.compress(nar) + self._compressor.flush()

    def add(self, block: bytes | memoryview) -> bytes:
        return self._compressor.compress(block)

    def finish(self) -> bytes:
        return self._compressor.flush()


class _Plain:
    """The NAR as it is."""

    def whole(self, nar: bytes) -> bytes:
        return nar

    def add(self, block: bytes | memoryview) -> bytes:
        return bytes(block)

    def finish(self) -> bytes:
        return b""


_CODECS: dict[Compression, type[_Codec]] = {"zstd": _ZstdFrames, "xz": _XzStream, "none": _Plain}


class NarEncoder:
    """NAR blocks in, compressed bytes out, both sides hashed. Not for two threads at once."""

    def __init__(self, compression: Compression, *, is_hashed: bool = True) -> None:
        """Without hashes, which are more than half of the work, only sizes are known at the end."""
        self._compression = compression
        self._codec = _CODECS[compression]()
        self._nar_hash = sha256() if is_hashed else None
        self._nar_size = 0
        self._file_hash = sha256() if is_hashed else None
        self._file_size = 0

    def whole(self, nar: bytes) -> bytes:
        """Encode all there is."""
        if self._nar_hash is not None:
            self._nar_hash.update(nar)
        self._nar_size = len(nar)
        return self._out(self._codec.whole(nar))

    def add(self, block: bytes | memoryview) -> bytes:
        """Encode one block of at most BLOCK_BYTES; what comes out may be empty."""
        if self._nar_hash is not None:
            self._nar_hash.update(block)
        self._nar_size += len(block)
        return self._out(self._codec.add(block))

    def finish(self) -> bytes:
        """Return the last compressed bytes."""
        return self._out(self._codec.finish())

    def uploaded(self, packing_s: float) -> UploadedNar:
        """Return what the object is, once all of it went through; hashes are "" where none were made."""
        if self._nar_hash is None or self._file_hash is None:
            return UploadedNar("", self._nar_size, StoredNar("", self._compression, "", self._file_size), packing_s)
        file_hash = sha256_text(self._file_hash.digest())
        stored = StoredNar(nar_key(file_hash, self._compression), self._compression, file_hash, self._file_size)
        return UploadedNar(sha256_text(self._nar_hash.digest()), self._nar_size, stored, packing_s)

    def _out(self, data: bytes) -> bytes:
        if self._file_hash is not None:
            self._file_hash.update(data)
        self._file_size += len(data)
        return data


class CompressedNar:
    """A NAR that is being compressed. Read `pieces` to their end, once; `uploaded` then says what the object is."""

    def __init__(self, encoder: NarEncoder, pieces: AsyncGenerator[bytes, None]) -> None:
        self.pieces = _TimedPieces(pieces)
        self._encoder = encoder

    def uploaded(self) -> UploadedNar:
        """Return hashes and sizes; the object's `url` is the key of an object that is named after its hash."""
        return self._encoder.uploaded(self.pieces.waited_s)


class _TimedPieces(AsyncIterator[bytes]):
    """The pieces of a NAR, and the seconds that were waited for them."""

    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        self._pieces = pieces
        self.waited_s = 0.0

    async def __anext__(self) -> bytes:
        began = time.monotonic()
        try:
            return await anext(self._pieces)
        finally:
            self.waited_s += time.monotonic() - began


@asynccontextmanager
async def compressing(
    chunks: AsyncIterable[bytes], compression: Compression = COMPRESSION
) -> AsyncIterator[CompressedNar]:
    """Compress the NAR that `chunks` are the bytes of; one NAR gives one object, however it was cut.

    Raises:
        CacheError: there were no bytes at all.
    """
    encoder = NarEncoder(compression)
    async with aclosing(_blocks(chunks)) as blocks:
        first = await anext(blocks, b"")
        if not first:
            raise CacheError("a NAR cannot be empty: the stream ended before its first byte")
        pieces = _one(encoder, first) if len(first) <= INLINE_BYTES else _compressed(encoder, first, blocks)
        async with aclosing(pieces):
            yield CompressedNar(encoder, pieces)


@asynccontextmanager
async def compressing_files(
    chunks: Iterator[bytes], compression: Compression = COMPRESSION, *, is_hashed: bool = True
) -> AsyncIterator[CompressedNar]:
    """Do the same with chunks that block, all in threads: reading, hashing and compressing are one walk.

    `is_hashed`: as in `NarEncoder`. Pieces have MADE_BYTES but for the last; one is made while the one before is used.

    Raises:
        OSError: reading failed; as `chunks` gives it.
    """
    encoder = NarEncoder(compression, is_hashed=is_hashed)
    async with aclosing(_ahead(_cut(encode(encoder, chunks)))) as pieces:
        yield CompressedNar(encoder, pieces)


def compress_now(
    chunks: Iterator[bytes], compression: Compression = COMPRESSION, *, is_hashed: bool = True
) -> tuple[bytes, UploadedNar]:
    """Return the object of a small NAR, and what it is; for a thread. The bytes are those of `compressing_files`.

    `is_hashed`: as in `NarEncoder`.

    Raises:
        OSError: reading failed; as `chunks` gives it.
    """
    encoder = NarEncoder(compression, is_hashed=is_hashed)
    data = b"".join(encode(encoder, chunks))
    return data, encoder.uploaded(0.0)


async def _one(encoder: NarEncoder, nar: bytes) -> AsyncGenerator[bytes, None]:
    yield encoder.whole(nar)


def encode(encoder: NarEncoder, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the encoded slices, joined to pieces of at least SLICE_BYTES / 2 but for the last."""
    first: list[bytes] = []
    size = 0
    for chunk in chunks:
        first.append(chunk)
        size += len(chunk)
        if size > INLINE_BYTES:
            break
    else:
        yield encoder.whole(b"".join(first))
        return
    out = bytearray()
    for block in _slices(chain(first, chunks)):
        data = encoder.add(block)
        if not out and len(data) >= SLICE_BYTES // 2:
            yield data
            continue
        out += data
        if len(out) >= SLICE_BYTES // 2:
            yield bytes(out)
            out.clear()
    yield bytes(out) + encoder.finish()


def _slices(chunks: Iterable[bytes]) -> Iterator[memoryview]:
    """Yield the bytes of `chunks` as slices of SLICE_BYTES, all but the last full; each overwrites the one before."""
    buffer = memoryview(bytearray(SLICE_BYTES))
    filled = 0
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            part = rest[: SLICE_BYTES - filled]
            buffer[filled : filled + len(part)] = part
            filled += len(part)
            rest = rest[len(part) :]
            if filled == SLICE_BYTES:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _cut(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the bytes of `pieces` as pieces of MADE_BYTES, but for the last."""
    parts: list[memoryview] = []
    room = MADE_BYTES
    for piece in pieces:
        rest = memoryview(piece)
        while len(rest) >= room:
            yield b"".join([*parts, rest[:room]])
            parts, rest, room = [], rest[room:], MADE_BYTES
        if rest:
            parts.append(rest)
            room -= len(rest)
    if parts:
        yield b"".join(parts)


async def _ahead(pieces: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield what the iterator gives, the next piece being made in a thread meanwhile."""
    work = asyncio.ensure_future(asyncio.to_thread(next, pieces, b""))
    try:
        while piece := await work:
            work = asyncio.ensure_future(asyncio.to_thread(next, pieces, b""))
            yield piece
    finally:
        # A thread cannot be stopped: let it end before its files are closed.
        await asyncio.wait([work])
        if not work.cancelled():
            work.exception()


async def _blocks(chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of `chunks` as blocks of BLOCK_BYTES; all but the last are full."""
    parts: list[bytes | memoryview] = []
    size = 0
    async for chunk in chunks:
        view = memoryview(chunk)
        while size + len(view) >= BLOCK_BYTES:
            room = BLOCK_BYTES - size
            parts.append(view[:room])
            yield b"".join(parts)
            view = view[room:]
            parts, size = [], 0
        if view:
            parts.append(view)
            size += len(view)
    if parts:
        yield b"".join(parts)


async def _compressed(
    encoder: NarEncoder, first: bytes, blocks: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    """Yield the encoded blocks; the next is read, and the one before uploaded, while a thread encodes one."""
    work = asyncio.ensure_future(asyncio.to_thread(encoder.add, first))
    try:
        async for block in blocks:
            data = await work
            work = asyncio.ensure_future(asyncio.to_thread(encoder.add, block))
            if data:
                yield data
        yield await work + encoder.finish()
    finally:
        # A thread cannot be stopped: let it end before the encoder is dropped.
        await asyncio.wait([work])
