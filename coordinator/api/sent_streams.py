"""The sending side of `coordinator.api.streams`: what a client needs to encode both, and no pydantic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Annotated, ClassVar, Final

import orjson
import zstandard

from coordinator.errors import IntakeError
from infra.field_bounds import FieldBounds
from infra.nix.path_info import PathInfo
from infra.nix.store_path import StoreDir
from infra.records import record

DERIVATIONS_MAGIC: Final = b"drover-derivations-1\n"
SOURCES_MAGIC: Final = b"drover-sources-1\n"
#: Longest store path name is 211 characters, its hash part and dash 33, `.drv` is part of the name.
MAX_NAME_BYTES: Final = 256
#: Bytes of one piece of a body, and of what is read of a NAR at one time.
PIECE_BYTES: Final = 256 * 1024
#: Bytes of each length in a stream.
INT_BYTES: Final = 4
_LEVEL: Final = 1


class FramingError(IntakeError):
    """The stream itself is wrong: not zstd, cut short, over a bound, followed by something."""

    code: ClassVar[str] = "bad_stream"


@record(frozen=True, slots=True, kw_only=True)
class SourceHeader:
    """Description of an input source by the client's Nix; the coordinator verifies all of it."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic's name for it

    #: Base name.
    path: Annotated[str, FieldBounds(max_length=MAX_NAME_BYTES)]
    #: Base names.
    references: tuple[str, ...] = ()
    #: `sha256:<52 nix32 characters>`.
    nar_hash: str
    nar_size: Annotated[int, FieldBounds(ge=0, lt=1 << 63)]
    #: Content address as in a narinfo, or empty.
    ca: str = ""

    @classmethod
    def of(cls, info: PathInfo) -> SourceHeader:
        """Return the header of a source in the client's store."""
        return cls(
            path=info.base_name, references=info.references, nar_hash=info.nar_hash, nar_size=info.nar_size, ca=info.ca
        )

    def info(self, store_dir: StoreDir) -> PathInfo:
        """Return the same of the path in `store_dir`."""
        return PathInfo(store_dir.full(self.path), self.nar_hash, self.nar_size, self.references, ca=self.ca)


def encode_derivations(members: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """Yield the compressed stream of (base name, .drv bytes), inputs first."""

    def plain() -> Iterator[bytes]:
        yield DERIVATIONS_MAGIC
        for name, data in members:
            raw = name.encode()
            yield b"".join((_int(len(raw)), raw, _int(len(data)), data))
        yield _int(0)

    return _compressed(plain())


def encode_sources(members: Iterable[tuple[SourceHeader, Callable[[], Iterable[bytes]]]]) -> Iterator[bytes]:
    """Yield the compressed stream of sources; each NAR is opened when its turn comes.

    Raises:
        FramingError: a NAR is not as long as its header says (the source changed under the reader).
    """

    def plain() -> Iterator[bytes]:
        yield SOURCES_MAGIC
        for header, open_nar in members:
            raw = orjson.dumps(header)
            yield _int(len(raw)) + raw
            left = header.nar_size
            for piece in open_nar():
                left -= len(piece)
                yield piece
            if left:
                raise FramingError(f"the source {header.path} changed while it was being sent")
        yield _int(0)

    return _compressed(plain())


async def in_thread(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Pull a blocking iterator from a worker thread, one piece ahead of nothing: the consumer sets the pace."""
    while True:
        piece = await asyncio.to_thread(next, pieces, None)
        if piece is None:
            return
        yield piece


def _int(value: int) -> bytes:
    return value.to_bytes(INT_BYTES, "little")


def _compressed(plain: Iterator[bytes]) -> Iterator[bytes]:
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compressobj()
    ready: list[bytes] = []
    size = 0
    for piece in plain:
        data = compressor.compress(piece)
        if data:
            ready.append(data)
            size += len(data)
            if size >= PIECE_BYTES:
                yield b"".join(ready)
                ready.clear()
                size = 0
    ready.append(compressor.flush())
    yield b"".join(ready)
