"""A lease's inputs become valid in the worker's store, fetched once however many leases want them.

    planning (one at a time): root the paths, ask the store which are valid, ask the cache for the narinfos of the rest
    with their closure, check every signature, and claim the paths that no transfer fetches yet;
    transfer (several at a time): wait for what others fetch, then stream the NARs into the store, references first.

Requests to a cache that does not answer, or a store that breaks off, are repeated for a while before the lease is given
back.

A path that was rooted and seen valid stays so for as long as the roots connection lives, so it is never looked up
again. A plan waits only for plans that claimed before it, so no two wait for each other.

What is fetched for leases to come (`bring`, used by `fetching_ahead`) is claimed likewise, so that a lease which wants
it waits for it; while leases wait for other paths, its bytes stand back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from infra.clock import Clock
from infra.daemon import DaemonGone, DaemonOperationError, Upload
from infra.nix.narinfo import NarInfo
from infra.nix.path_info import PathInfo
from workers.agent.attempt_record import AttemptRecord, Fetched, FetchLog, Moving
from workers.agent.daemon_pool import DaemonSession, SessionPool
from workers.agent.farm_sources import FarmSources, InputError, patiently

#: NARs up to this size are downloaded ahead of their turn, so many at a time.
AHEAD_BYTES = 1024 * 1024
AHEAD = 8
#: Streams into the store at one time.
TRANSFERS = 2
#: Paths remembered as valid; beyond it they are looked up again.
MAX_REMEMBERED = 200_000
#: Longest time for which a piece for a lease to come stands back: a connection that does not move is hung up.
STANDS_BACK_S = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class _Transfer:
    """Paths on their way into the store. The task never raises: it returns its error."""

    task: asyncio.Task[Exception | None]
    log: FetchLog
    #: It is for leases to come.
    ahead: bool = False


class InputFetcher:
    """Makes paths valid; see the module's text. Its tasks live in `group`."""

    def __init__(
        self,
        roots: DaemonSession,
        transfers: SessionPool,
        group: asyncio.TaskGroup,
        clock: Clock,
        *,
        moved: Callable[[], None] = lambda: None,
        added: Callable[[Iterable[PathInfo]], None] = lambda _: None,
    ) -> None:
        """`moved` is called with each piece that comes, `added` with the records of paths that a transfer has added."""
        self._moved = moved
        self._added = added
        self._roots = roots
        self._transfers = transfers
        self._group = group
        self._clock = clock
        self._planning = asyncio.Lock()
        #: Rooted by the roots connection of `_generation` and seen valid since.
        self._valid: set[str] = set()
        self._generation = 0
        self._tasks: set[asyncio.Task[Exception | None]] = set()
        #: Claimed paths and the transfer that will make them valid.
        self._claimed: dict[str, _Transfer] = {}
        #: Rooted by the roots connection of `_generation`, and not valid when it was last asked.
        self._lacked: set[str] = set()
        #: Leases that wait for paths, and those of them that wait for what `bring` fetches.
        self._waiting = self._joined = 0
        #: Set unless leases wait, and none for what `bring` fetches.
        self._may_bring = asyncio.Event()
        self._may_bring.set()

    def known(self, paths: Iterable[str]) -> bool:
        """Return whether all paths are known to be valid, so that `ensure` would return at once."""
        current = self._generation == self._roots.generation and not self._roots.broken
        return current and self._valid.issuperset(paths)

    def forget(self) -> None:
        """Ask about every path anew: the store has shown that it is not as remembered."""
        self._valid.clear()

    async def let_go(self, idle: Callable[[], bool]) -> bool:
        """Let the store collect what was rooted so far; False, and nothing happens, unless no lease needs it."""
        async with self._planning:
            if not idle() or self._claimed:
                return False
            # Before anything is waited for: a lease that comes now must root its inputs anew, after this.
            self._valid.clear()
            await self._roots.hang_up()
        return True

    async def expect(self, paths: Iterable[str]) -> None:
        """Root paths that are built here now, so that each is kept from its first moment on. Raises as `ensure`."""
        async with self._planning:
            await self._missing(set(paths))

    def arrived(self, paths: Iterable[str]) -> None:
        """Take paths for valid that have become so, as far as they were rooted before."""
        arrived = self._lacked.intersection(paths)
        self._valid |= arrived
        self._lacked -= arrived

    def stop(self) -> None:
        """Cancel all transfers: the agent is closing."""
        for task in self._tasks:
            task.cancel()

    async def ensure(self, paths: Sequence[str], sources: FarmSources, record: AttemptRecord) -> None:
        """Return when all full paths are valid and rooted for the life of the roots connection.

        `record` gets what was fetched meanwhile by the transfers that this waited for. A cancelled caller leaves the
        transfer running: others may wait for it. Raises `InputError`, `infra.daemon.DaemonError` or
        `DaemonUnreachableError`.
        """
        if self.known(paths):
            return
        joined = False
        self._count_waiting(1)
        try:
            async with self._planning:
                earlier, own = await self._plan(set(paths), sources)
            joined = any(transfer.ahead for transfer in earlier)
            self._count_waiting(0, joined)
            await self._settled(earlier, own, record)
        finally:
            self._count_waiting(-1, -joined)

    def _count_waiting(self, waiting: int, joined: int = 0) -> None:
        self._waiting += waiting
        self._joined += joined
        if self._joined or not self._waiting:
            self._may_bring.set()
        else:
            self._may_bring.clear()

    async def _settled(self, earlier: list[_Transfer], own: list[_Transfer], record: AttemptRecord) -> None:
        """Wait for transfers, and note in the record what they fetched."""
        try:
            with record.transfer("fetch", (transfer.log.moving for transfer in (*earlier, *own))):
                for transfer in (*earlier, *own):
                    error = await asyncio.shield(transfer.task)
                    if error is not None:
                        raise error
        finally:
            for transfer in (*earlier, *own):
                record.fetched(transfer.log, shared=transfer not in own)

    async def _plan(self, wanted: set[str], sources: FarmSources) -> tuple[list[_Transfer], list[_Transfer]]:
        """Claim what is missing; return the transfers to wait for, those of others and the own one if any."""
        missing = await self._missing(wanted)
        earlier = {self._claimed[path] for path in missing if path in self._claimed}
        unclaimed = missing - self._claimed.keys()
        if not unclaimed:
            return list(earlier), []
        infos = await sources.narinfos(unclaimed)
        missing = await self._still_missing({info.store_path for info in infos}, missing)
        earlier |= {self._claimed[path] for path in missing if path in self._claimed}
        mine = [info for info in infos if info.store_path in missing and info.store_path not in self._claimed]
        if not mine:
            return list(earlier), []
        log = FetchLog(Moving(sources.kind, sum(info.path.nar_size for info in mine), self._moved))
        before = frozenset(transfer.task for transfer in earlier)
        own = self._begin(mine, lambda: self._stream_after(before, mine, sources, log), log)
        return list(earlier), [own]

    async def _still_missing(self, paths: set[str], before: set[str]) -> set[str]:
        """Do what `_missing` does, without asking again for those that were missing `before`, under the same roots."""
        generation = self._generation
        missing = await self._missing(paths - before)
        if generation != self._generation:
            return await self._missing(paths)
        return (missing | (paths & before)) - self._valid

    async def _missing(self, paths: set[str]) -> set[str]:
        """Root paths, then ask which are not valid; a connection whose daemon is gone is replaced once."""
        try:
            return await self._ask_store(paths)
        except DaemonGone:
            return await self._ask_store(paths)

    async def _ask_store(self, paths: set[str]) -> set[str]:
        # Roots first: a collection could come between.
        async with self._roots.use() as connection:
            if self._generation != self._roots.generation or len(self._valid) + len(self._lacked) > MAX_REMEMBERED:
                self._valid.clear()
                self._lacked.clear()
                self._generation = self._roots.generation
            unknown = paths - self._valid
            if unknown:
                self._valid |= await connection.root_valid_paths(unknown)
            missing = paths - self._valid
            self._lacked |= missing
            return missing

    def _begin(
        self, infos: Sequence[NarInfo], work: Callable[[], Awaitable[None]], log: FetchLog, *, ahead: bool = False
    ) -> _Transfer:
        """Begin work that brings paths; they are claimed by it until it ends."""
        task = self._group.create_task(self._brought(infos, work), name="fetch inputs")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        transfer = _Transfer(task, log, ahead=ahead)
        self._claimed |= {info.store_path: transfer for info in infos}
        return transfer

    async def _brought(self, infos: Sequence[NarInfo], work: Callable[[], Awaitable[None]]) -> Exception | None:
        """Do work that brings paths; the error is returned, because every lease that waits wants it."""
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - handed to every waiting lease, which reports it
            return error
        finally:
            for info in infos:
                del self._claimed[info.store_path]
        return None

    async def _stream_after(
        self,
        earlier: frozenset[asyncio.Task[Exception | None]],
        infos: Sequence[NarInfo],
        sources: FarmSources,
        log: FetchLog,
    ) -> None:
        """Add the paths once earlier transfers have brought theirs. Raises the error of one that has not."""
        for task in earlier:
            error = await asyncio.shield(task)
            if error is not None:
                raise error
        await self._stream(infos, sources, log)

    async def _stream(self, infos: Sequence[NarInfo], sources: FarmSources, fetches: FetchLog) -> None:
        """Add the paths, where the store breaks off what is left of them again for a while."""
        left: list[NarInfo] | None = None

        async def stream() -> None:
            nonlocal left
            if left is None:
                left = list(infos)
            else:
                missing = await self._missing({info.store_path for info in left})
                left = [info for info in left if info.store_path in missing]
            if left:
                await self._add(left, sources, fetches)

        await patiently(stream)

    async def _add(
        self,
        infos: Sequence[NarInfo],
        sources: FarmSources,
        fetches: FetchLog,
        over: DaemonSession | None = None,
        pace: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        async with (self._transfers if over is None else over).use() as connection:
            stream = _NarsAhead(infos, sources, self._clock, fetches, pace)
            try:
                # The signatures are verified above, with the farm's keys; the daemon has its own list.
                await connection.add_multiple_to_store(stream.uploads(), dont_check_sigs=True)
            except DaemonOperationError as refused:
                raise InputError(f"the store refuses an input: {refused}") from refused
            finally:
                await stream.close()
        self._added(info.path for info in infos)
        # What is for a lease to come is rooted by that one, as far as it has been planned.
        self.arrived(info.store_path for info in infos)

    async def bring(
        self, infos: Sequence[NarInfo], sources: FarmSources, log: FetchLog, over: DaemonSession
    ) -> Exception | None:
        """Add those of the paths that no lease has fetched, for leases to come; return the error that ended it.

        The caller has rooted them, and brings what they refer to before. Leases that wait for other paths go first;
        one that wants some of these waits for them. A cancelled caller leaves the transfer running.
        """
        needed = {name for info in infos for name in info.path.references} | {info.base_name for info in infos}
        paths = {sources.store_dir.full(name) for name in needed}
        while others := {self._claimed[path].task for path in paths if path in self._claimed}:
            await asyncio.wait(others)
        mine = [info for info in infos if info.store_path not in self._valid]
        if not mine:
            return None
        transfer = self._begin(
            mine, lambda: patiently(lambda: self._add(mine, sources, log, over, self._stand_back)), log, ahead=True
        )
        return await asyncio.shield(transfer.task)

    async def _stand_back(self) -> None:
        """Let the bytes that leases wait for go first."""
        if not self._may_bring.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(STANDS_BACK_S):
                    await self._may_bring.wait()


class _NarsAhead:
    """The NARs of a transfer in order; small ones are downloaded while those before them are sent."""

    def __init__(
        self,
        infos: Sequence[NarInfo],
        sources: FarmSources,
        clock: Clock,
        log: FetchLog,
        pace: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`pace` is waited for before each piece."""
        self._infos = infos
        self._sources = sources
        self._clock = clock
        self._log = log
        self._pace = pace
        #: Downloads of the infos from `_next` on backwards, oldest first; at most AHEAD.
        self._ahead: deque[tuple[int, asyncio.Task[bytes]]] = deque()
        self._next = 0

    def uploads(self) -> list[Upload]:
        """Return the paths as `add_multiple_to_store` takes them; the NARs must be read in order, each once."""
        return [self._sources.upload(info, self._nar(number)) for number, info in enumerate(self._infos)]

    async def close(self) -> None:
        """Stop downloads that no transfer wants any more."""
        tasks = [task for _, task in self._ahead]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _nar(self, number: int) -> AsyncIterator[bytes]:
        self._look_ahead(number)
        if self._ahead and self._ahead[0][0] == number:
            _, task = self._ahead[0]
            data = await task
            self._ahead.popleft()
            yield data
            return
        async with aclosing(self._read(self._infos[number])) as chunks:
            async for chunk in chunks:
                yield chunk

    def _look_ahead(self, number: int) -> None:
        self._next = max(self._next, number)
        while self._next < len(self._infos) and len(self._ahead) < AHEAD:
            info = self._infos[self._next]
            if info.path.nar_size > AHEAD_BYTES:
                if self._next > number:
                    return
            else:
                self._ahead.append((self._next, asyncio.create_task(self._whole(info))))
            self._next += 1

    async def _whole(self, info: NarInfo) -> bytes:
        async with aclosing(self._read(info)) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def _read(self, info: NarInfo) -> AsyncGenerator[bytes, None]:
        """Yield a NAR, and note it in the log when all of it has come."""
        began = self._clock.now()
        counted = self._log.moving.counted
        async with aclosing(self._sources.nar(info)) as nar, aclosing(counted(nar, info.store_path)) as chunks:
            async for chunk in chunks:
                if self._pace is not None:
                    await self._pace()
                yield chunk
        took_s = self._clock.now() - began
        self._log.add(Fetched(info.path.nar_size, info.store_path, self._sources.kind, began, took_s))
