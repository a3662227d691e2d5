"""Facts and evidence as bytes: what the journal stores, for ever readable.

A frame is a JSON array `[[tag, {field: value, …}], …]`, compressed with zstd where that pays; both forms know
themselves by their first byte. Tags are written down here and never derived from a class name, so that a class may be
renamed. Bytes are base64 text, sets are sorted arrays. Decoding is strict: an unknown tag, a missing or an additional
field and a value of another type are all `CodecError`, because a journal half understood gives a wrong farm.

Evidence is what a finished build leaves for publishing: the outputs as the worker reported them. The core carries it
unread.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar, cast

import orjson
import zstandard
from pydantic import TypeAdapter, ValidationError

from coordinator.errors import CoordinatorError
from scheduler import facts
from scheduler.facts import Fact
from scheduler.model import Requirements, StepKey, SubmissionId
from scheduler.resource_limits import ResourceLimits
from workers.wire.messages import Output

#: Frames above this many bytes are compressed.
_COMPRESS_ABOVE_BYTES = 4096
#: In frames above this many bytes repetitions are looked for 2^27 bytes back: the same keys stand megabytes apart.
_LOOK_FAR_ABOVE_BYTES = 256 * 1024
_FAR_LOG = 27
#: A frame that claims to be larger than this is damaged (one frame holds at most `journal.FRAME_FACTS` facts).
MAX_FRAME_BYTES = 1024 * 1024 * 1024

#: Records with fewer plain fields are decoded field by field.
_QUICK_FIELDS = 3
#: Different requirements that are remembered to be shared.
_SHARED_VALUES = 10_000

_TAGS: dict[type, str] = {
    facts.SubmissionAccepted: "submission-accepted",
    facts.SubmissionRetried: "submission-retried",
    facts.SubmissionWithdrawn: "submission-withdrawn",
    facts.SubmissionForgotten: "submission-forgotten",
    facts.StepsForgotten: "steps-forgotten",
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
    facts.BuilderQuarantined: "builder-quarantined",
    facts.QuarantineEnded: "quarantine-ended",
    facts.FarmResumed: "farm-resumed",
    facts.StepRestored: "step-restored",
    facts.SubmissionRestored: "submission-restored",
    facts.BuilderRestored: "builder-restored",
    facts.FarmRestored: "farm-restored",
}

_Decoder = Callable[[Any], Any]


class CodecError(CoordinatorError):
    """Stored bytes do not say what this version of drover can understand."""

    code: ClassVar[str] = "damaged"


def encode_facts(batch: Sequence[Fact]) -> bytes:
    """Return the frame that holds `batch`, in order."""
    return _encode(batch, _TAGS)


def _encode(batch: Sequence[object], tags: Mapping[type, str]) -> bytes:
    frame = orjson.dumps([[tags[type(each)], each] for each in batch], default=_plain)
    if len(frame) <= _COMPRESS_ABOVE_BYTES:
        return frame
    if len(frame) <= _LOOK_FAR_ABOVE_BYTES:
        return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(frame)
    # A large submission names its members several times, a snapshot those of all that were submitted again.
    far = zstandard.ZstdCompressionParameters.from_level(
        1, source_size=len(frame), enable_ldm=True, window_log=_FAR_LOG, write_checksum=True
    )
    return zstandard.ZstdCompressor(compression_params=far).compress(frame)


def decode_facts(frame: bytes) -> tuple[Fact, ...]:
    """Return the facts of a frame, in order. Raises `CodecError` for anything but a whole frame."""
    return cast("tuple[Fact, ...]", _decode(frame, _DECODERS))


def _decode(frame: bytes, decoders: Mapping[str, _Decoder]) -> tuple[Any, ...]:
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
        return tuple([_decode_row(row, decoders) for row in _need(rows, list)])
    except RecursionError:
        raise CodecError("a frame of facts is nested too deeply.") from None


@dataclass(frozen=True, slots=True)
class RootNote:
    """A wish of a submission and the step it stands on; `outputs` as wanted, name and full store path."""

    attr: str
    drv: str
    step: StepKey
    outputs: tuple[tuple[str, str], ...]
    #: What the submission says of this root; absent in notes of before 2026-11-24.
    limits: ResourceLimits | None = None


@dataclass(frozen=True, slots=True)
class SubmissionNote:
    """What people called a submission, and how many derivations stand behind its steps."""

    label: str
    roots: tuple[RootNote, ...]
    derivations: int


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Part of a snapshot of the read model: what it knows of a step and the core does not."""

    step: StepKey
    #: Who has it or had it last.
    builder: str
    started_at: float
    ended_at: float
    uploaded_bytes: int
    trouble: str
    #: As in `rows.Life`; absent in snapshots of before 2026-11-29.
    isolation: str = ""


