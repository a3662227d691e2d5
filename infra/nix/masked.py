"""Digest of a NAR in which the hash parts of chosen store paths are masked.

A rebuild that changed nothing changes its own path and those of its references, and with them the bytes where these
stand. With all of them masked, two such NARs have one digest; their lengths are equal already.
"""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256
from typing import Final

from infra.nix.store_path import HASH_PART_LENGTH

#: No character of a hash part, so that nothing masked is part of another one.
_MASK: Final = bytes(HASH_PART_LENGTH)


class MaskedDigest:
    """Digest of bytes that come in pieces, whatever their edges; holds one piece.

    It takes a search of the bytes for each hash part: some 3 GB/s for all of them together.
    """

    def __init__(self, hash_parts: Collection[str]) -> None:
        self._parts = [part.encode() for part in sorted(set(hash_parts))]
        self._digest = sha256()
        #: The end of what came, masked: a hash part may begin in it.
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        data = self._rest + data
        for part in self._parts:
            data = data.replace(part, _MASK)
        kept = max(0, len(data) - HASH_PART_LENGTH + 1)
        self._digest.update(data[:kept])
        self._rest = data[kept:]

    def close(self) -> bytes:
        """Return the digest; nothing may be fed any more."""
        self._digest.update(self._rest)
        return self._digest.digest()
