r"""Packs: many small objects in one request, each verified by the coordinator as it arrives.

    pack   := "drover-pack-1\n" { length name, length object } 0        integers are little-endian, four bytes

`name` is the path's base name as it was claimed, `object` its NAR, compressed as the upload wants it. The end mark
distinguishes a whole pack from one that was cut at a record's edge. What came whole before a cut stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from infra.objects.compression import Compression
from infra.objects.errors import CacheError
from infra.objects.nar_encoder import UploadedNar
from infra.records import record
from infra.upload.errors import UploadFailedError
from infra.upload.protocol import MAX_PACK_BYTES, PACK_NAR_BYTES, PACK_PATHS, PathClaim, SentPath, most_bytes

MAGIC: Final = b"drover-pack-1\n"
#: NAR bytes of the paths of one pack, about, and so many paths: the coordinator verifies one while the next is made.
PACK_NARS_BYTES: Final = 2 * 1024 * 1024
SENT_PATHS: Final = 128
_INT: Final = 4
_MAX_NAME_BYTES: Final = 255
_END: Final = bytes(_INT)

#: Reads and compresses a small NAR as a whole; blocks.
MakeObject = Callable[[PathClaim, Compression], tuple[bytes, UploadedNar]]


class PackFormatError(CacheError):
    """The bytes are no pack."""


class SourceChangedError(UploadFailedError):
    """A path is not, or no longer, what the sender's store says; one sentence that names it."""


@record(frozen=True, slots=True)
class Pack:
    """A pack that is ready to be sent, and those of its paths that are left out because they changed."""

    body: bytes
    sent: tuple[SentPath, ...]
    nar_bytes: int
    changed: tuple[SourceChangedError, ...]


def is_small(claim: PathClaim) -> bool:
    """Return whether a path travels in a pack."""
    return claim.nar_size <= PACK_NAR_BYTES


def grouped(claims: Iterable[PathClaim]) -> list[list[PathClaim]]:
    """Divide small paths into packs."""
    packs: list[list[PathClaim]] = []
    size = PACK_NARS_BYTES
    for claim in claims:
        if size + claim.nar_size > PACK_NARS_BYTES or len(packs[-1]) >= SENT_PATHS:
            packs.append([])
            size = 0
        packs[-1].append(claim)
        size += claim.nar_size
    return packs


def make_pack(claims: Sequence[PathClaim], compression: Compression, make_object: MakeObject) -> Pack:
    """Read and compress the paths of one pack; for a thread.

    Raises:
        OSError, CacheError: as `make_object` gives it, but for `SourceChangedError`, which leaves one path out.
    """
    parts, sent, changed, nar_bytes = [MAGIC], [], [], 0
    for claim in claims:
        try:
            data, made = make_object(claim, compression)
            require_claimed(claim, made)
        except SourceChangedError as error:
            changed.append(error)
            continue
        name = claim.path.encode()
        parts += (_int(len(name)), name, _int(len(data)), data)
        sent.append(SentPath(path=claim.path, file_hash=made.stored.file_hash, file_size=made.stored.file_size))
        nar_bytes += claim.nar_size
    return Pack(b"".join((*parts, _END)), tuple(sent), nar_bytes, tuple(changed))


def require_claimed(claim: PathClaim, made: UploadedNar) -> None:
    """Raise `SourceChangedError` where a NAR is not the claimed one, as far as it was hashed."""
    if made.nar_size != claim.nar_size or made.nar_hash not in {"", claim.nar_hash}:
        raise SourceChangedError(f"{claim.path} is not what its store says: its NAR has another hash")


class PackReader:
    """Parses one pack as it comes; holds no more than it was given, which its caller bounds."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._began = False
        self._ended = False
        self._records = 0
        self._taken = 0

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """Return the (name, object) that are whole by now. Raises `PackFormatError`."""
        self._taken += len(data)
        if self._taken > MAX_PACK_BYTES:
            raise PackFormatError(f"a pack has at most {MAX_PACK_BYTES} bytes")
        self._data += data
        if not self._began:
            if not MAGIC.startswith(self._data[: len(MAGIC)]):
                raise PackFormatError("the body does not begin as a pack does")
            if len(self._data) < len(MAGIC):
                return []
            del self._data[: len(MAGIC)]
            self._began = True
        found = []
        at = 0
        while not self._ended and (record := self._record(at)) is not None:
            name, content, at = record
            found.append((name, content))
        del self._data[:at]
        if self._ended and self._data:
            raise PackFormatError("the pack goes on after its end")
        return found

    def close(self) -> None:
        """Raise `PackFormatError` unless the pack has come to its end."""
        if not self._ended:
            raise PackFormatError("the pack ends too early")

    def _record(self, at: int) -> tuple[str, bytes, int] | None:
        """Return the next record and where it ends, None while it is not whole, or where the pack has ended."""
        name_size = self._int(at)
        if name_size is None:
            return None
        if not name_size:
            self._ended = True
            del self._data[at : at + _INT]
            return None
        if name_size > _MAX_NAME_BYTES:
            raise PackFormatError(f"a name in a pack has at most {_MAX_NAME_BYTES} bytes")
        size = self._int(at + _INT + name_size)
        if size is None:
            return None
        if size > most_bytes(PACK_NAR_BYTES):
            raise PackFormatError(f"an object in a pack has at most {most_bytes(PACK_NAR_BYTES)} bytes")
        begin = at + 2 * _INT + name_size
        if len(self._data) < begin + size:
            return None
        self._records += 1
        if self._records > PACK_PATHS:
            raise PackFormatError(f"a pack has at most {PACK_PATHS} paths")
        name = self._data[at + _INT : at + _INT + name_size].decode("utf-8", "replace")
        return name, bytes(memoryview(self._data)[begin : begin + size]), begin + size

    def _int(self, at: int) -> int | None:
        data = self._data[at : at + _INT]
        return int.from_bytes(data, "little") if len(data) == _INT else None


def _int(value: int) -> bytes:
    return value.to_bytes(_INT, "little")
