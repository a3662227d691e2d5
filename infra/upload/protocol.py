"""Upload protocol over HTTP: messages and bounds of both sides.

    POST   PREFIX/uploads                  Begin -> Begun: all paths of a push or a job at once
    POST   PREFIX/uploads/ID/urls          UrlsWanted -> Urls: presigned PUTs of small objects
    POST   PREFIX/uploads/ID/parts         PartsWanted -> Parts: presigned PUTs of one object's parts, and what is there
    GET    PREFIX/uploads/ID/nar/NAME      -> SentOffset: how much of a relayed object has arrived
    PUT    PREFIX/uploads/ID/nar/NAME      ?offset=N, raw bytes -> SentOffset; 409 with an SentOffset where N is another
    POST   PREFIX/uploads/ID/pack          many small objects (`infra.upload.packs`) -> PackTaken
    POST   PREFIX/uploads/ID/commit        Commit -> Committed: one verdict for each path
    POST   PREFIX/uploads/ID/renew         -> 204: the upload goes on
    DELETE PREFIX/uploads/ID               -> 204: it does not

Paths are base names throughout, hashes `sha256:<nix32>`, sizes bytes. `how` an object travels is the coordinator's
choice: `direct`, by presigned PUTs to the object store (one, or a multipart upload of parts of `part_bytes`
beyond SINGLE_BYTES), or `relay`, through the coordinator: small ones in packs, others in pieces. Whatever was cut goes
on where it stopped: compression is deterministic for one version and level, so the sender compresses again and skips
what is there. It hashes everything, but for relayed objects of a coordinator that says it does (HASHES_HEADER): hashes
are half of a sender's work, and who receives makes them anyhow, to hold the NAR against the claim. An upload whose id
is unknown (it expired, or the coordinator began anew) is begun again and finds what had arrived in pieces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, ClassVar, Final

from infra.field_bounds import FieldBounds
from infra.nix.base32 import SHA256_PATTERN
from infra.nix.narinfo import StoredNar
from infra.nix.path_info import PathInfo
from infra.nix.store_path import StoreDir
from infra.objects.compression import COMPRESSION, MAX_NAR_BYTES, Compression
from infra.records import record

#: Paths of one upload, and bytes of its longest message.
MAX_PATHS: Final = 10_000
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
#: Least bytes of a part of a multipart upload (S3 takes 10,000 of at least 5 MiB); see `part_bytes`.
PART_BYTES: Final = 8 * 1024 * 1024
MAX_PARTS: Final = 10_000
#: Objects up to this size are put at once.
SINGLE_BYTES: Final = 8 * 1024 * 1024
#: Bytes of one relayed piece.
PIECE_BYTES: Final = 8 * 1024 * 1024
#: NARs up to this size travel in packs where objects are relayed: so many in one, and its bytes.
PACK_NAR_BYTES: Final = 1024 * 1024
PACK_PATHS: Final = 512
MAX_PACK_BYTES: Final = 8 * 1024 * 1024
#: Addresses in one answer.
MAX_URLS: Final = 256
#: Seconds for which an upload is held without word of its sender.
UPLOAD_TTL_S: Final = 900.0

#: Field of the answer to a begin, and its value where relayed objects may come without hashes: the coordinator makes
#: them as the bytes arrive. An older one says nothing, and an older sender does not look.
HASHES_HEADER: Final = "Drover-Hashes"
HASHES_MADE: Final = "made"
#: Names of the roots that pushes make.
KEEP_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._+?=-]{0,199}"

_Name = Annotated[str, FieldBounds(min_length=34, max_length=255)]
_Hash = Annotated[str, FieldBounds(pattern=f"^sha256:{SHA256_PATTERN}$")]
_MeasuredHash = Annotated[str, FieldBounds(pattern=f"^(sha256:{SHA256_PATTERN})?$")]
_Size = Annotated[int, FieldBounds(ge=1, le=MAX_NAR_BYTES)]
_Etag = Annotated[str, FieldBounds(max_length=200)]


def most_bytes(nar_size: int) -> int:
    """Bound the size of a NAR's object: a codec adds less than a hundredth to what it cannot compress."""
    return nar_size + nar_size // 64 + 64 * 1024


