"""Objects in every compression that `nix copy` writes: the right bytes or one typed error, within bounds."""

from __future__ import annotations

import bz2
import io
import lzma
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from infra.cache.publishing.claims import Published, malformed
from infra.nix.hashing import sha256_text
from infra.nix.narinfo import NarInfo, StoredNar
from infra.nix.path_info import PathInfo
from infra.objects.compression import MAX_XZ_BYTES, SUFFIXES, DecodeError, nar_key, unpacker
from infra.objects.errors import CorruptNarError
from infra.objects.nar_reader import fetch_nar
from infra.objects.verification import verify_nar
from tests.support.cache import STORE_DIR, open_cache, store_path

PACK: dict[str, Callable[[bytes], bytes]] = {
    "zstd": zstandard.ZstdCompressor(level=3, write_checksum=True).compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "none": bytes,
}
STREAMED = [name for name in PACK if name != "none"]
PATH = store_path("packed")


def claim(compression: str, nar: bytes, packed: bytes) -> NarInfo:
    file_hash = sha256_text(sha256(packed).digest())
    stored = StoredNar(nar_key(file_hash, compression), compression, file_hash, len(packed))
    return NarInfo(PathInfo(PATH, sha256_text(sha256(nar).digest()), len(nar)), stored)


def unpacked(compression: str, packed: bytes, size: int = 1000) -> bytes:
    reader = unpacker(compression, io.BytesIO(packed), 4096)
    parts = []
    while part := reader.read(size):
        assert len(part) <= size
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("compression", SUFFIXES)
async def test_a_path_is_published_and_fetched_as_it_was_pushed(tmp_path: Path, compression: str) -> None:
    nar = b"nar" * 100_000
    packed = PACK[compression](nar)
    offered = claim(compression, nar, packed)
    assert offered.stored.url.endswith(f".nar{SUFFIXES[compression]}")
    async with open_cache(tmp_path) as cache:
        await cache.objects.put_bytes(offered.stored.url, packed)
        assert await cache.publish([offered]) == [Published(PATH)]
        assert f"Compression: {compression}\n".encode() in (await cache.narinfo(offered.hash_part) or b"")
        assert b"".join([part async for part in fetch_nar(cache.objects, offered)]) == nar


def test_an_object_is_named_after_its_hash_and_compression() -> None:
    offered = claim("xz", b"nar", lzma.compress(b"nar"))
    assert malformed(offered, STORE_DIR) == ""
    stored = offered.stored
    for changed, complaint in (
        (replace(stored, compression="bzip2"), "named after"),
        (replace(stored, url=stored.url.removesuffix(".xz")), "named after"),
        (replace(stored, compression="br"), "not one of"),
    ):
        assert complaint in malformed(NarInfo(offered.path, changed), STORE_DIR)


@pytest.mark.parametrize("compression", STREAMED)
@given(parts=st.lists(st.binary(min_size=1, max_size=5000), min_size=1, max_size=4), size=st.integers(1, 3000))
def test_streams_one_after_the_other_are_one_nar(compression: str, parts: list[bytes], size: int) -> None:
    assert unpacked(compression, b"".join(map(PACK[compression], parts)), size) == b"".join(parts)


@pytest.mark.parametrize("compression", SUFFIXES)
@given(data=st.data())
def test_mutated_objects_give_the_right_bytes_or_one_typed_error(compression: str, data: st.DataObject) -> None:
    nar = data.draw(st.binary(min_size=1, max_size=300)) * data.draw(st.integers(1, 50))
    packed = PACK[compression](nar)
    promised = claim(compression, nar, packed)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(packed)))
        packed = packed[:at] + data.draw(st.binary(max_size=4)) + packed[at + data.draw(st.integers(0, 20)) :]
    # Without a hash of the file, the compression's own checks and the NAR's hash must do.
    loose = replace(promised, stored=replace(promised.stored, file_hash="", file_size=0))
    for promise in (promised, loose):
        try:
            verify_nar(io.BytesIO(packed), promise)
        except CorruptNarError:
            continue
        assert unpacked(compression, packed) == nar


@pytest.mark.parametrize("compression", ["xz", "bzip2"])
def test_what_is_cut_short_empty_or_followed_by_rubbish_is_refused(compression: str) -> None:
    packed = PACK[compression](b"nar" * 1000)
    for damaged in (b"", packed[:-1], packed + b"rubbish!", PACK[compression](b""), packed + PACK[compression](b"")):
        with pytest.raises(DecodeError):
            unpacked(compression, damaged)


def test_xz_streams_may_have_padding_between_and_after_them_in_its_unit() -> None:
    one = lzma.compress(b"one")
    assert unpacked("xz", one + bytes(4) + one + bytes(40_000)) == b"oneone"
    for damaged in (one + bytes(3), one + bytes(5) + one, bytes(4) + one):
        with pytest.raises(DecodeError):
            unpacked("xz", damaged)


def test_an_object_cannot_make_its_decoder_take_much_memory() -> None:
    greedy = lzma.compress(
        b"nar", filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2 * MAX_XZ_BYTES}], check=lzma.CHECK_CRC32
    )
    with pytest.raises(DecodeError, match="memory"):
        unpacked("xz", greedy)
    assert unpacked("xz", lzma.compress(b"nar", preset=9)) == b"nar"


@pytest.mark.parametrize("compression", STREAMED)
def test_a_bomb_is_left_as_soon_as_it_exceeds_its_promise(compression: str) -> None:
    packed = PACK[compression](bytes(64 * 1024 * 1024))
    promised = claim(compression, b"small", packed)
    promise = replace(promised, stored=replace(promised.stored, file_hash=""))
    source = io.BytesIO(packed)
    with pytest.raises(CorruptNarError, match="more than 5 bytes"):
        verify_nar(source, promise)
