"""A lease's inputs become valid in the worker's store, fetched once however many leases want them.

    planning (one at a time): root the paths, ask the store which are valid, ask the cache for the narinfos of the rest
    with their closure, check every signature, and claim the paths that no transfer fetches yet;
    transfer (several at a time): wait for what others fetch, then stream the NARs into the store, references first.

Requests to a cache that does not answer, or a store that breaks off, are repeated for a while before the lease is given
back.

A path that was rooted and seen valid stays so for as long as the roots connection lives, so it is never looked up
again. A plan waits only for plans that claimed before it, so no two wait for each other.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import aiohttp

from infra.clock import Clock
from infra.daemon import DaemonGone, DaemonOperationError, Upload
from infra.dependency_order import CycleError, inputs_first
from infra.nix import narinfo
from infra.nix.errors import NixError
from infra.nix.narinfo import NarInfo
from infra.nix.signing import PublicKey
from infra.nix.store_path import StoreDir, base_name_of
from infra.objects.errors import CacheError, ObjectMissingError, ObjectStoreError, StoreUnreachableError
from infra.objects.http_source import fetch_nar_over_http
from infra.objects.nar_reader import fetch_nar
from infra.objects.store import ObjectStore, open_object_store
from infra.retry import Outage, retrying
from infra.substituter.closures import (
    QUESTION_PATHS,
    ClosureAnswer,
    QuestionAnswerError,
    QuestionRefusedError,
)
from infra.upload.client import UploadClient, upload_connections
from workers.agent.attempt_record import AttemptRecord, Fetched, FetchLog, Moving
from workers.agent.daemon_pool import DaemonSession, SessionPool
from workers.errors import WorkerError
from workers.wire.measures import FetchSource
from workers.wire.messages import MAX_MISSING, FarmInfo

#: Seconds for one question to the cache, in all and until it connects.
QUESTION_S = 60.0
CONNECT_S = 10.0
#: Seconds for which requests to a cache that does not answer, or to a store that fails, are repeated.
AWAY_S = 60.0
#: Paths that the inputs of one lease may reach.
MAX_CLOSURE = 100_000
#: NARs up to this size are downloaded ahead of their turn, so many at a time.
AHEAD_BYTES = 1024 * 1024
AHEAD = 8
#: Streams into the store at one time.
TRANSFERS = 2
#: Seconds within which the farm's object store must answer a worker that is to use it itself.
STORE_WITHIN_S = 10.0
#: Paths remembered as valid; beyond it they are looked up again.
MAX_REMEMBERED = 200_000

_log = logging.getLogger(__name__)


_Result = TypeVar("_Result")


class InputError(WorkerError):
    """An input cannot be had; the message names it.

    Attributes:
        missing: Full paths that the farm's cache, or its object store, does not have; at most MAX_MISSING.
    """

    def __init__(self, message: str, missing: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)[:MAX_MISSING]


class InputAwayError(InputError):
    """An input cannot be had at the moment."""


class FarmSources:
    """Source of one farm's inputs and target of its outputs: its cache over HTTP, its object store. Must be closed.

    `store` is None where this machine does not see the object store; the coordinator's address is then all it needs.
    """

    def __init__(self, farm: FarmInfo, store: ObjectStore | None) -> None:
        """Raises `infra.nix.errors.NixError` for a public key or a store directory that cannot be read."""
        self.farm = farm
        self.store = store
        self.store_dir = StoreDir(farm.store_dir)
        self._keys = tuple(PublicKey.parse(text) for text in farm.public_keys)
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=QUESTION_S, connect=CONNECT_S), auto_decompress=True
        )
        self._upload_connections = upload_connections()

    async def close(self) -> None:
        """Close the connections to the cache."""
        self._upload_connections.close()
        await self._session.close()

    async def narinfos(self, paths: Iterable[str]) -> list[NarInfo]:
        """Return the verified narinfos of the closure of full paths, references first.

        Raises `InputError` where a member is not in the cache, is not signed by the farm, or the cache does not answer.
        """
        known: dict[str, NarInfo] = {}
        wanted = sorted({base_name_of(path) for path in paths})
        while wanted:
            if len(known) > MAX_CLOSURE:
                raise InputError(f"the inputs reach more than {MAX_CLOSURE} paths")
            batch, wanted = wanted[:QUESTION_PATHS], wanted[QUESTION_PATHS:]
            infos = await self._request_infos(batch)
            found = {info.base_name: info for info in infos}
            if not found.keys() >= set(batch):
                raise InputError("the cache's answer lacks paths that were asked for")
            known |= found
            # An answer is bounded: what it only refers to is requested in turn.
            beyond = {reference for info in infos for reference in info.path.references}
            wanted = sorted((beyond | set(wanted)) - known.keys())
        infos = _references_first(known)
        for info in infos:
            fingerprint = info.path.fingerprint()
            if not any(key.verify(fingerprint, sig) for key in self._keys for sig in info.path.sigs):
                raise InputError(f"{info.store_path} is not signed by a key of the farm")
        return infos

    async def _request_infos(self, names: Sequence[str]) -> list[NarInfo]:
        """Ask for narinfos by base name, with as much of their closure as the cache answers. Raises `InputError`."""
        texts, missing = await _patiently(partial(self._ask, names))
        if missing:
            paths = [self.store_dir.full(name) for name in missing[:MAX_MISSING]]
            raise InputError(f"{paths[0]} is not in the farm's cache", paths)
        try:
            return [narinfo.parse(text, self.store_dir) for text in texts]
        except NixError as error:
            raise InputError(f"the cache's answer cannot be read: {error}") from error

    @property
    def kind(self) -> FetchSource:
        """Source that `nar` reads."""
        return "cache" if self.store is None else "objects"

    async def nar(self, info: NarInfo) -> AsyncGenerator[bytes, None]:
        """Yield the NAR of a narinfo, verified by its end. Raises `InputError`."""
        if self.store is None:
            url = f"{self.farm.cache_url}/{info.stored.url}"
            source = fetch_nar_over_http(self._session, url, self._authorization(), info)
        else:
            source = fetch_nar(self.store, info)
        try:
            async with aclosing(source) as chunks:
                async for chunk in chunks:
                    yield chunk
        except CacheError as error:
            gone = isinstance(error, ObjectMissingError)
            raise (InputAwayError if isinstance(error, ObjectStoreError) and not gone else InputError)(
                f"{info.store_path}: {error}", [info.store_path] if gone else ()
            ) from error

    def upload(self, info: NarInfo, nar: AsyncIterator[bytes]) -> Upload:
        """Return what adds a path to the worker's store; its narinfo is one of `narinfos`."""
        return Upload(info.path, nar)

    def uploads(self, token: str) -> UploadClient:
        """Return what uploads outputs over HTTP with the token of a lease."""
        return UploadClient(self._upload_connections, self.farm.cache_url, token)

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.farm.cache_token}"} if self.farm.cache_token else {}

    async def _ask(self, names: Sequence[str]) -> tuple[list[bytes], list[str]]:
        """Return the narinfos of a closure, and the base names that the cache lacks. Raises `InputError`."""
        question = ClosureAnswer(self._session, self.farm.cache_url, self._authorization(), names)
        texts: list[bytes] = []
        try:
            async with aclosing(question.narinfos()) as pages:
                async for page in pages:
                    texts += page
                    if len(texts) > MAX_CLOSURE:
                        raise InputError(f"the inputs reach more than {MAX_CLOSURE} paths")
        except QuestionRefusedError as error:
            kind = InputError if error.status < 500 else InputAwayError
            problem = f"answered with status {error.status}"
        except QuestionAnswerError as error:
            raise InputError(f"the cache's answer cannot be read: {error}") from error
        except TimeoutError:
            kind, problem = InputAwayError, f"did not answer within {QUESTION_S:.0f} s"
        except aiohttp.ClientError as error:
            kind, problem = InputAwayError, f"cannot be asked ({error})"
        else:
            return texts, question.missing
        raise kind(f"the farm's cache at {self.farm.cache_url} {problem}")


