"""NAR, the archive format of store paths (infra/nix/FORMATS.md 4): a strict push reader and a writer of events.

An archive is one node. The events of a node are one `NarSymlink`; or one `NarFile` followed by `NarData` of exactly
its size in all; or one `NarDirectory`, the events of its entries in rising order of name, and one `NarDirectoryEnd`.
The root's name is b"". Writer and reader are inverse: what one takes the other gives, byte for byte.

Stricter than Nix 2.8: entries must rise strictly, names have at most `MAX_NAME_LENGTH` bytes and symlink targets 1 to
`MAX_TARGET_LENGTH`. Directories nest as deep as Nix can hold them (`MAX_DEPTH`). Neither side recurses or holds more
than a token and the names of the open directories.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from infra.nix.errors import FormatError

#: Deepest nesting of directories: the root is at depth 1. Nix reaches every file by its whole path, for which Linux
#: takes 4095 bytes; a store path has 45 at the least, and each directory below it two more.
MAX_DEPTH: Final = 2048
#: Longest name of a directory entry, in bytes.
MAX_NAME_LENGTH: Final = 255
#: Longest target of a symlink, in bytes.
MAX_TARGET_LENGTH: Final = 4095
#: Largest file, in bytes: a signed 64-bit number.
MAX_FILE_SIZE: Final = 2**63 - 1

_SUBJECT: Final = "NAR"
_LENGTH: Final = struct.Struct("<Q")


def _token(text: bytes) -> bytes:
    """`text` as the archive holds every string: length, bytes, zero bytes up to a multiple of 8."""
    return _LENGTH.pack(len(text)) + text + bytes(-len(text) % 8)


def _tokens(*texts: bytes) -> bytes:
    return b"".join(map(_token, texts))


_MAGIC: Final = _token(b"nix-archive-1")
_CLOSE: Final = _token(b")")
_REGULAR: Final = _tokens(b"(", b"type", b"regular", b"contents")
_EXECUTABLE: Final = _tokens(b"(", b"type", b"regular", b"executable", b"", b"contents")
_SYMLINK: Final = _tokens(b"(", b"type", b"symlink", b"target")
_DIRECTORY: Final = _tokens(b"(", b"type", b"directory")
_ENTRY: Final = _tokens(b"entry", b"(", b"name")
_NODE: Final = _token(b"node")
_NODES: Final = (_REGULAR, _EXECUTABLE, _SYMLINK, _DIRECTORY)
_NEXT: Final = (_ENTRY, _CLOSE)


@dataclass(frozen=True, slots=True)
class NarDirectory:
    """A directory opens."""

    name: bytes


@dataclass(frozen=True, slots=True)
class NarDirectoryEnd:
    """The innermost open directory is complete."""


@dataclass(frozen=True, slots=True)
class NarFile:
    """A regular file; its `size` bytes follow as `NarData`."""

    name: bytes
    executable: bool
    size: int


@dataclass(frozen=True, slots=True)
class NarData:
    """The next bytes, at least one, of the file that was opened last."""

    data: bytes


@dataclass(frozen=True, slots=True)
class NarSymlink:
    """A symbolic link."""

    name: bytes
    target: bytes


NarEvent = NarDirectory | NarDirectoryEnd | NarFile | NarData | NarSymlink


def name_fault(name: bytes) -> str | None:
    """Return the reason that `name` cannot name a directory entry, or None."""
    if not name:
        return "an empty entry name"
    if len(name) > MAX_NAME_LENGTH:
        return f"an entry name longer than {MAX_NAME_LENGTH} bytes"
    if name in {b".", b".."}:
        return "an entry named . or .."
    if b"/" in name or b"\0" in name:
        return "a slash or zero byte in an entry name"
    return None


def _target_fault(target: bytes) -> str | None:
    """Return the reason that `target` cannot be a symlink's target, or None."""
    if not target or len(target) > MAX_TARGET_LENGTH:
        return f"a symlink target that has not 1 to {MAX_TARGET_LENGTH} bytes"
    if b"\0" in target:
        return "a zero byte in a symlink target"
    return None


class _Levels:
    """The open directories, with the rules that both sides share."""

    __slots__ = ("stack",)

    def __init__(self) -> None:
        #: Name of the latest entry (b"" before the first) in each open directory, outermost first.
        self.stack: list[bytes] = []

    def fault(self, name: bytes) -> str | None:
        """Take `name` as the next entry of the innermost directory, or return the reason that it may not come there."""
        fault = name_fault(name)
        if fault is None and name <= self.stack[-1]:
            return "an entry that is not above the one before it"
        if fault is None:
            self.stack[-1] = name
        return fault


