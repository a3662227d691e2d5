"""Store paths: their text, and how they are computed from what they name (infra/nix/FORMATS.md 3.1).

Every path is `S + "/" + nix32(fold20(sha256(type ":sha256:" inner ":" S ":" name))) + "-" + name`, where S is the
store directory. S is always an argument, held by `StoreDir`: nothing here assumes /nix/store. Hash arguments are
base16 text, references are full store paths (a set: repeats do not count), results are full store paths (`str`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import field
from hashlib import sha256
from typing import Final

from infra.nix import base32
from infra.nix.errors import FormatError
from infra.records import record

#: Characters of a hash part: 20 bytes in nix32.
HASH_PART_LENGTH: Final = 32
#: Regular expression of a hash part.
HASH_PART_PATTERN: Final = f"{base32.DIGIT_PATTERN}{{{HASH_PART_LENGTH}}}"
#: Longest name after the hash part; with ".drv" and the hash part it still fits one file name.
MAX_NAME_LENGTH: Final = 211

_HASH_CHARS: Final = base32.ALPHABET
_HASH_PART_BITS: Final = (1 << 160) - 1
_NAME: Final = r"(?!\.{1,2}(?:-|\Z))[0-9A-Za-z+\-._?=]{1,211}"
_NAME_PATTERN: Final = re.compile(rf"{_NAME}\Z")
_BASE_NAME_PATTERN: Final = re.compile(rf"([{_HASH_CHARS}]{{32}})-({_NAME})\Z")
#: Version part of a name: the first dash that no letter follows.
_VERSION: Final = re.compile(r"-(?![A-Za-z])")
_STORE_DIR_PATTERN: Final = re.compile(r"(?:/(?!\.{1,2}(?:/|\Z))[ !#-.0-9;-\[\]-~]+)+\Z")


def is_valid_name(name: str) -> bool:
    """Return whether `name` may follow the hash part: 1 to 211 of `0-9A-Za-z+-._?=`, and not a reserved dot name."""
    return _NAME_PATTERN.match(name) is not None


@record(frozen=True, slots=True)
class StorePath:
    """A store path without its directory: 32 nix32 characters and a name."""

    hash_part: str
    name: str

    @property
    def base_name(self) -> str:
        """`<hash part>-<name>`, the file name inside the store directory."""
        return f"{self.hash_part}-{self.name}"

    @property
    def is_derivation(self) -> bool:
        """True if the name ends with `.drv`."""
        return self.name.endswith(".drv")


def parse_base_name(text: str) -> StorePath:
    """The store path whose file name is `text`.

    Raises:
        FormatError: If it is not 32 nix32 characters, a dash and a valid name.
    """
    match = _BASE_NAME_PATTERN.match(text)
    if match is None:
        raise FormatError(_explain(text), offset=0, subject="store path")
    return StorePath(match[1], match[2])


def base_name_of(path: str) -> str:
    """The file name of a store path that is known to be one; a base name is its own."""
    return path[path.rfind("/") + 1 :]


def hash_part_of(path: str) -> str:
    """The hash part of a full store path or base name that is known to be one."""
    # Hot: thousands of paths at a time, several times each.
    start = path.rfind("/") + 1
    return path[start : start + HASH_PART_LENGTH]


def drv_name_of(path: str) -> str:
    """The name of a derivation, by its .drv's full path or base name: without hash part and `.drv`."""
    return base_name_of(path)[HASH_PART_LENGTH + 1 :].removesuffix(".drv")


def package_of(name: str) -> str:
    """The name of a derivation without its version, as `builtins.parseDrvName` has it."""
    return _VERSION.split(name, maxsplit=1)[0]


def _explain(text: str) -> str:
    """Return the reason for a person that `text` is no base name."""
    if len(text) <= HASH_PART_LENGTH or text[HASH_PART_LENGTH] != "-":
        return "not 32 hash characters, a dash and a name"
    if any(char not in _HASH_CHARS for char in text[:HASH_PART_LENGTH]):
        return "the hash part has a character that nix32 lacks"
    if len(text) > HASH_PART_LENGTH + 1 + MAX_NAME_LENGTH:
        return f"the name is longer than {MAX_NAME_LENGTH} characters"
    return "the name is empty, reserved or has a character other than 0-9A-Za-z+-._?="


def output_path_name(drv_name: str, output_name: str) -> str:
    """Name of an output's path: the derivation's name, with `-<output>` unless the output is `out`."""
    return drv_name if output_name == "out" else f"{drv_name}-{output_name}"


