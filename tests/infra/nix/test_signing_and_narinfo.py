"""Keys, signatures and narinfo: RFC 8032 and Nix's texts, tolerant reading, and refusals with offsets."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.nix import narinfo, signing
from infra.nix.errors import FormatError
from infra.nix.narinfo import NarInfo, StoredNar
from infra.nix.path_info import PathInfo
from infra.nix.store_path import StoreDir

NIX_STORE = StoreDir("/nix/store")
SEED = bytes(range(32))
HASH = "vylz2d5mzcgx8z67q4xi43zhzf5zrld5"
OTHER = "1p9q0bz6f22dyxh4lw8xs08p4201vyq4"
NIX32 = "00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq"
PATH = PathInfo(
    store_path=f"/nix/store/{HASH}-x",
    nar_hash=f"sha256:{NIX32}",
    nar_size=120,
    references=(f"{OTHER}-f", f"{HASH}-x"),
    deriver=f"{OTHER}-x.drv",
    sigs=("a:b", "c:d"),
    ca="text:sha256:abc",
)
FULL = NarInfo(PATH, StoredNar("nar/a.nar.zst", "zstd", f"sha256:{NIX32}", 5))


def test_a_key_signs_what_its_public_half_verifies_and_nothing_else() -> None:
    key = signing.generate("cache-1", SEED)
    signature = key.sign(b"message")
    public = signing.PublicKey.parse(str(key.public))
    assert public.verify(b"message", signature)
    assert not public.verify(b"message.", signature)
    assert not public.verify(b"message", signature.replace("cache-1", "cache-2"))
    assert not public.verify(b"message", "cache-1:AAAA")
    assert not public.verify(b"message", "nonsense")
    assert not signing.generate("cache-1", bytes(32)).public.verify(b"message", signature)


def test_the_first_vector_of_rfc_8032_holds() -> None:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    key = signing.generate("k", seed)
    assert key.public.raw.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert signing.split_signature(key.sign(b""))[1].hex().startswith("e5564300c360ac729086e2cc806e828a")


def test_a_secret_key_round_trips_and_shows_itself_nowhere_else() -> None:
    key = signing.generate("cache-1", SEED)
    secret = key.reveal()
    assert signing.SecretKey.parse(secret).sign(b"x") == key.sign(b"x")
    assert secret.split(":")[1] not in repr(key) + str(key)
    with pytest.raises(FormatError) as refusal:
        signing.SecretKey.parse(secret[:-4] + "AAA=")
    assert secret[-20:-4] not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "k", "k:", ":AAAA", "k:!!!!", "k k:AAAA", "k\n:AAAA"])
def test_a_text_that_is_no_key_is_refused(text: str) -> None:
    for parse in (signing.SecretKey.parse, signing.PublicKey.parse):
        with pytest.raises(FormatError):
            parse(text)


def test_a_narinfo_is_rendered_in_nixs_order() -> None:
    assert FULL.render().decode() == (
        f"StorePath: /nix/store/{HASH}-x\nURL: nar/a.nar.zst\nCompression: zstd\nFileHash: sha256:{NIX32}\n"
        f"FileSize: 5\nNarHash: sha256:{NIX32}\nNarSize: 120\nReferences: {OTHER}-f {HASH}-x\nDeriver: {OTHER}-x.drv\n"
        "Sig: a:b\nSig: c:d\nCA: text:sha256:abc\n"
    )


def test_empty_references_keep_the_space_that_nix_counts_on() -> None:
    bare = NarInfo(PathInfo(PATH.store_path, PATH.nar_hash, 1), StoredNar("nar/x", "none", "", 0))
    assert b"\nReferences: \n" in bare.render()
    assert narinfo.parse(bare.render(), NIX_STORE) == bare


def test_the_fingerprint_has_full_paths_in_order_of_base_names() -> None:
    shuffled = replace(PATH, references=(f"{HASH}-x", f"{OTHER}-f"))
    assert shuffled.fingerprint().decode() == (
        f"1;/nix/store/{HASH}-x;sha256:{NIX32};120;/nix/store/{OTHER}-f,/nix/store/{HASH}-x"
    )
    assert replace(PATH, references=()).fingerprint().endswith(b";120;")


def test_reading_tolerates_what_nix_tolerates() -> None:
    lines = FULL.render().splitlines(keepends=True)
    unusual = b"".join(reversed(lines)).replace(
        NIX32.encode(), b"5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    )
    read = narinfo.parse(b"System: x86_64-linux\nFuture: \xff: \n" + unusual, NIX_STORE)
    assert read.signed(PATH.sigs) == FULL
    missing = b"".join(line for line in lines if not line.startswith((b"Compression", b"Deriver")))
    read = narinfo.parse(missing + b"Deriver: unknown-deriver\n", NIX_STORE)
    assert (read.stored.compression, read.path.deriver) == ("bzip2", "")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"CA: text:sha256:abc\n", b"CA: text:sha256:abc"),
        (b"URL: nar/a.nar.zst\n", b""),
        (b"URL: nar/a.nar.zst\n", b"URL: nar/a.nar.zst\r\n"),
        (b"URL: nar/a.nar.zst\n", b"\nURL: nar/a.nar.zst\n"),
        (b"Compression: zstd\n", b"Compression: zstd\nCompression: zstd\n"),
        (b"References: ", b"References:"),
        (b"References: ", b"References: /nix/store/"),
        (b"NarSize: 120", b"NarSize: 0"),
        (b"NarSize: 120", b"NarSize: -1"),
        (b"NarSize: 120", b"NarSize: 9223372036854775808"),
        (b"NarHash: sha256", b"NarHash: sha512"),
        (b"StorePath: /nix", b"StorePath: /gnu"),
        (b"StorePath: ", b"StorePath:  "),
    ],
)
def test_a_broken_narinfo_is_refused_near_the_break(before: bytes, after: bytes) -> None:
    text = FULL.render()
    assert before in text
    with pytest.raises(FormatError):
        narinfo.parse(text.replace(before, after, 1), NIX_STORE)


def test_an_error_in_a_field_is_placed_in_the_whole_text() -> None:
    text = FULL.render().replace(f"Deriver: {OTHER}".encode(), b"Deriver: " + b"e" * 32)
    with pytest.raises(FormatError) as refusal:
        narinfo.parse(text, NIX_STORE)
    assert refusal.value.offset == text.index(b"Deriver: ") + len("Deriver: ")


def test_a_value_cannot_smuggle_in_another_field() -> None:
    with pytest.raises(FormatError):
        replace(FULL, stored=replace(FULL.stored, url="nar/x\nNarSize: 7")).render()


@given(st.data())
def test_any_bytes_either_parse_or_are_refused_and_what_parses_renders_to_itself(data: st.DataObject) -> None:
    text = FULL.render()
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.binary(max_size=4)) + text[at + data.draw(st.integers(0, 40)) :]
    try:
        info = narinfo.parse(text, NIX_STORE)
    except FormatError as refusal:
        offset = refusal.offset
    else:
        offset = 0
        assert narinfo.parse(info.render(), NIX_STORE) == info
    assert 0 <= offset <= len(text)
