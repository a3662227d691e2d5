"""NAR bytes into the object store, once, at constant memory: NAR -> sha256 -> zstd -> sha256 -> object.

The object's key is the hash of its own bytes, so it is known only at the end. Up to QUICK_BYTES of compressed data wait
in memory and are put at once under the final key (nearly every output); beyond that the object streams to
`incoming/<random>` and is renamed. Reading, compressing (in a thread) and uploading overlap. An upload that is
cancelled, fails or is killed leaves nothing, or garbage below `incoming/`.

Memory per upload is bounded by QUICK_BYTES, the parts in flight (`objects`) and three BLOCK_BYTES.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from hashlib import sha256

import zstandard

from infra.cache.compression import COMPRESSION, nar_key
from infra.cache.errors import CacheError, ObjectStoreError
from infra.cache.objects import INLINE_BYTES, ObjectStore, incoming_key
from infra.nix.hashing import sha256_text

#: zstd's own default: 2 to 3 times faster than a local disk needs, within a few per cent of the size of higher levels.
LEVEL = 3
#: NAR bytes that are hashed and compressed at a time.
BLOCK_BYTES = 1024 * 1024
#: NAR bytes per zstd frame, a multiple of BLOCK_BYTES: a reader may seek to, or unpack in parallel, whole frames.
FRAME_BYTES = 16 * BLOCK_BYTES
#: Compressed bytes that wait in memory for the final key.
QUICK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class UploadedNar:
    """A NAR in the object store. Hashes are `sha256:<nix32>`, sizes bytes, `url` the object's key."""

    nar_hash: str
    nar_size: int
    url: str
    compression: str
    file_hash: str
    file_size: int


class _Encoder:
    """NAR blocks in, compressed bytes out, both sides hashed. Not for two threads at once."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
        self._frame: zstandard.ZstdCompressionObj | None = None
        self._frame_size = 0
        self._nar_hash = sha256()
        self._nar_size = 0
        self._file_hash = sha256()
        self._file_size = 0

    def whole(self, nar: bytes) -> bytes:
        """Encode all there is as one frame that states its content size."""
        self._nar_hash.update(nar)
        self._nar_size = len(nar)
        return self._out(self._compressor.compress(nar))

    def add(self, block: bytes) -> bytes:
        """Encode one block of at most BLOCK_BYTES; what comes out may be empty."""
        self._nar_hash.update(block)
        self._nar_size += len(block)
        if self._frame is None:
            self._frame = self._compressor.compressobj()
        data = self._frame.compress(block)
        self._frame_size += len(block)
        if self._frame_size >= FRAME_BYTES:
            data += self._end_frame()
        return self._out(data)

    def finish(self) -> bytes:
        """Return the last compressed bytes."""
        return self._out(self._end_frame())

    def uploaded(self) -> UploadedNar:
        """Return what the object is, once all of it went through."""
        file_hash = sha256_text(self._file_hash.digest())
        return UploadedNar(
            nar_hash=sha256_text(self._nar_hash.digest()),
            nar_size=self._nar_size,
            url=nar_key(file_hash),
            compression=COMPRESSION,
            file_hash=file_hash,
            file_size=self._file_size,
        )

    def _end_frame(self) -> bytes:
        data = b"" if self._frame is None else self._frame.flush()
        self._frame = None
        self._frame_size = 0
        return data

    def _out(self, data: bytes) -> bytes:
        self._file_hash.update(data)
        self._file_size += len(data)
        return data


async def upload_nar(store: ObjectStore, chunks: AsyncIterable[bytes]) -> UploadedNar:
    """Store the NAR that `chunks` are the bytes of, and say what it is. Two uploads of one NAR are one object.

    Raises:
        CacheError: there were no bytes at all.
        ObjectStoreError: the store failed; nothing is visible.
    """
    encoder = _Encoder()
    async with aclosing(_blocks(chunks)) as blocks:
        first = await anext(blocks, b"")
        if not first:
            raise CacheError("a NAR cannot be empty: the stream ended before its first byte")
        if len(first) <= INLINE_BYTES:
            return await _put(store, encoder, encoder.whole(first))
        async with aclosing(_compressed(encoder, first, blocks)) as pieces:
            head = bytearray()
            async for piece in pieces:
                head += piece
                if len(head) > QUICK_BYTES:
                    return await _stream(store, encoder, head, pieces)
            return await _put(store, encoder, bytes(head))


async def _put(store: ObjectStore, encoder: _Encoder, data: bytes) -> UploadedNar:
    uploaded = encoder.uploaded()
    await store.put_bytes(uploaded.url, data)
    return uploaded


async def _stream(
    store: ObjectStore, encoder: _Encoder, head: bytearray, pieces: AsyncGenerator[bytes, None]
) -> UploadedNar:
    async def everything() -> AsyncGenerator[bytes, None]:
        first = bytes(head)
        head.clear()
        yield first
        del first
        async for piece in pieces:
            yield piece

    staged = incoming_key()
    try:
        async with aclosing(everything()) as data:
            await store.put_stream(staged, data)
        uploaded = encoder.uploaded()
        await store.rename(staged, uploaded.url)
    except BaseException:
        with suppress(ObjectStoreError):
            await store.delete(staged)
        raise
    return uploaded


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
    encoder: _Encoder, first: bytes, blocks: AsyncGenerator[bytes, None]
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