class NarReader:
    """Reads an archive that arrives in pieces of any size.

    `feed` gives the events that became certain; `close` checks that the archive was whole. Data events are as large
    as the pieces allow and nothing else is held back but an incomplete token.
    """

    __slots__ = ("_base", "_buffer", "_executable", "_file_left", "_levels", "_name", "_padding", "_pos", "_step")

    def __init__(self) -> None:
        #: Bytes not yet consumed, after `_pos` that are.
        self._buffer = b""
        self._pos = 0
        #: Offset in the archive of `_buffer[0]`.
        self._base = 0
        #: What reads the next construct: it steps over it and chooses its successor, or returns False for want of
        #: bytes.
        self._step: Callable[[NarReader, list[NarEvent]], bool] = NarReader._read_magic
        self._levels = _Levels()
        #: Name of the next node, and whether the file whose size is due is executable.
        self._name = b""
        self._executable = False
        #: Bytes of the open file not yet seen, and the number of zero bytes after them.
        self._file_left = 0
        self._padding = 0

    def feed(self, data: bytes) -> list[NarEvent]:
        """The events that `data` completes.

        Raises:
            FormatError: At the token that breaks the format; every later call then fails too.
        """
        self._buffer = self._buffer[self._pos :] + data
        self._base += self._pos
        self._pos = 0
        events: list[NarEvent] = []
        try:
            while self._step(self, events):
                pass
        except FormatError:
            self._step = NarReader._refuse
            raise
        return events

    @property
    def complete(self) -> bool:
        """True if the archive is whole: the way to see the end of one that comes without a length."""
        return self._step is NarReader._read_end

    def close(self) -> None:
        """Check that the archive is whole.

        Raises:
            FormatError: If it is not.
        """
        if not self.complete:
            raise FormatError("the archive is cut short", offset=self._base + len(self._buffer), subject=_SUBJECT)

    def _fail(self, message: str, at: int | None = None) -> FormatError:
        return FormatError(message, offset=self._base + (self._pos if at is None else at), subject=_SUBJECT)

    def _choose(self, choices: tuple[bytes, ...]) -> bytes | None:
        """The one of `choices` that comes next, stepped over; None if more bytes must decide."""
        for choice in choices:
            if self._buffer.startswith(choice, self._pos):
                self._pos += len(choice)
                return choice
        rest = self._buffer[self._pos : self._pos + max(map(len, choices))]
        if any(choice.startswith(rest) for choice in choices):
            return None
        raise self._fail("not the token that is due", self._pos + max(_common(choice, rest) for choice in choices))

    def _string(self, limit: int, subject: str) -> tuple[bytes, int] | None:
        """The next string of at most `limit` bytes and where it begins, stepped over; None if it is not all there."""
        start = self._pos + 8
        if start > len(self._buffer):
            return None
        (length,) = _LENGTH.unpack_from(self._buffer, self._pos)
        if length > limit:
            raise self._fail(f"{subject} is longer than {limit} bytes")
        end = start + length
        after = end + -length % 8
        if after > len(self._buffer):
            return None
        if any(self._buffer[end:after]):
            raise self._fail("padding that is not zero", end)
        self._pos = after
        return self._buffer[start:end], start

    def _read_magic(self, _events: list[NarEvent]) -> bool:
        if self._choose((_MAGIC,)) is None:
            return False
        self._step = NarReader._read_node
        return True

    def _read_node(self, events: list[NarEvent]) -> bool:
        start = self._pos
        choice = self._choose(_NODES)
        if choice is None:
            return False
        if choice is _DIRECTORY:
            if len(self._levels.stack) == MAX_DEPTH:
                raise self._fail(f"directories deeper than {MAX_DEPTH}", start)
            self._levels.stack.append(b"")
            events.append(NarDirectory(self._name))
            self._step = NarReader._read_entry
        elif choice is _SYMLINK:
            self._step = NarReader._read_target
        else:
            self._executable = choice is _EXECUTABLE
            self._step = NarReader._read_size
        return True

    def _read_entry(self, events: list[NarEvent]) -> bool:
        choice = self._choose(_NEXT)
        if choice is None:
            return False
        if choice is _ENTRY:
            self._step = NarReader._read_name
        else:
            events.append(NarDirectoryEnd())
            self._levels.stack.pop()
            self._end_node()
        return True

    def _read_name(self, _events: list[NarEvent]) -> bool:
        found = self._string(MAX_NAME_LENGTH, "an entry name")
        if found is None:
            return False
        self._name, start = found
        fault = self._levels.fault(self._name)
        if fault is not None:
            raise self._fail(fault, start)
        self._step = NarReader._read_node_token
        return True

    def _read_node_token(self, _events: list[NarEvent]) -> bool:
        if self._choose((_NODE,)) is None:
            return False
        self._step = NarReader._read_node
        return True

    def _read_target(self, events: list[NarEvent]) -> bool:
        found = self._string(MAX_TARGET_LENGTH, "a symlink target")
        if found is None:
            return False
        target, start = found
        fault = _target_fault(target)
        if fault is not None:
            raise self._fail(fault, start)
        events.append(NarSymlink(self._name, target))
        self._step = NarReader._read_node_close
        return True

    def _read_size(self, events: list[NarEvent]) -> bool:
        if self._pos + 8 > len(self._buffer):
            return False
        (size,) = _LENGTH.unpack_from(self._buffer, self._pos)
        if size > MAX_FILE_SIZE:
            raise self._fail("a file larger than any can be")
        self._pos += 8
        events.append(NarFile(self._name, self._executable, size))
        self._file_left = size
        self._padding = -size % 8
        self._step = NarReader._read_data if size else NarReader._read_node_close
        return True

    def _read_data(self, events: list[NarEvent]) -> bool:
        data = self._buffer[self._pos : self._pos + self._file_left]
        if not data:
            return False
        events.append(NarData(data))
        self._pos += len(data)
        self._file_left -= len(data)
        if not self._file_left:
            self._step = NarReader._read_padding
        return True

    def _read_padding(self, _events: list[NarEvent]) -> bool:
        after = self._pos + self._padding
        if any(self._buffer[self._pos : after]):
            raise self._fail("padding that is not zero")
        if after > len(self._buffer):
            return False
        self._pos = after
        self._step = NarReader._read_node_close
        return True

    def _read_node_close(self, _events: list[NarEvent]) -> bool:
        if self._choose((_CLOSE,)) is None:
            return False
        self._end_node()
        return True

    def _end_node(self) -> None:
        self._step = NarReader._read_entry_close if self._levels.stack else NarReader._read_end

    def _read_entry_close(self, _events: list[NarEvent]) -> bool:
        if self._choose((_CLOSE,)) is None:
            return False
        self._step = NarReader._read_entry
        return True

    def _read_end(self, _events: list[NarEvent]) -> bool:
        if self._pos < len(self._buffer):
            raise self._fail("bytes after the end")
        return False

    def _refuse(self, _events: list[NarEvent]) -> bool:
        raise self._fail("the archive was already refused")


