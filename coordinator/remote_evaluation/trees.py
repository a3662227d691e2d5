"""Trees that clients sent or that were fetched, kept compressed in files named by their content.

They are read again by evaluations only. What is over the bound of all goes first that was used longest ago; what an
evaluation uses stays.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from coordinator.api.trees import TreeBounds, TreeReader, TreeRefusedError
from coordinator.errors import UnavailableError
from coordinator.remote_evaluation.errors import TreeMissingError

#: Trees that are taken at one time.
MAX_STREAMS: Final = 8
_SUFFIX: Final = ".nar.zst"
_PARTIAL: Final = "new-"


class TreeStore:
    """The trees in a directory that is this coordinator's alone."""

    def __init__(self, directory: Path, bounds: TreeBounds, kept_bytes: int) -> None:
        self.bounds = bounds
        self._directory = directory
        self._kept_bytes = kept_bytes
        self._used: Counter[str] = Counter()
        self._streams = 0

    def prepare(self) -> None:
        """Make the directory, and remove what an earlier coordinator was writing. Raises `OSError`."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        for partial in self._directory.glob(f"{_PARTIAL}*"):
            partial.unlink(missing_ok=True)

    async def add(self, body: AsyncIterable[bytes], expected: str = "") -> str:
        """Take a tree; returns its name.

        Raises:
            TreeRefusedError: It is damaged, over a bound, holds what it may not, or is not the `expected` one.
            UnavailableError: Too many trees come, or there is no room for it.
        """
        if self._streams >= MAX_STREAMS:
            raise UnavailableError(f"{MAX_STREAMS} trees are being taken, the limit; send it again in a moment.")
        self._streams += 1
        partial = self._directory / f"{_PARTIAL}{secrets.token_hex(8)}"
        try:
            reader = TreeReader(self.bounds)
            size = 0
            with partial.open("xb", buffering=0) as file:
                async for chunk in body:
                    size += len(chunk)
                    if size > self.bounds.size_bytes:
                        raise TreeRefusedError(f"the tree has more than {self.bounds.size_bytes} bytes, the limit")
                    await asyncio.to_thread(_take, reader, chunk, file.fileno())
            name = reader.finish()
            if expected and name != expected:
                raise TreeRefusedError("the tree is not the one that it is named; files changed while it was sent")
            await asyncio.to_thread(self._keep, partial, name, size)
        except OSError as error:
            raise UnavailableError(f"the tree cannot be kept: {error.strerror}.") from None
        finally:
            self._streams -= 1
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return name

    @contextmanager
    def using(self, name: str) -> Iterator[Path]:
        """Keep a tree for as long as the block runs. Raises `TreeMissingError`."""
        path = self._path(name)
        self._used[name] += 1
        try:
            with suppress(OSError):
                os.utime(path)
            if not path.is_file():
                raise TreeMissingError(f"the tree {name} is not here; send it.")
            yield path
        finally:
            self._used[name] -= 1

    def require(self, name: str) -> None:
        """Raise `TreeMissingError` where a tree is not here."""
        with self.using(name):
            pass

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}{_SUFFIX}"

    def _keep(self, partial: Path, name: str, size: int) -> None:
        """Give a whole tree its name, once there is room for it."""
        kept = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self._directory.glob(f"*{_SUFFIX}"))
        room = self._kept_bytes - size - sum(each for _, each, _ in kept)
        for _, each, path in kept:
            if room >= 0:
                break
            if not self._used[path.name.removesuffix(_SUFFIX)]:
                path.unlink(missing_ok=True)
                room += each
        if room < 0:
            raise UnavailableError("there is no room for one more tree; send it again when evaluations have ended.")
        partial.replace(self._path(name))


def _take(reader: TreeReader, chunk: bytes, file: int) -> None:
    """Check a piece and write it, in a thread."""
    for _ in reader.feed(chunk):
        pass
    view = memoryview(chunk)
    while view:
        view = view[os.write(file, view) :]
