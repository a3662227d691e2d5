"""Likeness of published paths: whether two outputs are equal but for store-path hashes, and how their sizes differ.

NARs of different lengths differ; those with one hash are equal; all others are read, each once, with the hash parts of
the path itself and of its references masked (`infra.nix.masked`). Everything is bounded: bytes and searches of one NAR,
bytes of one question, how many are read at once and how many questions wait. Digests are remembered, since what is
published never changes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeVar

from infra.cache.cache import Cache
from infra.cache.errors import ClosureTooLargeError
from infra.nix import narinfo as narinfo_format
from infra.nix.masked import MaskedDigest
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import hash_part_of
from infra.objects.errors import CorruptNarError, ObjectStoreError
from infra.objects.verification import VerifiedNar

#: Largest NAR that is read, and bytes that are searched in it: its size times its references.
MAX_COMPARED_NAR_BYTES: Final = 2 * 1024**3
MAX_SEARCHED_BYTES: Final = 64 * 1024**3
#: Bytes of NARs that one question reads; what is beyond is UNREAD, and read when it is asked for again.
QUESTION_BYTES: Final = 4 * 1024**3
#: NARs read at one time, each in a thread, and questions that may wait.
READ_AT_ONCE: Final = 2
MAX_QUESTIONS: Final = 16
#: Digests and sizes of closures in memory, some 200 bytes each.
REMEMBERED: Final = 50_000


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Likeness(StrEnum):
    """Likeness of two outputs."""

    #: The same bytes, to the last one.
    SAME = "same"
    #: The same bytes but for the hash parts of their own paths and of their references.
    NO_OP = "no-op"
    DIFFERENT = "different"
    #: One of them is not in the cache, or cannot be read.
    ABSENT = "absent"
    TOO_LARGE = "too large"
    #: The question had too many bytes.
    UNREAD = "unread"


@dataclass(frozen=True, slots=True)
class ComparedOutputs:
    """Two outputs, with bytes of their NARs and of their closures; None where that is not known."""

    before: str
    after: str
    likeness: Likeness
    nar_sizes: tuple[int | None, int | None] = (None, None)
    closure_sizes: tuple[int | None, int | None] = (None, None)


class TooManyQuestionsError(Exception):
    """MAX_QUESTIONS wait already."""


class Likenesses:
    """Compares paths of one cache; for the tasks of one event loop."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._turns = asyncio.Semaphore(READ_AT_ONCE)
        self._questions = 0
        #: NAR hash with path -> masked digest, and path -> bytes of its closure; the oldest use first.
        self._digests: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._closures: OrderedDict[str, int] = OrderedDict()

    async def compare(self, pairs: Sequence[tuple[str, str]]) -> list[ComparedOutputs]:
        """Compare pairs of full store paths.

        Raises:
            TooManyQuestionsError: Others must be answered first.
            MetadataError: The database failed.
        """
        if self._questions >= MAX_QUESTIONS:
            raise TooManyQuestionsError
        self._questions += 1
        try:
            paths = {path for pair in pairs for path in pair}
            infos = await self._infos(paths)
            sizes = {path: await self._closure_size(path) for path in infos}
            room = QUESTION_BYTES
            found = []
            for before, after in pairs:
                likeness, read = await self._likeness(infos.get(before), infos.get(after), room)
                room -= read
                both = (infos.get(before), infos.get(after))
                nar_sizes = tuple(None if info is None else info.path.nar_size for info in both)
                closures = (sizes.get(before), sizes.get(after))
                found.append(ComparedOutputs(before, after, likeness, (nar_sizes[0], nar_sizes[1]), closures))
            return found
        finally:
            self._questions -= 1

    async def _infos(self, paths: set[str]) -> dict[str, NarInfo]:
        texts, _ = await self._cache.closure(paths, recursive=False)
        infos = [narinfo_format.parse(text, self._cache.store_dir) for text in texts]
        return {info.store_path: info for info in infos}

    async def _closure_size(self, path: str) -> int | None:
        size = self._closures.get(path)
        if size is None:
            try:
                texts, missing = await self._cache.closure([path])
            except ClosureTooLargeError:
                return None
            if missing:
                return None
            store_dir = self._cache.store_dir
            size = await asyncio.to_thread(
                lambda: sum(narinfo_format.parse(text, store_dir).path.nar_size for text in texts)
            )
            _remember(self._closures, path, size)
        return size

    async def _likeness(self, before: NarInfo | None, after: NarInfo | None, room: int) -> tuple[Likeness, int]:
        """Return the likeness of two paths, and the bytes that were read for it."""
        if before is None or after is None:
            return Likeness.ABSENT, 0
        unread = [info for info in (before, after) if _key(info) not in self._digests]
        size = sum(info.path.nar_size for info in unread)
        if (known := _without_reading(before, after, unread)) is not None or size > room:
            return known or Likeness.UNREAD, 0
        try:
            # One after the other: the room in `_turns` is for other questions.
            digests = [await self._digest(info) for info in (before, after)]
        except (CorruptNarError, ObjectStoreError):
            return Likeness.ABSENT, size
        return Likeness.NO_OP if digests[0] == digests[1] else Likeness.DIFFERENT, size

    async def _digest(self, info: NarInfo) -> bytes:
        found = self._digests.get(_key(info))
        if found is None:
            async with self._turns:
                found = await asyncio.to_thread(self._read, info)
            _remember(self._digests, _key(info), found)
        return found

    def _read(self, info: NarInfo) -> bytes:
        digest = MaskedDigest(_hash_parts(info))
        reader = VerifiedNar(self._cache.objects.open_blocking(info.stored.url), info)
        try:
            while data := reader.read():
                digest.feed(data)
        finally:
            reader.close()
        return digest.close()


def _without_reading(before: NarInfo, after: NarInfo, unread: Sequence[NarInfo]) -> Likeness | None:
    """Return what is known without the bytes of those that are `unread`; None where these must be read."""
    if before.path.nar_hash == after.path.nar_hash:
        return Likeness.SAME
    if before.path.nar_size != after.path.nar_size:
        return Likeness.DIFFERENT
    return Likeness.TOO_LARGE if any(map(_is_too_large, unread)) else None


def _key(info: NarInfo) -> tuple[str, str]:
    return info.path.nar_hash, info.store_path


def _hash_parts(info: NarInfo) -> set[str]:
    return {info.path.hash_part, *(hash_part_of(path) for path in info.path.reference_paths)}


def _is_too_large(info: NarInfo) -> bool:
    searched = info.path.nar_size * (1 + len(info.path.references))
    return info.path.nar_size > MAX_COMPARED_NAR_BYTES or searched > MAX_SEARCHED_BYTES


def _remember(known: OrderedDict[_Key, _Value], key: _Key, value: _Value) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > REMEMBERED:
        known.popitem(last=False)
