"""Hash texts and the folding that shortens a digest to a store path's hash part.

Three texts of one digest exist: `sha256:<nix32>` (narinfo, `ca` fields), `sha256:<base16>` (derivations, daemon) and
the SRI form `sha256-<base64>`. Inside this project the first is the one that travels.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

from infra.nix import base32
from infra.nix.errors import FormatError

#: Digest length in bytes of every algorithm that Nix 2.8 knows.
DIGEST_SIZES: Final = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}

_BASE16: Final = re.compile(r"[0-9a-fA-F]*\Z")
_PREFIX: Final = re.compile(r"(md5|sha1|sha256|sha512)([:-])")


def compress_hash(digest: bytes, size: int = 20) -> bytes:
    """Fold `digest` to `size` bytes: byte i is XORed into position i mod `size` (infra/nix/FORMATS.md 3.1)."""
    # Little-endian, so that a short last piece is aligned with the first byte.
    folded = int.from_bytes(digest[:size], "little")
    for start in range(size, len(digest), size):
        folded ^= int.from_bytes(digest[start : start + size], "little")
    return folded.to_bytes(size, "little")


def sha256_text(digest: bytes) -> str:
    """`sha256:<52 nix32>` of a 32-byte digest.

    Raises:
        ValueError: If `digest` is not 32 bytes: a fault of the caller, not of input.
    """
    if len(digest) != DIGEST_SIZES["sha256"]:
        raise ValueError("a sha256 digest has 32 bytes")
    return f"sha256:{base32.encode(digest)}"


def decode_digest(algo: str, text: str, *, offset: int = 0) -> bytes:
    """Decode a digest in base16 or nix32; the length alone decides which, as in Nix.

    Raises:
        FormatError: If the algorithm is unknown or the text is neither; `offset` is where the text begins.
    """
    size = DIGEST_SIZES.get(algo)
    if size is None:
        raise FormatError("unknown hash algorithm", offset=offset, subject="hash")
    if len(text) == size * 2:
        if not _BASE16.match(text):
            raise FormatError("not a base16 hash", offset=offset, subject="hash")
        return bytes.fromhex(text)
    if len(text) == (size * 8 + 4) // 5:
        try:
            return base32.decode(text)
        except FormatError as error:
            raise FormatError(error.message, offset=offset + error.offset, subject="hash") from error
    raise FormatError(f"wrong length for a {algo} hash", offset=offset, subject="hash")


def parse_hash(text: str) -> tuple[str, bytes]:
    """Algorithm and digest of `algo:<nix32 or base16>` or of the SRI form `algo-<base64>`.

    Raises:
        FormatError: On anything else.
    """
    prefix = _PREFIX.match(text)
    if prefix is None:
        raise FormatError("a hash begins with its algorithm and a colon or dash", offset=0, subject="hash")
    algo, start = prefix[1], prefix.end()
    if prefix[2] == ":":
        return algo, decode_digest(algo, text[start:], offset=start)
    try:
        digest = base64.b64decode(text[start:], validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError("not base64", offset=start, subject="hash") from error
    if len(digest) != DIGEST_SIZES[algo]:
        raise FormatError(f"wrong length for a {algo} hash", offset=start, subject="hash")
    return algo, digest


def parse_sha256(text: str) -> bytes:
    """The 32 bytes of a sha256 hash in any of the three texts.

    Raises:
        FormatError: If it is malformed or of another algorithm.
    """
    algo, digest = parse_hash(text)
    if algo != "sha256":
        raise FormatError(f"sha256 wanted, {algo} given", offset=0, subject="hash")
    return digest
