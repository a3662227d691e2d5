"""Cutter of a zstd frame at its blocks, so that what one piece of it inflates to is bounded beforehand.

A frame (RFC 8878) is a header, blocks and perhaps a check sum. Each block says how many bytes it has, and inflates to
at most `BLOCK_BYTES`. So a piece with a bounded number of blocks inflates to a bounded number of bytes, whatever its
sender intends, and takes one call of the decompressor for each 35 KB of derivations instead of one for each 64 bytes.
What does not begin as a frame is cut into pieces of `UNKNOWN_BYTES`: the decompressor finds the words for it.
"""

from __future__ import annotations

from typing import Final

#: Most bytes that a block inflates to, however large the window of its frame.
BLOCK_BYTES: Final = 128 * 1024
#: Compressed bytes that are inflated at one time where no block is known; zstd makes at most 32,768 bytes of one.
UNKNOWN_BYTES: Final = 64
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
#: Magic and the byte that says how long the rest of the header is.
_HEADER_BEGIN: Final = 5
_BLOCK_HEADER: Final = 3
#: Kinds of blocks: as they are, one byte that is repeated, compressed.
_REPEATED: Final = 1
_RESERVED: Final = 3


class BlockCutter:
    """Cuts one frame that comes in pieces."""

    __slots__ = ("_body", "_head", "_is_known", "_most", "_needed", "_reads_blocks")

    def __init__(self, most: int) -> None:
        """`most` blocks are in one piece at most."""
        self._most = most
        self._is_known = True
        self._reads_blocks = False
        #: What came of the header that is being read, and how many bytes it has.
        self._head = bytearray()
        self._needed = _HEADER_BEGIN
        #: Bytes of the current block that are still to come.
        self._body = 0

    def cut(self, data: bytes, at: int) -> int:
        """Return how many bytes of `data` from `at` on make the next piece, at least one; they count as taken."""
        begin, end, blocks = at, len(data), 0
        while at < end and (self._body or self._is_known):
            if self._body:
                taken = min(self._body, end - at)
                self._body -= taken
                at += taken
                continue
            if blocks == self._most:
                break
            came = data[at : at + self._needed - len(self._head)]
            self._head += came
            at += len(came)
            if len(self._head) == self._needed:
                self._read_header()
                # Empty ones are not counted: a piece should not be one of them.
                blocks += self._body > 0
        return at - begin or min(UNKNOWN_BYTES, end - begin)

    def _read_header(self) -> None:
        if self._reads_blocks:
            header = int.from_bytes(self._head, "little")
            kind, size = header >> 1 & 3, header >> 3
            is_last = header & 1
            self._body = 0 if kind == _RESERVED else 1 if kind == _REPEATED else size
            # Behind the last one comes a check sum at most.
            self._is_known = kind != _RESERVED and not is_last
        elif self._needed == _HEADER_BEGIN:
            self._needed += _rest_of_header(self._head[-1])
            self._is_known = self._head.startswith(_MAGIC)
            return
        self._reads_blocks = True
        self._head.clear()
        self._needed = _BLOCK_HEADER


def _rest_of_header(descriptor: int) -> int:
    """Return how many bytes follow in the header of a frame, one at least: window, dictionary, size of the content."""
    is_single_segment = bool(descriptor & 0x20)
    content = (1 if is_single_segment else 0, 2, 4, 8)[descriptor >> 6]
    return (0 if is_single_segment else 1) + (0, 1, 2, 4)[descriptor & 3] + content
