"""Objects unpacked while they arrive, or small in memory: proven are exactly those that reading finds sound."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from hashlib import sha256
from io import BytesIO

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.nix.hashing import sha256_text
from infra.nix.narinfo import NarInfo, StoredNar
from infra.nix.path_info import PathInfo
from infra.objects.errors import CorruptNarError
from infra.objects.store import READ_BYTES
from infra.objects.verification import ArrivingNar, SmallNars, verify_nar
from tests.support.cache import store_path

NAR = os.urandom(100_000) + bytes(READ_BYTES + 50_000)


def frames(*contents: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    return b"".join(compressor.compress(content) for content in contents)


def hash_of(data: bytes) -> str:
    return sha256_text(sha256(data).digest())


def is_proven(compression: str, data: bytes, cuts: Sequence[int], nar: bytes) -> bool:
    arriving = ArrivingNar(compression, len(nar))
    for start, end in itertools.pairwise(sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})):
        arriving.feed(data[start:end])
    return arriving.proves(hash_of(nar), len(nar))


def is_sound(compression: str, data: bytes, nar: bytes) -> bool:
    stored = StoredNar("nar/x", compression, hash_of(data), len(data))
    try:
        verify_nar(BytesIO(data), NarInfo(PathInfo(store_path("x"), hash_of(nar), len(nar), ()), stored))
    except CorruptNarError:
        return False
    return True


WHOLE = frames(NAR[:200_000], NAR[200_000:])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, len(WHOLE)), max_size=5))
def test_an_object_is_proven_however_it_is_cut(cuts: list[int]) -> None:
    assert is_proven("zstd", WHOLE, cuts, NAR)
    assert is_proven("none", NAR, cuts, NAR)


def test_one_decoder_proves_small_objects_after_those_that_it_refuses() -> None:
    nars = SmallNars("zstd")
    for data, nar, proven in (
        (WHOLE, NAR, True),
        (WHOLE[:-9], NAR, False),
        (frames(b"a"), b"a", True),
        (b"x" * 1000, b"a", False),
        (frames(b"a", b"", b"b"), b"ab", True),
        (frames(b"ab"), b"a", False),
        (WHOLE, NAR, True),
    ):
        assert nars.proves(data, hash_of(nar), len(nar)) is proven


@pytest.mark.parametrize(
    "data",
    [
        WHOLE[:-9],
        WHOLE[: len(WHOLE) // 2],
        WHOLE + b"more",
        WHOLE + frames(b"more"),
        frames(NAR[:-1]),
        frames(NAR[:-1] + b"x"),
        b"x" * 1000,
        # Asks for more memory than a reader gives.
        zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters.from_level(1, window_log=25))
        .compressobj()
        .compress(NAR),
        b"",
    ],
)
def test_what_reading_it_whole_refuses_is_not_proven(data: bytes) -> None:
    assert not is_sound("zstd", data, NAR)
    assert not is_proven("zstd", data, [len(data) // 2], NAR)
    assert not SmallNars("zstd").proves(data, hash_of(NAR), len(NAR))


def test_a_bomb_is_unpacked_no_further_than_its_claim() -> None:
    bomb = frames(bytes(50_000_000))
    arriving = ArrivingNar("zstd", 1000)
    arriving.feed(bomb)
    # It is broken now: nothing more is unpacked, and no claim holds.
    arriving.feed(WHOLE)
    assert not arriving.proves(hash_of(bytes(1000)), 1000)
    assert not SmallNars("zstd").proves(bomb, hash_of(bytes(1000)), 1000)


def test_what_is_not_unpacked_in_pieces_says_so() -> None:
    with pytest.raises(ValueError, match="xz"):
        ArrivingNar("xz", 1)
