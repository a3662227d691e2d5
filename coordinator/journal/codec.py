"""Facts and evidence as bytes: what the journal stores, for ever readable.

A frame is a JSON array `[[tag, {field: value, …}], …]`, compressed with zstd where that pays; both forms know
themselves by their first byte. Tags are written down here and never derived from a class name, so that a class may be
renamed. Bytes are base64 text, sets are sorted arrays. Decoding is strict: an unknown tag, a missing or an additional
field and a value of another type are all `CodecError`, because a journal half understood gives a wrong farm.

Evidence is what a finished build leaves for publishing: the outputs as the worker reported them. The core carries it
unread.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import msgspec
import orjson
import zstandard
from pydantic import TypeAdapter, ValidationError

from coordinator.journal.decoding import RecordDecoder, need, plain
from coordinator.journal.errors import CodecError
from scheduler import facts
from scheduler.facts import Fact
from scheduler.model import StepKey, SubmissionId
from scheduler.resource_limits import ResourceLimits
from scheduler.terms import NO_TERMS, Terms, Withdrawal
from workers.wire.messages import Output

#: Frames above this many bytes are compressed.
_COMPRESS_ABOVE_BYTES = 4096
#: In frames above this many bytes repetitions are looked for 2^27 bytes back: the same keys stand megabytes apart.
_LOOK_FAR_ABOVE_BYTES = 256 * 1024
_FAR_LOG = 27
#: A frame that claims to be larger than this is damaged (one frame holds at most `journal.FRAME_FACTS` facts).
MAX_FRAME_BYTES = 1024 * 1024 * 1024

_TAGS: dict[type, str] = {
    facts.SubmissionAccepted: "submission-accepted",
    facts.SubmissionGrew: "submission-grew",
    facts.SubmissionSealed: "submission-sealed",
    facts.SubmissionRetried: "submission-retried",
    facts.SubmissionWithdrawn: "submission-withdrawn",
    facts.SubmissionBumped: "submission-bumped",
    facts.SubmissionForgotten: "submission-forgotten",
    facts.StepsForgotten: "steps-forgotten",
    facts.StepAdded: "step-added",
    facts.WorksRevised: "works-revised",
    facts.RecipeAdded: "recipe-added",
    facts.StepCached: "step-held",
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
    facts.StepReady: "step-ready",
    facts.StepWaiting: "step-waiting",
    facts.MembersJoined: "members-joined",
    facts.BuilderAdmitted: "builder-admitted",
    facts.BuilderRefreshed: "builder-refreshed",
    facts.BuilderRemoved: "builder-removed",
    facts.BuilderQuarantined: "builder-quarantined",
    facts.QuarantineEnded: "quarantine-ended",
    facts.BuildersRated: "builders-rated",
    facts.StepHeld: "waits-for-faster",
    facts.FarmResumed: "farm-resumed",
    facts.StepRestored: "step-restored",
    facts.SubmissionRestored: "submission-restored",
    facts.BuilderRestored: "builder-restored",
    facts.FarmRestored: "farm-restored",
}


def encode_facts(batch: Sequence[Fact]) -> bytes:
    """Return the frame that holds `batch`, in order."""
    return _encode(batch, _TAGS)


def _encode(batch: Sequence[object], tags: Mapping[type, str]) -> bytes:
    frame = orjson.dumps([[tags[type(each)], each] for each in batch], default=plain)
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


def _decode(frame: bytes, decoders: Mapping[str, RecordDecoder[Any]]) -> tuple[Any, ...]:
    if frame[:1] != b"[":
        try:
            frame = zstandard.ZstdDecompressor().decompress(frame, max_output_size=MAX_FRAME_BYTES)
        except zstandard.ZstdError:
            raise CodecError("a frame of facts is damaged (it is neither JSON nor zstd).") from None
    try:
        return tuple([_decoder(tag, decoders).decode(bytes(body)) for tag, body in _ROWS.decode(frame)])
    except msgspec.DecodeError as error:
        raise CodecError(f"a frame of facts is damaged: {error}.") from None
    except RecursionError:
        raise CodecError("a frame of facts is nested too deeply.") from None


def _decoder(tag: str, decoders: Mapping[str, RecordDecoder[Any]]) -> RecordDecoder[Any]:
    try:
        return decoders[tag]
    except KeyError:
        raise CodecError("a fact in the journal is of a kind that this version of drover does not know.") from None


@dataclass(frozen=True, slots=True)
class RootNote:
    """A wish of a submission and the step it stands on; `outputs` as wanted, name and full store path."""

    attr: str
    drv: str
    step: StepKey
    outputs: tuple[tuple[str, str], ...]
    #: Limits that the submission sets for this root; absent in notes of before 2026-11-24.
    limits: ResourceLimits | None = None


@dataclass(frozen=True, slots=True)
class OriginNote:
    """Origin of a submission: its owner by the token, the rest by its client's word."""

    owner: str = ""
    branch: str = ""
    pull: str = ""
    commit: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    #: Its idempotency key, and the digests of the wish that belongs to it.
    key: str = ""
    wish: str = ""
    #: Name of the client that opened it.
    client: str = ""


