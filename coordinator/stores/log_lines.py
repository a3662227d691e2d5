"""Lines of a log file: pages of them by number, and where a text stands; for threads, in pieces that let others run.

Python's other threads, the event loop among them, wait while one call of `bytes` works: so no call looks at more than
`PIECE_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

#: Bytes that are looked at by one call.
PIECE_BYTES: Final = 256 * 1024
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


def count_lines(path: Path) -> int:
    """Return how many lines a log has; one that does not end yet counts."""
    count, last = 0, b"\n"
    for _, piece in _pieces(path):
        count += piece.count(b"\n")
        last = piece[-1:]
    return count + (last != b"\n")


def read_lines(path: Path, first: int, limit: int) -> LogLines:
    """Return at most `limit` lines from number `first` (from 1) on."""
    return lines_from(path, _offset_of(path, first), first, limit)


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


def _offset_of(path: Path, line: int) -> int:
    """Return where a line begins; the end of the file for one beyond."""
    left, end = line - 1, 0
    if left <= 0:
        return 0
    for offset, piece in _pieces(path):
        count = piece.count(b"\n")
        if count >= left:
            at = -1
            for _ in range(left):
                at = piece.index(b"\n", at + 1)
            return offset + at + 1
        left -= count
        end = offset + len(piece)
    return end


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
