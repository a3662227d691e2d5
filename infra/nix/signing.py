"""Ed25519 keys and signatures in Nix's texts (infra/nix/FORMATS.md 6.4).

A key or signature is `name:base64`; a secret key holds seed and public key (64 bytes), a public key 32 bytes, a
signature 64. Randomness is an argument: `generate` takes the seed.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from infra.nix.errors import FormatError

#: Bytes of an Ed25519 seed and of a public key.
SEED_SIZE: Final = 32
#: Bytes of a secret key's text form: seed and public key.
SECRET_SIZE: Final = 64
#: Bytes of a signature.
SIGNATURE_SIZE: Final = 64

#: A key name ends at the first colon; white space and controls would break narinfo and configuration lines.
_NAME: Final = re.compile(r"[!-9;-~]{1,255}\Z")


def _split(text: str, size: int, subject: str) -> tuple[str, bytes]:
    name, colon, encoded = text.partition(":")
    if not colon:
        raise FormatError("no colon after the key name", offset=len(text), subject=subject)
    if not _NAME.match(name):
        raise FormatError("the key name is empty, too long or has odd characters", offset=0, subject=subject)
    try:
        # Errors are raised without a cause: a decoder's message could quote a secret.
        value = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise FormatError("not base64", offset=len(name) + 1, subject=subject) from None
    if len(value) != size:
        raise FormatError(f"{size} bytes wanted, {len(value)} given", offset=len(name) + 1, subject=subject)
    return name, value


def split_signature(text: str) -> tuple[str, bytes]:
    """Key name and 64 signature bytes of `name:base64`.

    Raises:
        FormatError: If it is anything else.
    """
    return _split(text, SIGNATURE_SIZE, "signature")


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A named public key; `str()` is the text for `trusted-public-keys`."""

    name: str
    raw: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """The key in `name:base64(32 bytes)`; surrounding white space is not stripped.

        Raises:
            FormatError: If it is anything else.
        """
        return cls(*_split(text, SEED_SIZE, "public key"))

    def __str__(self) -> str:
        return f"{self.name}:{base64.b64encode(self.raw).decode('ascii')}"

    def verify(self, fingerprint: bytes, signature: str) -> bool:
        """Return whether `signature` is by this key, over `fingerprint`; false for malformed and foreign signatures."""
        try:
            name, value = split_signature(signature)
            if name != self.name:
                return False
            Ed25519PublicKey.from_public_bytes(self.raw).verify(value, fingerprint)
        except (FormatError, InvalidSignature, ValueError):
            return False
        return True


class SecretKey:
    """A named secret key that signs; its `repr` shows the name only, and no method but `reveal` shows the secret."""

    __slots__ = ("_key", "_seed", "name", "public")

    def __init__(self, name: str, seed: bytes) -> None:
        if not _NAME.match(name):
            raise FormatError("the key name is empty, too long or has odd characters", offset=0, subject="secret key")
        if len(seed) != SEED_SIZE:
            raise FormatError(f"a seed has {SEED_SIZE} bytes", offset=0, subject="secret key")
        self._seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        #: The name that every signature carries.
        self.name = name
        #: The public half.
        self.public = PublicKey(name, self._key.public_key().public_bytes_raw())

    @classmethod
    def parse(cls, text: str) -> SecretKey:
        """The key in `name:base64(seed + public key)`, the content of a Nix secret key file without white space.

        Raises:
            FormatError: If it is anything else, or the two halves do not belong together.
        """
        name, value = _split(text, SECRET_SIZE, "secret key")
        key = cls(name, value[:SEED_SIZE])
        if key.public.raw != value[SEED_SIZE:]:
            raise FormatError("the public half does not belong to the seed", offset=len(name) + 1, subject="secret key")
        return key

    def __repr__(self) -> str:
        return f"SecretKey(name={self.name!r})"

    def reveal(self) -> str:
        """The text for the key file. It is a secret: never log it or put it on a command line."""
        return f"{self.name}:{base64.b64encode(self._seed + self.public.raw).decode('ascii')}"

    def sign(self, fingerprint: bytes) -> str:
        """The signature `name:base64(64 bytes)` over `fingerprint`."""
        return f"{self.name}:{base64.b64encode(self._key.sign(fingerprint)).decode('ascii')}"


def generate(name: str, seed: bytes) -> SecretKey:
    """A new key from 32 random bytes that the caller drew.

    Raises:
        FormatError: If the name is not usable or the seed has another length.
    """
    return SecretKey(name, seed)