@dataclass(frozen=True, slots=True)
class SubmissionNote:
    """Name of a submission for people, and the number of derivations behind its steps."""

    label: str
    roots: Sequence[RootNote]
    derivations: int
    #: W3C trace context that the client sent, and what it did before: (name, begin, end). Absent in notes of before
    #: 2026-11-29.
    traceparent: str = ""
    stages: tuple[tuple[str, float, float], ...] = ()
    #: Attributes that its client could not evaluate: (attribute, kind, message), the first of `unevaluated`. Absent in
    #: notes of before 2026-11-30.
    not_evaluated: tuple[tuple[str, str, str], ...] = ()
    unevaluated: int = 0
    #: Absent in notes of before 2026-11-30.
    origin: OriginNote = OriginNote()


@dataclass(frozen=True, slots=True)
class NoteGrowth:
    """Part of a note: roots by which an open submission has grown, and the derivations that came with them."""

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
    #: Absent in snapshots of before 2026-11-30.
    open: bool = False
    incomplete: str = ""
    #: As in `rows.SubmissionRow`; absent in snapshots of before 2026-11-30.
    why: Withdrawal = Withdrawal.CANCELLED
    by: str = ""
    terms: Terms = NO_TERMS


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
    """Claim of a finished build: every output as uploaded, and the class of isolation in which it was built."""

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
        raw = need(orjson.loads(data), dict)
        if raw.get("v") != 1:
            raise CodecError("the evidence of a build was written by another version of drover.")
        return Evidence(_OUTPUTS.validate_python(raw.get("outputs")), need(raw.get("isolation", ""), str))
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
    #: What it has grown by since, in order.
    grown: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredGrowth:
    """A growth of a note as the journal keeps it; `number` counts those of its submission from 0."""

    number: int
    body: bytes


def encode_note(note: SubmissionNote) -> StoredNote:
    """Return what the journal keeps of a submission's names: the roots of the same graph are the same bytes."""
    roots = orjson.dumps(note.roots)
    if len(roots) <= _COMPRESS_ABOVE_BYTES:
        return StoredNote(orjson.dumps(note))
    own = orjson.dumps({each.name: getattr(note, each.name) for each in fields(note) if each.name != "roots"})
    return StoredNote(own, zstandard.ZstdCompressor(level=3, write_checksum=True).compress(roots))


def encode_growth(growth: NoteGrowth, number: int) -> StoredGrowth:
    """Return what the journal keeps of a growth."""
    return StoredGrowth(number, zstandard.ZstdCompressor(level=3, write_checksum=True).compress(orjson.dumps(growth)))


def _grown(note: SubmissionNote, bodies: Sequence[bytes]) -> SubmissionNote:
    """Return a note with what it has grown by."""
    if not bodies:
        return note
    try:
        read = [zstandard.ZstdDecompressor().decompress(body, max_output_size=MAX_FRAME_BYTES) for body in bodies]
    except zstandard.ZstdError:
        raise CodecError("the note of a submission is damaged.") from None
    growths = [_GROWTH.decode(body) for body in read]
    roots = (*note.roots, *(root for growth in growths for root in growth.roots))
    derivations = note.derivations + sum(growth.derivations for growth in growths)
    return dataclasses.replace(note, roots=roots, derivations=derivations)


def decode_note(stored: StoredNote) -> SubmissionNote:
    """Read a note back. Raises `CodecError`."""
    return _grown(_ungrown(stored), stored.grown)


def _ungrown(stored: StoredNote) -> SubmissionNote:
    try:
        raw = orjson.loads(stored.own)
        if stored.shared:
            roots = zstandard.ZstdDecompressor().decompress(stored.shared, max_output_size=MAX_FRAME_BYTES)
            raw = {**need(raw, dict), "roots": orjson.loads(roots)}
        return _NOTE.convert(raw)
    except (orjson.JSONDecodeError, zstandard.ZstdError):
        raise CodecError("the note of a submission is damaged.") from None


def _note(own: bytes, roots: Sequence[RootNote]) -> SubmissionNote:
    try:
        note = _NOTE.convert({**need(orjson.loads(own), dict), "roots": []})
    except orjson.JSONDecodeError:
        raise CodecError("the note of a submission is damaged.") from None
    return dataclasses.replace(note, roots=roots)


def decode_notes(stored: Mapping[SubmissionId, StoredNote]) -> dict[SubmissionId, SubmissionNote]:
    """Read notes back; those that share their roots share them in memory too. Raises `CodecError`."""
    notes: dict[SubmissionId, SubmissionNote] = {}
    roots: dict[bytes, Sequence[RootNote]] = {}
    for name, each in stored.items():
        if each.shared in roots and not each.grown:
            notes[name] = _note(each.own, roots[each.shared])
            continue
        notes[name] = decode_note(each)
        if each.shared and not each.grown:
            roots[each.shared] = notes[name].roots
    return notes


#: Rows of a frame; what each holds is decoded as its tag says.
_ROWS = msgspec.json.Decoder(list[tuple[str, msgspec.Raw]])
_DECODERS: Mapping[str, RecordDecoder[Any]] = types.MappingProxyType(
    {tag: RecordDecoder(kind) for kind, tag in _TAGS.items()}
)
_RECORD_DECODERS: Mapping[str, RecordDecoder[Any]] = types.MappingProxyType(
    {tag: RecordDecoder(kind) for kind, tag in _RECORD_TAGS.items()}
)
_NOTE = RecordDecoder(SubmissionNote)
_GROWTH = RecordDecoder(NoteGrowth)
