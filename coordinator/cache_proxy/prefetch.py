"""NARs fetched ahead of Nix, in the order in which it will ask for them.

Nix asks for the narinfos of all that it lacks, then for the NARs, references first. The first NAR is therefore the sign
that a closure is wanted, and the narinfos that Nix asked for lately are what it will want: nothing is fetched for a dry
run, or for what Nix has. What is ahead of Nix is bounded in bytes; a NAR that Nix came for makes room for others.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

from coordinator.cache_proxy.lookups import NarinfoLookups
from coordinator.cache_proxy.model import KnownPath
from coordinator.cache_proxy.nars import ProxyNars
from infra.dependency_order import CycleError, inputs_first

#: NARs that are fetched ahead at one time, and bytes that may lie ahead of Nix, at most a share of the disk's bound.
PREFETCH_AT_ONCE: Final = 32
AHEAD_BYTES: Final = 1024**3
AHEAD_SHARE: Final = 0.5
#: A narinfo says that its NAR will be wanted for so many seconds; so many are remembered, the newest.
ASKED_S: Final = 300.0
ASKED: Final = 10_000


class NarPrefetch:
    """The fetching ahead; `now` gives seconds that only rise."""

    def __init__(self, lookups: NarinfoLookups, nars: ProxyNars, max_bytes: int, now: Callable[[], float]) -> None:
        self._lookups = lookups
        self._nars = nars
        self._now = now
        self._room = min(AHEAD_BYTES, int(max_bytes * AHEAD_SHARE))
        #: Hash part -> when its narinfo was asked for, oldest first.
        self._asked: OrderedDict[str, float] = OrderedDict()
        self._queue: deque[str] = deque()
        #: Hash part -> bytes that are ahead of Nix, or on their way, and since when; oldest first.
        self._ahead: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._ahead_bytes = 0
        self._running: dict[asyncio.Future[bool], str] = {}

    def asked(self, known: KnownPath) -> None:
        """Note that Nix asked for a narinfo."""
        self._asked[known.hash_part] = self._now()
        self._asked.move_to_end(known.hash_part)
        while len(self._asked) > ASKED:
            self._asked.popitem(last=False)

    def taken(self, known: KnownPath) -> None:
        """Note that Nix came for a NAR: what it asked for besides is fetched from now on."""
        self._asked.pop(known.hash_part, None)
        self._came(known.hash_part)
        if self._asked:
            self._plan()
        self._fill()

    def _plan(self) -> None:
        """Take all that was asked for lately into the queue, references first."""
        since = self._now() - ASKED_S
        while self._ahead and next(iter(self._ahead.values()))[1] <= since:
            # Nix did not come for it, and will hardly.
            self._came(next(iter(self._ahead)))
        wanted = {part: known for part, at in self._asked.items() if at > since and (known := self._find(part))}
        self._asked.clear()
        try:
            order = inputs_first(wanted, lambda part: (each for each in wanted[part].references if each in wanted))
        except CycleError:
            # No cache publishes one; then any order is as good.
            order = list(wanted)
        self._queue.extend(order)
        while len(self._queue) > ASKED:
            self._queue.popleft()

    def _find(self, part: str) -> KnownPath | None:
        return self._lookups.in_memory(part)

    def _fill(self) -> None:
        while self._queue and len(self._running) < PREFETCH_AT_ONCE:
            part = self._queue.popleft()
            known = self._find(part)
            if known is None or part in self._ahead or self._nars.is_here(known):
                continue
            size = known.info.stored.file_size or known.info.path.nar_size
            if size > self._room:
                continue
            if self._ahead_bytes + size > self._room:
                self._queue.appendleft(part)
                return
            download = self._nars.download(known)
            self._ahead[part] = (size, self._now())
            self._ahead_bytes += size
            self._running[download.done] = part
            download.done.add_done_callback(self._ended)

    def _ended(self, done: asyncio.Future[bool]) -> None:
        part = self._running.pop(done, "")
        if done.cancelled() or not done.result():
            self._came(part)
        self._fill()

    def _came(self, part: str) -> None:
        self._ahead_bytes -= self._ahead.pop(part, (0, 0.0))[0]
