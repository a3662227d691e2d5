"""Files of the proxy, kept within a bound of bytes: those used longest ago go first.

    DIR/lock            held by the one proxy that uses the directory
    DIR/narinfo/HASH    narinfos as they came, a line with their upstream and time before them
    DIR/nar/NAME        NARs as they came
    DIR/partial/…       what is being written; emptied at start

A large file gets its name once it is whole. A small one is written under its name a little later (`late_writer`), and a
proxy that was killed, or a machine that lost its power, may leave a part of it or nothing: a reader checks what an
earlier run wrote before it uses it. Sizes count in blocks, as the disk does; what is being written comes on top. The
order of use survives a restart in the times of the files, which for new ones are those of writing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Final

from coordinator.cache_proxy.errors import ProxyError
from coordinator.cache_proxy.late_writer import LateWriter

BLOCK_BYTES: Final = 4096
#: Least bound: the largest narinfo and some small NARs.
LEAST_BYTES: Final = 16 * 1024 * 1024
_KINDS: Final = ("narinfo", "nar")


class ProxyFiles:
    """The files. Names are `narinfo/HASH` and `nar/NAME`; a context that holds the lock of its directory."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self.max_bytes = max_bytes
        #: Bytes of all files, in blocks.
        self.size_bytes = 0
        #: Name -> bytes in blocks, those used longest ago first.
        self._sizes: OrderedDict[str, int] = OrderedDict()
        #: Names of files that were verified by this process.
        self._sound: set[str] = set()
        self._lock = -1
        self._partial = 0
        self._writer = LateWriter()

    def open(self) -> None:
        """Take the directory and read what is there.

        Raises:
            ProxyError: another proxy uses it, or it cannot be written.
        """
        try:
            for kind in _KINDS:
                (self._directory / kind).mkdir(parents=True, exist_ok=True)
            self._directory.chmod(0o700)
            self._lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self._directory / "partial", ignore_errors=True)
            (self._directory / "partial").mkdir()
            self._scan()
        except BlockingIOError:
            self.close()
            raise ProxyError(f"another proxy uses {self._directory}; end it, or name another --dir") from None
        except OSError as error:
            self.close()
            raise ProxyError(f"cannot use {self._directory}: {error.strerror}; name another --dir") from None

    def close(self) -> None:
        """Write what waits to be written, and give the directory back."""
        self._writer.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def note_sound(self, name: str) -> None:
        """Note that a file that is here was verified."""
        if name in self._sizes:
            self._sound.add(name)

    def is_sound(self, name: str) -> bool:
        """Return whether a file was verified since it is here and this process runs."""
        return name in self._sound

    def use(self, name: str) -> Path | None:
        """Return where a file is, and note its use; None where there is none."""
        if name not in self._sizes:
            return None
        path = self._directory / name
        self._writer.settle(path)
        try:
            os.utime(path)
        except OSError:
            self.drop(name)
            return None
        self._sizes.move_to_end(name)
        return path

    def read(self, name: str) -> bytes | None:
        """Return a small file's content, None where there is none."""
        waiting = self._writer.content(self._directory / name)
        if waiting is not None:
            self._sizes.move_to_end(name)
            return waiting
        path = self.use(name)
        if path is None:
            return None
        try:
            return path.read_bytes()
        except OSError:
            self.drop(name)
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, soon. One that the disk does not take is dropped."""
        self._writer.write(self._directory / name, content)
        self._enter(name, len(content))

    def partial(self) -> Path:
        """Return a path for something that is being written."""
        self._partial += 1
        return self._directory / "partial" / str(self._partial)

    def require_room(self, size: int) -> None:
        """Raise `OSError` where the disk has no room for a file of this size."""
        if shutil.disk_usage(self._directory).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def adopt(self, name: str, partial: Path, size: int) -> None:
        """Give a whole file its name, and drop others until all are within the bound.

        Raises:
            OSError: the file is not there.
        """
        partial.replace(self._directory / name)
        self._enter(name, size)

    def _enter(self, name: str, size: int) -> None:
        self.size_bytes -= self._sizes.pop(name, 0)
        self._sizes[name] = _blocks(size)
        self.size_bytes += self._sizes[name]
        self._shrink()

    def drop(self, name: str) -> None:
        """Remove a file; there being none is no error."""
        self._sound.discard(name)
        self.size_bytes -= self._sizes.pop(name, 0)
        self._writer.drop(self._directory / name)
        with suppress(OSError):
            (self._directory / name).unlink(missing_ok=True)

    def _scan(self) -> None:
        found: list[tuple[float, str, int]] = []
        for kind in _KINDS:
            with os.scandir(self._directory / kind) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime, f"{kind}/{entry.name}", _blocks(status.st_size)))
        self._sizes = OrderedDict((name, size) for _, name, size in sorted(found))
        self._sound.clear()
        self.size_bytes = sum(self._sizes.values())
        self._shrink()

    def _shrink(self) -> None:
        while self._writer.lost:
            lost = self._writer.lost.popleft()
            self.size_bytes -= self._sizes.pop(f"{lost.parent.name}/{lost.name}", 0)
        while self.size_bytes > self.max_bytes and self._sizes:
            self.drop(next(iter(self._sizes)))


def _blocks(size: int) -> int:
    return -(-max(size, 1) // BLOCK_BYTES) * BLOCK_BYTES
