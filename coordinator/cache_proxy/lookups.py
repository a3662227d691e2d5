"""Narinfos: looked up once however many ask, many in one question, and those of a closure before Nix asks for them.

    find        memory, then the disk, then a question that is under way, then a new one
    a walk      asks the upstreams in turn for some hash parts and what they reach; what it finds of a closure is in
                memory for the requests to come, and what it still expects is waited for rather than asked again

An absence is remembered for NEGATIVE_S, and only where no upstream failed. An upstream that fails is an absence for
Nix, which then asks its next cache or builds; a narinfo on disk, however old, is better than that.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Final

from coordinator.cache_proxy.disk import ProxyFiles
from coordinator.cache_proxy.model import KnownPath, known_path
from coordinator.cache_proxy.upstream import ProxyUpstream, UpstreamFailedError, WantedParts
from infra.nix.store_path import StoreDir
from infra.substituter.closures import QUESTION_PATHS

#: Paths in memory, some 3 KiB each, and bytes of their narinfos.
REMEMBERED: Final = 20_000
REMEMBERED_BYTES: Final = 64 * 1024 * 1024
#: Absences in memory, for how long each is believed, and how long an upstream's NAR is avoided that was wrong.
ABSENCES: Final = 50_000
NEGATIVE_S: Final = 15.0
AVOIDED_S: Final = 300.0
AVOIDED: Final = 1_000
#: Hash parts that wait for an answer; more are absent at once.
MAX_WAITING: Final = 20_000
#: Questions at one time, and seconds for which requests are gathered to one.
WALKS_AT_ONCE: Final = 4
GATHER_S: Final = 0.002
#: Narinfos that are parsed before the event loop looks after others, some milliseconds.
PARSED_AT_ONCE: Final = 32
#: Seconds that a request waits; Nix asks its next cache then.
ANSWER_S: Final = 20.0
#: Seconds for which a narinfo on disk is served without asking again.
FRESH_S: Final = 24 * 3600.0

_log = logging.getLogger(__name__)


class NarinfoLookups:
    """The lookups; `now` gives Unix seconds."""

    def __init__(
        self, upstreams: Sequence[ProxyUpstream], files: ProxyFiles, store_dir: StoreDir, now: Callable[[], float]
    ) -> None:
        self.upstreams = {each.url: each for each in upstreams}
        self._files = files
        self._store_dir = store_dir
        self._now = now
        self._known: OrderedDict[str, KnownPath] = OrderedDict()
        self._known_bytes = 0
        #: Hash part -> until when it is absent, oldest first.
        self._absent: OrderedDict[str, float] = OrderedDict()
        #: Hash part and upstream -> until when that upstream's narinfo is passed over.
        self._avoided: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._waiting: dict[str, asyncio.Future[KnownPath | None]] = {}
        self._queue: deque[str] = deque()
        self._walks: set[asyncio.Task[None]] = set()
        self._gathering: asyncio.TimerHandle | None = None

    async def close(self) -> None:
        """End the questions that are under way."""
        if self._gathering is not None:
            self._gathering.cancel()
        self._queue.clear()
        for walk in self._walks:
            walk.cancel()
        await asyncio.gather(*self._walks, return_exceptions=True)

    def in_memory(self, hash_part: str) -> KnownPath | None:
        """Return a path that was found before, None where it was not or is forgotten."""
        return self._known.get(hash_part)

    async def find(self, hash_part: str) -> KnownPath | None:
        """Return what the upstreams have under a hash part."""
        known = self._known.get(hash_part)
        if known is not None:
            self._known.move_to_end(hash_part)
            self._keep(known)
            return known
        if self._absent.get(hash_part, 0.0) > self._now():
            return None
        kept, written_at = self._kept(hash_part)
        if kept is not None and 0 <= self._now() - written_at < FRESH_S:
            self._remember(kept)
            return kept
        found = await self._answer(hash_part)
        if found is None:
            return kept
        self._keep(found)
        return found

    async def _answer(self, hash_part: str) -> KnownPath | None:
        """Return what the upstreams answer within ANSWER_S."""
        answer = self._waiting.get(hash_part)
        if answer is None:
            if len(self._waiting) >= MAX_WAITING:
                return None
            answer = self._ask(hash_part)
        try:
            async with asyncio.timeout(ANSWER_S):
                return await asyncio.shield(answer)
        except TimeoutError:
            return None

    def avoid(self, known: KnownPath) -> None:
        """Forget a path whose NAR was not what its narinfo said; its upstream is passed over for it for a while."""
        part = known.hash_part
        self._avoided[part, known.upstream] = self._now() + AVOIDED_S
        while len(self._avoided) > AVOIDED:
            self._avoided.popitem(last=False)
        self._forget(part)
        self._files.drop(f"narinfo/{part}")

    def _ask(self, hash_part: str) -> asyncio.Future[KnownPath | None]:
        answer = self._expect(hash_part)
        self._queue.append(hash_part)
        if self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(GATHER_S, self._begin)
        return answer

    def _expect(self, hash_part: str) -> asyncio.Future[KnownPath | None]:
        answer: asyncio.Future[KnownPath | None] = asyncio.get_running_loop().create_future()
        self._waiting[hash_part] = answer
        return answer

    def _begin(self) -> None:
        self._gathering = None
        while self._queue and len(self._walks) < WALKS_AT_ONCE:
            parts = [self._queue.popleft() for _ in range(min(QUESTION_PATHS, len(self._queue)))]
            walk = asyncio.create_task(self._walk(parts), name="lookup")
            self._walks.add(walk)
            walk.add_done_callback(self._ended)

    def _ended(self, walk: asyncio.Task[None]) -> None:
        self._walks.discard(walk)
        if not walk.cancelled() and (error := walk.exception()) is not None:
            _log.error("a lookup ended unexpectedly", exc_info=error)
        self._begin()

    async def _walk(self, parts: Sequence[str]) -> None:
        wanted = WantedParts(parts)
        failed = False
        try:
            for upstream in self.upstreams.values():
                if not wanted.left:
                    break
                if upstream.is_away:
                    failed = True
                    continue
                try:
                    await self._ask_one(upstream, wanted)
                except UpstreamFailedError:
                    failed = True
        finally:
            for part in wanted.left:
                self._settle(part, None)
                if not failed:
                    self._note_absence(part)

    async def _ask_one(self, upstream: ProxyUpstream, wanted: WantedParts) -> None:
        """Ask one upstream for all that is left; what it has leaves, what is expected of it enters."""
        async with aclosing(upstream.look(wanted)) as found:
            async for texts in found:
                for number, text in enumerate(texts):
                    if number % PARSED_AT_ONCE == 0:
                        await asyncio.sleep(0)
                    known = known_path(text, upstream.url, self._store_dir)
                    if known is None or self._avoided.get((known.hash_part, upstream.url), 0.0) > self._now():
                        continue
                    if known.hash_part in self._known and known.hash_part not in wanted.left:
                        # Not asked for: an upstream that comes later in the list changes nothing of one before it.
                        continue
                    wanted.found(known.hash_part)
                    self._remember(known)
                    self._settle(known.hash_part, known)
                    for part in known.references:
                        if self._is_news(part):
                            self._expect(part)
                            wanted.add(part)

    def _is_news(self, part: str) -> bool:
        known = part in self._known or part in self._waiting or f"narinfo/{part}" in self._files
        return not known and len(self._waiting) < MAX_WAITING

    def _remember(self, known: KnownPath) -> None:
        self._forget(known.hash_part)
        self._known[known.hash_part] = known
        self._known_bytes += len(known.text)
        self._absent.pop(known.hash_part, None)
        while len(self._known) > REMEMBERED or self._known_bytes > REMEMBERED_BYTES:
            self._forget(next(iter(self._known)))

    def _forget(self, part: str) -> None:
        known = self._known.pop(part, None)
        self._known_bytes -= 0 if known is None else len(known.text)

    def _settle(self, part: str, known: KnownPath | None) -> None:
        answer = self._waiting.pop(part, None)
        if answer is not None and not answer.done():
            answer.set_result(known)

    def _note_absence(self, part: str) -> None:
        self._absent[part] = self._now() + NEGATIVE_S
        self._absent.move_to_end(part)
        while len(self._absent) > ABSENCES:
            self._absent.popitem(last=False)

    def _keep(self, known: KnownPath) -> None:
        """Write a narinfo that Nix asked for; before it its upstream, the time, its length and its address there."""
        name = f"narinfo/{known.hash_part}"
        if name in self._files:
            return
        head = f"{known.upstream} {self._now():.0f} {len(known.text)} {known.info.stored.url}\n"
        self._files.write(name, head.encode() + known.text)

    def _kept(self, part: str) -> tuple[KnownPath | None, float]:
        """Return what is on disk, and when it was written."""
        content = self._files.read(f"narinfo/{part}")
        if content is None:
            return None, 0.0
        head, _, text = content.partition(b"\n")
        upstream, written, length, url = [*head.decode("latin-1").split(" ", 3), "", "", "", ""][:4]
        served = known_path(text, upstream, self._store_dir) if length == str(len(text)) else None
        if served is None or served.hash_part != part or upstream not in self.upstreams or not written.isdecimal():
            self._files.drop(f"narinfo/{part}")
            return None, 0.0
        return served.at(url), float(written)
