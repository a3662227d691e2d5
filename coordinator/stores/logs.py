"""Build logs as files: `LOGS/<first two of the key>/<key>/<attempt>.log`, raw bytes as the builder wrote them.

Workers send chunks with their offset and may send them again, so a file's size says what is already here: repeats are
dropped, and writing is idempotent. Bytes that never came read as zeros. All writing happens in one thread of its own:
a slow disk holds up the batch that waits for it, not the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from coordinator.errors import CoordinatorError, NotFoundError
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

_SAFE_KEY = re.compile(r"[A-Za-z0-9+_=][A-Za-z0-9+._?=-]{0,254}")
_UNPRINTABLE = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")


class LogError(CoordinatorError):
    """A log cannot be written."""

    code: ClassVar[str] = "log"


class LogStore:
    """All logs of a farm. `max_bytes` bounds one file; what a worker sends beyond it is dropped."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._io = ThreadPoolExecutor(max_workers=1, thread_name_prefix="drover-logs")
        #: Descriptor and size, least recently used first; touched by the I/O thread only.
        self._open: OrderedDict[Path, tuple[int, int]] = OrderedDict()
        self._followers: dict[Path, set[asyncio.Event]] = {}

    async def close(self) -> None:
        """Close all files; nothing may be written afterwards."""
        await asyncio.get_running_loop().run_in_executor(self._io, self._close_all)
        self._io.shutdown()

    async def append(self, chunks: Sequence[LogChunk]) -> None:
        """Write chunks; repeats change nothing. Raises `LogError` where the disk will not take them."""
        if not chunks:
            return
        paths = [self._path(chunk.step, chunk.attempt) for chunk in chunks]
        pairs = list(zip(paths, chunks, strict=True))
        await asyncio.get_running_loop().run_in_executor(self._io, self._write_all, pairs)
        for path in dict.fromkeys(paths):
            self._wake(path)

    def wake(self, step: str, attempt: int) -> None:
        """Let followers look again, because the attempt has ended."""
        self._wake(self._path(step, attempt))

    def exists(self, step: str, attempt: int) -> bool:
        """Return whether anything was logged."""
        return self._path(step, attempt).exists()

    def tail(self, step: str, attempt: int, lines: int = TAIL_LINES) -> str:
        """Return the last lines, fit for a terminal: control characters become `?`. Nothing if there is no log."""
        try:
            with self._path(step, attempt).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - TAIL_BYTES))
                data = file.read(TAIL_BYTES)
        except OSError:
            return ""
        text = data.decode("utf-8", "replace").replace("\r\n", "\n").rstrip("\n")
        return _UNPRINTABLE.sub("?", "\n".join(text.split("\n")[-lines:]))

    async def read(self, step: str, attempt: int, running: Callable[[], bool] | None = None) -> AsyncIterator[bytes]:
        """Yield the log from its start, raw; with `running`, go on until that says no and all is read.

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
                while data := await asyncio.to_thread(_read_at, path, offset):
                    offset += len(data)
                    yield data
                if not more:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), _FOLLOW_WAIT_S)
        finally:
            followers = self._followers[path]
            followers.discard(woken)
            if not followers:
                del self._followers[path]

    def _path(self, step: str, attempt: int) -> Path:
        # Keys come from the wire: none may name a place outside the root.
        if _SAFE_KEY.fullmatch(step) is None or attempt < 0:
            raise NotFoundError("that is not the key of a step.")
        return self._root / step[:2] / step / f"{attempt}.log"

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

    def _close_all(self) -> None:
        while self._open:
            _, (descriptor, _) = self._open.popitem()
            os.close(descriptor)


def _read_at(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(READ_BYTES)
    except FileNotFoundError:
        return b""
