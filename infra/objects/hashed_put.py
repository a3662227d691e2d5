"""Foreign bytes into the object store under a key that names their hash: nothing shows unless they have it.

For clients that upload finished objects (`nix copy`), where `nar_writer` makes the object itself. Small ones are hashed
in memory and put at once; others stream to `incoming/` while they are hashed and are renamed at the end. A stream that
ends early, raises or has another hash leaves nothing; a kill leaves garbage below `incoming/`, which is swept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import aclosing, suppress
from hashlib import sha256

from infra.nix.hashing import sha256_text
from infra.objects.errors import CacheError, ObjectStoreError
from infra.objects.store import READ_BYTES, ObjectStore, incoming_key

#: Objects up to this size wait in memory for their end.
QUICK_OBJECT_BYTES = 1024 * 1024


class WrongBytesError(CacheError):
    """The bytes are not those that the key names."""


async def put_hashed(
    store: ObjectStore, key: str, file_hash: str, size_bytes: int, chunks: AsyncIterable[bytes]
) -> None:
    """Store `chunks` as `key`, replacing what was there; `file_hash` is `sha256:<nix32>` of them all.

    Memory is bounded by QUICK_OBJECT_BYTES and the parts in flight (`objects`), whatever the size. What `chunks` raises
    is passed on.

    Raises:
        WrongBytesError: their hash or size differs; nothing is stored.
        ObjectStoreError: the store failed; nothing is stored.
    """
    hashing = sha256()
    async with aclosing(_hashed(chunks, hashing.update, size_bytes)) as blocks:
        if size_bytes <= QUICK_OBJECT_BYTES:
            data = b"".join([block async for block in blocks])
            _check(hashing.digest(), len(data), file_hash, size_bytes)
            await store.put_bytes(key, data)
            return
        staged = incoming_key()
        try:
            size = await store.put_stream(staged, blocks)
            _check(hashing.digest(), size, file_hash, size_bytes)
            await store.rename(staged, key)
        except BaseException:
            with suppress(ObjectStoreError):
                await store.delete(staged)
            raise


def _check(digest: bytes, size: int, file_hash: str, size_bytes: int) -> None:
    if size != size_bytes:
        raise WrongBytesError(f"{size} bytes came, {size_bytes} were announced")
    if sha256_text(digest) != file_hash:
        raise WrongBytesError(f"the bytes have the hash {sha256_text(digest)}, not {file_hash}")


async def _hashed(
    chunks: AsyncIterable[bytes], update: Callable[[bytes], None], limit: int
) -> AsyncGenerator[bytes, None]:
    """Yield the bytes again, as blocks of about READ_BYTES; more than `limit` are not taken."""
    block = bytearray()
    taken = 0
    async for chunk in chunks:
        taken += len(chunk)
        if taken > limit:
            raise WrongBytesError(f"more than the announced {limit} bytes came")
        block += chunk
        if len(block) >= READ_BYTES:
            data = bytes(block)
            block.clear()
            # A megabyte takes milliseconds: others are answered meanwhile.
            await asyncio.to_thread(update, data)
            yield data
    if block:
        data = bytes(block)
        update(data)
        yield data