def _common(one: bytes, other: bytes) -> int:
    """Return the number of leading bytes that agree."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


class NarWriter:
    """Turns events into an archive: `write` gives the bytes of one event, `close` checks that the tree was complete."""

    __slots__ = ("_file_left", "_levels", "_padding", "_state")

    def __init__(self) -> None:
        self._levels = _Levels()
        #: start, directory (an entry or its end is due), data (of a file) or end.
        self._state = "start"
        #: Bytes of the open file still due, and the number of zero bytes after them.
        self._file_left = 0
        self._padding = 0

    def write(self, event: NarEvent) -> bytes:
        """The bytes of `event`.

        Raises:
            FormatError: If the event may not come here, or has a name or target that an archive cannot hold; the
            offset is 0.
        """
        match event:
            case NarData(data):
                return self._write_data(data)
            case NarDirectoryEnd():
                if self._state != "directory":
                    raise _misplaced("no directory is open")
                self._levels.stack.pop()
                return _CLOSE + self._end_node()
            case NarDirectory(name):
                prefix = self._open(name)
                if len(self._levels.stack) == MAX_DEPTH:
                    raise _misplaced(f"directories deeper than {MAX_DEPTH}")
                self._levels.stack.append(b"")
                self._state = "directory"
                return prefix + _DIRECTORY
            case NarSymlink(name, target):
                fault = _target_fault(target)
                if fault is not None:
                    raise _misplaced(fault)
                return self._open(name) + _SYMLINK + _token(target) + _CLOSE + self._end_node()
            case NarFile(name, executable, size):
                return self._write_file(name, size, _EXECUTABLE if executable else _REGULAR)

    def close(self) -> None:
        """Check that one whole tree was written.

        Raises:
            FormatError: If it was not; the offset is 0.
        """
        if self._state != "end":
            raise _misplaced("the tree is not complete")

    def _open(self, name: bytes) -> bytes:
        """Return the bytes that precede a node called `name` here."""
        if self._state == "directory":
            fault = self._levels.fault(name)
            if fault is not None:
                raise _misplaced(fault)
            return _ENTRY + _token(name) + _NODE
        if self._state != "start":
            raise _misplaced("no node is due")
        if name:
            raise _misplaced("the root has no name")
        return _MAGIC

    def _write_file(self, name: bytes, size: int, head: bytes) -> bytes:
        if not 0 <= size <= MAX_FILE_SIZE:
            raise _misplaced("a file size that no file has")
        head = self._open(name) + head + _LENGTH.pack(size)
        if not size:
            return head + _CLOSE + self._end_node()
        self._state = "data"
        self._file_left = size
        self._padding = -size % 8
        return head

    def _write_data(self, data: bytes) -> bytes:
        if self._state != "data" or len(data) > self._file_left:
            raise _misplaced("more data than the file has")
        self._file_left -= len(data)
        if self._file_left:
            return data
        return b"".join((data, bytes(self._padding), _CLOSE, self._end_node()))

    def _end_node(self) -> bytes:
        """Go on after a complete node; of an entry, its own parenthesis is still to be written."""
        self._state = "directory" if self._levels.stack else "end"
        return _CLOSE if self._levels.stack else b""


def _misplaced(message: str) -> FormatError:
    return FormatError(message, offset=0, subject="NAR events")


def write_events(events: Iterable[NarEvent]) -> Iterator[bytes]:
    """The archive of `events`, piece by piece.

    Raises:
        FormatError: If they do not make one whole tree; the offset is 0.
    """
    writer = NarWriter()
    for event in events:
        yield writer.write(event)
    writer.close()
