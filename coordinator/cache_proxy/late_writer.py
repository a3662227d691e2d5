"""Small files written in a thread, in order, while their content is still in memory.

To make a file takes longer than all else that the proxy does for a small path, and on a busy machine the disk waits for
others: the event loop must not. What waits is bounded in bytes; beyond that the caller writes, at the disk's pace.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Final

#: Bytes that wait to be written.
WAITING_BYTES: Final = 16 * 1024 * 1024

_log = logging.getLogger(__name__)


class LateWriter:
    """The writing; all but the thread's own part belongs to one event loop."""

    def __init__(self) -> None:
        #: Path -> what is to be in it. Entered by the event loop, removed under `_writing`.
        self._waiting: dict[Path, bytes] = {}
        self._bytes = 0
        self._queue: SimpleQueue[Path | None] = SimpleQueue()
        self._counting = threading.Lock()
        #: Held while a file is written.
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        #: Files that could not be written; nothing of them is there.
        self.lost: deque[Path] = deque()

    def write(self, path: Path, content: bytes) -> None:
        """Have a file written: soon, or now where much waits."""
        self.drop(path)
        with self._counting:
            is_late = self._bytes + len(content) <= WAITING_BYTES
            self._bytes += len(content)
        self._waiting[path] = content
        if not is_late:
            self.settle(path)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="late writer", daemon=True)
            self._thread.start()
        self._queue.put(path)

    def content(self, path: Path) -> bytes | None:
        """Return what a file that waits will hold, None for any other."""
        return self._waiting.get(path)

    def settle(self, path: Path) -> None:
        """Write a file now if it waits, because it is needed as one."""
        if path in self._waiting:
            with self._writing:
                self._put(path)

    def drop(self, path: Path) -> None:
        """Leave a file that waits unwritten."""
        if path in self._waiting:
            with self._writing:
                self._remove(path)

    def close(self) -> None:
        """Write all that waits."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (path := self._queue.get()) is not None:
            with self._writing:
                self._put(path)

    def _put(self, path: Path) -> None:
        content = self._waiting.get(path)
        if content is None:
            return
        try:
            path.write_bytes(content)
        except OSError as error:
            _log.warning("%s cannot be kept: %s", path, error.strerror)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            self.lost.append(path)
        self._remove(path)

    def _remove(self, path: Path) -> None:
        content = self._waiting.pop(path, b"")
        with self._counting:
            self._bytes -= len(content)
