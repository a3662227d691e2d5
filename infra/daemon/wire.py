"""The bytes of the Nix worker protocol, without any I/O.

An `Encoder` makes the bytes of a request. An `Inbox` is fed whatever arrived and read back as integers, strings and
messages. Reading is all or nothing: a read for which bytes are still missing raises `IncompleteError` with the number
of bytes that are certainly missing and leaves the inbox as it was, so the shell feeds more and asks again. Whatever
else is wrong with the bytes raises `DaemonProtocolError`. Every length is checked against a named limit *before* the
bytes are waited for, so a peer cannot make this process allocate by announcing a size.

Free text (log lines, messages, fields of activities) is what builders print, of any length. Such a text is never
refused for its length: an inbox keeps its first `MAX_TEXT_BYTES`, ends them with a note, and drops the rest as it
arrives. Fields beyond `MAX_FIELDS` are dropped in the same way.

Format: an integer is 8 bytes little-endian unsigned; a string is its length, its bytes and zero bytes up to a multiple
of 8; a list is a count and its items; a map is a count and key, value pairs. Strings are bytes, never text.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import Final, Self, TypeVar

from infra.daemon.errors import DaemonError, DaemonProtocolError, DaemonUnsupportedError
from infra.records import record

#: Magic number that a client sends first ("nixc").
CLIENT_MAGIC: Final = 0x6E697863
#: Magic number that a server answers ("dxio").
SERVER_MAGIC: Final = 0x6478696F
#: Version this client announces: 1.38, the number at which the protocol is frozen.
CLIENT_VERSION: Final = 0x126
#: Oldest server: 1.32 (Nix 2.4) is the first with AddMultipleToStore.
OLDEST_MINOR: Final = 32

#: Longest log line, error message or other free text that is kept; what is longer is cut, and says so at its end.
MAX_TEXT_BYTES: Final = 1024 * 1024
#: Longest free text that a peer may announce: a daemon holds it in memory whole, so none is near it.
MAX_ANNOUNCED_BYTES: Final = 1 << 40
#: Longest store path, name or other short word that is accepted.
MAX_WORD_BYTES: Final = 64 * 1024
#: Most items in a list or map that answers a request.
MAX_LIST_ITEMS: Final = 1_000_000
#: Bytes of a stream in which a run of log lines is looked for: messages of other kinds between lines must not make it
#: copy much for each of them.
RUN_BYTES: Final = 64 * 1024
#: Most fields of one activity or result that are kept. Nix sends at most four; builders may inject any number.
MAX_FIELDS: Final = 64
#: Longest text among several fields that is kept; a log line is the only field of its result.
MAX_FIELD_BYTES: Final = 64 * 1024
#: Most fields that a peer may announce: a daemon holds them in memory.
MAX_ANNOUNCED_FIELDS: Final = 1 << 32
#: Most trace entries of one error.
MAX_TRACES: Final = 10_000

TAG_LAST: Final = 0x616C7473
TAG_ERROR: Final = 0x63787470
TAG_NEXT: Final = 0x6F6C6D67
TAG_START_ACTIVITY: Final = 0x53545254
TAG_STOP_ACTIVITY: Final = 0x53544F50
TAG_RESULT: Final = 0x52534C54

#: Type of the activity that is one build; its first field is the derivation's path.
ACTIVITY_BUILD: Final = 105
#: Type of the result that is one line of a builder's log.
RESULT_BUILD_LOG_LINE: Final = 101
#: Type of the result that names the phase a builder has entered.
RESULT_SET_PHASE: Final = 104

_INT = struct.Struct("<Q")
_read_int_at: Final = _INT.unpack_from
#: tag, activity id, result type, number of fields, kind of the first field, its length
_RESULT_HEAD = struct.Struct("<6Q")
#: The same and all fields, where so many of them are integers: kind and value of each.
_NUMBERS: Final = tuple(struct.Struct(f"<{4 + 2 * count}Q") for count in range(5))
_FIELD_INT = 0
_FIELD_STRING = 1
_ZEROS = bytes(8)
#: The zero bytes that follow a string, by its length modulo 8.
_PADDING: Final = tuple(bytes(-length % 8) for length in range(8))

_T = TypeVar("_T")


class Operation(IntEnum):
    """The requests that this client makes, by the numbers of the protocol."""

    IS_VALID_PATH = 1
    ADD_TEMP_ROOT = 11
    SET_OPTIONS = 19
    COLLECT_GARBAGE = 20
    QUERY_PATH_INFO = 26
    QUERY_VALID_PATHS = 31
    BUILD_DERIVATION = 36
    ADD_SIGNATURES = 37
    NAR_FROM_PATH = 38
    ADD_TO_STORE_NAR = 39
    ADD_MULTIPLE_TO_STORE = 44


def agreed_version(server: int) -> tuple[int, int]:
    """Return the (major, minor) that both speak, this client and a server. Raises `DaemonUnsupportedError`."""
    major, minor = server >> 8, server & 0xFF
    if major != CLIENT_VERSION >> 8 or minor < OLDEST_MINOR:
        raise DaemonUnsupportedError(
            f"the daemon speaks protocol {major}.{minor}; 1.{OLDEST_MINOR} (Nix 2.4) or later is needed"
        )
    return major, min(minor, CLIENT_VERSION & 0xFF)


class IncompleteError(DaemonError):
    """The bytes so far are a proper beginning; at least `missing` more are needed. Never leaves this package."""

    def __init__(self, missing: int) -> None:
        super().__init__(f"{missing} more bytes are needed")
        self.missing = missing


@record(frozen=True, slots=True)
class Last:
    """The operation succeeded; its reply follows."""


@record(frozen=True, slots=True)
class Refusal:
    """The operation failed."""

    level: int
    message: bytes


@record(frozen=True, slots=True)
class Text:
    """Free text for the user, usually one line."""

    data: bytes


@record(frozen=True, slots=True)
class ActivityStarted:
    """The daemon began something; `fields` depend on the type (105: derivation path, machine, 1, 1)."""

    activity: int
    level: int
    type: int
    text: bytes
    fields: tuple[int | bytes, ...]
    parent: int


@record(frozen=True, slots=True)
class ActivityStopped:
    """An activity ended."""

    activity: int


@record(slots=True)
class Result:
    """News of an activity (not frozen: one is made per log line, and freezing costs as much as the rest of it)."""

    activity: int
    type: int
    fields: tuple[int | bytes, ...]


@record(frozen=True, slots=True)
class LineRun:
    """Lines of a builder's log that came one after another: `data` has each with a newline behind it."""

    activity: int
    data: bytes
    count: int


