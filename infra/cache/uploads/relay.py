"""Objects that arrive in pieces: one file for each slot, hashed while it grows, moved to its place when it is whole.

What will be published is unpacked while it grows too, so that the commit need not read it back; at most MAX_PROOFS
objects at one time, those that began last, and only those that came whole to one process. All others are read back.

The files are the directory `incoming/` of a store that is a directory, so that placing an object is a rename; else they
lie in a directory of the coordinator. They outlive this process and are found again by their slot: a client that
sends the object anew goes on where it ends. The holder of a slot (`Uploads` gives turns) alone may write to it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final

from infra.cache.uploads.errors import BadUploadError, WrongOffsetError
from infra.nix.hashing import sha256_text
from infra.objects.errors import ObjectMissingError, ObjectStoreError, StoreFullError
from infra.objects.nar_encoder import BLOCK_BYTES
from infra.objects.store import FULL, INCOMING, LocalObjectStore, ObjectStore, says_full
from infra.objects.verification import ArrivingNar
from infra.upload.pieces import one_ahead
from infra.upload.protocol import SINGLE_BYTES, SentPath

if TYPE_CHECKING:
    from hashlib import _Hash

#: Objects that are unpacked while they arrive: 8 MiB of memory each.
MAX_PROOFS: Final = 16
#: Threads that unpack at one time, for as long as a block's NAR bytes take.
UNPACKING: Final = 4
#: Slots whose running hash is kept; the hash of another is computed again from its file.
MAX_HASHES: Final = 1024
#: Chunks of a block that are kept as they came; more are joined, since a sender may send bytes one by one.
MAX_GROUP: Final = 64


@dataclass(slots=True)
class _Running:
    """The hash of a slot's bytes so far, and of the NAR in them."""

    size: int = 0
    hash: _Hash = field(default_factory=sha256)
    nar: ArrivingNar | None = None


class RelayStaging:
    """The objects on their way into one store; `directory` is used where that is none itself."""

    def __init__(self, objects: ObjectStore, directory: Path) -> None:
        self._objects = objects
        self._directory = objects.local_path(INCOMING) or directory
        self._running: dict[str, _Running] = {}
        self._unpacking = asyncio.Semaphore(UNPACKING)

    def size(self, slot: str) -> int:
        """Return how many bytes of an object have arrived."""
        return _size(self._file(slot))

    async def append(
        self,
        slot: str,
        offset: int,
        data: AsyncIterable[bytes],
        most_bytes: int,
        unpacked: Callable[[], ArrivingNar | None] = lambda: None,
    ) -> int:
        """Add a piece to an object; returns how many bytes it has then. What came before an error stays.

        `unpacked` gives what unpacks an object that begins.

        Raises:
            WrongOffsetError: it does not begin where the object ends.
            BadUploadError: the object would have more than `most_bytes`.
            StoreFullError: no room is left.
            ObjectStoreError: the staging area failed.
        """
        file = self._file(slot)
        running = await self._hash_so_far(slot)
        if offset != running.size:
            raise WrongOffsetError(running.size)
        if not running.size:
            self._make_room()
            running.nar = unpacked()
        # The next block is received while one is unpacked.
        async with aclosing(one_ahead(_groups(data))) as arriving:
            async for group in arriving:
                size = sum(map(len, group))
                if running.size + size > most_bytes:
                    raise BadUploadError("the object is larger than its NAR can become")
                if running.nar is not None:
                    # A small block may unpack to a large part of a NAR.
                    async with self._unpacking:
                        await asyncio.to_thread(_write, file, running, group)
                elif size < BLOCK_BYTES // 4:
                    _write(file, running, group)
                else:
                    await asyncio.to_thread(_write, file, running, group)
        return running.size

    def _make_room(self) -> None:
        """Have the object that began longest ago read back, since it may have been abandoned."""
        unpacked = [each for each in self._running.values() if each.nar is not None]
        if len(unpacked) >= MAX_PROOFS:
            unpacked[0].nar = None

    def proves(self, slot: str, nar_hash: str, nar_size: int) -> bool | None:
        """Return whether what arrived is the object of this NAR; None unless all of it came to this process."""
        running = self._running.get(slot)
        return None if running is None or running.nar is None else running.nar.proves(nar_hash, nar_size)

    async def hashed(self, slot: str, path: str) -> SentPath | None:
        """Return hash and size of what arrived, None where nothing did."""
        running = await self._hash_so_far(slot)
        if not running.size:
            return None
        return SentPath(path=path, file_hash=sha256_text(running.hash.digest()), file_size=running.size)

    def drop(self, slot: str) -> None:
        """Throw away what arrived."""
        self._forget(slot)

    async def place(self, slot: str, key: str, file_hash: str, file_size: int) -> bool:
        """Put a whole object where it is published from; False where it has another hash or size.

        That is then thrown away. Where nothing arrived, the object may be in its place already.

        Raises:
            ObjectMissingError: nothing arrived, and it is not in its place.
            ObjectStoreError: the store failed; the same call may succeed later.
        """
        file = self._file(slot)
        if not file.exists():
            if await self._objects.head(key) != file_size:
                raise ObjectMissingError("its object was not sent")
            return True
        running = await self._hash_so_far(slot)
        if (running.size, sha256_text(running.hash.digest())) != (file_size, file_hash):
            self._forget(slot)
            return False
        if isinstance(self._objects, LocalObjectStore):
            await self._objects.rename(f"{INCOMING}/{file.name}", key)
        elif file_size <= SINGLE_BYTES:
            await self._objects.put_bytes(key, file.read_bytes())
        else:
            await self._objects.put_stream(key, _read_file(file))
        self._forget(slot)
        return True

    async def sweep(self, before: float) -> None:
        """Delete what has not been written to since `before` (Unix seconds)."""
        await asyncio.to_thread(_sweep_files, self._directory, before)

    def _file(self, slot: str) -> Path:
        return self._directory / f"relay-{slot}"

    def _forget(self, slot: str) -> None:
        self._running.pop(slot, None)
        self._file(slot).unlink(missing_ok=True)

    async def _hash_so_far(self, slot: str) -> _Running:
        running = self._running.get(slot)
        file = self._file(slot)
        if running is None or running.size != _size(file):
            running = await asyncio.to_thread(_hash_file, file)
            self._running.pop(slot, None)
            if len(self._running) >= MAX_HASHES:
                del self._running[next(iter(self._running))]
            self._running[slot] = running
        return running