@dataclass(frozen=True, slots=True)
class SubmissionRecord:
    """Part of a snapshot of the read model: a submission. Fields are as in `rows.SubmissionRow`."""

    submission: SubmissionId
    created_at: float
    roots: tuple[StepKey, ...]
    members: tuple[StepKey, ...]
    #: Members that do not count here, because they were done when it arrived; empty once it has ended.
    apart: tuple[StepKey, ...]
    held: int
    joined: int
    #: By state, for one that has ended: its counts are history.
    counts: tuple[tuple[str, int], ...]
    failed: tuple[StepKey, ...]
    done_roots: int
    uploaded_bytes: int
    withdrawn: bool
    touched_at: float
    ended: bool


Record = StepRecord | SubmissionRecord
_RECORD_TAGS: dict[type, str] = {StepRecord: "step", SubmissionRecord: "submission"}


def encode_records(batch: Sequence[Record]) -> bytes:
    """Return the frame that holds a part of the read model's snapshot, in order."""
    return _encode(batch, _RECORD_TAGS)


def decode_records(frame: bytes) -> tuple[Record, ...]:
    """Return the records of a frame, in order. Raises `CodecError` for anything but a whole frame."""
    return cast("tuple[Record, ...]", _decode(frame, _RECORD_DECODERS))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a finished build claims: every output as uploaded, and in which class of isolation it was built."""

    outputs: tuple[Output, ...]
    #: Empty in what was written before 2026-11-29.
    isolation: str = ""

    @property
    def uploaded_bytes(self) -> int:
        """Bytes of compressed NARs."""
        return sum(output.file_size for output in self.outputs)


_OUTPUTS: TypeAdapter[tuple[Output, ...]] = TypeAdapter(tuple[Output, ...])


def encode_evidence(evidence: Evidence) -> bytes:
    """Return the bytes that the core keeps until the outputs are published."""
    outputs = [output.model_dump() for output in evidence.outputs]
    return orjson.dumps({"v": 1, "outputs": outputs, "isolation": evidence.isolation})


def decode_evidence(data: bytes) -> Evidence:
    """Read evidence back. Raises `CodecError`."""
    try:
        raw = _need(orjson.loads(data), dict)
        if raw.get("v") != 1:
            raise CodecError("the evidence of a build was written by another version of drover.")
        return Evidence(_OUTPUTS.validate_python(raw.get("outputs")), _need(raw.get("isolation", ""), str))
    except (orjson.JSONDecodeError, ValidationError):
        raise CodecError("the evidence of a build is damaged.") from None


def evidence_shown(data: bytes) -> tuple[int, str]:
    """Return (bytes uploaded, class of isolation) of some evidence, (0, "") where it cannot be read.

    It is only shown to people.
    """
    try:
        raw = orjson.loads(data)
        return sum(int(output["file_size"]) for output in raw["outputs"]), str(raw.get("isolation", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0, ""


@dataclass(frozen=True, slots=True)
class StoredNote:
    """A note as the journal keeps it: `own` is the submission's, `shared` stands once for all that have the same.

    `shared` is empty for a note of before 2026-11-29, whose `own` has all, and for one with few roots.
    """

    own: bytes
    shared: bytes = b""


def encode_note(note: SubmissionNote) -> StoredNote:
    """Return what the journal keeps of a submission's names: the roots of the same graph are the same bytes."""
    roots = orjson.dumps(note.roots)
    if len(roots) <= _COMPRESS_ABOVE_BYTES:
        return StoredNote(orjson.dumps(note))
    own = orjson.dumps({"label": note.label, "derivations": note.derivations})
    return StoredNote(own, zstandard.ZstdCompressor(level=3, write_checksum=True).compress(roots))


def decode_note(stored: StoredNote) -> SubmissionNote:
    """Read a note back. Raises `CodecError`."""
    try:
        raw = orjson.loads(stored.own)
        if stored.shared:
            roots = zstandard.ZstdDecompressor().decompress(stored.shared, max_output_size=MAX_FRAME_BYTES)
            raw = {**_need(raw, dict), "roots": orjson.loads(roots)}
        return cast("SubmissionNote", _NOTE(raw))
    except (orjson.JSONDecodeError, zstandard.ZstdError):
        raise CodecError("the note of a submission is damaged.") from None


def _note(own: bytes, roots: tuple[RootNote, ...]) -> SubmissionNote:
    try:
        note: SubmissionNote = _NOTE({**_need(orjson.loads(own), dict), "roots": []})
    except orjson.JSONDecodeError:
        raise CodecError("the note of a submission is damaged.") from None
    return dataclasses.replace(note, roots=roots)


