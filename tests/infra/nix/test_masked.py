"""Masked digests: equal exactly where bytes differ in the masked hash parts alone, wherever the pieces end."""

from __future__ import annotations

from hashlib import sha256
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from infra.nix.base32 import encode
from infra.nix.masked import MaskedDigest

PARTS = [encode(sha256(bytes([number])).digest()[:20]) for number in range(6)]


def digest(data: bytes, parts: list[str], cuts: list[int]) -> bytes:
    masked = MaskedDigest(parts)
    for start, end in pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]):
        masked.feed(data[start:end])
    return masked.close()


@given(
    st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([0, 1, 2])), max_size=12),
    st.lists(st.integers(0, 400), max_size=6),
    st.lists(st.integers(0, 400), max_size=6),
)
def test_two_texts_that_differ_in_masked_hash_parts_have_one_digest(
    pieces: list[bytes | int], left_cuts: list[int], right_cuts: list[int]
) -> None:
    sides = [
        b"".join(PARTS[piece + add].encode() if isinstance(piece, int) else piece for piece in pieces) for add in (0, 3)
    ]
    left, right = digest(sides[0], PARTS[:3], left_cuts), digest(sides[1], PARTS[3:], right_cuts)
    assert left == right
    # Unmasked, a hash part is a difference; and so is any other byte.
    if any(isinstance(piece, int) for piece in pieces):
        assert digest(sides[0], [], left_cuts) != digest(sides[1], [], right_cuts)
    assert digest(sides[0] + b"x", PARTS[:3], left_cuts) != right
