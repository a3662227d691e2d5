"""Search of whole closures in several upstreams, with the reason for each path that none of them has.

For work in the background: each path is asked for by itself, a fault that may pass is tried again, and a path that one
upstream lacks, or lies about, is asked of the next. So of ten paths of which two are bad, eight are found. An upstream
that fails AWAY_AFTER paths in a row is left out for the rest of the search.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from infra.cache.cache import Cache
from infra.cache.pulls.upstream import UPSTREAM_CONCURRENCY, Inquiry, Upstream
from infra.collector import keep_from_collector
from infra.nix.narinfo import NarInfo
from infra.objects.errors import CacheError
from infra.retry import Backoff

#: Paths of one search, those that are here and those that are nowhere included.
MAX_SEARCHED: Final = 100_000
#: Paths that are looked for together: less than the event loop may be held.
PIECE: Final = 512
#: Paths found since the collector was last kept from them: it would walk all of them again, 70 ms for 20,000.
KEPT: Final = 2_000
#: Questions about one path to one upstream whose faults may pass, and paths in a row without an answer after which the
#: upstream is left out.
TRIES: Final = 3
AWAY_AFTER: Final = 8


class SearchTooLargeError(CacheError):
    """A closure is beyond the bounds of a search."""


@dataclass(frozen=True, slots=True)
class FoundPath:
    """A path that an upstream has, signed by a key of that upstream."""

    info: NarInfo
    upstream: Upstream

    @property
    def references(self) -> tuple[str, ...]:
        """Full paths of what it refers to, without itself."""
        return tuple(path for path in self.info.path.reference_paths if path != self.info.store_path)


@dataclass(slots=True)
class Searched:
    """Result of a search, by full path."""

    #: In the cache already.
    here: set[str] = field(default_factory=set)
    found: dict[str, FoundPath] = field(default_factory=dict)
    #: In no upstream: why, as far as one of them said more than that.
    nowhere: dict[str, str] = field(default_factory=dict)

    @property
    def nar_bytes(self) -> int:
        """Bytes of the NARs that were found."""
        return sum(each.info.path.nar_size for each in self.found.values())

    def blocked(self) -> dict[str, str]:
        """Return what was found and stands on a path that is nowhere, and which path that is."""
        referrers: dict[str, list[str]] = {}
        for path, each in self.found.items():
            for reference in each.references:
                referrers.setdefault(reference, []).append(path)
        blocked: dict[str, str] = {}
        stack = [(path, path) for path in self.nowhere]
        while stack:
            path, cause = stack.pop()
            for referrer in referrers.get(path, ()):
                if referrer not in blocked:
                    blocked[referrer] = cause
                    stack.append((referrer, cause))
        return blocked

    def below(self, roots: Iterable[str]) -> set[str]:
        """Return what was found of the closures of `roots`, themselves included."""
        reached: set[str] = set()
        stack = list(roots)
        while stack:
            path = stack.pop()
            if path in self.found and path not in reached:
                reached.add(path)
                stack += self.found[path].references
        return reached


class PatientUpstreams:
    """The upstreams of one search, in order, and which of them are away."""

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self._upstreams = tuple(upstreams)
        self._failed_in_a_row = dict.fromkeys(range(len(self._upstreams)), 0)
        self._fault: dict[int, str] = {}

    async def find(self, store_path: str, without: Collection[Upstream] = ()) -> FoundPath | str:
        """Return the path as the first upstream has it that does, or why none does ("": they lack it)."""
        reason = ""
        for number, upstream in enumerate(self._upstreams):
            if upstream in without:
                continue
            inquiry = await self._inquire(number, upstream, store_path)
            if inquiry.info is not None:
                return FoundPath(inquiry.info, upstream)
            reason = reason or inquiry.fault
        return reason

    async def _inquire(self, number: int, upstream: Upstream, store_path: str) -> Inquiry:
        if self._failed_in_a_row[number] >= AWAY_AFTER:
            return Inquiry(fault=self._fault[number], passing=True)
        backoff = Backoff()
        inquiry = await upstream.inquire(store_path)
        for _ in range(TRIES - 1):
            if not inquiry.passing or self._failed_in_a_row[number] >= AWAY_AFTER:
                break
            await backoff.pause()
            inquiry = await upstream.inquire(store_path)
        self._fault[number] = inquiry.fault
        self._failed_in_a_row[number] = self._failed_in_a_row[number] + 1 if inquiry.passing else 0
        return inquiry


async def search(
    cache: Cache,
    upstreams: PatientUpstreams,
    store_paths: Collection[str],
    max_bytes: int = 0,
    on_found: Callable[[Searched], None] = lambda _: None,
) -> Searched:
    """Look for full store paths, and for all that they refer to, in the cache and then in the upstreams.

    `on_found` is called with what is known so far, after each path. `max_bytes` of NARs are found at most; 0 is no
    limit. A path that is here has its closure here.

    Raises:
        SearchTooLargeError: There is more of it.
        MetadataError: As all of `Cache`.
    """
    result = Searched()
    seen = set(store_paths)
    waiting = deque(seen)
    found_bytes = kept = 0

    async def ask(absent: Iterable[str]) -> None:
        nonlocal found_bytes
        for path in absent:
            found = await upstreams.find(path)
            if isinstance(found, FoundPath):
                result.found[path] = found
                found_bytes += found.info.path.nar_size
                fresh = [reference for reference in found.references if reference not in seen]
                seen.update(fresh)
                waiting.extend(fresh)
            else:
                result.nowhere[path] = found
            on_found(result)

    while waiting:
        piece = {waiting.popleft() for _ in range(min(PIECE, len(waiting)))}
        absent = await cache.missing(piece)
        result.here |= piece - absent
        remaining = iter(absent)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(UPSTREAM_CONCURRENCY, len(absent))):
                tasks.create_task(ask(remaining))
        if len(result.found) - kept >= KEPT:
            kept = len(result.found)
            keep_from_collector()
        if len(seen) > MAX_SEARCHED:
            raise SearchTooLargeError(f"their closure has more than {MAX_SEARCHED} paths; ask for parts of it")
        if max_bytes and found_bytes > max_bytes:
            raise SearchTooLargeError(f"the upstreams have more than {max_bytes} bytes of their closure; ask for parts")
    return result