Message = Last | Refusal | Text | ActivityStarted | ActivityStopped | Result | LineRun


class Encoder:
    """Collects the bytes of one request; the methods return the encoder, so calls chain."""

    __slots__ = ("_out",)

    def __init__(self) -> None:
        self._out = bytearray()

    def integer(self, value: int) -> Self:
        """Append an integer of 0 <= value < 2**64.

        Raises:
            ValueError: The value does not fit.
        """
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{value} does not fit an unsigned 64-bit integer")
        self._out += _INT.pack(value)
        return self

    def string(self, value: bytes | str) -> Self:
        """Append a string; text is written as UTF-8."""
        data = value.encode() if isinstance(value, str) else value
        self._out += _INT.pack(len(data))
        self._out += data
        self._out += _ZEROS[: -len(data) % 8]
        return self

    def strings(self, values: Iterable[bytes | str]) -> Self:
        """Append a list of strings in the order given."""
        items = tuple(values)
        self.integer(len(items))
        for item in items:
            self.string(item)
        return self

    def mapping(self, values: Mapping[str, str]) -> Self:
        """Append a map, sorted by key as Nix sends it."""
        self.integer(len(values))
        for key in sorted(values):
            self.string(key).string(values[key])
        return self

    def getvalue(self) -> bytes:
        """Return the bytes collected so far."""
        return bytes(self._out)


