"""Trees of files as clients send them for a remote evaluation: a NAR in a zstd frame, named by the NAR's SHA-256.

A NAR has one form for one tree: names in rising order, no owners, no times, no devices. `TreeReader` takes a tree as it
comes, holds no more than a slice of it, and refuses what could leave it or harm a reader of its names:

    symlinks     relative, `..` only at the beginning and never above the tree's own directory: then none leaves it,
                 whatever other links it leads over
    names        UTF-8 without control characters
    bounds       bytes inflated, entries, depth, length of a path
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import ClassVar, Final

import zstandard

from coordinator.errors import IntakeError
from infra.nix.errors import FormatError
from infra.nix.nar import NarData, NarDirectory, NarDirectoryEnd, NarEvent, NarFile, NarReader, NarSymlink
from infra.records import record

#: Compressed bytes that are inflated at one time; zstd makes at most 32,768 bytes of one.
SLICE_BYTES: Final = 256
#: Directories in each other, and bytes of a path in the tree.
MAX_DEPTH: Final = 128
MAX_PATH_BYTES: Final = 2048
#: What a reader's frame may ask for; the fast levels stay at 2 MiB.
MAX_WINDOW_BYTES: Final = 8 * 1024 * 1024
#: Characters of a name that a sentence shows.
_SHOWN: Final = 100
_LEVEL: Final = 1
_PIECE_BYTES: Final = 256 * 1024


class TreeRefusedError(IntakeError):
    """A tree is damaged, over a bound, or holds something that could leave it."""

    code: ClassVar[str] = "bad_tree"


@record(frozen=True, slots=True)
class TreeBounds:
    """Bounds of one tree."""

    #: Of the NAR.
    size_bytes: int
    #: Files, directories and symlinks.
    entries: int


class TreeChecker:
    """Checks the events of a tree's NAR one by one."""

    def __init__(self, bounds: TreeBounds) -> None:
        self._bounds = bounds
        self._entries = 0
        #: Names of the open directories, the tree's own (b"") first.
        self._above: list[bytes] = []
        self._path_bytes = 0

    def check(self, event: NarEvent) -> None:
        """Take the next event. Raises `TreeRefusedError`."""
        if isinstance(event, NarData):
            return
        if isinstance(event, NarDirectoryEnd):
            self._path_bytes -= len(self._above.pop()) + 1
            return
        self._entries += 1
        if self._entries > self._bounds.entries:
            raise TreeRefusedError(f"the tree has more than {self._bounds.entries} files and directories, the limit")
        self._check_name(event.name)
        match event:
            case NarDirectory(name):
                self._open(name)
            case NarFile() | NarSymlink() if not self._above:
                raise TreeRefusedError("the tree is a single file; send its directory")
            case NarFile(name, _, size):
                if size > self._bounds.size_bytes:
                    raise TreeRefusedError(
                        f"{self._shown(name)} has {size} bytes; a tree may have {self._bounds.size_bytes}"
                    )
            case NarSymlink(name, target):
                self._check_target(name, target)

    def _open(self, name: bytes) -> None:
        self._above.append(name)
        self._path_bytes += len(name) + 1
        if len(self._above) > MAX_DEPTH:
            raise TreeRefusedError(f"{self._shown(b'')} lies deeper than {MAX_DEPTH} directories, the limit")

    def _check_target(self, name: bytes, target: bytes) -> None:
        if not stays_inside(target, len(self._above) - 1):
            raise TreeRefusedError(
                f"the symlink {self._shown(name)} leads to {_text(target)}, which may lie outside of the tree; "
                "make it a relative one with .. at its beginning only, or take it out"
            )

    def _check_name(self, name: bytes) -> None:
        if self._path_bytes + len(name) > MAX_PATH_BYTES:
            raise TreeRefusedError(f"{self._shown(name)} has a path of more than {MAX_PATH_BYTES} bytes, the limit")
        try:
            text = name.decode()
        except UnicodeDecodeError:
            text = "\0"
        if not text.isprintable():
            raise TreeRefusedError(
                f"the name {self._shown(name)} is no UTF-8 or has a control character; give the file another name"
            )

    def _shown(self, name: bytes) -> str:
        return _text(b"/".join([*self._above[1:], name]))


def stays_inside(target: bytes, depth: int) -> bool:
    """Return whether a symlink below `depth` directories of a tree stays in it, whatever other such links it passes.

    Each `..` at its beginning leaves a real directory; one later would leave what another link leads to.
    """
    parts = [part for part in target.split(b"/") if part not in {b"", b"."}]
    up = 0
    while up < len(parts) and parts[up] == b"..":
        up += 1
    return not target.startswith(b"/") and up <= depth and b".." not in parts[up:]


class TreeReader:
    """Reads a compressed tree that comes in pieces; what it raises names what is wrong with it."""

    def __init__(self, bounds: TreeBounds) -> None:
        self._bounds = bounds
        self._frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
        self._nar = NarReader()
        self._checker = TreeChecker(bounds)
        self._hash = hashlib.sha256()
        self._size = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the NAR's bytes that `data` completes, checked; to be read to the end. Raises `TreeRefusedError`."""
        for start in range(0, len(data), SLICE_BYTES):
            if self._frame.eof:
                raise TreeRefusedError("something follows the tree; send it again")
            try:
                plain = self._frame.decompress(data[start : start + SLICE_BYTES])
            except zstandard.ZstdError:
                raise TreeRefusedError("the tree is not valid zstd; send it again") from None
            self._size += len(plain)
            if self._size > self._bounds.size_bytes:
                raise TreeRefusedError(
                    f"the tree has more than {self._bounds.size_bytes} bytes, the limit; keep large files out of it"
                )
            self._hash.update(plain)
            try:
                for event in self._nar.feed(plain):
                    self._checker.check(event)
            except FormatError as error:
                raise TreeRefusedError(f"the tree is no NAR: {error}") from None
            yield plain
        if self._frame.unused_data:
            raise TreeRefusedError("something follows the tree; send it again")

    def finish(self) -> str:
        """Return the tree's name. Raises `TreeRefusedError` where it is cut short."""
        if not self._frame.eof or not self._nar.complete:
            raise TreeRefusedError("the tree was cut short; send it again")
        return self._hash.hexdigest()


def compressed(nar: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the zstd frame of a NAR."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compressobj()
    ready = bytearray()
    for piece in nar:
        ready += compressor.compress(piece)
        if len(ready) >= _PIECE_BYTES:
            yield bytes(ready)
            ready.clear()
    yield bytes(ready) + compressor.flush()


def _text(name: bytes) -> str:
    return repr(name.decode(errors="backslashreplace")[:_SHOWN])