@record(frozen=True, slots=True)
class StoreDir:
    """A store directory, such as `/nix/store`, and the paths in it.

    Raises:
        FormatError: On construction, unless it is absolute, normalised, printable ASCII, and free of colons, quotes and
            backslashes (they would be ambiguous in the texts that are hashed).
    """

    path: str
    _bases: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _STORE_DIR_PATTERN.match(self.path):
            raise FormatError("not an absolute normalised directory", offset=0, subject="store directory")
        pattern = re.compile(rf"{re.escape(self.path)}/([{_HASH_CHARS}]{{32}})-({_NAME})\Z")
        object.__setattr__(self, "_bases", pattern)

    def parse(self, path_text: str) -> StorePath:
        """The store path that the full path `path_text` names.

        Raises:
            FormatError: If it lies outside this directory, below a store path, or is malformed.
        """
        match = self._bases.match(path_text)
        if match is not None:
            return StorePath(match[1], match[2])
        prefix = f"{self.path}/"
        if not path_text.startswith(prefix):
            raise FormatError(f"not in the store directory {self.path}", offset=0, subject="store path")
        raise FormatError(_explain(path_text[len(prefix) :]), offset=len(prefix), subject="store path")

    def contains(self, path_text: str) -> bool:
        """Return whether `path_text` is a well-formed store path directly in this directory."""
        return self._bases.match(path_text) is not None

    def hash_parts(self, paths: Iterable[str]) -> set[str]:
        """Return the hash parts of those texts that are full store paths directly in this directory."""
        return {match[1] for match in map(self._bases.match, paths) if match is not None}

    def render(self, store_path: StorePath) -> str:
        """The full path of `store_path`."""
        return f"{self.path}/{store_path.hash_part}-{store_path.name}"

    def full(self, base_name: str) -> str:
        """The full path of a base name that is known to be one, or is to be looked at by `parse`."""
        return f"{self.path}/{base_name}"

    def base_name(self, path_text: str) -> str:
        """The file name of the full path `path_text`.

        Raises:
            FormatError: As `parse`.
        """
        return self.parse(path_text).base_name

    def make_path(self, path_type: str, inner_hex: str, name: str) -> str:
        """The path of `type:sha256:inner:S:name`, the rule below all others.

        Raises:
            FormatError: If `name` is not a valid name.
        """
        if not _NAME_PATTERN.match(name):
            raise FormatError("not a valid store path name", offset=0, subject="store path")
        text = f"{path_type}:sha256:{inner_hex}:{self.path}:{name}"
        digest = int.from_bytes(sha256(text.encode()).digest(), "little")
        # Folded to 20 bytes as `hashing.compress_hash` does it.
        return f"{self.path}/{base32.encode_short((digest & _HASH_PART_BITS) ^ (digest >> 160))}-{name}"

    def make_text_path(self, name: str, content_sha256_hex: str, refs: Iterable[str] = ()) -> str:
        """The path of a text file (`builtins.toFile`, a .drv) with the content hash and references given.

        Raises:
            FormatError: If `name` is not a valid name.
        """
        return self.make_path(":".join(("text", *sorted(set(refs)))), content_sha256_hex, name)

    def make_source_path(
        self, name: str, nar_sha256_hex: str, refs: Iterable[str] = (), *, self_reference: bool = False
    ) -> str:
        """The path of an added source, or of any content addressed by its NAR with sha256.

        Raises:
            FormatError: If `name` is not a valid name.
        """
        tail = ("self",) if self_reference else ()
        return self.make_path(":".join(("source", *sorted(set(refs)), *tail)), nar_sha256_hex, name)

    def make_fixed_output_path(
        self, name: str, method: str, algo: str, digest_hex: str, refs: Iterable[str] = ()
    ) -> str:
        """The path of content fixed by its hash; `method` is `""` (flat file) or `"r:"` (NAR).

        Raises:
            FormatError: If `name` is not a valid name, or references are given to a method that has none.
        """
        if method == "r:" and algo == "sha256":
            return self.make_source_path(name, digest_hex, refs)
        if tuple(refs):
            raise FormatError("only NAR content hashed with sha256 may have references", offset=0, subject="store path")
        inner = sha256(f"fixed:out:{method}{algo}:{digest_hex}:".encode()).hexdigest()
        return self.make_path("output:out", inner, name)

    def make_output_path(self, drv_hash_hex: str, output_name: str, drv_name: str) -> str:
        """The path of an input-addressed output, from the masked hash modulo of its derivation.

        Raises:
            FormatError: If the names do not form a valid name.
        """
        return self.make_path(f"output:{output_name}", drv_hash_hex, output_path_name(drv_name, output_name))
