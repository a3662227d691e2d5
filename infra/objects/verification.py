"""An object's NAR, decompressed and held against what was promised of it.

`VerifiedNar` is the reader of NAR objects: publishing discards what it yields, workers unpack it. `ArrivingNar` unpacks
and hashes an object while it comes, so that it need not be read back. `SmallNars` looks at whole small objects in
memory, thousands of them: it says only whether one holds. All run where they may block (a
thread; hashing and decompression release the interpreter lock) and holds about one READ_BYTES of each side and the
decoder's bounded memory (`compression`), whatever the object claims: output is taken from the decompressor in bounded
pieces, and reading stops once it exceeds the promised size, so a small object that unpacks to terabytes costs no more
than an honest one.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final

from infra.nix.hashing import sha256_text
from infra.nix.narinfo import NarInfo
from infra.objects.compression import DecodeError, unpacker, unpacking_whole, unpacking_zstd
from infra.objects.errors import CorruptNarError, ObjectStoreError
from infra.objects.store import READ_BYTES, BlockingSource

#: Bytes that are unpacked at a time where they are only hashed. Larger ones are new memory of the system each time
#: (`infra.heap`), whose faults cost as much as hashing them: 100 MB took 80 ms, and 180 with READ_BYTES (measured).
HASHED_BYTES: Final = 256 * 1024


class _Measured:
    """A source that counts and hashes what passes, and ends with an error once there is more than promised."""

    def __init__(self, source: BlockingSource, promise: NarInfo) -> None:
        self._source = source
        self._store_path = promise.store_path
        self._stored = promise.stored
        self.size = 0
        self.hash = sha256()

    def read(self, size: int, /) -> bytes:
        try:
            data = self._source.read(size)
        except OSError as error:
            raise ObjectStoreError(f"cannot read {self._stored.url}: {error.strerror}") from error
        self.size += len(data)
        if self._stored.file_size and self.size > self._stored.file_size:
            raise CorruptNarError(self._store_path, f"the file has more than {self._stored.file_size} bytes")
        self.hash.update(data)
        return data


class VerifiedNar:
    """Reads the NAR out of `source`; takes ownership of it."""

    def __init__(self, source: BlockingSource, promise: NarInfo, at_once: int = READ_BYTES) -> None:
        """Read at most `at_once` bytes of each side at a time."""
        self._at_once = at_once
        self._source = source
        self._path = promise.path
        self._stored = promise.stored
        self._file = _Measured(source, promise)
        try:
            self._nar = unpacker(promise.stored.compression, self._file, at_once)
        except DecodeError as error:
            source.close()
            raise CorruptNarError(promise.store_path, str(error)) from None
        self._size = 0
        self._hash = sha256()

    def read(self) -> bytes:
        """Return the next bytes of the NAR, some at a time; b"" once all is read and all promises hold.

        Raises:
            CorruptNarError: a promise is broken. What was returned before must then be thrown away.
            ObjectStoreError: the object cannot be read.
        """
        try:
            data = self._nar.read(self._at_once)
        except DecodeError as error:
            raise CorruptNarError(self._path.store_path, str(error)) from None
        self._size += len(data)
        if self._size > self._path.nar_size:
            raise CorruptNarError(self._path.store_path, f"it unpacks to more than {self._path.nar_size} bytes")
        self._hash.update(data)
        if not data:
            self._check()
        return data

    def _check(self) -> None:
        while self._file.read(self._at_once):
            pass
        path, stored = self._path, self._stored
        if stored.file_size and self._file.size != stored.file_size:
            raise CorruptNarError(path.store_path, f"the file has {self._file.size} bytes, not {stored.file_size}")
        if stored.file_hash and sha256_text(self._file.hash.digest()) != stored.file_hash:
            raise CorruptNarError(path.store_path, "the file's hash differs")
        if self._size != path.nar_size:
            raise CorruptNarError(path.store_path, f"it unpacks to {self._size} bytes, not {path.nar_size}")
        if sha256_text(self._hash.digest()) != path.nar_hash:
            raise CorruptNarError(path.store_path, "the NAR's hash differs")

    def close(self) -> None:
        """Let go of the object."""
        self._source.close()


class ArrivingNar:
    """Hash and size of the NAR in an object whose bytes come piece by piece, within the bounds of `VerifiedNar`."""

    def __init__(self, compression: str, nar_size: int) -> None:
        """Expect a NAR of `nar_size` bytes. Raises `ValueError` for a compression that is not unpacked in pieces."""
        self._most = nar_size
        self._size = 0
        self._hash = sha256()
        self._is_broken = False
        match compression:
            case "zstd":
                self._take = unpacking_zstd(self._count, HASHED_BYTES)
            case "none":
                self._take = self._count
            case _:
                raise ValueError(compression)

    def feed(self, data: bytes) -> None:
        """Take the object's next bytes. What is not valid, or too much, is remembered and not unpacked further."""
        if not self._is_broken:
            try:
                self._take(data)
            except DecodeError:
                self._is_broken = True

    def proves(self, nar_hash: str, nar_size: int) -> bool:
        """Return whether what came is the object of this NAR; asked once all of it has come."""
        found = (sha256_text(self._hash.digest()), self._size)
        return not self._is_broken and found == (nar_hash, nar_size)

    def _count(self, nar: bytes) -> None:
        self._size += len(nar)
        if self._size > self._most:
            raise DecodeError("it unpacks to more than was promised")
        self._hash.update(nar)


class SmallNars:
    """Holds whole small objects against what is claimed of their NARs; for one thread at a time."""

    def __init__(self, compression: str) -> None:
        self._unpack = unpacking_whole(compression)

    def proves(self, content: bytes, nar_hash: str, nar_size: int) -> bool:
        """Return whether an object is this NAR, of which at most one byte more than `nar_size` is unpacked.

        False is no reason; `verify_nar` names one, or takes the object where this does not read its compression.
        """
        if self._unpack is None:
            return False
        try:
            nar = self._unpack(content, nar_size + 1)
        except DecodeError:
            return False
        return len(nar) == nar_size and sha256_text(sha256(nar).digest()) == nar_hash


def verify_nar(source: BlockingSource, promise: NarInfo) -> None:
    """Read all of `source`, which is then closed, and return if every promise holds.

    Raises:
        CorruptNarError: a promise is broken.
        ObjectStoreError: the object cannot be read.
    """
    reader = VerifiedNar(source, promise, HASHED_BYTES)
    try:
        while reader.read():
            pass
    finally:
        reader.close()