async def _patiently(call: Callable[[], Awaitable[_Result]]) -> _Result:
    """Return what `call` gives, repeating it while the cache or the store is away, at most `AWAY_S`."""
    outage = Outage(_log, "it is asked again", over="inputs can be had again")
    return await retrying(call, AWAY_S, outage, _away)


def _away(error: Exception) -> str:
    return str(error) if isinstance(error, InputAwayError) else ""


def _references_first(infos: Mapping[str, NarInfo]) -> list[NarInfo]:
    """Order a closure. Raises `InputError` where it runs in a circle, which no published closure does."""
    try:
        return [infos[name] for name in inputs_first(infos, lambda name: _others(infos[name]))]
    except CycleError:
        raise InputError("the cache's answer has paths that refer to each other in a circle") from None


def _others(info: NarInfo) -> list[str]:
    return [name for name in info.path.references if name != info.base_name]


async def open_sources(farm: FarmInfo) -> FarmSources:
    """Return the sources of a farm, over its object store if this machine sees it.

    Raises:
        CacheError: the object store is not seen, and the farm takes no uploads over HTTP either.
        NixError: see `FarmSources`.
    """
    return FarmSources(farm, await _reachable_store(farm))


async def _reachable_store(farm: FarmInfo) -> ObjectStore | None:
    """Return the farm's object store if this machine sees it, None if all must go over HTTP.

    Raises `StoreUnreachableError` where the farm takes no uploads over HTTP either.
    """
    store = open_object_store(farm.object_store_url)
    try:
        # Without credentials, looking for some may take a while that is not ours to wait.
        async with asyncio.timeout(STORE_WITHIN_S):
            mark = await store.check_marker()
    except (StoreUnreachableError, TimeoutError):
        if farm.takes_uploads:
            return None
        raise
    if farm.store_mark and mark != farm.store_mark:
        if farm.takes_uploads:
            return None
        raise StoreUnreachableError(f"this machine sees another object store at {store.url}, not the farm's")
    return store


