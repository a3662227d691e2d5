"""Mirroring for clients: paths that they want from the farm's upstreams, as bounded runs in the background.

Rules:
1. Only what an upstream's keys have signed counts, down to the last reference; a bad path costs itself and what stands
   on it, no other.
2. What is here is never fetched again, and what a run has published stays when it is cancelled or the coordinator ends:
   the same request goes on where that one stopped.
3. Runs live in memory. A client whose run is not known any more begins it again.
4. An upstream that is only recorded gives no bytes, except for what a mirrored path stands on: a cache has no path
   without all that it refers to.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from coordinator.api.mirroring import MIRROR_PREFIX, MirroredOutcome, MirroredPathView, MirrorState, MirrorView
from coordinator.errors import IntakeError, NotFoundError, UnavailableError
from infra.cache.cache import Cache
from infra.cache.pulls.closure_search import PatientUpstreams, Searched, search
from infra.cache.pulls.mirror import ClosureMirror, MirrorRun
from infra.cache.pulls.recorded_paths import RecordedPaths
from infra.cache.pulls.upstream import Upstream
from infra.nix.errors import FormatError
from infra.objects.errors import CacheError

_log = logging.getLogger(__name__)

#: Runs that work at one time, that wait, and that one owner may have open.
RUNS_AT_ONCE: Final = 2
MAX_WAITING: Final = 16
MAX_OF_OWNER: Final = 4
#: Runs that ended and are remembered, and paths of all of them together, some 500 bytes each.
REMEMBERED: Final = 100
REMEMBERED_PATHS: Final = 100_000
#: Seconds that an answer waits for another state.
WAIT_S: Final = 2.0
#: Seconds for which a run keeps what it stands on; renewed with everything that it publishes.
LEASE_S: Final = 3600.0
#: Kind of the roots that keep what was wanted.
POPULATED: Final = "populate"


@dataclass(slots=True)
class MirrorProgress:
    """A run, as it stands."""

    state: MirrorState = MirrorState.QUEUED
    searched: Searched = field(default_factory=Searched)
    nar_bytes: int = 0
    recorded: int = 0
    run: MirrorRun = field(default_factory=MirrorRun)
    #: Set, and made anew, whenever the state changes.
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def become(self, state: MirrorState) -> None:
        """Change the state, and wake those who wait for that."""
        self.state = state
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(slots=True)
class _MirrorJob:
    """A run that a client asked for."""

    id: str
    owner: str
    wanted: tuple[str, ...]
    keep_as: str
    pull: bool
    progress: MirrorProgress = field(default_factory=MirrorProgress)
    error: str = ""
    paths: tuple[MirroredPathView, ...] = ()
    task: asyncio.Task[None] | None = None
    #: What clients see of it for good, once it has ended.
    last: MirrorView | None = None

    def end(self, state: MirrorState) -> None:
        """Let it have ended, and forget all but what clients see: what was searched is up to 100,000 narinfos."""
        ended, self.progress = self.progress, MirrorProgress(state)
        ended.state = state
        self.last = self._seen(ended)
        ended.become(state)

    def view(self) -> MirrorView:
        """Return what clients see of it."""
        return self.last or self._seen(self.progress)

    def _seen(self, now: MirrorProgress) -> MirrorView:
        return MirrorView(
            id=self.id,
            state=now.state,
            error=self.error,
            wanted=len(self.wanted),
            here=len(now.searched.here),
            found=len(now.searched.found),
            nar_bytes=now.nar_bytes,
            nowhere=len(now.searched.nowhere),
            taken=len(now.run.taken),
            fetched_bytes=now.run.fetched_bytes,
            recorded=now.recorded,
            failed=len(now.run.failed),
            paths=self.paths,
        )


class Mirroring:
    """The room; paths come into one cache, the farm's own."""

    def __init__(
        self,
        cache: Cache,
        upstreams: Sequence[Upstream],
        now: Callable[[], float],
        *,
        expiry: Callable[[float], float | None] = lambda _now: None,
        max_bytes: int = 0,
    ) -> None:
        """`expiry(now)` is until when what was wanted is kept, `max_bytes` what NARs one run may find; 0: no limit."""
        self.records = RecordedPaths(cache, now)
        self._cache = cache
        self._upstreams = tuple(upstreams)
        self._now = now
        self._expiry = expiry
        self._max_bytes = max_bytes
        self._jobs: dict[str, _MirrorJob] = {}
        self._turns = asyncio.Semaphore(RUNS_AT_ONCE)

    async def begin(self, paths: Sequence[str], owner: str, keep_as: str = "", *, pull: bool = True) -> MirrorView:
        """Begin a run of full store paths for an owner; they are kept under that name of the owner's, or the run's.

        Without `pull` upstreams are not asked.

        Raises:
            IntakeError: One is no path of this store.
            UnavailableError: Too many runs are open.
        """
        wanted = await asyncio.to_thread(self._checked, paths)
        open_jobs = [each for each in self._jobs.values() if not each.progress.state.ended]
        if len(open_jobs) >= RUNS_AT_ONCE + MAX_WAITING:
            raise UnavailableError(f"{MAX_WAITING} runs of mirroring wait already, the limit; try again later.")
        if sum(each.owner == owner for each in open_jobs) >= MAX_OF_OWNER:
            raise UnavailableError(
                f"{owner} has {MAX_OF_OWNER} open runs of mirroring, the limit; wait until one ends, or cancel one."
            )
        name = f"{MIRROR_PREFIX}{secrets.token_hex(8)}"
        job = _MirrorJob(name, owner, wanted, f"{owner}/{keep_as or name}", pull)
        self._jobs[name] = job
        job.task = asyncio.create_task(self._run(job), name=f"mirroring {name}")
        self._forget_oldest()
        return job.view()

    async def view(self, name: str, seen: str = "") -> MirrorView:
        """Return a run; while its state is the one `seen`, wait for another one for a while. Raises `NotFoundError`."""
        job = self._find(name)
        if job.progress.state == seen and not job.progress.state.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    await job.progress.changed.wait()
        return job.view()

    async def cancel(self, name: str) -> MirrorView:
        """End a run; what it has published stays. A repeat changes nothing. Raises `NotFoundError`."""
        job = self._find(name)
        if job.task is not None and not job.task.done():
            job.task.cancel()
            await asyncio.wait([job.task])
        return job.view()

    async def stop(self) -> None:
        """End all runs."""
        tasks = [each.task for each in self._jobs.values() if each.task is not None and not each.task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def have(
        self, paths: Collection[str], progress: MirrorProgress | None = None, *, pull: bool = True
    ) -> tuple[MirroredPathView, ...]:
        """Have full store paths from the upstreams, in their turn, and return what became of each, in order.

        The caller keeps them (`Cache.keep`, which may come first); what is published without that stays for an hour.

        Raises:
            SearchTooLargeError: The closure is beyond the bounds of one run.
            CacheError: The cache failed; what was published before stays.
        """
        now = progress or MirrorProgress()
        holder = f"mirroring {secrets.token_hex(8)}"
        async with self._turns:
            now.become(MirrorState.SEARCHING)
            upstreams = PatientUpstreams(self._upstreams if pull else ())

            def on_found(searched: Searched) -> None:
                now.searched = searched

            try:
                searched = now.searched = await search(self._cache, upstreams, paths, self._max_bytes, on_found)
                blocked = await asyncio.to_thread(searched.blocked)
                bytes_of = await asyncio.to_thread(_to_mirror, searched, blocked)
                # What is here, and what comes, stays meanwhile; some may have been collected since it was looked for.
                absent = await self._cache.lease(holder, searched.here | bytes_of, LEASE_S)
                if gone := absent & searched.here:
                    raise CacheError(f"{min(gone)} was collected meanwhile")
                now.nar_bytes = sum(searched.found[path].info.path.nar_size for path in bytes_of)
                now.become(MirrorState.FETCHING)

                async def after_chunk() -> None:
                    await self._cache.renew(holder, LEASE_S)

                wanted = [searched.found[path] for path in bytes_of]
                await ClosureMirror(self._cache, upstreams, now.run).take(wanted, searched.here, after_chunk)
                others = bytes_of | blocked.keys()
                only_known = [each for path, each in searched.found.items() if path not in others]
                if only_known:
                    await self.records.record(only_known)
                now.recorded = len(only_known)
            finally:
                await self._cache.release(holder)
        return await asyncio.to_thread(lambda: tuple(_outcome(path, now, blocked) for path in paths))

    async def _run(self, job: _MirrorJob) -> None:
        """Run one to its end, whatever that is."""
        try:
            # From the start: what is published of it stays, however the run ends.
            await self._cache.keep(POPULATED, job.keep_as, job.wanted, self._expiry(self._now()))
            job.paths = await self.have(job.wanted, job.progress, pull=job.pull)
            counts = Counter(each.outcome for each in job.paths)
            _log.info("mirroring %s ended: %s", job.id, dict(counts))
            job.end(MirrorState.DONE)
        except asyncio.CancelledError:
            job.end(MirrorState.CANCELLED)
        except CacheError as error:
            job.error = f"{error}; what was had before stays, so begin it again."
            job.end(MirrorState.FAILED)
        except Exception:  # noqa: BLE001 - a fault of ours ends this run and no other
            _log.exception("mirroring %s failed", job.id)
            job.error = "the run failed by a fault of the coordinator; its log says more"
            job.end(MirrorState.FAILED)

    def _forget_oldest(self) -> None:
        ended = deque(each for each in self._jobs.values() if each.progress.state.ended)
        paths = sum(len(each.wanted) for each in ended)
        while len(ended) > REMEMBERED or paths > REMEMBERED_PATHS:
            oldest = ended.popleft()
            paths -= len(oldest.wanted)
            del self._jobs[oldest.id]

    def _find(self, name: str) -> _MirrorJob:
        if (found := self._jobs.get(name)) is None:
            raise NotFoundError(
                f"there is no run of mirroring {name[:40]}; it ended long ago, or the coordinator has started anew "
                "since: begin it again, which fetches nothing twice."
            )
        return found

    def _checked(self, paths: Sequence[str]) -> tuple[str, ...]:
        store_dir = self._cache.store_dir
        wanted = tuple(dict.fromkeys(paths))
        for path in wanted:
            try:
                store_dir.parse(path)
            except FormatError as error:
                raise IntakeError(
                    f"{path[:200]!r} is no path of the farm's store, {store_dir.path}: {error.message}."
                ) from None
        return wanted


def _to_mirror(searched: Searched, blocked: Mapping[str, str]) -> set[str]:
    """Return what is found whole in an upstream that is mirrored, with all that it stands on."""
    return searched.below(
        path for path, each in searched.found.items() if each.upstream.mirrored and path not in blocked
    )


def _outcome(path: str, now: MirrorProgress, blocked: Mapping[str, str]) -> MirroredPathView:
    searched, run = now.searched, now.run
    upstream = searched.found[path].upstream.url if path in searched.found else ""
    outcome, reason = MirroredOutcome.RECORDED, ""
    if path in searched.here:
        outcome = MirroredOutcome.HERE
    elif path in run.taken:
        outcome, upstream = MirroredOutcome.MIRRORED, run.taken[path]
    elif path in run.differing:
        outcome, reason = MirroredOutcome.HERE, "it was published here meanwhile with other bits, which stay"
    elif path in run.failed:
        outcome, reason = MirroredOutcome.REFUSED, run.failed[path]
    elif path in blocked:
        why = searched.nowhere[blocked[path]] or "no upstream has it"
        outcome, reason = MirroredOutcome.REFUSED, f"it refers to {blocked[path]}: {why}"
    elif path in searched.nowhere:
        reason = searched.nowhere[path]
        outcome = MirroredOutcome.REFUSED if reason else MirroredOutcome.NOWHERE
    return MirroredPathView(path=path, outcome=outcome, upstream=upstream, reason=reason)
