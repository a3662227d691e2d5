"""A NAR out of the object store, verified."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from infra.nix.narinfo import NarInfo
from infra.objects.object_files import INLINE_BYTES
from infra.objects.store import LocalObjectStore, ObjectStore
from infra.objects.verification import VerifiedNar


async def fetch_nar(store: ObjectStore, narinfo: NarInfo) -> AsyncGenerator[bytes, None]:
    """Yield the NAR that `narinfo` promises, about 1 MiB at a time; `url` is the object's key.

    It ends normally only if file size and hash, NAR size and hash are as promised: until then what was yielded must
    not be used (give it to a consumer that commits at the end). Close the generator if you leave it early.

    Raises:
        CorruptNarError: a promise is broken.
        ObjectMissingError: the object is gone.
        ObjectStoreError: it cannot be read.
    """
    if isinstance(store, LocalObjectStore):
        reader = VerifiedNar(store.open_blocking(narinfo.stored.url), narinfo)
        if narinfo.stored.file_size <= INLINE_BYTES >= narinfo.path.nar_size:
            try:
                while data := reader.read():
                    yield data
            finally:
                reader.close()
            return
    else:
        reader = VerifiedNar(await asyncio.to_thread(store.open_blocking, narinfo.stored.url), narinfo)
    async with aclosing(read_verified(reader)) as chunks:
        async for data in chunks:
            yield data


async def read_verified(reader: VerifiedNar, *, interruptible: bool = False) -> AsyncGenerator[bytes, None]:
    """Yield what `reader` reads in a thread, the next bytes while these are used; closes it.

    `interruptible` says that closing the reader's source ends a read that waits.
    """
    work = asyncio.ensure_future(asyncio.to_thread(reader.read))
    try:
        while data := await work:
            work = asyncio.ensure_future(asyncio.to_thread(reader.read))
            yield data
    finally:
        if interruptible:
            reader.close()
        # A thread cannot be stopped: let it end before its file is closed.
        await asyncio.wait([work])
        if not work.cancelled():
            work.exception()
        reader.close()
