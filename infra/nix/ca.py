"""Proof that an uploaded source is what its store path says (infra/nix/FORMATS.md 3.1), while its archive streams by.

Input sources are content-addressed: added trees by the hash of their archive, texts (`builtins.toFile`) and flat
files by the hash of their content. A `SourceReader` takes the archive's bytes and gives the hash of the content,
beside that of the archive, which the writer of the object computes anyway; `verify_source` finds the method that gives
the path, since the path alone does not show which one made it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from infra.nix.errors import FormatError, SourcePathError
from infra.nix.hashing import parse_hash, sha256_text
from infra.nix.nar import NarData, NarFile, NarReader
from infra.nix.store_path import StoreDir

_TEXT: Final = "text:"
_FIXED: Final = "fixed:"


@dataclass(frozen=True, slots=True)
class SourceHashes:
    """Hashes of the content of a source.

    Attributes:
        nar_hash: `sha256:<nix32>` of the archive.
        flat_hash: `sha256:<nix32>` of the content if it is one file that is not executable, else "".
    """

    nar_hash: str
    flat_hash: str


class SourceReader:
    """Checks the format of an archive that arrives in pieces, and hashes the content of a single plain file."""

    __slots__ = ("_flat", "_is_flat", "_reader")

    def __init__(self) -> None:
        self._reader = NarReader()
        self._flat = sha256()
        #: Whether the root is a file that is not executable.
        self._is_flat = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the archive.

        Raises:
            FormatError: If they break the format.
        """
        for event in self._reader.feed(data):
            if isinstance(event, NarFile) and not event.name:
                self._is_flat = not event.executable
            elif self._is_flat and isinstance(event, NarData):
                self._flat.update(event.data)

    def finish(self, nar_hash: str) -> SourceHashes:
        """Return the hashes of the source whose whole archive has the hash `nar_hash`, which the caller computed.

        Raises:
            FormatError: If it was cut short.
        """
        self._reader.close()
        return SourceHashes(nar_hash, sha256_text(self._flat.digest()) if self._is_flat else "")


def path_of_content(store_dir: StoreDir, name: str, ca: str, refs: Collection[str] = ()) -> str:
    """The full path of content with the content address `ca`.

    `ca` is one of `text:sha256:H`, `fixed:r:sha256:H` or `fixed:ALGO:H`.

    `refs` are full paths. One of the path itself cannot be given: the hash would be of other bytes then.

    Raises:
        FormatError: If `ca` or `name` is malformed, or the method has no references and some are given.
    """
    if ca.startswith(_TEXT):
        algo, digest = parse_hash(ca[len(_TEXT) :])
        if algo != "sha256":
            raise FormatError("texts are hashed with sha256", offset=len(_TEXT), subject="content address")
        return store_dir.make_text_path(name, digest.hex(), refs)
    if not ca.startswith(_FIXED):
        raise FormatError("neither text: nor fixed:", offset=0, subject="content address")
    rest = ca[len(_FIXED) :]
    method = "r:" if rest.startswith("r:") else ""
    algo, digest = parse_hash(rest[len(method) :])
    return store_dir.make_fixed_output_path(name, method, algo, digest.hex(), refs)


def verify_source(store_dir: StoreDir, path: str, hashes: SourceHashes, refs: Collection[str] = ()) -> str:
    """The content address by which `path` is made from content of these hashes.

    `refs` are its references, as full paths.
    Tried are the archive (`fixed:r:sha256`), and for a single plain file the text and the flat file. That `refs` are
    the references that the content really has is for a scan to tell.

    Raises:
        SourcePathError: If none of the methods gives the path.
        FormatError: If `path` is no path of this store directory.
    """
    name = store_dir.parse(path).name
    candidates = [f"fixed:r:{hashes.nar_hash}"]
    if hashes.flat_hash:
        candidates.append(f"text:{hashes.flat_hash}")
        if not refs:
            candidates.append(f"fixed:{hashes.flat_hash}")
    for candidate in candidates:
        if path_of_content(store_dir, name, candidate, refs) == path:
            return candidate
    raise SourcePathError(path, "its content gives another path by every known method")
