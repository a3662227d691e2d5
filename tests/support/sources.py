"""Hashes of a source's archive, for tests that ask what its store path says."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

from infra.nix.ca import SourceHashes, SourceReader
from infra.nix.hashing import sha256_text


def hashes_of(archive: Iterable[bytes]) -> SourceHashes:
    """Read an archive in pieces."""
    reader, whole = SourceReader(), sha256()
    for piece in archive:
        reader.feed(piece)
        whole.update(piece)
    return reader.finish(sha256_text(whole.digest()))
