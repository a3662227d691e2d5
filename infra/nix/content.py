"""Content of fixed outputs: by which method, algorithm and digest it is promised, whatever a path calls it.

A fixed-output derivation names the hash of its result beforehand. Its store path depends on that hash and on its name
(infra/nix/FORMATS.md 3.1), so one file that two derivations call differently has two paths and one content.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from infra.nix import base32
from infra.nix.errors import FormatError
from infra.nix.hashing import DIGEST_SIZES, decode_digest, parse_hash, sha256_text
from infra.nix.nar import NarData, NarFile, NarReader
from infra.nix.store_path import StoreDir

#: What a content address of a fixed output begins with; its method follows.
_FIXED: Final = "fixed:"
#: Method of what is hashed as an archive; a plain file's is empty.
RECURSIVE: Final = "r:"
#: The beginning of a derivation with a fixed output, as Nix writes it.
_HEAD: Final = re.compile(
    rb'Derive\(\[\("out","[^"\\]+","(?P<method>r:)?(?P<algo>md5|sha1|sha256|sha512)","(?P<hash>[0-9a-f]+)"\)\],'
)


@dataclass(frozen=True, slots=True)
class FixedContent:
    """Promise of a content: `method` is `""` (a plain file) or `r:` (an archive)."""

    method: str
    algo: str
    digest: bytes

    @classmethod
    def parse(cls, address: str) -> FixedContent:
        """The content of a content address `fixed:[r:]ALGO:HASH`.

        Raises:
            FormatError: If it is none.
        """
        if not address.startswith(_FIXED):
            raise FormatError("not the address of a fixed output", offset=0, subject="content address")
        rest = address.removeprefix(_FIXED)
        method = RECURSIVE if rest.startswith(RECURSIVE) else ""
        return cls(method, *parse_hash(rest.removeprefix(method)))

    @classmethod
    def of_derivation(cls, derivation: bytes) -> FixedContent | None:
        """The content that a derivation's bytes promise, None where its output is not fixed by one of the methods."""
        head = _HEAD.match(derivation)
        if head is None:
            return None
        algo = head["algo"].decode()
        if len(head["hash"]) != DIGEST_SIZES[algo] * 2:
            return None
        return cls((head["method"] or b"").decode(), algo, decode_digest(algo, head["hash"].decode()))

    @classmethod
    def of_output(cls, text: str) -> FixedContent | None:
        """The content of `[r:]ALGO:HASH` (base16), as a verified output has them; None for other methods."""
        method = RECURSIVE if text.startswith(RECURSIVE) else ""
        algo, _, digest = text.removeprefix(method).partition(":")
        if algo not in DIGEST_SIZES or len(digest) != DIGEST_SIZES[algo] * 2:
            return None
        return cls(method, algo, decode_digest(algo, digest))

    @property
    def address(self) -> str:
        """`fixed:[r:]ALGO:<nix32>`, as Nix writes it in the metadata of a path."""
        return f"{_FIXED}{self.method}{self.algo}:{base32.encode(self.digest)}"

    @property
    def is_flat(self) -> bool:
        """True if it is a plain file whose bytes are hashed."""
        return not self.method

    @property
    def sha256(self) -> str:
        """`sha256:<nix32>` of what is hashed, "" where that is by another algorithm."""
        return sha256_text(self.digest) if self.algo == "sha256" else ""

    def path(self, store_dir: StoreDir, name: str) -> str:
        """The full store path that this content has under a name.

        Raises:
            FormatError: If the name is none.
        """
        return store_dir.make_fixed_output_path(name, self.method, self.algo, self.digest.hex())


class ContentCheck:
    """Hashes an archive that arrives in pieces as a `FixedContent` promises, and holds the digests together."""

    __slots__ = ("_hash", "_is_plain", "_reader", "_wanted")

    def __init__(self, wanted: FixedContent) -> None:
        self._wanted = wanted
        self._hash = hashlib.new(wanted.algo, usedforsecurity=False)
        self._reader = NarReader() if wanted.is_flat else None
        self._is_plain = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the archive.

        Raises:
            FormatError: If they break the format; an archive that is hashed whole is not read.
        """
        if self._reader is None:
            self._hash.update(data)
            return
        for event in self._reader.feed(data):
            if isinstance(event, NarFile) and not event.name:
                self._is_plain = not event.executable
            elif self._is_plain and isinstance(event, NarData):
                self._hash.update(event.data)

    def holds(self) -> bool:
        """Return whether the archive, which is whole, has the promised content.

        Raises:
            FormatError: If it was cut short.
        """
        if self._reader is not None:
            self._reader.close()
            if not self._is_plain:
                return False
        return self._hash.digest() == self._wanted.digest