def part_bytes(nar_size: int) -> int:
    """Return the size of the parts (but the last) of the object of a NAR of this size."""
    unit = 1024 * 1024
    return max(PART_BYTES, (most_bytes(nar_size) // MAX_PARTS // unit + 1) * unit)


class UploadMessage:
    """Base of the messages: immutable records. Read with strict checks on both sides: unknown fields are refused."""

    __slots__ = ()
    #: For the receiver of requests, who has pydantic check the bounds.
    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}

    def json(self) -> bytes:
        """Return the message as it travels."""
        return json.dumps(self, default=_members, separators=(",", ":")).encode()


def _members(value: Any) -> Any:
    return {name: getattr(value, name) for name in _names_of(value.__class__)}


@cache
def _names_of(message: type[Any]) -> tuple[str, ...]:
    return tuple(each.name for each in fields(message))


@record(frozen=True, slots=True, kw_only=True)
class PathClaim(UploadMessage):
    """A path that is to be in the cache, as the sender's store knows it."""

    path: _Name
    nar_hash: _Hash
    nar_size: _Size
    references: Annotated[tuple[_Name, ...], FieldBounds(max_length=100_000, fail_fast=True)] = ()
    deriver: Annotated[str, FieldBounds(max_length=255)] = ""
    ca: Annotated[str, FieldBounds(max_length=200)] = ""

    @classmethod
    def of(cls, info: PathInfo) -> PathClaim:
        """Return the claim on a path of the sender's store."""
        return cls(
            path=info.base_name, nar_hash=info.nar_hash, nar_size=info.nar_size, references=info.references,
            deriver=info.deriver, ca=info.ca,
        )  # fmt: skip

    def info(self, store_dir: StoreDir) -> PathInfo:
        """Return the same of the path in `store_dir`."""
        path = store_dir.full(self.path)
        return PathInfo(path, self.nar_hash, self.nar_size, self.references, self.deriver, ca=self.ca)


@record(frozen=True, slots=True, kw_only=True)
class KeepRequest(UploadMessage):
    """Root that is to keep the pushed paths: of kind `push`, with this name, for so many days (0: for ever)."""

    name: Annotated[str, FieldBounds(pattern=f"^{KEEP_NAME}$")]
    paths: Annotated[tuple[_Name, ...], FieldBounds(min_length=1, max_length=MAX_PATHS, fail_fast=True)]
    days: Annotated[float, FieldBounds(ge=0, le=36_500)] = 30.0


@record(frozen=True, slots=True, kw_only=True)
class Begin(UploadMessage):
    """All paths of the closure, those that may be there too: each is protected from collection from here on."""

    paths: Annotated[tuple[PathClaim, ...], FieldBounds(min_length=1, max_length=MAX_PATHS, fail_fast=True)]


class SendRoute(StrEnum):
    """Routes of an object from client to store."""

    DIRECT = "direct"
    RELAY = "relay"


@record(frozen=True, slots=True, kw_only=True)
class SentPath(UploadMessage):
    """An object that was sent whole. `etags` are those of its parts, in order; empty where it had none.

    `file_hash` is "" where the sender made no hashes (HASHES_HEADER): the NAR that arrived, in pieces or in a pack, is
    held against the claim.
    """

    path: _Name
    file_hash: _MeasuredHash
    file_size: _Size
    etags: Annotated[tuple[_Etag, ...], FieldBounds(max_length=MAX_PARTS, fail_fast=True)] = ()

    def stored(self, url: str, compression: str) -> StoredNar:
        """Return the object, which the coordinator placed at `url`."""
        return StoredNar(url, compression, self.file_hash, self.file_size)


@record(frozen=True, slots=True, kw_only=True)
class Begun(UploadMessage):
    """Answer to the begin of an upload: the paths to send, the route of each, and the paths that are there already."""

    id: str
    how: SendRoute
    send: tuple[str, ...]
    present: tuple[str, ...]
    #: Paths that are not sent because a trusted upstream has them, signed.
    upstream: tuple[str, ...] = ()
    #: Paths that are published with other bits, which stay; that these differ is recorded already.
    conflicts: tuple[str, ...] = ()
    ttl_s: float = UPLOAD_TTL_S
    #: What the cache wants the objects of this upload compressed with.
    compression: Compression = COMPRESSION
    #: Whether small objects come in packs.
    packs: bool = False
    #: Paths that came in packs of an earlier upload and were not committed: they are sent no more.
    arrived: tuple[SentPath, ...] = ()


@record(frozen=True, slots=True, kw_only=True)
class UrlsWanted(UploadMessage):
    """Paths whose object is at most SINGLE_BYTES."""

    paths: Annotated[tuple[_Name, ...], FieldBounds(min_length=1, max_length=MAX_URLS, fail_fast=True)]


@record(frozen=True, slots=True, kw_only=True)
class Urls(UploadMessage):
    """Path -> address to PUT the whole object to; good for some minutes."""

    urls: dict[str, str]


@record(frozen=True, slots=True, kw_only=True)
class PartsWanted(UploadMessage):
    """Part numbers, from 1, of one object larger than SINGLE_BYTES."""

    path: _Name
    first: Annotated[int, FieldBounds(ge=1, le=MAX_PARTS)]
    count: Annotated[int, FieldBounds(ge=1, le=MAX_URLS)]


@record(frozen=True, slots=True, kw_only=True)
class StoredPart(UploadMessage):
    """A part that the store has: `etag` is the MD5 of its bytes in hex where the store does as S3 does."""

    number: int
    size: int
    etag: str


@record(frozen=True, slots=True, kw_only=True)
class Parts(UploadMessage):
    """Part number -> address to PUT it to, and the parts of the requested range that are there already."""

    urls: dict[str, str]
    have: tuple[StoredPart, ...] = ()


@record(frozen=True, slots=True, kw_only=True)
class SentOffset(UploadMessage):
    """Number of bytes of an object that have arrived."""

    offset: int


@record(frozen=True, slots=True, kw_only=True)
class PackTaken(UploadMessage):
    """Answer to a pack: its objects that are not as claimed, with the reason; all others have arrived."""

    refused: dict[str, str]


@record(frozen=True, slots=True, kw_only=True)
class Commit(UploadMessage):
    """Request to publish the paths sent, all together. `keep` makes a root, also of paths that were there already."""

    sent: Annotated[tuple[SentPath, ...], FieldBounds(max_length=MAX_PATHS, fail_fast=True)]
    keep: KeepRequest | None = None


class SendStatus(StrEnum):
    """Outcomes of one path."""

    #: Verified, signed, visible.
    PUBLISHED = "published"
    #: It was published before, with these very bits.
    PRESENT = "present"
    #: In the object store, to be published when its build is reported (uploads of workers).
    STORED = "stored"
    #: Other bits were published before; they stay.
    CONFLICT = "conflict"
    #: The bytes are not as claimed, or not there: send them again.
    REFUSED = "refused"
    #: References are not published; `missing` names them.
    MISSING_REFERENCES = "missing_references"
    #: The store failed: the same commit may succeed later.
    FAILED = "failed"


@record(frozen=True, slots=True, kw_only=True)
class SendVerdict(UploadMessage):
    """The outcome of one path; `url` is the object's key."""

    path: str
    status: SendStatus
    message: str = ""
    missing: tuple[str, ...] = ()
    url: str = ""


@record(frozen=True, slots=True, kw_only=True)
class Committed(UploadMessage):
    """One verdict for each path of the commit, in order."""

    verdicts: tuple[SendVerdict, ...]
