"""Claims: offers to publish a path, their outcomes, and the part of the decision that needs no I/O."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from infra.nix.errors import FormatError
from infra.nix.hashing import parse_sha256, sha256_text
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import StoreDir, parse_base_name
from infra.objects.compression import MAX_NAR_BYTES, SUFFIXES, nar_key
from infra.objects.nar_writer import UploadedNar

#: References of one path; Nix itself has no limit, the largest known closures have some 10,000 paths.
MAX_REFERENCES = 100_000

_GENERATION = re.compile(r"[0-9a-z]{1,40}")
_CONTENT_ADDRESS = re.compile(r"(?:text|fixed):(?:r:|git:)?(?:md5|sha1|sha256|sha512):[0-9a-z]{26,128}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A claim: this object is the NAR of this path. Hashes are `sha256:<nix32>`, sizes bytes.

    `references` and `deriver` are base names; a path that refers to itself names itself.
    """

    store_path: str
    nar_hash: str
    nar_size: int
    references: tuple[str, ...]
    url: str
    compression: str
    file_hash: str
    file_size: int
    deriver: str = ""
    ca: str = ""

    @classmethod
    def of_upload(
        cls, store_path: str, uploaded: UploadedNar, references: Sequence[str], *, deriver: str = "", ca: str = ""
    ) -> Candidate:
        """Return the claim that `uploaded` is the NAR of `store_path`."""
        return cls(
            store_path=store_path,
            nar_hash=uploaded.nar_hash,
            nar_size=uploaded.nar_size,
            references=tuple(references),
            url=uploaded.url,
            compression=uploaded.compression,
            file_hash=uploaded.file_hash,
            file_size=uploaded.file_size,
            deriver=deriver,
            ca=ca,
        )

    @property
    def base_name(self) -> str:
        """File name of the store path."""
        return self.store_path.rpartition("/")[2]

    @property
    def hash_part(self) -> str:
        """The 32 characters before the name."""
        return self.base_name[:32]

    def narinfo(self) -> NarInfo:
        """Return what the cache will say of the path, unsigned."""
        return NarInfo(
            store_path=self.store_path,
            url=self.url,
            compression=self.compression,
            file_hash=self.file_hash,
            file_size=self.file_size,
            nar_hash=self.nar_hash,
            nar_size=self.nar_size,
            references=tuple(sorted(set(self.references))),
            deriver=self.deriver,
            ca=self.ca,
        )


class RejectReason(StrEnum):
    """Reasons for the refusal of a claim. Only STORE_FAILED may go away by itself."""

    MALFORMED = "malformed"
    MISSING_OBJECT = "missing_object"
    CORRUPT = "corrupt"
    MISSING_REFERENCES = "missing_references"
    STORE_FAILED = "store_failed"


@dataclass(frozen=True, slots=True)
class Published:
    """The path can be fetched now, and could not before."""

    store_path: str


@dataclass(frozen=True, slots=True)
class AlreadyPublished:
    """The path was published before with these very bits."""

    store_path: str


@dataclass(frozen=True, slots=True)
class Conflict:
    """The path was published before with other bits, which stay; the claim was verified and is recorded."""

    store_path: str
    published_nar_hash: str
    offered_nar_hash: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """The claim is not true, or not yet. `missing` has the base names of references that are not published."""

    store_path: str
    reason: RejectReason
    message: str
    missing: tuple[str, ...] = ()


PublishOutcome: TypeAlias = Published | AlreadyPublished | Conflict | Rejected


def malformed(candidate: Candidate, store_dir: StoreDir) -> str:
    """Return what is wrong with the claim on its face, "" if nothing is."""
    try:
        store_dir.parse(candidate.store_path)
        for reference in candidate.references:
            parse_base_name(reference)
        deriver = parse_base_name(candidate.deriver) if candidate.deriver else None
        normal = tuple(sha256_text(parse_sha256(text)) for text in (candidate.nar_hash, candidate.file_hash))
    except FormatError as error:
        return str(error)
    if candidate.compression not in SUFFIXES:
        return f"the object's compression is not one of {', '.join(SUFFIXES)}"
    sizes = (candidate.nar_size, candidate.file_size)
    faults = {
        "the deriver is not a .drv": deriver is not None and not deriver.is_derivation,
        "a hash is not in the form sha256:<52 nix32 characters>": normal != (candidate.nar_hash, candidate.file_hash),
        "the object is not named after its hash and compression": not _is_named_after(candidate),
        f"a size is not between 1 and {MAX_NAR_BYTES} bytes": not 0 < min(sizes) <= max(sizes) <= MAX_NAR_BYTES,
        f"it has more than {MAX_REFERENCES} references": len(candidate.references) > MAX_REFERENCES,
        "the content address is malformed": bool(candidate.ca) and not _CONTENT_ADDRESS.fullmatch(candidate.ca),
    }
    return next((fault for fault, found in faults.items() if found), "")


def _is_named_after(candidate: Candidate) -> bool:
    """Tell whether the key holds the file's hash, or the NAR's and a generation (uploads straight to the store)."""
    if candidate.url == nar_key(candidate.file_hash, candidate.compression):
        return True
    start, _, generation = candidate.url.partition("-")
    suffix = f".nar{SUFFIXES[candidate.compression]}"
    return (
        start == f"nar/{candidate.nar_hash.removeprefix('sha256:')}"
        and generation.endswith(suffix)
        and bool(_GENERATION.fullmatch(generation.removesuffix(suffix)))
    )


def references_first(
    candidates: Sequence[Candidate], present: Collection[str]
) -> tuple[list[Candidate], dict[str, tuple[str, ...]]]:
    """Order candidates so that each comes after all that it refers to.

    Args:
        candidates: distinct paths.
        present: base names that may be referred to already.

    Returns:
        The publishable ones, in order, and for each other its store path -> the base names that it lacks (which
        include candidates that lack something themselves, or that refer to each other in a cycle).
    """
    unmet: dict[str, set[str]] = {}
    referrers: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        wanted = set(candidate.references) - {candidate.base_name}
        unmet[candidate.base_name] = {reference for reference in wanted if reference not in present}
        for reference in unmet[candidate.base_name]:
            referrers.setdefault(reference, []).append(candidate)
    free = deque(candidate for candidate in candidates if not unmet[candidate.base_name])
    ordered = []
    while free:
        candidate = free.popleft()
        ordered.append(candidate)
        for referrer in referrers.get(candidate.base_name, ()):
            lacking = unmet[referrer.base_name]
            lacking.discard(candidate.base_name)
            if not lacking:
                free.append(referrer)
    blocked = {
        candidate.store_path: tuple(sorted(unmet[candidate.base_name]))
        for candidate in candidates
        if unmet[candidate.base_name]
    }
    return ordered, blocked


def rejected_for_references(missing: Mapping[str, tuple[str, ...]]) -> dict[str, PublishOutcome]:
    """Return the outcomes of candidates that `references_first` could not place."""
    outcomes: dict[str, PublishOutcome] = {}
    for store_path, names in missing.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        message = f"it refers to {names[0]}{more}, which cannot be fetched"
        outcomes[store_path] = Rejected(store_path, RejectReason.MISSING_REFERENCES, message, names)
    return outcomes
