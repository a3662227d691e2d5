"""Demand: counts what readers of the cache miss, finds out what the farm could build of it, and acts as configured.

A reader is a stranger where the cache is public. So a miss costs the loop microseconds, derivations are looked up for
many misses at once, at most `LOOKUPS_AT_ONCE` each `LOOK_EVERY_S`, and what follows is bounded by the settings: only
derivations that a submitter once sent, so many an hour, at the lowest priority. No address is kept, not even hashed
(`ledger`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
from collections import OrderedDict, deque
from hashlib import blake2b
from typing import Final

from coordinator.api.demand_routes import DemandView
from coordinator.api.requests import RootRequest, SubmitRequest
from coordinator.demand.ledger import Miss, MissLedger, in_order
from coordinator.demand_settings import DemandAction, DemandSettings
from coordinator.errors import CoordinatorError, UnavailableError
from coordinator.intake.submissions import Submissions
from coordinator.readmodel.rows import OPEN, SubmissionRow
from coordinator.readmodel.views import Views
from coordinator.stores.known_outputs import KnownOutput, KnownOutputs
from infra.cache.cache import Cache
from infra.clock import Clock
from infra.objects.errors import CacheError
from scheduler.terms import HIGHEST_PRIORITY, LOWEST_PRIORITY

#: Owner of the submissions that are made here.
OWNER: Final = "demand"
#: Seconds between two looks at what has been missed, and paths looked up in each.
LOOK_EVERY_S: Final = 1.0
LOOKUPS_AT_ONCE: Final = 2_000
#: Paths that wait to be looked up; of more the oldest are not.
WAITING_LOOKUPS: Final = 8_000
#: Paths that are looked at for something to do.
CONSIDERED: Final = 64
HOUR_S: Final = 3600.0
DAY_S: Final = 86400.0
#: Characters of a sentence about what was done.
NOTE_CHARACTERS: Final = 300

_log = logging.getLogger(__name__)


class Demand:
    """The misses of one cache; for the tasks of one event loop. `run` serves it."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        settings: DemandSettings,
        cache: Cache,
        outputs: KnownOutputs,
        views: Views,
        submissions: Submissions,
        clock: Clock,
    ) -> None:
        self.settings = settings
        self.ledger = MissLedger()
        #: Requests that missed, since the start.
        self.misses = 0
        self._cache = cache
        self._outputs = outputs
        self._views = views
        self._submissions = submissions
        self._clock = clock
        self._salt = secrets.token_bytes(16)
        self._day_ends = clock.now() + DAY_S
        #: Hash parts that are to be looked up, oldest first.
        self._unknown: OrderedDict[str, None] = OrderedDict()
        self._filled = asyncio.Event()
        #: When something was done for a path within the last hour.
        self._acted: deque[float] = deque()

    def missed(self, hash_part: str, address: str) -> None:
        """Count a request of a reader at this address for a path that is not there. Returns at once."""
        if self.settings.action is DemandAction.OFF:
            return
        self.misses += 1
        if self.ledger.note(hash_part, self._asker(address), self._clock.now()):
            self._unknown[hash_part] = None
            if len(self._unknown) > WAITING_LOOKUPS:
                self._unknown.popitem(last=False)
        self._filled.set()

    def found(self, hash_part: str) -> None:
        """Note that a path is there by now."""
        self.ledger.forget((hash_part,))

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            try:
                await self.look()
            except (CoordinatorError, CacheError) as error:
                _log.warning("demand was not looked at: %s", error)
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Look up what is new, and act.

        Raises:
            CoordinatorError: The derivations cannot be read.
            CacheError: The cache cannot be read.
            UnavailableError: The engine stops, or takes nothing just now.
        """
        now = self._clock.now()
        if now >= self._day_ends:
            self._day_ends = now + DAY_S
            self._salt = secrets.token_bytes(16)
            self.ledger.end_day()
        names = [self._unknown.popitem(last=False)[0] for _ in range(min(LOOKUPS_AT_ONCE, len(self._unknown)))]
        if names:
            for known in await self._outputs.find(names):
                self.ledger.identify(known)
        if self._unknown:
            self._filled.set()
        if self.settings.action in {DemandAction.PRIORITY, DemandAction.BUILD}:
            await self._act(now)

    async def wanted(self) -> list[Miss]:
        """Return what people wait for, the most wanted first, without what is there by now.

        Raises:
            CacheError: The cache cannot be read.
        """
        found = await asyncio.to_thread(in_order, list(self.ledger))
        paths = {miss.known.path: miss for miss in found if miss.known is not None}
        there = paths.keys() - await self._cache.missing(paths)
        self.ledger.forget(paths[path].hash_part for path in there)
        return [miss for miss in found if miss.known is None or miss.known.path not in there]

    def view(self, miss: Miss) -> DemandView:
        """Return what people see of a miss."""
        known = miss.known
        row = self._views.row_of(known.step) if known else None
        running = self._running(known) if known else None
        note, submission = miss.note, miss.submission
        if running is not None and running.terms.owner == OWNER:
            note, submission = f"submission {running.id} builds it", running.id
        return DemandView(
            hash_part=miss.hash_part,
            known=known is not None,
            path=known.path if known else "",
            name=known.name if known else "",
            system=known.system if known else "",
            drv=known.drv if known else "",
            people=max(1, round(miss.people)),
            requests=max(1, round(miss.requests)),
            first_at=miss.first_at,
            last_at=miss.last_at,
            state=row.state.value if row else "",
            note=note,
            submission=submission,
        )

    async def _act(self, now: float) -> None:
        if not self._has_room(now):
            return
        due = self.ledger.buildable(CONSIDERED, lambda miss, known: self._counts(miss, known, now))
        if not due:
            return
        missing = await self._cache.missing([known.path for _, known in due])
        for miss, known in due:
            if known.path not in missing:
                self.ledger.forget((known.hash_part,))
                continue
            if not self._has_room(now):
                return
            if not self._counts(miss, known, now):
                # What was done for one before is for this one too.
                continue
            try:
                await self._act_on(miss, known)
            except UnavailableError:
                raise
            except CoordinatorError as error:
                miss.note = str(error)[:NOTE_CHARACTERS]
            miss.acted_at = now
            self._acted.append(now)

    def _counts(self, miss: Miss, known: KnownOutput, now: float) -> bool:
        """Return whether enough people wait for a path, nothing was done for it lately, and there is something to do.

        What is not so must not take the place of another among those that are considered.
        """
        lately = bool(miss.acted_at) and now - miss.acted_at < self.settings.again_after_hours * HOUR_S
        if round(miss.people) < self.settings.people or lately:
            return False
        running = self._running(known)
        return self.settings.action is DemandAction.BUILD if running is None else running.terms.owner != OWNER

    def _running(self, known: KnownOutput) -> SubmissionRow | None:
        """Return the submission that is to build a path."""
        row = self._views.row_of(known.step)
        if row is None or row.state not in OPEN:
            return None
        return next((each for each in row.submissions if not each.ended), None)

    async def _act_on(self, miss: Miss, known: KnownOutput) -> None:
        """Do for a path what may be done."""
        running = self._running(known)
        if running is not None:
            await self._raise(miss, running)
            return
        root = RootRequest(attr=known.name, drv=known.drv)
        label = f"asked for by {miss.people:.0f}"
        wish = SubmitRequest(roots=(root,), label=label, priority=LOWEST_PRIORITY)
        made = await self._submissions.submit(wish, OWNER)
        miss.submission, miss.note = made.id, f"submission {made.id} builds it"
        _log.info(
            "%s, which is not in the cache, is built for those who ask for it (submission %s)", known.path, made.id
        )

    async def _raise(self, miss: Miss, running: SubmissionRow) -> None:
        """Let the submission that is to build a path go before others of its owner, by one step and once a path."""
        miss.submission = running.id
        priority = min(HIGHEST_PRIORITY, running.terms.priority + 1)
        await self._submissions.bump(running.id, priority)
        miss.note = f"submission {running.id} has priority {priority} because of it"

    def _has_room(self, now: float) -> bool:
        """Return whether the bound of an hour lets something follow."""
        while self._acted and self._acted[0] <= now - HOUR_S:
            self._acted.popleft()
        return len(self._acted) < self.settings.per_hour

    def _asker(self, address: str) -> int:
        """Return a number that one network has today and that says nothing about it."""
        return int.from_bytes(blake2b(_network(address), key=self._salt, digest_size=8).digest(), "little")


def _network(address: str) -> bytes:
    """Return what one asker has: an IPv4 address, or the network of an IPv6 one, whose holder has all addresses of."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address.encode()
    if isinstance(found, ipaddress.IPv6Address):
        return found.ipv4_mapped.packed if found.ipv4_mapped else found.packed[:8]
    return found.packed
