"""Signer of a cache: bytes in, signatures out.

The only place of a running coordinator that touches secret keys. Everything else sees fingerprints and signatures, so
the keys can move into a process of their own behind these three names.
"""

from __future__ import annotations

from collections.abc import Sequence

from infra.nix.signing import PublicKey, SecretKey
from infra.objects.errors import CacheError


class Signer:
    """Signs with each of some keys, at least one; changes never, so it may be shared between threads."""

    __slots__ = ("_keys", "public_keys")

    def __init__(self, keys: Sequence[SecretKey]) -> None:
        if not keys:
            raise CacheError("a cache needs a signing key")
        self._keys = tuple(keys)
        #: What verifies the signatures, in the order of the keys.
        self.public_keys: tuple[PublicKey, ...] = tuple(key.public for key in keys)

    def sign(self, fingerprint: bytes) -> tuple[str, ...]:
        """Return the signature `name:base64` of every key over `fingerprint`, in the order of the keys."""
        return tuple(key.sign(fingerprint) for key in self._keys)

    def has_signed(self, fingerprint: bytes, signatures: Sequence[str]) -> bool:
        """Return whether one at least of the signatures is by one of the keys, over `fingerprint`."""
        return any(key.verify(fingerprint, signature) for key in self.public_keys for signature in signatures)
