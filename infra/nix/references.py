"""Scanning content for references: the hash parts of store paths that occur in it, as Nix scans.

A hash part is 32 characters of nix32, found anywhere, whatever surrounds it. Nearly no content is made of such
characters for 32 bytes on end, so the scan marks the bytes that could belong to one with one table lookup each and
searches for a run of 32 marks; only in such runs does it look for the candidates themselves. A candidate that was
found is not looked for again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from infra.nix.base32 import ALPHABET
from infra.nix.errors import FormatError
from infra.nix.store_path import HASH_PART_LENGTH

_MARK: Final = b"#"
_MARKS: Final = bytes(ord(_MARK) if byte in ALPHABET.encode() else ord(" ") for byte in range(256))
_RUN: Final = _MARK * HASH_PART_LENGTH
#: Bytes of a piece that may begin a hash part which ends in the next.
_OVERLAP: Final = HASH_PART_LENGTH - 1


class Scanner:
    """Looks for candidates in content that arrives in pieces of any size; holds 31 bytes between them."""

    __slots__ = ("_found", "_tail", "_wanted")

    def __init__(self, candidates: Iterable[str]) -> None:
        """A scanner for `candidates`, hash parts of 32 nix32 characters each.

        Raises:
            FormatError: If one is anything else.
        """
        #: Candidates not yet found.
        self._wanted: set[bytes] = set()
        self._found: set[bytes] = set()
        self._tail = b""
        for candidate in candidates:
            if len(candidate) != HASH_PART_LENGTH or not set(candidate) <= set(ALPHABET):
                raise FormatError("not the hash part of a store path", offset=0, what="reference candidate")
            self._wanted.add(candidate.encode())

    @property
    def found(self) -> frozenset[str]:
        """The candidates that occurred so far."""
        return frozenset(candidate.decode() for candidate in self._found)

    def feed(self, data: bytes) -> None:
        """Scan the next bytes."""
        if not self._wanted:
            return
        if self._tail:
            self._scan(self._tail + data[:_OVERLAP])
        self._scan(data)
        self._tail = data[-_OVERLAP:] if len(data) >= _OVERLAP else (self._tail + data)[-_OVERLAP:]

    def _scan(self, data: bytes) -> None:
        marks = data.translate(_MARKS)
        start = marks.find(_RUN)
        while start >= 0 and self._wanted:
            end = marks.find(b" ", start + HASH_PART_LENGTH)
            if end < 0:
                end = len(marks)
            self._scan_run(data, start, end)
            start = marks.find(_RUN, end)

    def _scan_run(self, data: bytes, start: int, end: int) -> None:
        """Look for candidates in a run of nix32 characters: by window, or in a long run by candidate."""
        windows = end - start - _OVERLAP
        if windows <= 2 * len(self._wanted):
            hits = {data[at : at + HASH_PART_LENGTH] for at in range(start, start + windows)} & self._wanted
        else:
            hits = {candidate for candidate in self._wanted if data.find(candidate, start, end) >= 0}
        if hits:
            self._found |= hits
            self._wanted -= hits
