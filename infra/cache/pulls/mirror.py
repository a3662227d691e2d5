"""Mirroring: NARs of paths that upstreams have become published paths of this cache, in pieces that each stay.

In the order of references, so that what an interrupted run has published is never fetched again. A NAR that is wrong,
or breaks off, is asked of the next upstream; where none has it right, that path and all that stand on it are left out,
each with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from infra.cache.cache import Cache
from infra.cache.publishing.claims import Conflict, Rejected, references_first
from infra.cache.pulls.closure_search import FoundPath, PatientUpstreams
from infra.cache.pulls.upstream import Upstream, UpstreamError
from infra.cache.pulls.upstream_pulls import PULLING
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import base_name_of
from infra.objects.errors import CacheError, CorruptNarError
from infra.objects.nar_writer import upload_nar

#: Paths, and bytes of their NARs, that are fetched before they are published together.
CHUNK_PATHS: Final = 64
CHUNK_BYTES: Final = 256 * 1024 * 1024


@dataclass(slots=True)
class MirrorRun:
    """One run, as it stands; all by full path."""

    #: Published by this run, and the address of the upstream that had it.
    taken: dict[str, str] = field(default_factory=dict)
    #: Not had, and why.
    failed: dict[str, str] = field(default_factory=dict)
    #: Published before, or meanwhile, with other bits, which stay.
    differing: set[str] = field(default_factory=set)
    fetched_bytes: int = 0


class ClosureMirror:
    """Takes paths into one cache."""

    def __init__(self, cache: Cache, upstreams: PatientUpstreams, run: MirrorRun) -> None:
        """`run` is written to as it goes."""
        self._cache = cache
        self._upstreams = upstreams
        self._run = run

    async def take(
        self, wanted: Sequence[FoundPath], here: set[str], after_chunk: Callable[[], Awaitable[None]]
    ) -> None:
        """Fetch, verify and publish `wanted`, whose references are among them or among `here` (full paths).

        `after_chunk` is awaited whenever something was published.

        Raises:
            ObjectStoreError: The store of this cache failed: full, away. What was published before stays.
            MetadataError: As all of `Cache`.
        """
        by_path = {each.info.store_path: each for each in wanted}
        claims = [each.info for each in wanted]
        ordered, blocked = await asyncio.to_thread(
            lambda: references_first(claims, {base_name_of(path) for path in here})
        )
        for path, lacking in blocked.items():
            self._run.failed[path] = f"it refers to {lacking[0]}, which no upstream has whole"
        for chunk in _chunks(ordered):
            await self._take_chunk([by_path[info.store_path] for info in chunk])
            await after_chunk()

    async def _take_chunk(self, chunk: Sequence[FoundPath]) -> None:
        failed = self._run.failed
        ready = []
        for each in chunk:
            lacking = next((path for path in each.references if path in failed), None)
            if lacking is None:
                ready.append(each)
            else:
                failed[each.info.store_path] = f"it refers to {lacking}, which was not had"
        claims: dict[str, NarInfo] = {}
        origins: dict[str, str] = {}
        waiting = iter(ready)
        faults: list[CacheError] = []

        async def fetch() -> None:
            for each in waiting:
                path = each.info.store_path
                try:
                    stored = await self._store(each)
                except CacheError as error:
                    faults.append(error)
                    return
                if isinstance(stored, str):
                    failed[path] = stored
                else:
                    claims[path], origins[path] = stored

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(PULLING, len(ready))):
                tasks.create_task(fetch())
        if claims:
            await self._publish(claims, origins)
        if faults:
            raise faults[0]

    async def _publish(self, claims: Mapping[str, NarInfo], origins: Mapping[str, str]) -> None:
        for outcome in await self._cache.publish(list(claims.values())):
            match outcome:
                case Rejected():
                    self._run.failed[outcome.store_path] = outcome.message
                case Conflict():
                    self._run.differing.add(outcome.store_path)
                case _:
                    self._run.taken[outcome.store_path] = origins[outcome.store_path]

    async def _store(self, found: FoundPath) -> tuple[NarInfo, str] | str:
        """Return the claim for a NAR that is stored now and its origin, or why none of the upstreams gave it."""
        reason = ""
        tried: list[Upstream] = []
        candidate: FoundPath | str = found
        while isinstance(candidate, FoundPath):
            tried.append(candidate.upstream)
            try:
                async with aclosing(candidate.upstream.fetch(candidate.info)) as chunks:
                    uploaded = await upload_nar(self._cache.objects, chunks, self._cache.compression)
            except CorruptNarError as error:
                reason = reason or f"the upstream {candidate.upstream.url} sent a wrong NAR: {error.reason}"
            except UpstreamError as error:
                reason = reason or f"the upstream {error}"
            else:
                self._run.fetched_bytes += candidate.info.stored.file_size or uploaded.stored.file_size
                return uploaded.narinfo(candidate.info.path), candidate.upstream.url
            candidate = await self._upstreams.find(found.info.store_path, tried)
        return reason


def _chunks(ordered: Sequence[NarInfo]) -> Iterator[Sequence[NarInfo]]:
    chunk: list[NarInfo] = []
    size = 0
    for info in ordered:
        if chunk and (len(chunk) >= CHUNK_PATHS or size + info.path.nar_size > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(info)
        size += info.path.nar_size
    if chunk:
        yield chunk
