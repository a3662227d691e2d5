"""The compressions that NAR objects come in, and unpacking them within bounds.

A cache writes one of `Compression`, zstd unless its settings say otherwise. It also takes what people push with
`nix copy`, whose default is xz, and keeps it as it came: the clients unpack. `br`, `lzip` and the rest need libraries
that nothing else here needs, and are refused.

A reader yields at most what `read` requests and holds at most its decoder's memory, which is bounded whatever the
object asks for. Files of several frames or streams, one after the other, are one NAR, as every client reads them.
"""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable
from typing import IO, Final, Literal, Protocol, cast

import zstandard

#: Largest NAR that is published. It bounds the work that one false claim can cause.
MAX_NAR_BYTES = 256 * 1024**3

Compression = Literal["zstd", "xz", "none"]
#: What a cache writes unless its settings say otherwise. Nix 2.3 does not read it.
COMPRESSION: Final = "zstd"
#: Name in a narinfo -> what the object's key ends with. These can be read.
SUFFIXES: Final = {"zstd": ".zst", "xz": ".xz", "bzip2": ".bz2", "none": ""}
#: A zstd frame may ask for this much memory to be unpacked (RFC 8878, 3.1.1.1.2, asks every decoder to support 8 MiB).
MAX_WINDOW_BYTES: Final = 8 * 1024 * 1024
#: The same for an xz stream: `xz -9` wants 65 MiB, and nothing usual wants more. (bzip2 never takes more than 4 MiB.)
MAX_XZ_BYTES: Final = 80 * 1024 * 1024
#: Compressed bytes given to an xz or bzip2 decoder at a time; what a stream leaves over is copied.
_SLICE_BYTES: Final = 32 * 1024
#: The file format asks for padding between streams in this unit (xz-file-format 2.2).
_XZ_PADDING: Final = 4


class DecodeError(Exception):
    """The bytes are not what the compression's format allows, or want more memory than they may; one clause."""


class NarBytes(Protocol):
    """Gives compressed bytes; b"" is the end."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most `size`."""


class Unpacker(Protocol):
    """Gives unpacked bytes; b"" is the end of a file that is whole as far as its format can show."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most `size`.

        Raises:
            DecodeError: the file is not valid.
        """


class _Decompressor(Protocol):
    """Common interface of `lzma.LZMADecompressor` and `bz2.BZ2Decompressor`."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /, max_length: int = -1) -> bytes: ...


def nar_key(file_hash: str, compression: str = COMPRESSION) -> str:
    """Return the key of the object whose bytes have the hash `sha256:<nix32>`; `compression` is one of SUFFIXES."""
    return f"nar/{file_hash.removeprefix('sha256:')}.nar{SUFFIXES[compression]}"


def unpacker(compression: str, source: NarBytes, read_size: int) -> Unpacker:
    """Return a reader of what `source` holds, which is read up to about `read_size` bytes at a time.

    Raises:
        DecodeError: `compression` is not one of SUFFIXES.
    """
    match compression:
        case "zstd":
            return _Zstd(source, read_size)
        case "xz" | "bzip2":
            return _Streams(compression, source)
        case "none":
            return source
        case _:
            raise DecodeError(f"compression is {compression[:20]!r}, which this cache does not read")


def unpacking_zstd(take: Callable[[bytes], None], most_bytes: int) -> Callable[[bytes], None]:
    """Return what takes the next bytes of a zstd file and gives `take` what they unpack to, `most_bytes` at a time.

    It raises `DecodeError` for bytes that are not valid, and what `take` raises, which ends the unpacking.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    writer = decompressor.stream_writer(cast("IO[bytes]", _Taker(take)), write_size=most_bytes, closefd=False)

    def feed(data: bytes) -> None:
        try:
            writer.write(data)
        except zstandard.ZstdError:
            raise DecodeError("the file is not valid zstd") from None

    return feed


def unpacking_whole(compression: str) -> Callable[[bytes, int], bytes] | None:
    """Return what unpacks an object in memory, at most so many bytes of it; None for a compression that is not zstd.

    It raises `DecodeError` for bytes that are not valid. Its decoder is made once, since it costs more than they do.
    """
    if compression != "zstd":
        return None
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)

    def unpack(data: bytes, most_bytes: int) -> bytes:
        try:
            return decompressor.stream_reader(data, read_across_frames=True).read(most_bytes)
        except zstandard.ZstdError:
            raise DecodeError("the file is not valid zstd") from None

    return unpack


class _Taker:
    """A file to write to."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take

    def write(self, data: bytes) -> int:
        self._take(data)
        return len(data)


class _Zstd:
    def __init__(self, source: NarBytes, read_size: int) -> None:
        self._reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).stream_reader(
            cast("IO[bytes]", source), read_size=read_size, read_across_frames=True, closefd=False
        )

    def read(self, size: int, /) -> bytes:
        try:
            return self._reader.read(size)
        except zstandard.ZstdError:
            raise DecodeError("the file is not valid zstd") from None


class _Streams:
    """xz or bzip2 streams, one after the other."""

    def __init__(self, compression: str, source: NarBytes) -> None:
        self._compression = compression
        self._source = source
        self._decoder = self._next_decoder()
        #: Compressed bytes not yet given to the decoder.
        self._rest = b""
        #: Whether the present stream has begun, whether it has given anything, and whether it is the first.
        self._begun = False
        self._given = False
        self._first = True

    def _next_decoder(self) -> _Decompressor:
        if self._compression == "xz":
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_BYTES)
        return bz2.BZ2Decompressor()

    def read(self, size: int, /) -> bytes:
        while True:
            if self._decoder.eof:
                self._end_stream()
            if not self._begun and not self._start_stream():
                return b""
            data = self._step(size)
            if data:
                self._given = True
                return data

    def _step(self, size: int) -> bytes:
        piece = b""
        if self._decoder.needs_input:
            piece = self._more()
            if not piece:
                raise DecodeError(f"the {self._compression} file is cut short")
        try:
            return self._decoder.decompress(piece, max_length=size)
        except lzma.LZMAError as error:
            if "limit" in str(error):
                raise DecodeError(f"the xz file wants more than {MAX_XZ_BYTES} bytes of memory") from None
            raise DecodeError("the file is not valid xz") from None
        except (OSError, ValueError, EOFError):
            raise DecodeError(f"the file is not valid {self._compression}") from None

    def _more(self) -> bytes:
        """Return compressed bytes that were left over, or new ones."""
        piece, self._rest = self._rest, b""
        return piece or self._source.read(_SLICE_BYTES)

    def _start_stream(self) -> bool:
        """Begin with the next stream; False at the end of the file, which must hold one at least."""
        padding = 0
        while True:
            self._rest = self._more()
            if not self._rest:
                break
            stripped = self._rest.lstrip(b"\0") if self._compression == "xz" else self._rest
            padding += len(self._rest) - len(stripped)
            self._rest = stripped
            if stripped:
                self._begun = True
                break
        if padding % _XZ_PADDING or (padding and self._first):
            raise DecodeError("the file is not valid xz")
        if not self._begun and self._first:
            raise DecodeError(f"the {self._compression} file is empty")
        return self._begun

    def _end_stream(self) -> None:
        # Streams of nothing would cost time for no bytes that count against the promised size.
        if not self._given:
            raise DecodeError(f"the {self._compression} file has an empty stream")
        self._rest = self._decoder.unused_data
        self._decoder = self._next_decoder()
        self._begun = self._given = self._first = False
