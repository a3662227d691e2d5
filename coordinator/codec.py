"""Facts and evidence as bytes: what the journal stores, for ever readable.

A frame is a JSON array `[[tag, {field: value, …}], …]`, compressed with zstd where that pays; both forms know
themselves by their first byte. Tags are written down here and never derived from a class name, so that a class may be
renamed. Bytes are base64 text, sets are sorted arrays. Decoding is strict: an unknown tag, a missing or an additional
field and a value of another type are all `CodecError`, because a journal half understood gives a wrong farm.

Evidence is what a finished build leaves for publishing: the .drv and the outputs as the worker reported them. The core
carries it unread.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import orjson
import zstandard
from pydantic import TypeAdapter, ValidationError

from coordinator.errors import CoordinatorError
from scheduler import facts
from scheduler.facts import Fact
from scheduler.model import Requirements, StepKey
from workers.protocol import Output

#: Raised when the meaning of stored frames changes; a journal tells which version it was written with.
FACTS_VERSION = 1
#: Frames above this many bytes are compressed.
_COMPRESS_ABOVE_BYTES = 4096
#: A frame that claims to be larger than this is damaged (one frame holds at most `journal.FRAME_FACTS` facts).
MAX_FRAME_BYTES = 1024 * 1024 * 1024

#: Different requirements that are remembered to be shared.
_SHARED_VALUES = 10_000

_TAGS: dict[type, str] = {
    facts.SubmissionAccepted: "submission-accepted",
    facts.SubmissionWithdrawn: "submission-withdrawn",
    facts.StepAdded: "step-added",
    facts.RecipeAdded: "recipe-added",
    facts.StepHeld: "step-held",
    facts.StepRevived: "step-revived",
    facts.StepLost: "step-lost",
    facts.StepLeased: "step-leased",
    facts.LeaseRevoked: "lease-revoked",
    facts.StepBuilt: "step-built",
    facts.StepDone: "step-done",
    facts.StepFellBack: "step-fell-back",
    facts.StepFailed: "step-failed",
    facts.StepDoomed: "step-doomed",
    facts.StepAbandoned: "step-abandoned",
    facts.BackOffEnded: "back-off-ended",
    facts.BuilderAdmitted: "builder-admitted",
    facts.BuilderRefreshed: "builder-refreshed",
    facts.BuilderRemoved: "builder-removed",
    facts.FarmResumed: "farm-resumed",
}

_Decoder = Callable[[Any], Any]


class CodecError(CoordinatorError):
    """Stored bytes do not say what this version of drover can understand."""

    code: ClassVar[str] = "damaged"


def encode_facts(batch: Sequence[Fact]) -> bytes:
    """Return the frame that holds `batch`, in order."""
    frame = orjson.dumps([[_TAGS[type(fact)], fact] for fact in batch], default=_plain)
    if len(frame) <= _COMPRESS_ABOVE_BYTES:
        return frame
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(frame)


def decode_facts(frame: bytes) -> tuple[Fact, ...]:
    """Return the facts of a frame, in order. Raises `CodecError` for anything but a whole frame."""
    if frame[:1] != b"[":
        try:
            frame = zstandard.ZstdDecompressor().decompress(frame, max_output_size=MAX_FRAME_BYTES)
        except zstandard.ZstdError:
            raise CodecError("a frame of facts is damaged (it is neither JSON nor zstd).") from None
    try:
        rows = orjson.loads(frame)
    except orjson.JSONDecodeError as error:
        raise CodecError(f"a frame of facts is damaged at byte {error.pos}.") from None
    try:
        return tuple(_decode_row(row) for row in _need(rows, list))
    except RecursionError:
        raise CodecError("a frame of facts is nested too deeply.") from None


@dataclass(frozen=True, slots=True)
class RootNote:
    """A wish of a submission and the step it stands on; `outputs` as wanted, name and full store path."""

    attr: str
    drv: str
    step: StepKey
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class SubmissionNote:
    """What people called a submission, and how many derivations stand behind its steps."""

    label: str
    roots: tuple[RootNote, ...]
    derivations: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a finished build claims: its .drv (full store path) and every output as uploaded."""

    drv: str
    outputs: tuple[Output, ...]

    @property
    def uploaded_bytes(self) -> int:
        """Bytes of compressed NARs."""
        return sum(output.file_size for output in self.outputs)


_OUTPUTS: TypeAdapter[tuple[Output, ...]] = TypeAdapter(tuple[Output, ...])


def encode_evidence(evidence: Evidence) -> bytes:
    """Return the bytes that the core keeps until the outputs are published."""
    return orjson.dumps({"v": 1, "drv": evidence.drv, "outputs": [output.model_dump() for output in evidence.outputs]})


def decode_evidence(data: bytes) -> Evidence:
    """Read evidence back. Raises `CodecError`."""
    try:
        raw = _need(orjson.loads(data), dict)
        if raw.get("v") != 1:
            raise CodecError("the evidence of a build was written by another version of drover.")
        return Evidence(_need(raw.get("drv"), str), _OUTPUTS.validate_python(raw.get("outputs")))
    except (orjson.JSONDecodeError, ValidationError):
        raise CodecError("the evidence of a build is damaged.") from None


