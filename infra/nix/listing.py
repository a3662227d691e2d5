"""Listings (`<hash>.ls`): what a NAR holds and where, so that single files can be looked at without unpacking it.

`{"version":1,"root":NODE}`, byte for byte what Nix 2.8 writes for `write-nar-listing`. A node is `{"type":"regular",
"size":…,"executable":true,"narOffset":…}` (`executable` only where it is), `{"type":"directory","entries":{NAME:NODE}}`
or `{"type":"symlink","target":…}`. `narOffset` is where the file's bytes begin in the NAR. Names and targets are bytes:
like Nix, only quotes, backslashes and control characters are escaped.
"""

from __future__ import annotations

import re
from typing import Final

from infra.nix.errors import FormatError
from infra.nix.nar import NarData, NarDirectory, NarDirectoryEnd, NarEvent, NarFile, NarReader, NarSymlink

_ESCAPED: Final = re.compile(rb'[\x00-\x1f"\\]')
_SHORT: Final = {b'"': b'\\"', b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r", b"\t": b"\\t"}


def _quoted(text: bytes) -> bytes:
    return b'"' + _ESCAPED.sub(lambda found: _SHORT.get(found[0]) or b"\\u%04x" % found[0][0], text) + b'"'


def _width(size: int) -> int:
    """Bytes that a token of `size` bytes takes in a NAR: a length, and padding up to a multiple of 8."""
    return 8 + size + -size % 8


def _widths(*texts: bytes) -> int:
    return sum(_width(len(text)) for text in texts)


_MAGIC: Final = _widths(b"nix-archive-1")
_CLOSE: Final = _widths(b")")
#: Before and after the name of an entry.
_ENTRY: Final = _widths(b"entry", b"(", b"name")
_NODE: Final = _widths(b"node")
_REGULAR: Final = _widths(b"(", b"type", b"regular", b"contents")
_EXECUTABLE: Final = _widths(b"executable", b"")
_SYMLINK: Final = _widths(b"(", b"type", b"symlink", b"target")
_DIRECTORY: Final = _widths(b"(", b"type", b"directory")


class NarLister:
    """Makes the listing of a NAR that arrives in pieces of any size; holds it and no more."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reader = NarReader()
        self._text = bytearray(b'{"version":1,"root":')
        #: Where the archive stands after the events so far.
        self._offset = _MAGIC
        #: Of each open directory, whether an entry was listed.
        self._has_entries: list[bool] = []

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the NAR.

        Raises:
            FormatError: If they break the format, or the listing would be longer than the limit.
        """
        for event in self._reader.feed(data):
            self._take(event)
        if len(self._text) > self._limit:
            raise FormatError(f"its listing is longer than {self._limit} bytes", offset=0, subject="NAR")

    def close(self) -> bytes:
        """The listing.

        Raises:
            FormatError: If the NAR was cut short.
        """
        self._reader.close()
        return bytes(self._text) + b"}"

    def _take(self, event: NarEvent) -> None:
        match event:
            case NarData():
                # `NarFile` has counted them.
                return
            case NarFile(name, executable, size):
                self._begin(name)
                self._offset += _REGULAR + 8 + (_EXECUTABLE if executable else 0)
                flag = b',"executable":true' if executable else b""
                self._text += b'{"type":"regular","size":%d%b,"narOffset":%d}' % (size, flag, self._offset)
                self._offset += size + -size % 8
                self._end()
            case NarSymlink(name, target):
                self._begin(name)
                self._offset += _SYMLINK + _width(len(target))
                self._text += b'{"type":"symlink","target":%b}' % _quoted(target)
                self._end()
            case NarDirectory(name):
                self._begin(name)
                self._offset += _DIRECTORY
                self._text += b'{"type":"directory","entries":{'
                self._has_entries.append(False)
            case NarDirectoryEnd():
                self._has_entries.pop()
                self._text += b"}}"
                self._end()

    def _begin(self, name: bytes) -> None:
        if not self._has_entries:
            return
        if self._has_entries[-1]:
            self._text += b","
        self._has_entries[-1] = True
        self._text += _quoted(name) + b":"
        self._offset += _ENTRY + _width(len(name)) + _NODE

    def _end(self) -> None:
        """Go past the parenthesis of a complete node, and of the entry that holds it."""
        self._offset += _CLOSE * (2 if self._has_entries else 1)
