"""Nix's base 32 text of hashes (infra/nix/FORMATS.md 1.1).

The digest is a little-endian number, cut into 5-bit digits from bit 0 (the last digit zero-extended) and printed
from the most significant digit. The standard library does the digits: base 32 of the reversed bytes one way,
`int(text, 32)` the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from infra.nix.errors import FormatError

#: The 32 digits in order of value; `e`, `o`, `t`, `u` are left out so that hashes spell no words.
ALPHABET: Final = "0123456789abcdfghijklmnpqrsvwxyz"
#: Regular expressions of one digit, and of a SHA-256 in full.
DIGIT_PATTERN: Final = "[0-9a-df-np-sv-z]"
SHA256_PATTERN: Final = f"{DIGIT_PATTERN}{{52}}"

#: Two digits at a time: the text of every 10-bit number. A larger table would not stay in the processor's cache.
_PAIRS: Final = tuple(a + b for a in ALPHABET for b in ALPHABET)
_TO_PYTHON: Final = str.maketrans(ALPHABET, "0123456789abcdefghijklmnopqrstuv")
_FOREIGN: Final = re.compile(f"[^{ALPHABET}]")
#: Bit position of each pair of digits, most significant first, for the sizes that occur most.
_SHIFTS: Final = {size: tuple(range(((size * 8 + 9) // 10 - 1) * 10, -1, -10)) for size in (20, 32)}


def _spread() -> Iterator[tuple[int, int, int]]:
    """Masks of the lower and of the upper half of all groups, and how far up the latter move, group size by size."""
    for digits in (32, 16, 8, 4, 2):
        half = (1 << (5 * digits // 2)) - 1
        lower = sum(half << (8 * digits * group) for group in range(32 // digits))
        yield lower, lower << (5 * digits // 2), 3 * digits // 2


_SPREAD: Final = tuple(_spread())
_DIGITS: Final = ALPHABET.encode().ljust(256, b"\0")


def encode(digest: bytes) -> str:
    """The nix32 text of `digest`: 20 bytes give 32 characters, 32 bytes give 52."""
    size = len(digest)
    shifts = _SHIFTS.get(size) or range(((size * 8 + 9) // 10 - 1) * 10, -1, -10)
    number = int.from_bytes(digest, "little")
    digits = "".join([_PAIRS[(number >> shift) & 0x3FF] for shift in shifts])
    return digits[len(digits) - (size * 8 + 4) // 5 :]


def encode_short(number: int) -> str:
    """The nix32 text of a number of 160 bits, as `encode` has it of its 20 bytes: a third of the time.

    Its digits of five bits are spread to a byte each: the upper half of each group moves up, until a group is a digit.
    """
    for lower, upper, shift in _SPREAD:
        number = (number & lower) | (number & upper) << shift
    return number.to_bytes(32, "big").translate(_DIGITS).decode()


def decode(text: str) -> bytes:
    """The bytes behind nix32 `text`.

    Raises:
        FormatError: On a foreign character, a length that no byte string has, or excess bits in the first digit.
    """
    foreign = _FOREIGN.search(text)
    if foreign is not None:
        raise FormatError("not a nix32 digit", offset=foreign.start(), subject="nix32")
    if not text:
        return b""
    size = len(text) * 5 // 8
    if (size * 8 + 4) // 5 != len(text):
        raise FormatError(f"no hash has {len(text)} nix32 digits", offset=len(text), subject="nix32")
    number = int(text.translate(_TO_PYTHON), 32)
    if number >> (size * 8):
        raise FormatError("the first nix32 digit has excess bits", offset=0, subject="nix32")
    return number.to_bytes(size, "little")
