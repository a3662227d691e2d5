"""Offers of contents that are here: a fixed output under another name is published without a build or a fetch.

The path that should hold a content is read whole and hashed as the fixed output wants it, whatever its metadata says;
then the same object is published under the other path. What does not hold it is left alone, and the output is built as
ever. Each offer is bounded by bytes and time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Final

from infra.cache.cache import Cache
from infra.cache.publishing.claims import Rejected
from infra.nix.content import ContentCheck, FixedContent
from infra.nix.errors import FormatError
from infra.nix.narinfo import NarInfo
from infra.nix.path_info import PathInfo
from infra.objects.errors import CorruptNarError, ObjectStoreError
from infra.objects.verification import VerifiedNar

#: Bytes of NARs that one offer reads; what is beyond is built.
MAX_OFFERED_BYTES: Final = 8 * 1024**3
#: Seconds that reading of one offer may take, its wait for a turn included; less than a client waits for an answer.
OFFER_S: Final = 120.0
#: NARs that are read at one time, each in a thread.
READ_AT_ONCE: Final = 2
#: Paths that are published together.
PUBLISHED_AT_ONCE: Final = 256

_log = logging.getLogger(__name__)


class ContentOffers:
    """Offers what one cache holds; for the tasks of one event loop."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._turns = asyncio.Semaphore(READ_AT_ONCE)
        #: Paths that were published by their content alone.
        self.published = 0

    async def offer(self, wanted: Mapping[str, FixedContent]) -> frozenset[str]:
        """Publish those full paths whose content is here under another name, and return them.

        Raises:
            MetadataError: As all of `Cache`.
        """
        if not wanted:
            return frozenset()
        holders = await self._cache.holders(set(wanted.values()))
        if not holders:
            return frozenset()
        proven = await self._proven(holders)
        claims = [_claim(path, content, proven[content]) for path, content in wanted.items() if content in proven]
        done: set[str] = set()
        for batch in _batches(claims):
            outcomes = await self._cache.publish(batch)
            done.update(outcome.store_path for outcome in outcomes if not isinstance(outcome, Rejected))
        self.published += len(done)
        return frozenset(done)

    async def _proven(self, holders: Mapping[FixedContent, NarInfo]) -> dict[FixedContent, NarInfo]:
        """Return those that hold what they should, as far as bytes and time allow to read them."""
        proven: dict[FixedContent, NarInfo] = {}
        room = MAX_OFFERED_BYTES
        waiting = []
        for content, info in sorted(holders.items(), key=lambda item: item[1].path.nar_size):
            room -= info.path.nar_size
            if room >= 0:
                waiting.append((content, info))
        remaining = iter(waiting)
        # A thread is not cancelled: without this it would read on beside those of the next offers.
        ended = threading.Event()

        async def prove() -> None:
            for content, info in remaining:
                async with self._turns:
                    if await asyncio.to_thread(self._holds, content, info, ended):
                        proven[content] = info

        try:
            async with asyncio.timeout(OFFER_S), asyncio.TaskGroup() as tasks:
                for _ in range(min(READ_AT_ONCE, len(waiting))):
                    tasks.create_task(prove())
        except TimeoutError:
            late = len(waiting) - len(proven)
            _log.warning("%d contents of fixed outputs were not read within %.0f s", late, OFFER_S)
        finally:
            ended.set()
        return proven

    def _holds(self, content: FixedContent, info: NarInfo, ended: threading.Event) -> bool:
        check = ContentCheck(content)
        try:
            source = self._cache.objects.open_blocking(info.stored.url)
        except ObjectStoreError:
            return False
        try:
            with closing(VerifiedNar(source, info)) as reader:
                while data := reader.read():
                    if ended.is_set():
                        return False
                    check.feed(data)
            return check.holds()
        except (CorruptNarError, ObjectStoreError, FormatError) as error:
            _log.warning("%s does not hold %s: %s", info.store_path, content.address, error)
            return False


def _claim(path: str, content: FixedContent, held_by: NarInfo) -> NarInfo:
    info = PathInfo(path, held_by.path.nar_hash, held_by.path.nar_size, ca=content.address)
    return NarInfo(info, held_by.stored)


def _batches(claims: list[NarInfo]) -> Iterator[list[NarInfo]]:
    return (claims[start : start + PUBLISHED_AT_ONCE] for start in range(0, len(claims), PUBLISHED_AT_ONCE))
