"""Leases of the store paths that a client need not send: one for equal paths, ended with their last use.

A lease is named after the paths that it keeps. So the same graph, asked about or submitted again, renews what is there
and adds nothing. A lease in *use* does not end: a question uses it until the submission that it prepares comes, a
submission until its root keeps the paths. A lease without a user (of a question without a submission, of a coordinator
that is gone) ends after `LEASE_S`, or earlier where there are too many: beyond `MAX_QUESTIONS` questions, or
`MAX_QUESTION_PATHS` paths in them, the oldest ends. Its client may have to send collected paths again.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from infra.cache.cache import Cache
from infra.nix.store_path import base_name_of

#: Seconds for which what a client asked about is safe from collection; it must submit within them.
LEASE_S: Final = 3600.0
#: Different questions without a submission that are kept, and their paths: five of the largest graphs.
MAX_QUESTIONS: Final = 256
MAX_QUESTION_PATHS: Final = 1_000_000
#: Bytes of the digest that names a lease: no two sets of paths have the same by chance or by intent.
_DIGEST_BYTES: Final = 20


@dataclass(slots=True)
class _Lease:
    """Use counts of a lease, those by questions without a submission among them, and the time of its own end."""

    uses: int = 0
    questions: int = 0
    over_at: float = 0.0


class PathLeases:
    """The leases of intake in the farm's own cache."""

    def __init__(self, cache: Cache, ending: asyncio.Lock | None = None) -> None:
        """`ending` is held while leases end."""
        self._cache = cache
        self._leases: dict[str, _Lease] = {}
        #: Leases of questions, the one that was asked longest ago first, and how many paths each has.
        self._asked: OrderedDict[str, int] = OrderedDict()
        self._asked_paths = 0
        #: Submission -> the leases that last until a root keeps what it needs.
        self._of: dict[str, list[str]] = {}
        #: One that is taken again while it ends waits, so that it is there afterwards.
        self._ending = ending or asyncio.Lock()

    async def ask(self, paths: Collection[str]) -> set[str]:
        """Return which paths the cache lacks; the others stay for `LEASE_S` or until their submission is a root.

        They stay shorter where too many questions come after this one.
        """
        if not paths:
            return set()
        name, absent = await self.take(paths)
        self._leases[name].questions += 1
        if name not in self._asked:
            self._asked[name] = len(paths)
            self._asked_paths += len(paths)
        self._asked.move_to_end(name)
        while len(self._asked) > MAX_QUESTIONS or (self._asked_paths > MAX_QUESTION_PATHS and len(self._asked) > 1):
            await self._drop(next(iter(self._asked)))
        return absent

    async def _drop(self, name: str) -> None:
        """End what the questions of a lease keep."""
        self._answered(name)
        lease = self._leases[name]
        lease.uses -= lease.questions
        lease.questions = 0
        async with self._ending:
            await self._end_unused(name)

    def _answered(self, name: str) -> None:
        self._asked_paths -= self._asked.pop(name)

    async def take(self, paths: Collection[str]) -> tuple[str, set[str]]:
        """Return the name of a lease of full paths, and which of them the cache lacks; it is used until `give_back`."""
        name = await asyncio.to_thread(_name, paths)
        lease = self._leases.setdefault(name, _Lease())
        lease.uses += 1
        lease.over_at = time.monotonic() + LEASE_S
        try:
            async with self._ending:
                pass
            absent = await self._cache.lease(name, paths, LEASE_S)
        except BaseException:
            self.give_back((name,))
            raise
        return name, absent

    async def take_again(self, name: str, present: Collection[str]) -> set[str] | None:
        """Take a lease of the same paths once more; return which of those that were `present` the cache has lost.

        None where the lease has ended: then it is not taken.
        """
        lease = self._leases.get(name)
        if lease is None:
            return None
        lease.uses += 1
        lost: set[str] | None = None
        try:
            async with self._ending:
                pass
            if await self._cache.renew(name, LEASE_S):
                lease.over_at = time.monotonic() + LEASE_S
                lost = await self._cache.missing(present) if present else set()
        finally:
            if lost is None:
                self.give_back((name,))
        return lost

    async def answered(self, paths: Collection[str]) -> tuple[str, ...]:
        """Return the lease of a question about exactly these paths, which is its asker's submission's from now on."""
        name = await asyncio.to_thread(_name, paths)
        lease = self._leases.get(name)
        if lease is None or not lease.questions:
            return ()
        lease.questions -= 1
        if not lease.questions:
            self._answered(name)
        return (name,)

    def attach(self, submission: str, names: Iterable[str]) -> None:
        """Let a submission that the coordinator knows use leases until `end`."""
        self._of.setdefault(submission, []).extend(names)

    def give_back(self, names: Iterable[str]) -> None:
        """End one use of each lease."""
        for name in names:
            lease = self._leases.get(name)
            if lease is not None:
                lease.uses -= 1

    async def end(self, running: Collection[str]) -> None:
        """End the leases of all submissions but these, and those without a user.

        For housekeeping, under the lock under which it collects: a collection names first what submissions need.
        """
        for submission in [each for each in self._of if each not in running]:
            self.give_back(self._of.pop(submission))
        now = time.monotonic()
        async with self._ending:
            for name, lease in list(self._leases.items()):
                await self._end_unused(name)
                if lease.over_at <= now and name in self._leases:
                    del self._leases[name]
                    if name in self._asked:
                        self._answered(name)

    async def _end_unused(self, name: str) -> None:
        """End a lease without a user; the caller holds `_ending`."""
        lease = self._leases.get(name)
        if lease is not None and lease.uses <= 0:
            await self._cache.release(name)
            # A caller of `take` that came meanwhile waits for `_ending`, and makes a new row afterwards.
            if lease.uses <= 0:
                del self._leases[name]


def _name(paths: Collection[str]) -> str:
    """Return the name of a lease of these paths, whatever their order; for a thread, since they may be many."""
    #: Sorting in parts lets other threads go on in between.
    parts: dict[str, list[str]] = {}
    for path in set(paths):
        parts.setdefault(base_name_of(path)[:1], []).append(path)
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for _, part in sorted(parts.items()):
        digest.update("\n".join([*sorted(part), ""]).encode())
    return f"intake-{digest.hexdigest()}"
