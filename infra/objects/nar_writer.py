"""NAR bytes into the object store, once, at constant memory: NAR -> sha256 -> codec -> sha256 -> object.

The object's key is the hash of its own bytes, so it is known only at the end. Up to QUICK_BYTES of compressed data wait
in memory and are put at once under the final key (nearly every output); beyond that the object streams to
`incoming/<random>` and is renamed. Reading, compressing (in a thread) and uploading overlap. An upload that is
cancelled, fails or is killed leaves nothing, or garbage below `incoming/`.

Memory per upload is bounded by QUICK_BYTES, the parts in flight (`objects`) and three BLOCK_BYTES (`nar_encoder`).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterable, Iterator
from contextlib import aclosing, suppress

from infra.objects.compression import COMPRESSION, Compression
from infra.objects.errors import ObjectStoreError, WrongNarError
from infra.objects.nar_encoder import CompressedNar, NarEncoder, UploadedNar, compressing, encode
from infra.objects.store import LocalObjectStore, ObjectStore, incoming_key

#: Compressed bytes that wait in memory for the final key.
QUICK_BYTES = 8 * 1024 * 1024


def store_nar_now(
    store: LocalObjectStore, chunks: Iterator[bytes], compression: Compression, nar_hash: str, nar_size: int
) -> UploadedNar:
    """Store the promised NAR, in one thread: each piece is written as soon as it is compressed.

    Raises:
        WrongNarError: the chunks are another NAR; nothing is visible.
        ObjectStoreError: the store failed; nothing is visible.
        OSError, CacheError: as `chunks` gives it; nothing is visible.
    """
    encoder = NarEncoder(compression)
    packing_s = 0.0

    def pieces() -> Iterator[bytes]:
        nonlocal packing_s
        encoded = encode(encoder, chunks)
        while True:
            began = time.monotonic()
            piece = next(encoded, None)
            packing_s += time.monotonic() - began
            if piece is None:
                return
            yield piece

    def key() -> str:
        made = encoder.uploaded(packing_s)
        if (made.nar_hash, made.nar_size) != (nar_hash, nar_size):
            raise WrongNarError(f"the NAR has the hash {made.nar_hash} and {made.nar_size} bytes, not as promised")
        return made.stored.url

    store.put_pieces_now(pieces(), key)
    return encoder.uploaded(packing_s)


async def upload_nar(
    store: ObjectStore, chunks: AsyncIterable[bytes], compression: Compression = COMPRESSION
) -> UploadedNar:
    """Store the NAR that `chunks` are the bytes of, and return its object. Two uploads of one NAR are one object.

    Raises:
        CacheError: there were no bytes at all.
        ObjectStoreError: the store failed; nothing is visible.
    """
    async with compressing(chunks, compression) as nar:
        return await upload_compressed(store, nar)


async def upload_compressed(store: ObjectStore, nar: CompressedNar) -> UploadedNar:
    """Store a NAR that is being compressed, and return its object. Errors as `upload_nar`, and as `nar` gives them."""
    # Not in one buffer that grows: it would be copied again and again, into memory that is new each time.
    head: list[bytes] = []
    size = 0
    async for piece in nar.pieces:
        head.append(piece)
        size += len(piece)
        if size > QUICK_BYTES:
            return await _stream(store, nar, head)
    uploaded = nar.uploaded()
    await store.put_bytes(uploaded.stored.url, b"".join(head))
    return uploaded


async def _stream(store: ObjectStore, nar: CompressedNar, head: list[bytes]) -> UploadedNar:
    async def everything() -> AsyncGenerator[bytes, None]:
        for number, piece in enumerate(head):
            head[number] = b""
            yield piece
        async for piece in nar.pieces:
            yield piece

    staged = incoming_key()
    try:
        async with aclosing(everything()) as data:
            await store.put_stream(staged, data)
        uploaded = nar.uploaded()
        await store.rename(staged, uploaded.stored.url)
    except BaseException:
        with suppress(ObjectStoreError):
            await store.delete(staged)
        raise
    return uploaded
