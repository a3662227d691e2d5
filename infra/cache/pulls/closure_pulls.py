"""Pulls of whole closures from trusted upstreams, for paths that no client sends and no build here makes.

Only what an upstream signs counts, down to the last reference: a path is published only with all that it refers to, so
nothing is fetched of a closure of which a part is nowhere. Each pull is bounded by paths, bytes and time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from infra.cache.cache import MAX_BATCH, Cache
from infra.cache.publishing.claims import Rejected
from infra.cache.pulls.upstream import Upstream
from infra.cache.pulls.upstream_pulls import PULLING
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import hash_part_of
from infra.objects.errors import CacheError
from infra.objects.nar_writer import upload_nar

#: Paths of one pull; they are published together.
MAX_PULLED_PATHS: Final = MAX_BATCH
#: Bytes of NARs of one pull, uncompressed.
MAX_PULLED_BYTES: Final = 32 * 1024**3
#: Seconds that one pull may take, its wait for a turn included; less than a client waits for an answer.
PULL_S: Final = 240.0
#: Pulls at one time.
PULLS_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class Pulled:
    """Report of a pull."""

    #: Full paths of the question that can be fetched now.
    paths: frozenset[str] = frozenset()
    #: One sentence about why there are not more of them; "" where no upstream has them.
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class _Found:
    """A path that an upstream has."""

    info: NarInfo
    upstream: Upstream


class ClosurePulls:
    """Asks the upstreams of one cache, in order."""

    def __init__(self, cache: Cache, upstreams: Sequence[Upstream] = ()) -> None:
        self._cache = cache
        #: May be added to.
        self.upstreams = list(upstreams)
        self._turns = asyncio.Semaphore(PULLS_AT_ONCE)

    async def pull(self, store_paths: Collection[str]) -> Pulled:
        """Publish those of the full store paths, with their closures, that upstreams have whole.

        Raises:
            MetadataError: As all of `Cache`.
        """
        if not store_paths or not self.upstreams:
            return Pulled()
        try:
            async with asyncio.timeout(PULL_S), self._turns:
                found = await self._find(store_paths)
                troubles = [f"the upstream {each.url} does not answer" for each in self.upstreams if each.is_away]
                troubles += await self._fetch(found)
        except TimeoutError:
            troubles = [f"the upstreams took more than {PULL_S:.0f} s"]
        except _TooLargeError as error:
            troubles = [str(error)]
        absent = await self._cache.missing(store_paths)
        return Pulled(frozenset(store_paths) - absent, troubles[0] if absent and troubles else "")

    async def _find(self, store_paths: Collection[str]) -> dict[str, _Found]:
        """Return what must be fetched for those paths whose closures are to be had whole."""
        found: dict[str, _Found] = {}
        nowhere: set[str] = set()
        size = 0
        roots = frontier = await self._cache.missing(store_paths)
        while frontier:
            level = await self._look(frontier)
            found |= level
            nowhere |= frontier - level.keys()
            size += sum(each.info.path.nar_size for each in level.values())
            if len(found) > MAX_PULLED_PATHS or size > MAX_PULLED_BYTES:
                raise _TooLargeError(
                    f"what the upstreams have of it is more than {MAX_PULLED_PATHS} paths or {MAX_PULLED_BYTES} bytes"
                )
            references = {path for each in level.values() for path in self._references(each.info)}
            frontier = await self._cache.missing(references - found.keys() - nowhere)
        return self._whole(roots, found, nowhere)

    def _whole(self, roots: Iterable[str], found: Mapping[str, _Found], nowhere: Iterable[str]) -> dict[str, _Found]:
        """Leave out what stands on something that is nowhere, and what only that needs."""
        referrers: dict[str, list[str]] = {}
        for path, each in found.items():
            for reference in self._references(each.info):
                referrers.setdefault(reference, []).append(path)
        broken: set[str] = set()
        stack = list(nowhere)
        while stack:
            path = stack.pop()
            if path not in broken:
                broken.add(path)
                stack += referrers.get(path, ())
        whole: dict[str, _Found] = {}
        stack = [root for root in roots if root not in broken]
        while stack:
            path = stack.pop()
            if path in found and path not in whole:
                whole[path] = found[path]
                stack += self._references(found[path].info)
        return whole

    async def _look(self, paths: Iterable[str]) -> dict[str, _Found]:
        found: dict[str, _Found] = {}
        for upstream in self.upstreams:
            by_hash_part = {hash_part_of(path): path for path in paths if path not in found}
            for part, info in (await upstream.narinfos(by_hash_part)).items():
                if info.store_path == by_hash_part[part]:
                    found[info.store_path] = _Found(info, upstream)
        return found

    async def _fetch(self, found: Mapping[str, _Found]) -> list[str]:
        """Store and publish; returns a sentence for each path that was not had."""
        claims: list[NarInfo] = []
        troubles: list[str] = []
        waiting = iter(found.values())

        async def fetch() -> None:
            for each in waiting:
                try:
                    claims.append(await self._store(each))
                except CacheError as error:
                    troubles.append(str(error))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(PULLING, len(found))):
                tasks.create_task(fetch())
        if claims:
            outcomes = await self._cache.publish(claims)
            troubles += [
                f"{each.store_path} was not taken from an upstream: {each.message}"
                for each in outcomes
                if isinstance(each, Rejected)
            ]
        return troubles

    async def _store(self, found: _Found) -> NarInfo:
        info = found.info
        chunks = await found.upstream.nar(info)
        if chunks is None:
            raise CacheError(f"the upstream {found.upstream.url} does not have {info.store_path} any more")
        async with aclosing(chunks):
            uploaded = await upload_nar(self._cache.objects, chunks, self._cache.compression)
        return uploaded.narinfo(info.path)

    @staticmethod
    def _references(info: NarInfo) -> list[str]:
        """Full paths of what it refers to, without itself."""
        return [path for path in info.path.reference_paths if path != info.store_path]


class _TooLargeError(CacheError):
    """A closure is beyond the bounds of one pull."""