@dataclass(frozen=True, slots=True, eq=False)
class _Transfer:
    """Paths on their way into the store. The task never raises: it returns its error."""

    task: asyncio.Task[Exception | None]
    log: FetchLog


class InputFetcher:
    """Makes paths valid; see the module's text. Its tasks live in `group`."""

    def __init__(
        self,
        roots: DaemonSession,
        transfers: SessionPool,
        group: asyncio.TaskGroup,
        clock: Clock,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        """`moved` is called with each piece that comes."""
        self._moved = moved
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
        async with self._planning:
            earlier, own = await self._plan(set(paths), sources)
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
        work = self._transfer(mine, sources, frozenset(transfer.task for transfer in earlier), log)
        own = _Transfer(self._group.create_task(work, name="fetch inputs"), log)
        self._tasks.add(own.task)
        own.task.add_done_callback(self._tasks.discard)
        for info in mine:
            self._claimed[info.store_path] = own
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
            if self._generation != self._roots.generation or len(self._valid) > MAX_REMEMBERED:
                self._valid.clear()
                self._generation = self._roots.generation
            unknown = paths - self._valid
            if unknown:
                await connection.add_temp_roots(sorted(unknown))
                self._valid |= await connection.query_valid_paths(unknown)
            return paths - self._valid

    async def _transfer(
        self,
        infos: Sequence[NarInfo],
        sources: FarmSources,
        earlier: frozenset[asyncio.Task[Exception | None]],
        log: FetchLog,
    ) -> Exception | None:
        """Add the paths; the error is returned, because every lease that waits wants it."""
        try:
            for task in earlier:
                error = await asyncio.shield(task)
                if error is not None:
                    return error
            await self._stream(infos, sources, log)
        except Exception as error:  # noqa: BLE001 - handed to every waiting lease, which reports it
            return error
        finally:
            for info in infos:
                del self._claimed[info.store_path]
        return None

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

        await _patiently(stream)

    async def _add(self, infos: Sequence[NarInfo], sources: FarmSources, fetches: FetchLog) -> None:
        async with self._transfers.use() as connection:
            stream = _NarsAhead(infos, sources, self._clock, fetches)
            try:
                # The signatures are verified above, with the farm's keys; the daemon has its own list.
                await connection.add_multiple_to_store(stream.uploads(), dont_check_sigs=True)
            except DaemonOperationError as refused:
                raise InputError(f"the store refuses an input: {refused}") from refused
            finally:
                await stream.close()
        self._valid.update(info.store_path for info in infos)


class _NarsAhead:
    """The NARs of a transfer in order; small ones are downloaded while those before them are sent."""

    def __init__(self, infos: Sequence[NarInfo], sources: FarmSources, clock: Clock, log: FetchLog) -> None:
        self._infos = infos
        self._sources = sources
        self._clock = clock
        self._log = log
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
                yield chunk
        took_s = self._clock.now() - began
        self._log.add(Fetched(info.path.nar_size, info.store_path, self._sources.kind, began, took_s))
