"""narinfo: what a binary cache says about one store path (infra/nix/FORMATS.md 6.3).

Rendering follows Nix byte for byte: its field order, `References: ` with the space even when empty, and a final
newline. Reading is as tolerant as Nix: any order, unknown fields ignored, base16 and SRI hashes accepted and turned
into nix32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Final, TypeVar

from infra.nix.errors import FormatError
from infra.nix.hashing import parse_sha256, sha256_text
from infra.nix.path_info import PathInfo
from infra.nix.store_path import StoreDir, parse_base_name
from infra.records import record

#: What Nix assumes when the field is missing or empty.
DEFAULT_COMPRESSION: Final = "bzip2"
#: How Nix spells a missing deriver.
UNKNOWN_DERIVER: Final = "unknown-deriver"
#: Largest size a narinfo may state: a signed 64-bit number.
MAX_SIZE: Final = 2**63 - 1

_DIGITS: Final = re.compile(r"[0-9]{1,19}\Z")
_FOREIGN: Final = re.compile(r"[^ -~]")
_UNPRINTABLE: Final = re.compile(rb"[^ -~]")
_KNOWN: Final = frozenset(
    (
        "StorePath",
        "URL",
        "Compression",
        "FileHash",
        "FileSize",
        "NarHash",
        "NarSize",
        "References",
        "Deriver",
        "Sig",
        "CA",
    )
)
_T = TypeVar("_T")

_REFERENCES = b"\nReferences: "


@record(frozen=True, slots=True)
class StoredNar:
    """The object that holds a NAR.

    Attributes:
        url: Where it is, relative to the cache: its key in the object store.
        compression: Codec name; `none` for plain.
        file_hash: `sha256:<nix32>` of the object, or "".
        file_size: Bytes of the object, or 0 if unknown.
    """

    url: str
    compression: str
    file_hash: str
    file_size: int


@record(frozen=True, slots=True)
class NarInfo:
    """One narinfo: a store path, and the object that holds its NAR."""

    path: PathInfo
    stored: StoredNar

    @property
    def store_path(self) -> str:
        """Full store path."""
        return self.path.store_path

    @property
    def base_name(self) -> str:
        """File name of the store path."""
        return self.path.base_name

    @property
    def hash_part(self) -> str:
        """The 32 characters before the name."""
        return self.path.hash_part

    def signed(self, sigs: tuple[str, ...]) -> NarInfo:
        """The same with these signatures and no others."""
        return replace(self, path=replace(self.path, sigs=sigs))

    def render(self) -> bytes:
        """The narinfo in Nix's field order, with a final newline.

        Raises:
            FormatError: If a field is not printable ASCII: a line break would forge fields.
        """
        path, stored = self.path, self.stored
        lines = [f"StorePath: {path.store_path}", f"URL: {stored.url}", f"Compression: {stored.compression}"]
        if stored.file_hash:
            lines.append(f"FileHash: {stored.file_hash}")
        if stored.file_size:
            lines.append(f"FileSize: {stored.file_size}")
        lines.append(f"NarHash: {path.nar_hash}")
        lines.append(f"NarSize: {path.nar_size}")
        lines.append(f"References: {' '.join(path.references)}")
        if path.deriver:
            lines.append(f"Deriver: {path.deriver}")
        lines.extend(f"Sig: {sig}" for sig in path.sigs)
        if path.ca:
            lines.append(f"CA: {path.ca}")
        offset = 0
        for line in lines:
            foreign = _FOREIGN.search(line)
            if foreign is not None:
                raise FormatError("a field is not printable ASCII", offset=offset + foreign.start(), subject="narinfo")
            offset += len(line) + 1
        return ("\n".join(lines) + "\n").encode()


def rendered_references(text: bytes) -> list[str]:
    """Return the base names of the references in what `NarInfo.render` made, without reading the rest of it."""
    start = text.index(_REFERENCES) + len(_REFERENCES)
    return text[start : text.index(b"\n", start)].decode("ascii").split()


def _fields(text: bytes) -> tuple[dict[str, tuple[str, int]], tuple[str, ...]]:
    """Known single fields as name -> (value, offset of the value), and all signatures."""
    if not text.endswith(b"\n"):
        raise FormatError("the last line has no newline", offset=len(text), subject="narinfo")
    fields: dict[str, tuple[str, int]] = {}
    sigs: list[str] = []
    start = 0
    for line in text[:-1].split(b"\n"):
        raw_key, separator, raw_value = line.partition(b": ")
        if not separator:
            raise FormatError("a line is not `Key: value`", offset=start, subject="narinfo")
        key = raw_key.decode("latin-1")
        if key in _KNOWN:
            value_start = start + len(raw_key) + 2
            foreign = _UNPRINTABLE.search(raw_value)
            if foreign is not None:
                raise FormatError("not printable ASCII", offset=value_start + foreign.start(), subject="narinfo")
            value = raw_value.decode("ascii")
            if key == "Sig":
                sigs.append(value)
            elif key in fields:
                raise FormatError(f"{key} appears twice", offset=start, subject="narinfo")
            else:
                fields[key] = (value, value_start)
        start += len(line) + 1
    return fields, tuple(sigs)


def _at(field: tuple[str, int], parse: Callable[[str], _T]) -> _T:
    """`parse` the field's value, with errors moved to its place in the narinfo."""
    value, offset = field
    try:
        return parse(value)
    except FormatError as error:
        raise FormatError(error.message, offset=offset + error.offset, subject="narinfo") from error