class Inbox:
    """Bytes that arrived and were not read yet.

    Raises from every read_ method: IncompleteError when bytes are missing (nothing is consumed) and
    DaemonProtocolError when the bytes are not allowed (the inbox is of no use afterwards).
    """

    __slots__ = ("_buffer", "_position", "_skip_bytes", "lines")

    def __init__(self, data: bytes = b"") -> None:
        self._buffer = bytearray(data)
        #: Bytes before this index are read; 0 <= _position <= len(_buffer).
        self._position = 0
        #: So many of the next bytes to arrive belong to a text that was cut; they are dropped.
        self._skip_bytes = 0
        #: Log lines that were read in runs since bytes arrived.
        self.lines = 0

    def __len__(self) -> int:
        return len(self._buffer) - self._position

    def feed(self, data: bytes) -> None:
        """Add bytes that arrived."""
        self.lines = 0
        if self._position:
            del self._buffer[: self._position]
            self._position = 0
        if self._skip_bytes:
            skipped = min(self._skip_bytes, len(data))
            self._skip_bytes -= skipped
            self._buffer += memoryview(data)[skipped:]
        else:
            self._buffer += data

    def attempt(self, parse: Callable[["Inbox"], _T]) -> _T:
        """Run a parser of several reads so that it consumes all of its bytes or none."""
        start = self._position
        try:
            return parse(self)
        except IncompleteError:
            self._position = start
            raise

    def read_raw(self, most: int) -> bytes:
        """Take up to `most` bytes, as many as are here (perhaps none)."""
        start = self._position
        self._position = min(start + most, len(self._buffer))
        return bytes(memoryview(self._buffer)[start : self._position])

    def read_int(self) -> int:
        """Read an integer."""
        start = self._position
        available = len(self._buffer) - start
        if available < 8:
            raise IncompleteError(8 - available)
        self._position = start + 8
        value: int = _INT.unpack_from(self._buffer, start)[0]
        return value

    def read_bool(self) -> bool:
        """Read an integer that means a truth value; any non-zero number is true, as for Nix."""
        return self.read_int() != 0

    def read_count(self, limit: int, subject: str) -> int:
        """Read the number of items that follow, at most `limit`."""
        count = self.read_int()
        if count > limit:
            raise DaemonProtocolError(f"{subject}: {count} items announced, the limit is {limit}")
        return count

    def read_string(self, limit: int, subject: str) -> bytes:
        """Read a string of at most `limit` bytes; `subject` names it in errors."""
        start = self._position
        buffer = self._buffer
        available = len(buffer) - start
        if available < 8:
            raise IncompleteError(8 - available)
        (length,) = _INT.unpack_from(buffer, start)
        if length > limit:
            raise DaemonProtocolError(f"{subject}: a string of {length} bytes announced, the limit is {limit}")
        padded = (length + 7) & ~7
        if available < 8 + padded:
            raise IncompleteError(8 + padded - available)
        begin = start + 8
        end = begin + length
        if padded != length and buffer[end : begin + padded] != _ZEROS[: padded - length]:
            raise DaemonProtocolError(f"{subject}: the padding after a string is not zero")
        self._position = begin + padded
        return bytes(memoryview(buffer)[begin:end])

    def read_free_text(self, subject: str, keep_bytes: int = MAX_TEXT_BYTES) -> bytes:
        """Read a string of any length, of which at most `keep_bytes` (a multiple of 8) are kept, the note included.

        A string that is too long is cut in the buffer as soon as the kept part is there, so that reading again after
        an IncompleteError finds a string of the right length.
        """
        start = self._position
        length = self.read_int()
        self._position = start
        if length > keep_bytes:
            if length > MAX_ANNOUNCED_BYTES:
                raise DaemonProtocolError(
                    f"{subject}: a string of {length} bytes announced, the limit is {MAX_ANNOUNCED_BYTES}"
                )
            available = len(self._buffer) - start
            if available < 8 + keep_bytes:
                raise IncompleteError(8 + keep_bytes - available)
            self._cut(start, length, keep_bytes)
        return self.read_string(keep_bytes, subject)

    def _cut(self, start: int, length: int, keep_bytes: int) -> None:
        """Replace the string that begins at `start`, of which at least `keep_bytes` are here, by its beginning."""
        buffer = self._buffer
        note = b" [drover: cut here, %d bytes in all]" % length
        begin, end = start + 8, start + 8 + keep_bytes
        buffer[end - len(note) : end] = note
        rest = ((length + 7) & ~7) - keep_bytes
        here = min(rest, len(buffer) - end)
        del buffer[end : end + here]
        self._skip_bytes = rest - here
        buffer[start:begin] = _INT.pack(keep_bytes)

    def read_fields(self) -> tuple[int | bytes, ...]:
        """Read the fields of an activity or result; those beyond MAX_FIELDS are dropped as they arrive."""
        start = self._position
        count = self.read_count(MAX_ANNOUNCED_FIELDS, "fields")
        fields = [self._read_field() for _ in range(min(count, MAX_FIELDS))]
        kept_to = self._position
        try:
            while count > MAX_FIELDS:
                before = self._position
                try:
                    self._read_field()
                except IncompleteError:
                    self._position = before
                    raise
                count -= 1
        finally:
            if self._position > kept_to:
                del self._buffer[kept_to : self._position]
                self._position = kept_to
                _INT.pack_into(self._buffer, start, count)
        return tuple(fields)

    def _read_field(self) -> int | bytes:
        kind = self.read_int()
        if kind == _FIELD_INT:
            return self.read_int()
        if kind == _FIELD_STRING:
            return self.read_free_text("field", MAX_FIELD_BYTES)
        raise DaemonProtocolError(f"field of unknown kind {kind}")

    def read_text(self, limit: int, subject: str) -> str:
        """Read a string that must be UTF-8 (paths, names, signatures)."""
        data = self.read_string(limit, subject)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise DaemonProtocolError(f"{subject}: not UTF-8 text") from None

    def read_word(self, subject: str) -> str:
        """Read a short text of at most MAX_WORD_BYTES."""
        return self.read_text(MAX_WORD_BYTES, subject)

    def read_words(self, subject: str, limit: int = MAX_LIST_ITEMS) -> tuple[str, ...]:
        """Read a list of at most `limit` short texts."""
        return tuple([self.read_word(subject) for _ in range(self.read_count(limit, subject))])

    def read_lines(self) -> LineRun | None:
        """Read the log lines of one activity that are here whole; None where the next message is not such a line.

        A builder can print 200,000 lines a second. So a line costs one turn of this loop, and no object but its bytes.
        Only the next `RUN_BYTES` are looked at; a line that is longer is left for `read_message`, which may cut it.
        """
        start = self._position
        if len(self._buffer) - start < _RESULT_HEAD.size:
            return None
        tag, activity, kind, count, field, _ = _RESULT_HEAD.unpack_from(self._buffer, start)
        if tag != TAG_RESULT or kind != RESULT_BUILD_LOG_LINE or count != 1 or field != _FIELD_STRING:
            return None
        # Bytes, because taking slices of a bytearray costs twice as much.
        buffer = bytes(memoryview(self._buffer)[start : start + RUN_BYTES])
        head = buffer[:40]
        size, at, lines = len(buffer), 0, list[bytes]()
        begin = 48
        while begin <= size and buffer.startswith(head, at):
            (length,) = _read_int_at(buffer, begin - 8)
            end = begin + length
            at = end + (-length & 7)
            if at > size:
                break
            if not buffer.startswith(_PADDING[length & 7], end):
                raise DaemonProtocolError("field of a result: the padding after a string is not zero")
            lines.append(buffer[begin:end])
            self._position = start + at
            begin = at + 48
        if not lines:
            return None
        self.lines += len(lines)
        return LineRun(activity, b"\n".join(lines) + b"\n", len(lines))

    def read_message(self) -> Message:
        """Read one message of the stream that precedes every reply."""
        start = self._position
        available = len(self._buffer) - start
        if available >= _RESULT_HEAD.size:
            # Nearly every message of a busy build is a log line; this reads its head in one step.
            tag, activity, kind, count, field, _ = _RESULT_HEAD.unpack_from(self._buffer, start)
            if tag == TAG_RESULT and count == 1 and field == _FIELD_STRING:
                self._position = start + 40
                try:
                    line = self.read_free_text("field of a result")
                except IncompleteError:
                    self._position = start
                    raise
                return Result(activity, kind, (line,))
            if tag == TAG_RESULT and 0 < count < len(_NUMBERS) and available >= 32 + 16 * count:
                # Most messages of a short build: counts of what is to be done, done and expected.
                numbers = _NUMBERS[count].unpack_from(self._buffer, start)
                if not any(numbers[4::2]):
                    self._position = start + 32 + 16 * count
                    return Result(activity, kind, numbers[5::2])
        return self.attempt(_read_any_message)


