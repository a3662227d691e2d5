"""Archive of build logs: one zstd object an attempt, below `logs/` in the object store of the farm's own cache.

An object store is what a coordinator that takes over shares with the one before it; a state directory is not. The
object has the log as frames of FRAME_BYTES, which `zstd -d` unpacks as one file. It appears whole or not at all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import zstandard

from infra.objects.compression import DecodeError, unpacker
from infra.objects.errors import ObjectMissingError, ObjectStoreError
from infra.objects.store import ObjectStore

#: First segment of the keys. The cache's collector looks at `nar/` alone.
PREFIX: Final = "logs"
#: Bytes of a log that are packed, and unpacked, at a time: bounds memory whatever a log's size.
FRAME_BYTES: Final = 1024 * 1024
#: Logs shrink to a tenth with the fastest levels, and a noisy builder must not cost the coordinator a core.
LEVEL: Final = 3


class LogArchive:
    """Logs of ended attempts. `max_bytes` bounds what is unpacked: workers write to the same object store."""

    def __init__(self, objects: ObjectStore, max_bytes: int) -> None:
        self._objects = objects
        self._max_bytes = max_bytes

    async def put(self, step: str, attempt: int, file: Path) -> None:
        """Store a log, replacing what was there. Raises `ObjectStoreError`, and `OSError` for an unreadable file."""
        await self._objects.put_stream(_key(step, attempt), _packed(file))

    async def get(self, step: str, attempt: int, target: Path) -> int | None:
        """Unpack a log into the new file `target`; returns its size, None where the archive has no such log.

        Raises `ObjectStoreError` where the store does not answer or has other bytes than a log, `OSError` for `target`.
        """
        try:
            return await asyncio.to_thread(self._unpack, _key(step, attempt), target)
        except ObjectMissingError:
            return None

    async def expire(self, before: float) -> int:
        """Delete logs that were stored before this moment (Unix seconds); returns how many."""
        old = [entry.key async for entry in self._objects.list(PREFIX) if entry.modified_at < before]
        for key in old:
            await self._objects.delete(key)
        return len(old)

    def _unpack(self, key: str, target: Path) -> int:
        source = self._objects.open_blocking(key)
        fresh = target.with_name(f"{target.name}.new")
        try:
            reader, size = unpacker("zstd", source, FRAME_BYTES), 0
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                while size < self._max_bytes and (data := reader.read(FRAME_BYTES)):
                    size += file.write(data[: self._max_bytes - size])
            fresh.replace(target)
        except DecodeError as error:
            raise ObjectStoreError(f"{key} in {self._objects.url} is no log: {error}") from None
        finally:
            source.close()
            with suppress(OSError):
                fresh.unlink()
        return size


async def _packed(file: Path) -> AsyncIterator[bytes]:
    packer = zstandard.ZstdCompressor(level=LEVEL)
    with await asyncio.to_thread(file.open, "rb") as log:
        while data := await asyncio.to_thread(log.read, FRAME_BYTES):
            yield await asyncio.to_thread(packer.compress, data)


def _key(step: str, attempt: int) -> str:
    # Names in step keys may hold `?`, which object keys may not; `=` begins what stands for another character.
    quoted = step.replace("=", "=3D").replace("?", "=3F")
    return f"{PREFIX}/{step[:2]}/{quoted}/{attempt}.log.zst"
