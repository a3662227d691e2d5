"""Paths that a sender need not send because an upstream has them, signed by a key that is trusted.

The coordinator has them from there itself: a path is published only with all that it refers to, so what stands on an
upstream's path needs that path here. Only the very bits that the sender has count as the same path.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Final

from infra.cache.cache import Cache
from infra.cache.pulls.upstream import Upstream
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import hash_part_of
from infra.objects.errors import CacheError
from infra.objects.nar_writer import upload_nar
from infra.upload.protocol import PathClaim

#: NARs that are had from upstreams at one time, for one sender.
PULLING: Final = 4

_log = logging.getLogger(__name__)


class Pulls:
    """Asks the upstreams of one cache, in order, and has paths from them."""

    def __init__(self, cache: Cache, upstreams: Sequence[Upstream]) -> None:
        self._cache = cache
        self._full = cache.store_dir.full
        self._upstreams = tuple(upstreams)

    async def found(self, claims: Mapping[str, PathClaim]) -> dict[str, Upstream]:
        """Return those of the claimed paths (by base name) that an upstream has with the same bits, and which one."""
        found: dict[str, Upstream] = {}
        for upstream in self._upstreams:
            by_hash_part = {hash_part_of(path): path for path in claims if path not in found}
            for part, info in (await upstream.narinfos(by_hash_part)).items():
                path = by_hash_part[part]
                if (info.store_path, info.path.nar_hash) == (self._full(path), claims[path].nar_hash):
                    found[path] = upstream
        return found

    async def pull(self, wanted: Mapping[PathClaim, Upstream]) -> list[NarInfo]:
        """Store the NARs of those claims that are not published, and return what is to be published.

        One that cannot be had is left out and logged: what refers to it is then refused for that.
        """
        absent = await self._cache.missing(self._full(claim.path) for claim in wanted)
        turns = asyncio.Semaphore(PULLING)
        async with asyncio.TaskGroup() as tasks:
            pulling = [
                tasks.create_task(self._one(turns, claim, upstream))
                for claim, upstream in wanted.items()
                if self._full(claim.path) in absent
            ]
        return [narinfo for task in pulling if (narinfo := task.result()) is not None]

    async def _one(self, turns: asyncio.Semaphore, claim: PathClaim, upstream: Upstream) -> NarInfo | None:
        path, part = self._full(claim.path), hash_part_of(claim.path)
        async with turns:
            info = (await upstream.narinfos([part])).get(part)
            chunks = None if info is None or info.path.nar_hash != claim.nar_hash else await upstream.nar(info)
            if chunks is None:
                return None
            try:
                async with aclosing(chunks):
                    uploaded = await upload_nar(self._cache.objects, chunks, self._cache.compression)
            except CacheError as error:
                _log.warning("%s was not had from %s: %s", path, upstream.url, error)
                return None
        return uploaded.narinfo(claim.info(self._cache.store_dir))