def _size(text: str) -> int:
    if not _DIGITS.match(text) or int(text) > MAX_SIZE:
        raise FormatError("not a size", offset=0, subject="narinfo")
    return int(text)


def _hash(text: str) -> str:
    return sha256_text(parse_sha256(text))


def _references(text: str) -> tuple[str, ...]:
    references: set[str] = set()
    offset = 0
    for reference in text.split(" "):
        if reference:
            try:
                references.add(parse_base_name(reference).base_name)
            except FormatError as error:
                raise FormatError(f"reference: {error.message}", offset=offset + error.offset) from error
        offset += len(reference) + 1
    return tuple(sorted(references))


def _deriver(text: str) -> str:
    return "" if text in {"", UNKNOWN_DERIVER} else parse_base_name(text).base_name


def parse(text: bytes, store_dir: StoreDir) -> NarInfo:
    """The narinfo in `text`, of a cache whose store directory is `store_dir`.

    Raises:
        FormatError: On a missing final newline, a line without `: `, a known field twice or malformed, or a missing
        one of
            StorePath, URL, NarHash and NarSize (which must not be 0). A malformed signature is kept: it verifies as
            nothing.
    """
    fields, sigs = _fields(text)
    for required in ("StorePath", "URL", "NarHash", "NarSize"):
        if required not in fields or not fields[required][0]:
            raise FormatError(f"no {required}", offset=len(text), subject="narinfo")
    nothing = ("", len(text))
    nar_size = _at(fields["NarSize"], _size)
    if nar_size == 0:
        raise FormatError("NarSize is 0", offset=fields["NarSize"][1], subject="narinfo")
    file_hash = fields.get("FileHash", nothing)
    file_size = fields.get("FileSize", nothing)
    path = PathInfo(
        store_path=store_dir.render(_at(fields["StorePath"], store_dir.parse)),
        nar_hash=_at(fields["NarHash"], _hash),
        nar_size=nar_size,
        references=_at(fields.get("References", nothing), _references),
        deriver=_at(fields.get("Deriver", nothing), _deriver),
        sigs=sigs,
        ca=fields.get("CA", nothing)[0],
    )
    stored = StoredNar(
        url=fields["URL"][0],
        compression=fields.get("Compression", nothing)[0] or DEFAULT_COMPRESSION,
        file_hash=_at(file_hash, _hash) if file_hash[0] else "",
        file_size=_at(file_size, _size) if file_size[0] else 0,
    )
    return NarInfo(path, stored)
