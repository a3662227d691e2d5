"""The room of tracked environments: looks at sources, takes revisions, keeps their paths, and moves pointers.

1. What a revision names is a root of the cache before the revision is written, and until it is forgotten.
2. A revision is written before anything is done for it. What follows (bringing its packages, looking at its coverage,
   moving pointers) is done again after a restart wherever it was not finished.
3. One environment is changed by one task at a time.
4. What a revision lacks is brought beside all that, because that may take hours: neither other environments nor a
   change of this one wait for it.
5. A source that fails changes nothing but its own trouble, and is looked at less and less often.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol
from weakref import WeakValueDictionary

from coordinator.environment_settings import EnvironmentSettings
from coordinator.environments.coverage import PackageStanding, covered, day_of, gaps
from coordinator.environments.history import forgotten, next_revision, rooted
from coordinator.environments.model import (
    Environment,
    EnvironmentRevision,
    PollState,
    SourceKind,
    TrackedSource,
)
from coordinator.environments.pointers import SystemPointer, advanced, rolled_back
from coordinator.environments.reading import SourceContent, wishes_of
from coordinator.environments.store import CoverageAssessment, EnvironmentsError, EnvironmentStore
from coordinator.errors import ConflictError, CoordinatorError, NotFoundError
from coordinator.wishes.model import WishList
from infra.cache.cache import Cache
from infra.cache.retention.roots import ENVIRONMENT
from infra.clock import Clock
from infra.objects.errors import CacheError
from infra.retry import Outage

#: Environments that are looked after at one time.
AT_ONCE: Final = 4
#: Seconds between two looks at a source that fails, at most, and at coverage that is whole.
LONGEST_S: Final = 3600.0
#: Seconds between two rounds, at most.
ROUND_S: Final = 30.0

_log = logging.getLogger(__name__)


class PackageSource(Protocol):
    """Port to the farm: it brings packages into the cache, and finds how they stand."""

    async def bring(self, environment: Environment, revision: EnvironmentRevision, content: WishList) -> None:
        """Have what can be had of a revision; done again, it goes on where it was."""
        ...

    async def standings(self, content: WishList) -> Sequence[PackageStanding]:
        """Return how each package stands on its system."""
        ...

    async def resolved(self, content: WishList) -> WishList:
        """Return the wishes with the store paths of derivations. Raises `EnvironmentSourceError`."""
        ...


#: Reads a source: its content, or None where that is at the given mark still.
SourceReader = Callable[[TrackedSource, str], Awaitable[SourceContent | None]]
WishReader = Callable[[TrackedSource, SourceContent], Awaitable[WishList]]


@dataclass(slots=True)
class _LastLook:
    """Memory of the last assessment of an environment, and of the last try to bring what it lacks."""

    revision: int
    at: float
    whole: bool
    brought_at: float = 0.0


class EnvironmentTracker:
    """All environments. Methods raise `EnvironmentsError`, `CacheError` where a database fails."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        store: EnvironmentStore,
        cache: Cache,
        packages: PackageSource,
        read: SourceReader,
        settings: EnvironmentSettings,
        clock: Clock,
    ) -> None:
        self.store = store
        self._cache = cache
        self._packages = packages
        self._read = read
        #: Returns what a content of a source wishes for; without another one nothing is evaluated.
        self.wishes: WishReader = self._plain_wishes
        self._settings = settings
        self._clock = clock
        #: Locks of names that something is done for, as long as that lasts.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        #: Environments whose packages are being brought.
        self._bringing: dict[str, asyncio.Task[None]] = {}
        self._bringers = asyncio.Semaphore(AT_ONCE)
        self._settled = False
        self._looked: dict[str, _LastLook] = {}
        self._wake = asyncio.Event()
        self._outage = Outage(_log, "environments wait", "environments are looked after again")

    @property
    def trouble(self) -> str:
        """Reason that environments are not looked after at the moment, "" while all is well."""
        return self._outage.trouble

    async def run(self) -> None:
        """Look after all environments until cancelled."""
        try:
            await self._rounds()
        finally:
            await self._end_bringing(*self._bringing)

    async def _rounds(self) -> None:
        while True:
            self._wake.clear()
            try:
                if not self._settled:
                    await self._settle_roots()
                    self._settled = True
                await self._round()
            except (EnvironmentsError, CacheError) as error:
                self._outage.begin(f"environments cannot be looked after: {error}")
            else:
                self._outage.end()
            pause_s = min(ROUND_S, self._settings.poll_s, self._settings.assess_s)
            try:
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def stir(self, name: str) -> None:
        """Have the coverage of an environment looked at soon: something that it lacked may be there."""
        looked = self._looked.get(name)
        if looked is not None:
            looked.at = 0.0
        self._wake.set()

    # Changes that clients ask for.

    async def environment(self, name: str) -> Environment:
        """Return an environment. Raises `NotFoundError`."""
        found = await self.store.environment(name)
        if found is None:
            raise NotFoundError(f"there is no environment {name[:80]!r}; `drover environments list` has all.")
        return found

    async def track(self, wanted: Environment, seen: Environment | None) -> Environment:
        """Make an environment, or give one that was `seen` another source and owners; its history stays.

        Raises:
            ConflictError: There are as many as there may be, or it has other owners than it was seen with.
            EnvironmentSourceError: The source cannot be read now.
        """
        async with self._lock(wanted.name):
            before = await self.store.environment(wanted.name)
            if before is not None and before.owners != (seen or wanted).owners:
                raise _changed(wanted.name)
            if before is None and len(await self.store.environments()) >= self._settings.most:
                raise ConflictError(
                    f"there are {self._settings.most} environments, the limit (environments.most); forget one first."
                )
            kept = replace(wanted, created_at=before.created_at if before else wanted.created_at)
            if wanted.source.kind is SourceKind.PUSH:
                await self.store.save(kept)
                return kept
            content = await self._read(wanted.source, "")
            if content is None:
                raise AssertionError("a source without a mark has a content")
            await self._take(kept, content)
            self._looked.pop(wanted.name, None)
        self._wake.set()
        return await self.environment(wanted.name)

    async def push(self, environment: Environment, content: WishList, mark: str, note: str) -> Environment:
        """Take a content that a client sends as a revision; the same as the newest one's changes nothing.

        Raises:
            ConflictError: Another source says what the environment is, or it is another one than it was.
            EnvironmentSourceError: A derivation in it is not known.
            NotFoundError: It was forgotten meanwhile.
        """
        if environment.source.kind is not SourceKind.PUSH:
            raise ConflictError(
                f"{environment.name} follows {_place(environment.source)}, which a push would be undone by; change "
                "that, or track another name."
            )
        async with self._lock(environment.name):
            await self._take_wishes(await self._unchanged(environment), content, mark, note)
        self._wake.set()
        return await self.environment(environment.name)

    async def look(self, environment: Environment) -> Environment:
        """Look at a source now. Raises `EnvironmentSourceError`, `WishListError`, `NotFoundError` where that fails."""
        async with self._lock(environment.name):
            environment = await self.environment(environment.name)
            self._looked.pop(environment.name, None)
            if environment.source.kind is not SourceKind.PUSH:
                trouble = await self._look(environment)
                if trouble is not None:
                    raise trouble
        self._wake.set()
        return await self.environment(environment.name)

    async def roll_back(self, environment: Environment, systems: Collection[str], target: int) -> list[SystemPointer]:
        """Move pointers back, of some systems or all that have one; returns them.

        Raises:
            ConflictError: There is no such place, or the environment is another one than it was.
            NotFoundError: It was forgotten meanwhile.
        """
        name = environment.name
        async with self._lock(name):
            await self._unchanged(environment)
            pointers = await self.store.pointers(name)
            history = await self.store.revisions(name)
            chosen = [pointers.get(each, SystemPointer(each)) for each in systems or pointers]
            if not chosen:
                raise ConflictError(f"stable of {name} is at no revision yet, so there is nothing to roll back.")
            wanted = {target or next(iter(each.before), 0) for each in chosen}
            whole = await self._whole(name, wanted)
            newest = history[0].number if history else 0
            now = self._clock.now()
            moved = [
                rolled_back(each, target, {one for one in wanted if each.system in whole.get(one, ())}, newest, now)
                for each in chosen
            ]
            await self.store.save_pointers(name, moved)
            await self._tidy(name)
        return moved

    async def forget(self, name: str) -> None:
        """Forget an environment, its history, and that its paths are kept."""
        async with self._lock(name):
            await self._end_bringing(name)
            await self.store.forget(name)
            self._looked.pop(name, None)
            try:
                await self._tidy(name)
            except CacheError:
                # Its roots are ended by the next round.
                self._settled = False
                raise

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _unchanged(self, seen: Environment) -> Environment:
        """Return an environment as it is now, for a change that its owners of before were allowed."""
        found = await self.environment(seen.name)
        if (found.source, found.owners, found.created_at) != (seen.source, seen.owners, seen.created_at):
            raise _changed(seen.name)
        return found

    # Looking after.

    async def _round(self) -> None:
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(environment: Environment) -> None:
            async with turns:
                await self._look_after_safely(environment.name)

        environments = await self.store.environments()
        try:
            async with asyncio.TaskGroup() as group:
                for environment in environments:
                    if self._is_due(environment):
                        group.create_task(one(environment))
        except* (EnvironmentsError, CacheError) as errors:
            raise errors.exceptions[0] from None

    async def _look_after_safely(self, name: str) -> None:
        """Do what is due for one environment; a fault costs this look at it and nothing else."""
        try:
            await self.look_after(name)
        except (EnvironmentsError, CacheError):
            raise
        except CoordinatorError as error:
            _log.warning("environment %s cannot be looked at now: %s", name, error)
        except Exception:  # noqa: BLE001 - a fault of ours ends this look and no other
            _log.exception("environment %s cannot be looked at", name)
        else:
            return
        before = self._looked.get(name)
        revision = before.revision if before else 0
        self._looked[name] = _LastLook(revision, self._clock.now(), whole=False, brought_at=self._clock.now())

    def _is_due(self, environment: Environment) -> bool:
        now = self._clock.now()
        return self._source_is_due(environment, now) or self._coverage_is_due(environment.name, now)

    def _source_is_due(self, environment: Environment, now: float) -> bool:
        pause_s = min(self._settings.poll_s * 2 ** min(environment.poll.failures, 16), LONGEST_S)
        return environment.source.kind is not SourceKind.PUSH and now >= environment.poll.looked_at + pause_s

    def _coverage_is_due(self, name: str, now: float) -> bool:
        looked = self._looked.get(name)
        return looked is None or now >= looked.at + (LONGEST_S if looked.whole else self._settings.assess_s)

    async def look_after(self, name: str) -> None:
        """Do what is due for one environment."""
        async with self._lock(name):
            environment = await self.store.environment(name)
            if environment is None:
                return
            now = self._clock.now()
            if self._source_is_due(environment, now):
                await self._look(environment)
            history = await self.store.revisions(name)
            if history and self._coverage_is_due(name, now):
                await self._assess(environment, history)

    async def _look(self, environment: Environment) -> CoordinatorError | None:
        """Look at a source; returns why that failed."""
        before = environment.poll
        now = self._clock.now()
        try:
            content = await self._read(environment.source, before.mark)
            if content is None:
                await self.store.save(replace(environment, poll=PollState(now, now, before.mark)))
            else:
                await self._take(environment, content)
        except (EnvironmentsError, CacheError):
            raise
        except CoordinatorError as error:
            since = before.trouble_since if before.trouble else now
            failed = replace(
                before, looked_at=now, trouble=str(error), trouble_since=since, failures=before.failures + 1
            )
            await self.store.save(replace(environment, poll=failed))
            return error
        return None

    async def _take(self, environment: Environment, content: SourceContent) -> None:
        await self._take_wishes(environment, await self.wishes(environment.source, content), content.mark)

    async def _plain_wishes(self, source: TrackedSource, content: SourceContent) -> WishList:
        return await asyncio.to_thread(wishes_of, content, self._cache.store_dir, source.system)

    async def _take_wishes(self, environment: Environment, content: WishList, mark: str, note: str = "") -> None:
        """Write a revision where the content is another one, and that the source was looked at."""
        wishes = await self._packages.resolved(content)
        name, now = environment.name, self._clock.now()
        seen = replace(environment, poll=PollState(now, now, mark))
        history = await self.store.revisions(name)
        revision = await asyncio.to_thread(next_revision, history, wishes, mark, now, note)
        if revision is None:
            return await self.store.save(seen)
        paths = await asyncio.to_thread(lambda: wishes.paths)
        await self._cache.keep(ENVIRONMENT, _root(name, revision.number), paths, None)
        await self.store.add_revision(seen, revision, wishes)
        self._looked.pop(name, None)
        await self._tidy(name)
        return None

    async def _assess(self, environment: Environment, history: Sequence[EnvironmentRevision]) -> None:
        """Bring what the newest revision lacks, look at its coverage, and move pointers."""
        name, newest = environment.name, history[0]
        content = (await self.store.contents(name, [newest.number]))[newest.number]
        now = self._clock.now()
        looked = self._looked.get(name)
        brought_at = 0.0 if looked is None or looked.revision != newest.number else looked.brought_at
        if now >= brought_at + self._settings.poll_s and name not in self._bringing:
            brought_at = now
            task = asyncio.create_task(self._bring(environment, newest), name=f"bringing {_root(name, newest.number)}")
            self._bringing[name] = task
        standings = await self._packages.standings(content)
        before = await self.store.assessment(name)
        found = await asyncio.to_thread(_assessment, newest.number, standings, before, now)
        await self.store.save_assessment(name, found, day_of(now), self._settings.trend_days)
        await self._move(name, history, {each.system for each in found.systems if each.is_whole})
        whole = all(each.is_whole for each in found.systems)
        self._looked[name] = _LastLook(newest.number, self._clock.now(), whole, brought_at)

    async def _bring(self, environment: Environment, revision: EnvironmentRevision) -> None:
        """Bring what a revision lacks, then have its coverage looked at; a fault costs this try and nothing else."""
        name = environment.name
        try:
            async with self._bringers:
                contents = await self.store.contents(name, [revision.number])
                for content in contents.values():
                    await self._packages.bring(environment, revision, content)
            # Not before the end of the look that began this.
            async with self._lock(name):
                self.stir(name)
        except EnvironmentsError as error:
            _log.warning("what environment %s lacks cannot be brought now: %s", name, error)
        except Exception:  # noqa: BLE001 - a fault of ours ends this try and no other
            _log.exception("what environment %s lacks cannot be brought", name)
        finally:
            del self._bringing[name]

    async def _end_bringing(self, *names: str) -> None:
        tasks = [self._bringing[name] for name in names if name in self._bringing]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _move(self, name: str, history: Sequence[EnvironmentRevision], whole: Collection[str]) -> None:
        """Move each system's pointer to the highest revision that is whole there, if it is not there."""
        pointers = await self.store.pointers(name)
        newest = history[0]
        systems = {system for revision in history for system in revision.systems} | set(pointers)
        known: dict[str, set[int]] = {system: {newest.number} if system in whole else set() for system in systems}
        # Where the newest is not whole, one before it may have become so meanwhile.
        behind = [pointers.get(system, SystemPointer(system)) for system in systems - set(whole)]
        kept = rooted([each.number for each in history], pointers.values(), self._settings.kept_revisions)
        later = {
            number
            for number in kept - {newest.number}
            if any(number > max(each.revision, each.held_through) for each in behind)
        }
        for number, its in (await self._whole(name, later)).items():
            for system in its:
                known.setdefault(system, set()).add(number)
        now = self._clock.now()
        moved = [
            after
            for system in sorted(systems)
            if (after := advanced(before := pointers.get(system, SystemPointer(system)), known[system], now)) != before
        ]
        if moved:
            await self.store.save_pointers(name, moved)
            await self._tidy(name)

    async def _whole(self, name: str, numbers: Collection[int]) -> dict[int, set[str]]:
        """Return the systems on which revisions are whole now."""
        found: dict[int, set[str]] = {}
        for number, content in (await self.store.contents(name, numbers)).items() if numbers else ():
            coverage = await asyncio.to_thread(covered, await self._packages.standings(content))
            found[number] = {each.system for each in coverage.values() if each.is_whole}
        return found

    # Keeping.

    async def _tidy(self, name: str) -> None:
        """Forget what is beyond the bounds of history, and end the roots of what is no longer kept."""
        numbers = [each.number for each in await self.store.revisions(name)]
        pointers = (await self.store.pointers(name)).values()
        kept = rooted(numbers, pointers, self._settings.kept_revisions)
        await self.store.drop_revisions(name, forgotten(numbers, kept, self._settings.revisions))
        for root in await self._cache.roots():
            environment, _, number = root.name.rpartition("@")
            if root.kind == ENVIRONMENT and environment == name and int(number) not in kept:
                await self._cache.drop(ENVIRONMENT, root.name)

    async def _settle_roots(self) -> None:
        """Make the roots what they should be: a kill may have come between a root and its revision."""
        names = {each.name for each in await self.store.environments()}
        there = {root.name for root in await self._cache.roots() if root.kind == ENVIRONMENT}
        for name in names | {root.rpartition("@")[0] for root in there}:
            async with self._lock(name):
                await self._tidy(name)
                numbers = [each.number for each in await self.store.revisions(name)]
                pointers = (await self.store.pointers(name)).values()
                kept = rooted(numbers, pointers, self._settings.kept_revisions)
                lacking = [number for number in kept if _root(name, number) not in there]
                for number, content in (await self.store.contents(name, lacking)).items() if lacking else ():
                    await self._cache.keep(ENVIRONMENT, _root(name, number), content.paths, None)


def _assessment(
    revision: int, standings: Sequence[PackageStanding], before: CoverageAssessment | None, now: float
) -> CoverageAssessment:
    missing = gaps(standings, before.gaps if before else (), now)
    return CoverageAssessment(revision, now, tuple(covered(standings).values()), missing)


def _changed(name: str) -> ConflictError:
    return ConflictError(f"{name} was given another source or other owners meanwhile; look at it, and try again.")


def _root(name: str, number: int) -> str:
    return f"{name}@{number}"


def _place(source: TrackedSource) -> str:
    return f"{source.ref or 'HEAD'} of {source.url}" if source.kind is SourceKind.GIT else source.path
