"""The two batched streams: what is written is read, and whatever is damaged is one typed error."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api import zstd_blocks
from coordinator.api.sent_streams import (
    DERIVATIONS_MAGIC,
    FramingError,
    SourceHeader,
    encode_derivations,
    encode_sources,
)
from coordinator.api.streams import StreamLimits, read_derivations, read_sources

LIMITS = StreamLimits(max_records=1000, max_record_bytes=1 << 20, max_bytes=1 << 24)
MEMBERS = [(f"name-{n}.drv", random.Random(n).randbytes(n * 50)) for n in range(40)]


async def pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def derivations(data: bytes, size: int = 100, limits: StreamLimits = LIMITS) -> list[tuple[str, bytes]]:
    return [member async for batch in read_derivations(pieces(data, size), limits) for member in batch]


async def sources(data: bytes, size: int = 100, limits: StreamLimits = LIMITS) -> list[tuple[str, bytes]]:
    return [
        (source.header.path, b"".join([chunk async for chunk in source.chunks()]))
        async for source in read_sources(pieces(data, size), limits)
    ]


def header(name: str, nar: bytes, said: int | None = None) -> SourceHeader:
    return SourceHeader(path=name, nar_hash="sha256:x", nar_size=len(nar) if said is None else said)


def whole_sources(members: Iterable[tuple[str, bytes]]) -> bytes:
    def opener(nar: bytes) -> Callable[[], Iterable[bytes]]:
        return lambda: iter([nar[:10], nar[10:]])

    return b"".join(encode_sources((header(name, nar), opener(nar)) for name, nar in members))


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
async def test_a_stream_is_read_as_it_was_written_however_it_is_cut(size: int) -> None:
    assert await derivations(b"".join(encode_derivations(MEMBERS)), size) == MEMBERS
    assert await sources(whole_sources(MEMBERS), size) == MEMBERS


async def test_an_unread_source_is_skipped() -> None:
    stream = pieces(whole_sources(MEMBERS), 1000)
    assert [source.header.path async for source in read_sources(stream, LIMITS)] == [name for name, _ in MEMBERS]


async def test_a_stream_cut_anywhere_is_an_error() -> None:
    for data, read in ((b"".join(encode_derivations(MEMBERS)), derivations), (whole_sources(MEMBERS), sources)):
        for end in (*range(0, len(data), 97), len(data) - 1):
            with pytest.raises(FramingError):
                await read(data[:end], 512)


async def test_a_stream_that_ends_without_its_end_mark_is_an_error() -> None:
    plain = zstandard.decompress(b"".join(encode_derivations(MEMBERS)), max_output_size=1 << 24)
    with pytest.raises(FramingError, match="cut short"):
        await derivations(zstandard.compress(plain[:-4]))


@pytest.mark.parametrize("rest", [b"\0", zstandard.compress(b"more"), b"x" * 5000])
async def test_anything_after_the_end_is_an_error(rest: bytes) -> None:
    with pytest.raises(FramingError, match="follows"):
        await derivations(b"".join(encode_derivations(MEMBERS)) + rest)
    plain = zstandard.decompress(whole_sources(MEMBERS), max_output_size=1 << 24)
    with pytest.raises(FramingError, match="follows"):
        await sources(zstandard.compress(plain + rest))


async def test_one_kind_of_stream_is_not_taken_for_the_other() -> None:
    with pytest.raises(FramingError, match="does not begin"):
        await derivations(whole_sources(MEMBERS))


async def test_every_bound_is_named() -> None:
    data = b"".join(encode_derivations(MEMBERS))
    with pytest.raises(FramingError, match="more than 39 derivations"):
        await derivations(data, limits=StreamLimits(39, 1 << 20, 1 << 24))
    with pytest.raises(FramingError, match=r"name-3\.drv has 150 bytes; a derivation may have 149"):
        await derivations(data, limits=StreamLimits(1000, 149, 1 << 24))
    with pytest.raises(FramingError, match="longer than 5000 bytes"):
        await derivations(data, limits=StreamLimits(1000, 1 << 20, 5000))
    with pytest.raises(FramingError, match=r"name-3\.drv has 150 bytes"):
        await sources(whole_sources(MEMBERS), limits=StreamLimits(1000, 149, 1 << 24))


async def test_a_small_stream_that_inflates_without_end_is_stopped_at_the_bound() -> None:
    bomb = zstandard.compress(DERIVATIONS_MAGIC + bytes([1, 0, 0, 0]) * (32 << 20))
    assert len(bomb) < 64 * 1024
    with pytest.raises(FramingError):
        await derivations(bomb, size=len(bomb), limits=StreamLimits(10, 1 << 20, 1 << 20))


@pytest.mark.parametrize("plain", [bytes(8 << 20), random.Random(1).randbytes(600_000), b"text, " * 500_000], ids=len)
@pytest.mark.parametrize(("level", "checked"), [(-5, True), (1, False), (19, True)])
@pytest.mark.parametrize("size", [1000, 70_000, 1 << 20])
def test_what_one_piece_of_a_frame_inflates_to_is_bounded_beforehand(
    plain: bytes, size: int, level: int, checked: bool
) -> None:
    """However much that is in all: a megabyte of zeros takes 32 bytes."""
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=checked, write_content_size=checked)
    frame = compressor.compress(plain)
    cutter, decompressor = zstd_blocks.BlockCutter(most=2), zstandard.ZstdDecompressor().decompressobj()
    found, cuts = bytearray(), 0
    for start in range(0, len(frame), size):
        came, at = frame[start : start + size], 0
        while at < len(came):
            count = cutter.cut(came, at)
            piece = decompressor.decompress(came[at : at + count])
            assert count > 0
            assert len(piece) <= 2 * zstd_blocks.BLOCK_BYTES
            found += piece
            at += count
            cuts += 1
    assert bytes(found) == plain
    assert decompressor.eof
    # A call each: not one for each few bytes.
    assert cuts <= len(plain) // zstd_blocks.BLOCK_BYTES + len(frame) // size + 4


def test_a_source_that_changes_while_it_is_sent_is_named() -> None:
    with pytest.raises(FramingError, match="the source s changed"):
        list(encode_sources([(header("s", b"abc", said=4), lambda: iter([b"abc"]))]))


@settings(max_examples=150, deadline=None)
@given(st.data())
async def test_any_damage_is_a_framing_error_or_harmless(data: st.DataObject) -> None:
    stream = bytearray(b"".join(encode_derivations(MEMBERS[:4])))
    plain = data.draw(st.booleans())
    if plain:
        stream = bytearray(zstandard.decompress(bytes(stream), max_output_size=1 << 24))
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    with suppress(FramingError):
        await derivations(zstandard.compress(bytes(stream)) if plain else bytes(stream))
