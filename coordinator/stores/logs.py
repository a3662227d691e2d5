"""Build logs as files: `LOGS/<first two of the key>/<key>/<attempt>.log`, raw bytes as the builder wrote them.

A log lies here while its attempt runs and while it is read. `coordinator.engine.log_archiver` moves those of ended
attempts to the archive; a reader, or a late chunk, brings a log back. What stays of a failed attempt's is its tail.

Workers send chunks with their offset and may send them again, so a file's size says what is already here: repeats are
dropped, and writing is idempotent. Bytes that never came read as zeros. All writing happens in one thread of its own:
a slow disk holds up the batch that waits for it, not the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from coordinator.errors import CoordinatorError, NotFoundError
from coordinator.stores.log_archive import LogArchive
from coordinator.terminal_controls import harmless
from infra.objects.errors import ObjectStoreError
from workers.wire.messages import LogChunk

#: Files kept open for appending.
OPEN_FILES = 128
#: Bytes read at one time.
READ_BYTES = 64 * 1024
#: Bytes and lines of a tail.
TAIL_BYTES = 8 * 1024
TAIL_LINES = 20
#: A follower looks again after this many seconds even if no write woke it.
_FOLLOW_WAIT_S = 5.0

#: Endings of a log and of what is kept of one that was moved to the archive.
_LOG, _TAIL = ".log", ".tail"

_log = logging.getLogger(__name__)

_SAFE_KEY = re.compile(r"[A-Za-z0-9+_=][A-Za-z0-9+._?=-]{0,254}")


class LogError(CoordinatorError):
    """A log cannot be written."""

    code: ClassVar[str] = "log"


@dataclass(frozen=True, slots=True)
class LocalLog:
    """A log, or the tail of one, that lies on this machine."""

    step: str
    attempt: int
    path: Path
    size: int
    #: Unix seconds of the last write, or of the last restoration.
    written_at: float
    is_tail: bool


class LogStore:
    """All logs of a farm. `max_bytes` bounds one file; what a worker sends beyond it is dropped."""

    def __init__(self, root: Path, max_bytes: int, archive: LogArchive) -> None:
        self._root = root
        self._archive = archive
        self._max_bytes = max_bytes
        self._io = ThreadPoolExecutor(max_workers=1, thread_name_prefix="drover-logs")
        #: Descriptor and size, least recently used first; touched by the I/O thread only.
        self._open: OrderedDict[Path, tuple[int, int]] = OrderedDict()
        self._followers: dict[Path, set[asyncio.Event]] = {}
        #: Logs of this machine that the archive has too, at this size.
        self._archived: dict[Path, int] = {}
        #: Restorations under way: the second reader of a log waits for the first one's.
        self._restoring: dict[Path, asyncio.Task[bool]] = {}

    @property
    def open_files(self) -> int:
        """Number of logs whose file is open."""
        return len(self._open)

    @property
    def followed(self) -> int:
        """Number of logs that are followed while they grow."""
        return len(self._followers)

    async def close(self) -> None:
        """Close all files; nothing may be written afterwards."""
        await asyncio.get_running_loop().run_in_executor(self._io, self._close_all)
        self._io.shutdown()

    async def append(self, chunks: Sequence[LogChunk], ended: Collection[tuple[str, int]] = ()) -> None:
        """Write chunks; repeats change nothing. Logs of `ended` attempts (step, number) may be in the archive by now.

        Raises `LogError` where the disk will not take them.
        """
        if not chunks:
            return
        paths = [self._path(chunk.step, chunk.attempt) for chunk in chunks]
        pairs = list(zip(paths, chunks, strict=True))
        for path, chunk in pairs:
            if (chunk.offset or (chunk.step, chunk.attempt) in ended) and not path.exists():
                await self._bring_back(path, chunk)
        await asyncio.get_running_loop().run_in_executor(self._io, self._write_all, pairs)
        for path in dict.fromkeys(paths):
            self._wake(path)

    def wake(self, step: str, attempt: int) -> None:
        """Let followers look again, because the attempt has ended."""
        if self._followers:
            self._wake(self._path(step, attempt))

    async def file(self, step: str, attempt: int) -> Path | None:
        """Return the log's file, brought back from the archive where it lies there; None where nothing was logged.

        It stays for as long after this call as after a write, so that it can be read at leisure. Raises `LogError`
        where the archive does not answer.
        """
        path = self._path(step, attempt)
        try:
            await asyncio.to_thread(os.utime, path)
        except OSError:
            return path if await self._restore(path, step, attempt) else None
        return path

    def tail(self, step: str, attempt: int, lines: int = TAIL_LINES) -> str:
        """Return the last lines without what a terminal would obey (`harmless`). Nothing if there is no log."""
        path = self._path(step, attempt)
        data = _tail_of(path) or _tail_of(path.with_suffix(_TAIL)) or b""
        text = data.decode("utf-8", "replace").replace("\r\n", "\n").rstrip("\n")
        return harmless("\n".join(text.split("\n")[-lines:]))

    async def read(self, step: str, attempt: int, running: Callable[[], bool] | None = None) -> AsyncIterator[bytes]:
        """Yield the log from its start, raw; with `running`, go on until that is false and all is read.

        An attempt that printed nothing has an empty log.
        """
        path = self._path(step, attempt)
        woken = asyncio.Event()
        self._followers.setdefault(path, set()).add(woken)
        try:
            offset = 0
            while True:
                woken.clear()
                # Asked before reading: what came in between is then read by the next round.
                more = running is not None and running()
                while data := await self._read_at(step, attempt, offset):
                    offset += len(data)
                    yield data
                if not more:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_FOLLOW_WAIT_S):
                        await woken.wait()
        finally:
            followers = self._followers[path]
            followers.discard(woken)
            if not followers:
                del self._followers[path]

    async def local(self) -> list[LocalLog]:
        """Return all logs and tails that lie on this machine."""
        return await asyncio.get_running_loop().run_in_executor(self._io, self._scan)

    async def archive(self, log: LocalLog, *, keep_tail: bool) -> None:
        """Move a log of an ended attempt to the archive, unless it is written to, or wanted, meanwhile.

        Raises `ObjectStoreError` where the archive does not take it; nothing is lost then.
        """
        with contextlib.suppress(FileNotFoundError):
            if self._archived.get(log.path) != log.size:
                await self._archive.put(log.step, log.attempt, log.path)
                self._archived[log.path] = log.size
            await asyncio.get_running_loop().run_in_executor(self._io, self._let_go, log, keep_tail)

    async def expire(self, before: float) -> int:
        """Delete archived logs of before this moment (Unix seconds); returns how many. Raises `ObjectStoreError`."""
        return await self._archive.expire(before)

    async def forget_tail(self, log: LocalLog) -> None:
        """Delete the tail of a log that is no longer one of a failed step."""
        await asyncio.get_running_loop().run_in_executor(self._io, _remove, log.path)

    async def keep_tail(self, step: str, attempt: int) -> None:
        """Have the tail of a failed attempt on this machine, as far as the archive has the log. Raises `LogError`.

        The log itself does not stay: many at a time would fill the disk.
        """
        path = self._path(step, attempt)
        if path.exists() or path.with_suffix(_TAIL).exists() or not await self._restore(path, step, attempt):
            return
        known = _described(path)
        if known is not None:
            await asyncio.get_running_loop().run_in_executor(self._io, self._let_go, known, True)

    async def _bring_back(self, path: Path, chunk: LogChunk) -> None:
        """Restore what comes before a late chunk; where that cannot be, it reads as zeros."""
        try:
            await self._restore(path, chunk.step, chunk.attempt)
        except LogError as error:
            _log.warning("%s", error)

    async def _restore(self, path: Path, step: str, attempt: int) -> bool:
        task = self._restoring.get(path)
        if task is None:
            task = self._restoring[path] = asyncio.create_task(self._fetch(path, step, attempt))
            task.add_done_callback(lambda _: self._restoring.pop(path, None))
        # One reader that leaves must not break off what others wait for.
        return await asyncio.shield(task)

    async def _fetch(self, path: Path, step: str, attempt: int) -> bool:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            size = await self._archive.get(step, attempt, path)
            if size is not None:
                self._archived[path] = size
            else:
                await asyncio.get_running_loop().run_in_executor(self._io, _remove_empty, path.parent)
        except ObjectStoreError as error:
            raise LogError(f"cannot read an archived log: {error}.") from None
        except OSError as error:
            raise LogError(f"cannot unpack an archived log: {error.strerror}.") from None
        return size is not None

    async def _read_at(self, step: str, attempt: int, offset: int) -> bytes:
        path = self._path(step, attempt)
        data = await asyncio.to_thread(_read_at, path, offset)
        if data is None and await self._restore(path, step, attempt):
            data = await asyncio.to_thread(_read_at, path, offset)
        return data or b""

    def _path(self, step: str, attempt: int) -> Path:
        # Keys come from the wire: none may name a place outside the root.
        if _SAFE_KEY.fullmatch(step) is None or attempt < 0:
            raise NotFoundError("that is not the key of a step.")
        return self._root / step[:2] / step / f"{attempt}{_LOG}"

    def _wake(self, path: Path) -> None:
        for woken in self._followers.get(path, ()):
            woken.set()

    def _write_all(self, pairs: Sequence[tuple[Path, LogChunk]]) -> None:
        try:
            for path, chunk in pairs:
                self._write(path, chunk)
        except OSError as error:
            raise LogError(f"cannot write build logs: {error.strerror}.") from None

    def _write(self, path: Path, chunk: LogChunk) -> None:
        descriptor, size = self._handle(path)
        end = min(chunk.offset + len(chunk.data), self._max_bytes)
        start = max(size, chunk.offset)
        while start < end:
            start += os.pwrite(descriptor, chunk.data[start - chunk.offset : end - chunk.offset], start)
        self._open[path] = (descriptor, max(size, end))

    def _handle(self, path: Path) -> tuple[int, int]:
        known = self._open.get(path)
        if known is not None:
            self._open.move_to_end(path)
            return known
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._open[path] = (descriptor, os.fstat(descriptor).st_size)
        while len(self._open) > OPEN_FILES:
            _, (oldest, _) = self._open.popitem(last=False)
            os.close(oldest)
        return self._open[path]

    def _scan(self) -> list[LocalLog]:
        found: list[LocalLog] = []
        for path in self._root.glob("*/*/*"):
            if path.suffix not in (_LOG, _TAIL) or not path.stem.isdecimal():
                continue
            known = _described(path)
            if known is not None:
                found.append(known)
        return found

    def _let_go(self, log: LocalLog, keep_tail: bool) -> None:
        """Delete a log that is in the archive, unless it has grown or was wanted since."""
        with contextlib.suppress(OSError):
            if _described(log.path) != log:
                return
            tail = log.path.with_suffix(_TAIL)
            if keep_tail:
                fresh = tail.with_name(f"{tail.name}.new")
                fresh.write_bytes(_tail_of(log.path) or b"")
                fresh.replace(tail)
            self._archived.pop(log.path, None)
            known = self._open.pop(log.path, None)
            if known is not None:
                os.close(known[0])
            _remove(log.path)

    def _close_all(self) -> None:
        while self._open:
            _, (descriptor, _) = self._open.popitem()
            os.close(descriptor)


def _described(path: Path) -> LocalLog | None:
    """Return the description of a log or a tail; None where it is gone."""
    try:
        known = path.stat()
    except OSError:
        return None
    return LocalLog(path.parent.name, int(path.stem), path, known.st_size, known.st_mtime, is_tail=path.suffix == _TAIL)


def _read_at(path: Path, offset: int) -> bytes | None:
    """Return the bytes from `offset` on, at most READ_BYTES; None where the file is not there."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(READ_BYTES)
    except FileNotFoundError:
        return None


def _tail_of(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read(TAIL_BYTES)
    except OSError:
        return None


def _remove(path: Path) -> None:
    """Delete a file, and the directories that are empty then."""
    with contextlib.suppress(OSError):
        path.unlink()
    _remove_empty(path.parent)


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
        directory.parent.rmdir()
