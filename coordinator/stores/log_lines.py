"""Lines of a log file: pages of them by number, and where a text stands; for threads, in pieces that let others run.

Python's other threads, the event loop among them, wait while one call of `bytes` works: so no call looks at more than
`PIECE_BYTES`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

#: Bytes that are looked at by one call.
PIECE_BYTES: Final = 256 * 1024
#: Logs whose indexes are kept: up to 8 KiB each, of a log of 64 MiB.
MOST_INDEXES: Final = 256
#: Bytes of one line that are returned; the rest is counted.
LINE_BYTES: Final = 8 * 1024
#: Bytes of all lines of one page: twice what a thousand usual lines have.
PAGE_BYTES: Final = 160 * 1024


@dataclass(frozen=True, slots=True)
class NumberedLine:
    """A line without its end; `cut` bytes of it are left out."""

    number: int
    data: bytes
    cut: int = 0


@dataclass(frozen=True, slots=True)
class LogLines:
    """Some lines that follow each other; `following` is the number of the next line, 0 where there is none."""

    lines: tuple[NumberedLine, ...] = ()
    following: int = 0
    #: Bytes of the file, and where the lines end in it.
    size: int = 0
    end: int = 0


class LineIndex:
    """Counts of the lines before each piece of one log, so that a page of it reads little more than it shows.

    A log only grows, so what was counted is never counted again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._piece_bytes = PIECE_BYTES
        self._lock = threading.Lock()
        #: Ends of lines before each whole piece, and before what follows the last of them; and the last byte before it.
        self._before = [0]
        self._last = b"\n"

    @property
    def counted_bytes(self) -> int:
        """Bytes of the whole pieces."""
        return (len(self._before) - 1) * self._piece_bytes

    def count(self) -> int:
        """Return how many lines the log has; one that does not end yet counts."""
        with self._lock:
            rest = self._grow()
            return self._before[-1] + rest.count(b"\n") + ((rest[-1:] or self._last) != b"\n")

    def lines(self, first: int, limit: int) -> LogLines:
        """Return at most `limit` lines from number `first` (from 1) on."""
        return lines_from(self.path, self._offset_of(first), first, limit)

    def _offset_of(self, line: int) -> int:
        """Return where a line begins; the end of the file for one beyond."""
        ends = line - 1
        if ends <= 0:
            return 0
        with self._lock:
            piece = self._grow()
            place = bisect_left(self._before, ends) - 1
            left = ends - self._before[place]
        begin = place * self._piece_bytes
        if begin < self.counted_bytes:
            with self.path.open("rb") as file:
                file.seek(begin)
                piece = file.read(self._piece_bytes)
        at = -1
        for _ in range(left):
            at = piece.find(b"\n", at + 1)
            if at < 0:
                return begin + len(piece)
        return begin + at + 1

    def _grow(self) -> bytes:
        """Count what was written since the last time; returns what no whole piece holds yet."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.counted_bytes)
                while len(piece := file.read(self._piece_bytes)) == self._piece_bytes:
                    self._before.append(self._before[-1] + piece.count(b"\n"))
                    self._last = piece[-1:]
                return piece
        except FileNotFoundError:
            return b""


class LineIndexes:
    """Indexes of the logs that were read last; for threads."""

    def __init__(self, most: int = MOST_INDEXES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Path, int], LineIndex] = OrderedDict()

    def of(self, path: Path) -> LineIndex:
        """Return the index of a log; a new one where another file has come to its place."""
        try:
            found = path.stat()
        except FileNotFoundError:
            return LineIndex(path)
        with self._lock:
            index = self._kept.pop((path, found.st_ino), None)
            if index is None or index.counted_bytes > found.st_size:
                index = LineIndex(path)
            self._kept[path, found.st_ino] = index
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
            return index


def lines_from(path: Path, offset: int, number: int, limit: int) -> LogLines:
    """Return at most `limit` lines of a page's size; the line with this number begins at `offset`."""
    lines: list[NumberedLine] = []
    read_bytes = 0
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(offset)
            while file.tell() < size and len(lines) < limit and read_bytes < PAGE_BYTES:
                data = file.readline(LINE_BYTES + 1)
                cut = 0
                if len(data) > LINE_BYTES and not data.endswith(b"\n"):
                    cut = len(data) - LINE_BYTES + _skip_line(file)
                    data = data[:LINE_BYTES]
                lines.append(NumberedLine(number + len(lines), data.removesuffix(b"\n"), cut))
                read_bytes += len(data)
            end = file.tell()
    except FileNotFoundError:
        return LogLines()
    return LogLines(tuple(lines), number + len(lines) if end < size else 0, size, end)


def find_text(path: Path, text: bytes, limit: int) -> tuple[list[int], bool]:
    """Return the numbers of the first `limit` lines with `text` (ASCII letters large or small), and if more have it."""
    wanted = text.lower()
    found: list[int] = []
    number, carried = 1, b""
    for _, piece in _pieces(path):
        window = carried + piece.lower()
        at = counted = 0
        while (at := window.find(wanted, at)) >= 0:
            number += window.count(b"\n", counted, at)
            counted = at
            if not found or found[-1] != number:
                if len(found) == limit:
                    return found, True
                found.append(number)
            at += 1
        # What may begin here and end in the next piece is looked at again.
        keep = max(counted, len(window) - len(wanted) + 1)
        number += window.count(b"\n", counted, keep)
        carried = window[keep:]
    return found, False


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of a line; returns how many bytes that are, its end left out."""
    skipped = 0
    while data := file.readline(PIECE_BYTES):
        skipped += len(data)
        if data.endswith(b"\n"):
            return skipped - 1
    return skipped


def _pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the file's bytes with their offsets; nothing where it is not there."""
    try:
        with path.open("rb") as file:
            offset = 0
            while piece := file.read(PIECE_BYTES):
                yield offset, piece
                offset += len(piece)
    except FileNotFoundError:
        return
