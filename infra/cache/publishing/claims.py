"""Claims, the part of the decision on them that needs no I/O, and their outcomes.

A claim is an unverified narinfo: it says that an object is the NAR of a path. The publisher ignores its signatures and
signs for itself.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from infra.nix.base32 import DIGIT_PATTERN
from infra.nix.errors import FormatError
from infra.nix.hashing import parse_sha256, sha256_text
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import StoreDir, parse_base_name
from infra.objects.compression import MAX_NAR_BYTES, SUFFIXES, nar_key

#: References of one path; Nix itself has no limit, the largest known closures have some 10,000 paths.
MAX_REFERENCES = 100_000

#: The one text of a hash that counts: its first digit has one bit.
_HASH = re.compile(rf"sha256:[01]{DIGIT_PATTERN}{{51}}")
_GENERATION = re.compile(r"[0-9a-z]{1,40}")
_CONTENT_ADDRESS = re.compile(r"(?:text|fixed):(?:r:|git:)?(?:md5|sha1|sha256|sha512):[0-9a-z]{26,128}")


class RejectReason(StrEnum):
    """Reasons for the refusal of a claim. Only STORE_FAILED may go away by itself."""

    MALFORMED = "malformed"
    MISSING_OBJECT = "missing_object"
    CORRUPT = "corrupt"
    MISSING_REFERENCES = "missing_references"
    STORE_FAILED = "store_failed"


class ProvenObject(NamedTuple):
    """An object of this cache, named after the hash of its file, that was found to be a NAR of this hash and size."""

    url: str
    nar_hash: str
    nar_size: int


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


def malformed(claim: NarInfo, store_dir: StoreDir) -> str:
    """Return what is wrong with the claim on its face, "" if nothing is."""
    try:
        store_dir.parse(claim.store_path)
        for reference in claim.path.references:
            parse_base_name(reference)
        deriver = parse_base_name(claim.path.deriver) if claim.path.deriver else None
        normal = all(
            _HASH.fullmatch(text) or sha256_text(parse_sha256(text)) == text
            for text in (claim.path.nar_hash, claim.stored.file_hash)
        )
    except FormatError as error:
        return str(error)
    if claim.stored.compression not in SUFFIXES:
        return f"the object's compression is not one of {', '.join(SUFFIXES)}"
    sizes = (claim.path.nar_size, claim.stored.file_size)
    faults = {
        "the deriver is not a .drv": deriver is not None and not deriver.is_derivation,
        "a hash is not in the form sha256:<52 nix32 characters>": not normal,
        "the object is not named after its hash and compression": not _is_named_after(claim),
        f"a size is not between 1 and {MAX_NAR_BYTES} bytes": not 0 < min(sizes) <= max(sizes) <= MAX_NAR_BYTES,
        f"it has more than {MAX_REFERENCES} references": len(claim.path.references) > MAX_REFERENCES,
        "the content address is malformed": bool(claim.path.ca) and not _CONTENT_ADDRESS.fullmatch(claim.path.ca),
    }
    return next((fault for fault, found in faults.items() if found), "")


def _is_named_after(claim: NarInfo) -> bool:
    """Return whether the key holds the file's hash, or the NAR's and a generation (uploads straight to the store)."""
    if claim.stored.url == nar_key(claim.stored.file_hash, claim.stored.compression):
        return True
    start, _, generation = claim.stored.url.partition("-")
    suffix = f".nar{SUFFIXES[claim.stored.compression]}"
    return (
        start == f"nar/{claim.path.nar_hash.removeprefix('sha256:')}"
        and generation.endswith(suffix)
        and bool(_GENERATION.fullmatch(generation.removesuffix(suffix)))
    )


def references_first(
    claims: Sequence[NarInfo], present: Collection[str]
) -> tuple[list[NarInfo], dict[str, tuple[str, ...]]]:
    """Order claims so that each comes after all that it refers to.

    Args:
        claims: distinct paths.
        present: base names that may be referred to already.

    Returns:
        The publishable ones, in order, and for each other its store path -> the base names that it lacks (which
        include claims that lack something themselves, or that refer to each other in a cycle).
    """
    unmet: dict[str, set[str]] = {}
    referrers: dict[str, list[NarInfo]] = {}
    for claim in claims:
        wanted = set(claim.path.references) - {claim.base_name}
        unmet[claim.base_name] = {reference for reference in wanted if reference not in present}
        for reference in unmet[claim.base_name]:
            referrers.setdefault(reference, []).append(claim)
    free = deque(claim for claim in claims if not unmet[claim.base_name])
    ordered = []
    while free:
        claim = free.popleft()
        ordered.append(claim)
        for referrer in referrers.get(claim.base_name, ()):
            lacking = unmet[referrer.base_name]
            lacking.discard(claim.base_name)
            if not lacking:
                free.append(referrer)
    blocked = {claim.store_path: tuple(sorted(unmet[claim.base_name])) for claim in claims if unmet[claim.base_name]}
    return ordered, blocked


def rejected_for_references(missing: Mapping[str, tuple[str, ...]]) -> dict[str, PublishOutcome]:
    """Return the outcomes of claims that `references_first` could not place."""
    outcomes: dict[str, PublishOutcome] = {}
    for store_path, names in missing.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        message = f"it refers to {names[0]}{more}, which cannot be fetched"
        outcomes[store_path] = Rejected(store_path, RejectReason.MISSING_REFERENCES, message, names)
    return outcomes
