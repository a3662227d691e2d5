"""Outputs as they lie in the worker's store: their records from the daemon, their NARs from their files.

The files are read where the agent sees them, in one walk that hashes and compresses too, and in the end writes, in one
thread: through the daemon each byte passes a pipe and the event loop, which costs more than all of that. What was read
counts only if it is the NAR that Nix recorded when it registered the output; else, and where files cannot be read, the
daemon is asked for the NAR.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType

from infra.daemon import DaemonConnection, DaemonGone
from infra.nar_files import dump
from infra.nix.errors import NixError
from infra.nix.path_info import PathInfo
from infra.nix.store_path import base_name_of
from infra.objects.compression import Compression
from infra.objects.errors import WrongNarError
from infra.objects.nar_encoder import CompressedNar, UploadedNar, compressing, compressing_files
from infra.objects.nar_writer import store_nar_now, upload_compressed
from infra.objects.store import LocalObjectStore, ObjectStore
from workers.agent.attempt_record import Moving
from workers.agent.daemon_pool import SessionPool
from workers.errors import WorkerError

NOTHING_KNOWN: Mapping[str, PathInfo] = MappingProxyType({})
#: Outputs that are read at one time, and connections that are there for it, so that slots are free for the next build.
READERS = 2
#: Largest NAR that is read without a change of threads: some files.
HERE_BYTES = 8 * 1024
#: NAR bytes that are counted together while files are read.
COUNTED_BYTES = 1024 * 1024


class OutputError(WorkerError):
    """An output is not where the daemon reported it, or could not be put into the object store."""


class FilesUnreadableError(OutputError):
    """The files of an output are not to be read by this process, or are not what Nix recorded."""


class _LeftError(Exception):
    """The reader has been left: its caller was cancelled."""


class OutputReader:
    """Reads outputs of one worker; `store` is where their files lie, None where all are read through the daemon."""

    def __init__(self, sessions: SessionPool, store: Path | None) -> None:
        self._sessions = sessions
        self._store = store
        self._turns = asyncio.Semaphore(READERS)

    async def infos(self, paths: Sequence[str], known: Mapping[str, PathInfo] = NOTHING_KNOWN) -> dict[str, PathInfo]:
        """Return what the store knows of full paths; a reader whose daemon is gone is replaced once.

        Those that are `known` are not asked for. Raises `OutputError` for one that is not valid,
        `infra.daemon.DaemonError` or `DaemonUnreachableError`.
        """
        asked = [path for path in paths if path not in known]
        if not asked:
            return {path: known[path] for path in paths}
        try:
            return {**known, **(await self._infos(asked))}
        except DaemonGone:
            return {**known, **(await self._infos(asked))}

    async def stored(
        self, info: PathInfo, store: ObjectStore, compression: Compression, moving: Moving, *, files: bool
    ) -> UploadedNar:
        """Put an output into the object store; `files` says whether its files may be read.

        Raises `FilesUnreadableError`, `OutputError` where it has changed, `infra.objects.errors.CacheError`, or as
        `infos`.
        """
        at = self._at(info, files=files)
        if at is not None and isinstance(store, LocalObjectStore):
            return await self._stored_from_files(at, info, store, compression, moving)
        async with self.packed(info, compression, moving, files=files) as nar:
            made = await upload_compressed(store, nar)
        if (made.nar_hash, made.nar_size) == (info.nar_hash, info.nar_size):
            return made
        raise (FilesUnreadableError if at is not None else OutputError)(
            f"{info.store_path} changed since it was built: its NAR has another hash than the store recorded"
        )

    @asynccontextmanager
    async def packed(
        self, info: PathInfo, compression: Compression, moving: Moving, *, files: bool
    ) -> AsyncIterator[CompressedNar]:
        """Give the compressed NAR of an output, whose hash the caller checks; arguments and errors as `stored`."""
        at = self._at(info, files=files)
        if at is not None:
            chunks = _FileChunks(at, info.store_path, _from_threads(moving))
            async with self._turns, compressing_files(chunks, compression) as nar:
                yield nar
            return
        async with (
            self._sessions.use() as connection,
            aclosing(connection.nar_from_path(info.store_path, info.nar_size)) as nar_bytes,
            aclosing(moving.counted(nar_bytes, info.store_path)) as counted,
            compressing(counted, compression) as nar,
        ):
            yield nar

    async def _infos(self, paths: Sequence[str]) -> dict[str, PathInfo]:
        async with self._sessions.use() as connection:
            return {path: await _info(connection, path) for path in paths}

    def _at(self, info: PathInfo, *, files: bool) -> Path | None:
        """Return where the files of an output lie, None where the daemon is to be asked."""
        return self._store / base_name_of(info.store_path) if files and self._store is not None else None

    async def _stored_from_files(
        self, at: Path, info: PathInfo, store: LocalObjectStore, compression: Compression, moving: Moving
    ) -> UploadedNar:
        here = info.nar_size <= HERE_BYTES
        chunks = _FileChunks(at, info.store_path, moving.add if here else _from_threads(moving))
        work = partial(store_nar_now, store, chunks, compression, info.nar_hash, info.nar_size)
        try:
            if here:
                return work()
            async with self._turns:
                return await _in_thread(work, chunks)
        except WrongNarError as error:
            raise FilesUnreadableError(f"{info.store_path} is not what the store recorded: {error}") from error


class _FileChunks(Iterator[bytes]):
    """The NAR of files, for a thread that may block; `count` gets the path and how many bytes more were read of it.

    Raises `FilesUnreadableError`, and `_LeftError` once it was left.
    """

    def __init__(self, at: Path, path: str, count: Callable[[str, int], object]) -> None:
        self._chunks = dump(at, case_hack=sys.platform == "darwin")
        self._path = path
        self._tell = count
        self._uncounted = self._counted = 0
        self._left = False

    def __next__(self) -> bytes:
        if self._left:
            raise _LeftError
        try:
            chunk = next(self._chunks, b"")
        except (OSError, NixError) as error:
            self._count(-self._counted)
            raise FilesUnreadableError(f"the files of {self._path} cannot be read: {error}") from error
        self._uncounted += len(chunk)
        if self._uncounted >= COUNTED_BYTES or not chunk:
            self._count(self._uncounted)
            self._uncounted = 0
        if not chunk:
            raise StopIteration
        return chunk

    def leave(self) -> None:
        """Have the thread that reads fail, soon."""
        self._left = True

    def _count(self, size: int) -> None:
        self._counted += size
        self._tell(self._path, size)


def _from_threads(moving: Moving) -> Callable[[str, int], object]:
    """Return what counts in the event loop, for threads."""
    loop = asyncio.get_running_loop()
    return lambda path, size: loop.call_soon_threadsafe(moving.add, path, size)


async def _in_thread(work: Callable[[], UploadedNar], chunks: _FileChunks) -> UploadedNar:
    """Return what `work` does with the chunks in a thread; where this is cancelled, once the thread has ended."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        chunks.leave()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        raise


async def _info(connection: DaemonConnection, path: str) -> PathInfo:
    info = await connection.query_path_info(path)
    if info is None:
        raise OutputError(f"{path} is not in the store although its build succeeded")
    return info