def _write(file: Path, running: _Running, group: Sequence[bytes]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            at = running.size
            for chunk in group:
                rest = memoryview(chunk)
                while rest:
                    written = os.pwrite(descriptor, rest, at)
                    rest, at = rest[written:], at + written
        except OSError:
            # A group is there whole or not at all: the hash counts whole groups.
            os.ftruncate(descriptor, running.size)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        if says_full(error):
            raise StoreFullError(f"cannot take the object: {FULL}") from None
        raise ObjectStoreError(f"cannot write what is uploaded: {error.strerror}") from error
    # The event loop may drop it meanwhile.
    nar = running.nar
    for chunk in group:
        running.hash.update(chunk)
        running.size += len(chunk)
        if nar is not None:
            nar.feed(chunk)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _hash_file(file: Path) -> _Running:
    running = _Running()
    with suppress(FileNotFoundError), file.open("rb") as source:
        while block := source.read(BLOCK_BYTES):
            running.hash.update(block)
            running.size += len(block)
    return running


async def blocks(data: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Gather what arrives into blocks of about BLOCK_BYTES; where it breaks off, what came before is given first."""
    async for group in _groups(data):
        yield b"".join(group)


async def _groups(data: AsyncIterable[bytes]) -> AsyncIterator[Sequence[bytes]]:
    """Do the same without making one of them: each copy of a block is new memory, a quarter of what receiving takes."""
    gathered: list[bytes] = []
    size = 0
    try:
        async for chunk in data:
            gathered.append(chunk)
            size += len(chunk)
            if len(gathered) >= MAX_GROUP:
                gathered = [b"".join(gathered)]
            if size >= BLOCK_BYTES:
                group, gathered, size = gathered, [], 0
                yield group
    except ConnectionError:
        if gathered:
            yield gathered
        raise
    if gathered:
        yield gathered


async def _read_file(file: Path) -> AsyncIterator[bytes]:
    with file.open("rb") as source:
        while block := await asyncio.to_thread(source.read, BLOCK_BYTES):
            yield block


def _sweep_files(directory: Path, before: float) -> None:
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("relay-") and entry.stat().st_mtime < before:
                with suppress(FileNotFoundError):
                    Path(entry.path).unlink()