def decode_notes(stored: Mapping[SubmissionId, StoredNote]) -> dict[SubmissionId, SubmissionNote]:
    """Read notes back; those that share their roots share them in memory too. Raises `CodecError`."""
    notes: dict[SubmissionId, SubmissionNote] = {}
    roots: dict[bytes, tuple[RootNote, ...]] = {}
    for name, each in stored.items():
        if each.shared in roots:
            notes[name] = _note(each.own, roots[each.shared])
            continue
        notes[name] = decode_note(each)
        if each.shared:
            roots[each.shared] = notes[name].roots
    return notes


def _plain(value: object) -> object:
    """Turn what JSON lacks into what it has."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(type(value).__name__)


def _decode_row(row: Any, decoders: Mapping[str, _Decoder]) -> Any:
    pair = _need(row, list)
    if len(pair) != 2 or not isinstance(pair[0], str) or pair[0] not in decoders:
        raise CodecError("a fact in the journal is of a kind that this version of drover does not know.")
    return decoders[pair[0]](pair[1])


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
    try:
        return sys.intern(value)
    except TypeError:
        return _str(value)


def _keys(value: Any) -> tuple[str, ...]:
    try:
        return tuple(map(sys.intern, _need(value, list)))
    except TypeError:
        return tuple(map(_str, value))


def _decoder(kind: Any) -> _Decoder:  # noqa: PLR0911  one way for each form of type
    """Build the decoder of a type from its annotations; done once, at import."""
    if kind is StepKey:
        return _key
    if kind == tuple[StepKey, ...]:
        return _keys
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    if kind in _LEAVES:
        return _LEAVES[kind]
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        [some] = [choice for choice in typing.get_args(kind) if choice is not types.NoneType]
        return _optional(_decoder(some))
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


def _optional(some: _Decoder) -> _Decoder:
    return lambda value: None if value is None else some(value)


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
    names = tuple(field.name for field in dataclasses.fields(kind))
    items = tuple(_decoder(hints[name]) for name in names)
    # Most fields hold what they must: one comparison of all their types is worth a call for each.
    exact = {_str: str, _int: int, _float: float, _bool: bool}
    leaves = tuple(name for name, item in zip(names, items, strict=True) if item in exact)
    types_of_leaves = tuple(exact[item] for item in items if item in exact)
    quick_items = tuple(None if item in exact else item for item in items)
    if len(names) < _QUICK_FIELDS or len(leaves) < _QUICK_FIELDS:
        return _small_record(kind, names, items)
    pick, pick_leaves = itemgetter(*names), itemgetter(*leaves)

    def decode(value: Any) -> Any:
        if type(value) is not dict or len(value) != len(names):
            value = _completed(kind, value)
        try:
            raw = pick(value)
        except KeyError:
            raise _mismatch(kind) from None
        if tuple(map(type, pick_leaves(value))) != types_of_leaves:
            return kind(*[item(each) for item, each in zip(items, raw, strict=True)])
        return kind(*[each if item is None else item(each) for item, each in zip(quick_items, raw, strict=True)])

    return decode


def _small_record(kind: type, names: tuple[str, ...], items: tuple[_Decoder, ...]) -> _Decoder:
    fields = tuple(zip(names, items, strict=True))
    known = frozenset(names)

    def decode(value: Any) -> Any:
        if type(value) is not dict or value.keys() != known:
            value = _completed(kind, value)
        return kind(*[item(value[name]) for name, item in fields])

    return _shared(decode) if kind is Requirements else decode


def _completed(kind: type, value: Any) -> dict[str, Any]:
    """Give a record of before a field was added what the field is by default. Raises `CodecError`."""
    fields = dataclasses.fields(kind)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    made = orjson.loads(orjson.dumps(defaults, default=_plain)) | (value if type(value) is dict else {})
    if made.keys() != {field.name for field in fields}:
        raise _mismatch(kind)
    return cast("dict[str, Any]", made)


def _mismatch(kind: type) -> CodecError:
    return CodecError(f"the journal has a {kind.__name__} with missing or unknown fields.")


def _shared(decode: _Decoder) -> _Decoder:
    """Give one value for equal ones: a farm knows a handful of requirements and a hundred thousand steps."""
    known: dict[Any, Any] = {}

    def decode_shared(value: Any) -> Any:
        try:
            said = (value["system"], *_need(value["features"], list)) if len(value) == 2 else ()
            made = known.get(said)
        except (TypeError, KeyError):
            return decode(value)
        if made is None:
            made = decode(value)
            if len(known) < _SHARED_VALUES:
                known[said] = made
        return made

    return decode_shared


_DECODERS: types.MappingProxyType[str, _Decoder] = types.MappingProxyType(
    {tag: _record(kind) for kind, tag in _TAGS.items()}
)
_RECORD_DECODERS: types.MappingProxyType[str, _Decoder] = types.MappingProxyType(
    {tag: _record(kind) for kind, tag in _RECORD_TAGS.items()}
)
_NOTE = _record(SubmissionNote)