def _read_failure(inbox: Inbox) -> Refusal:
    inbox.read_string(MAX_WORD_BYTES, "type of an error")
    level = inbox.read_int()
    inbox.read_string(MAX_WORD_BYTES, "name of an error")
    message = inbox.read_free_text("message of an error")
    if inbox.read_int() != 0:
        raise DaemonProtocolError("an error has a position, which the protocol does not allow")
    for _ in range(inbox.read_count(MAX_TRACES, "traces of an error")):
        if inbox.read_int() != 0:
            raise DaemonProtocolError("a trace has a position, which the protocol does not allow")
        inbox.read_free_text("trace of an error", MAX_FIELD_BYTES)
    return Refusal(level, message)


def _read_activity(inbox: Inbox) -> ActivityStarted:
    return ActivityStarted(
        activity=inbox.read_int(),
        level=inbox.read_int(),
        type=inbox.read_int(),
        text=inbox.read_free_text("text of an activity", MAX_FIELD_BYTES),
        fields=inbox.read_fields(),
        parent=inbox.read_int(),
    )


def _read_any_message(inbox: Inbox) -> Message:
    tag = inbox.read_int()
    read = _READERS.get(tag)
    if read is None:
        raise DaemonProtocolError(f"unknown message 0x{tag:x}")
    return read(inbox)


_READERS: Final[Mapping[int, Callable[[Inbox], Message]]] = {
    TAG_LAST: lambda _: Last(),
    TAG_ERROR: _read_failure,
    TAG_NEXT: lambda inbox: Text(inbox.read_free_text("text", MAX_FIELD_BYTES)),
    TAG_START_ACTIVITY: _read_activity,
    TAG_STOP_ACTIVITY: lambda inbox: ActivityStopped(inbox.read_int()),
    TAG_RESULT: lambda inbox: Result(inbox.read_int(), inbox.read_int(), inbox.read_fields()),
}
