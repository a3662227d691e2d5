"""The `.ls` listings of published paths, made from their objects on request.

Few listings are ever requested, so none is stored: the object is read once, verified, and what was made is remembered
for a while. Everything is bounded: the NAR, the listing, how many are made at once and how many wait. Askers for one
path share the work.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from infra.cache.cache import Cache
from infra.nix import narinfo as narinfo_format
from infra.nix.errors import FormatError
from infra.nix.listing import NarLister
from infra.nix.narinfo import NarInfo
from infra.objects.errors import CorruptNarError, ObjectStoreError
from infra.objects.verification import VerifiedNar

#: Largest NAR that is listed.
MAX_LISTED_NAR_BYTES = 4 * 1024**3
#: Largest listing: some hundred thousand files.
MAX_LISTING_BYTES = 16 * 1024**2
#: Listings made at one time, each in a thread, and how many may wait.
LISTING_CONCURRENCY = 2
MAX_LISTINGS_WANTED = 64
#: Listings in memory, in all.
LISTINGS_IN_MEMORY_BYTES = 16 * 1024**2


class Listings:
    """Makes listings of what `cache` holds. For the tasks of one event loop; `close` it."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._turns = asyncio.Semaphore(LISTING_CONCURRENCY)
        #: NAR hash -> listing, oldest use first.
        self._made: OrderedDict[str, bytes] = OrderedDict()
        #: Bytes of the listings that are held.
        self.held_bytes = 0
        self._making: dict[str, asyncio.Task[bytes | None]] = {}

    async def listing(self, hash_part: str) -> bytes | None:
        """Return the JSON text of `<hash_part>.ls`.

        None if no such path can be fetched, its object is lost or corrupt, it is larger than the limits, or too many
        listings are requested just now.

        Raises:
            MetadataError: the database failed.
        """
        text = await self._cache.narinfo(hash_part)
        if text is None:
            return None
        info = narinfo_format.parse(text, self._cache.store_dir)
        made = self._made.get(info.path.nar_hash)
        if made is not None:
            self._made.move_to_end(info.path.nar_hash)
            return made
        task = self._making.get(info.path.nar_hash)
        if task is None:
            if info.path.nar_size > MAX_LISTED_NAR_BYTES or len(self._making) >= MAX_LISTINGS_WANTED:
                return None
            task = asyncio.create_task(self._make(info))
            self._making[info.path.nar_hash] = task
        # Shielded: a waiter that is cancelled does not end it for the others.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Wait for what is being made: a thread cannot be stopped."""
        await asyncio.gather(*self._making.values())

    async def _make(self, info: NarInfo) -> bytes | None:
        try:
            async with self._turns:
                made = await asyncio.to_thread(self._read, info)
        finally:
            del self._making[info.path.nar_hash]
        if made is not None:
            self._made[info.path.nar_hash] = made
            self.held_bytes += len(made)
            while self.held_bytes > LISTINGS_IN_MEMORY_BYTES:
                self.held_bytes -= len(self._made.popitem(last=False)[1])
        return made

    def _read(self, info: NarInfo) -> bytes | None:
        lister = NarLister(MAX_LISTING_BYTES)
        try:
            reader = VerifiedNar(self._cache.objects.open_blocking(info.stored.url), info)
            try:
                while data := reader.read():
                    lister.feed(data)
            finally:
                reader.close()
            return lister.close()
        except (FormatError, CorruptNarError, ObjectStoreError):
            # For clients a listing is an extra: what is wrong with the object, `fsck` says.
            return None