def evidence_size(data: bytes) -> int:
    """Return the bytes uploaded for some evidence, 0 where it cannot be read (it is only shown to people)."""
    try:
        return sum(int(output["file_size"]) for output in orjson.loads(data)["outputs"])
    except (ValueError, KeyError, TypeError):
        return 0


def encode_note(note: SubmissionNote) -> bytes:
    """Return the bytes that the journal keeps of a submission's names."""
    return orjson.dumps(note)


def decode_note(data: bytes) -> SubmissionNote:
    """Read a note back. Raises `CodecError`."""
    try:
        return cast("SubmissionNote", _NOTE(orjson.loads(data)))
    except orjson.JSONDecodeError:
        raise CodecError("the note of a submission is damaged.") from None


def _plain(value: object) -> object:
    """Turn what JSON lacks into what it has."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(type(value).__name__)


def _decode_row(row: Any) -> Fact:
    pair = _need(row, list)
    if len(pair) != 2 or not isinstance(pair[0], str) or pair[0] not in _DECODERS:
        raise CodecError("a fact in the journal is of a kind that this version of drover does not know.")
    return cast("Fact", _DECODERS[pair[0]](pair[1]))


def _need(value: Any, kind: type) -> Any:
    # bool is an int to Python, not to a journal.
    if type(value) is not kind:
        raise CodecError(f"the journal has {type(value).__name__} where {kind.__name__} belongs.")
    return value


def _float(value: Any) -> float:
    if type(value) is int:
        return float(value)
    return cast("float", _need(value, float))


def _bytes(value: Any) -> bytes:
    try:
        return base64.b64decode(_need(value, str), validate=True)
    except (binascii.Error, ValueError):
        raise CodecError("the journal has text that is not base64 where bytes belong.") from None


def _str(value: Any) -> str:
    if type(value) is not str:
        raise CodecError(f"the journal has {type(value).__name__} where text belongs.")
    return value


def _int(value: Any) -> int:
    if type(value) is not int:
        raise CodecError(f"the journal has {type(value).__name__} where a whole number belongs.")
    return value


def _bool(value: Any) -> bool:
    return cast("bool", _need(value, bool))


_LEAVES: dict[Any, _Decoder] = {str: _str, int: _int, float: _float, bytes: _bytes, bool: _bool}


def _key(value: Any) -> str:
    # A step's key stands in its spec, in the needs of others and in every later fact: one string serves them all.
    return sys.intern(_str(value))


def _decoder(kind: Any) -> _Decoder:
    """Build the decoder of a type from its annotations; done once, at import."""
    if kind is StepKey:
        return _key
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    if kind in _LEAVES:
        return _LEAVES[kind]
    origin = typing.get_origin(kind)
    if origin in (tuple, frozenset):
        arguments = typing.get_args(kind)
        if origin is tuple and arguments[1] is not Ellipsis:
            return _pair(_decoder(arguments[0]), _decoder(arguments[1]))
        return _many(origin, _decoder(arguments[0]))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _choice(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _record(kind)
    raise TypeError(f"facts may not hold {kind!r}")


def _pair(first: _Decoder, second: _Decoder) -> _Decoder:
    def decode(value: Any) -> Any:
        pair = _need(value, list)
        if len(pair) != 2:
            raise CodecError("the journal has something else where a pair belongs.")
        return (first(pair[0]), second(pair[1]))

    return decode


def _many(container: type, item: _Decoder) -> _Decoder:
    def decode(value: Any) -> Any:
        return container(map(item, _need(value, list)))

    return decode


def _choice(kind: type[enum.Enum]) -> _Decoder:
    values = {member.value: member for member in kind}

    def decode(value: Any) -> enum.Enum:
        if not isinstance(value, str) or value not in values:
            raise CodecError(f"the journal has an unknown {kind.__name__}.")
        return values[value]

    return decode


def _record(kind: type) -> _Decoder:
    hints = typing.get_type_hints(kind)
    fields = tuple((field.name, _decoder(hints[field.name])) for field in dataclasses.fields(kind))
    names = frozenset(name for name, _ in fields)

    def decode(value: Any) -> Any:
        if type(value) is not dict or value.keys() != names:
            raise CodecError(f"the journal has a {kind.__name__} with missing or unknown fields.")
        return kind(*[item(value[name]) for name, item in fields])

    return _shared(decode) if kind is Requirements else decode


def _shared(decode: _Decoder) -> _Decoder:
    """Give one value for equal ones: a farm knows a handful of requirements and a hundred thousand steps."""
    known: dict[Any, Any] = {}

    def decode_shared(value: Any) -> Any:
        made = decode(value)
        return known.setdefault(made, made) if len(known) < _SHARED_VALUES else known.get(made, made)

    return decode_shared


_DECODERS: types.MappingProxyType[str, _Decoder] = types.MappingProxyType(
    {tag: _record(kind) for kind, tag in _TAGS.items()}
)
_NOTE = _record(SubmissionNote)
