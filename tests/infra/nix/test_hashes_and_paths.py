"""nix32, hash texts, store paths: vectors, round trips; any input parses or is refused with an offset."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.nix import base32, ca, hashing, store_path
from infra.nix.errors import FormatError
from infra.nix.signing import PublicKey, SecretKey, split_signature
from infra.nix.store_path import StoreDir

NIX_STORE = StoreDir("/nix/store")
HELLO = sha256(b"hello\n")
HELLO_NIX32 = "00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq"


def test_the_vector_of_the_format_page_holds_in_all_three_texts() -> None:
    assert base32.encode(HELLO.digest()) == HELLO_NIX32
    assert hashing.sha256_text(HELLO.digest()) == f"sha256:{HELLO_NIX32}"
    for text in (
        f"sha256:{HELLO_NIX32}",
        f"sha256:{HELLO.hexdigest()}",
        "sha256-WJG1tSLV3whtD/CxEPvZ0hu0/HFjrzTQgoai6Eb2vgM=",
    ):
        assert hashing.parse_hash(text) == ("sha256", HELLO.digest())


def test_hash_parts_are_those_of_paths_directly_in_the_store() -> None:
    paths = [f"/nix/store/{character * 32}-name" for character in "abc"]
    others = ["", "/nix/store", f"/opt/store/{'d' * 32}-name", f"/nix/store/{'f' * 32}-name/bin", f"{'g' * 32}-name"]
    assert NIX_STORE.hash_parts([*others, *paths, *paths]) == {NIX_STORE.parse(path).hash_part for path in paths}


@given(st.binary(max_size=80))
def test_nix32_round_trips(digest: bytes) -> None:
    assert base32.decode(base32.encode(digest)) == digest


@pytest.mark.parametrize(
    ("text", "offset"), [("e", 0), ("0O", 1), ("000", 3), ("zz", 0), ("0_", 1), ("0 ", 1), ("é0", 0)]
)
def test_nix32_that_no_encoder_writes_is_refused_at_its_place(text: str, offset: int) -> None:
    with pytest.raises(FormatError) as refusal:
        base32.decode(text)
    assert refusal.value.offset == offset


@given(st.binary(min_size=32, max_size=32))
def test_folding_is_the_xor_of_bytes_at_equal_positions(digest: bytes) -> None:
    expected = bytearray(20)
    for index, byte in enumerate(digest):
        expected[index % 20] ^= byte
    assert hashing.compress_hash(digest) == bytes(expected)


@given(st.binary(min_size=32, max_size=32))
def test_a_hash_part_is_the_folded_hash_in_nix32(digest: bytes) -> None:
    folded = hashing.compress_hash(digest)
    assert base32.encode_short(int.from_bytes(folded, "little")) == base32.encode(folded)
    inner = digest.hex()
    text = f"output:out:sha256:{inner}:/nix/store:x"
    expected = base32.encode(hashing.compress_hash(sha256(text.encode()).digest()))
    assert NIX_STORE.make_output_path(inner, "out", "x") == f"/nix/store/{expected}-x"


def test_the_path_vectors_of_the_format_page_hold() -> None:
    assert NIX_STORE.make_text_path("x", sha256(b"abc").hexdigest()) == "/nix/store/vylz2d5mzcgx8z67q4xi43zhzf5zrld5-x"
    assert (
        NIX_STORE.make_fixed_output_path("f", "", "sha256", HELLO.hexdigest())
        == "/nix/store/1p9q0bz6f22dyxh4lw8xs08p4201vyq4-f"
    )
    masked = "dae5410a258feb7cd81d2b9c2f76bd335c8ec80f87deffc6c54f6c9f0398e318"
    assert NIX_STORE.make_output_path(masked, "out", "t") == "/nix/store/2jmiqxxd2z4ypk8am71rc6kffqzgma57-t"


def test_paths_depend_on_the_store_directory_and_stay_in_it() -> None:
    other = StoreDir("/opt/other/store")
    path = other.make_text_path("x", sha256(b"abc").hexdigest())
    assert other.contains(path)
    assert path[len(other.path) :] != NIX_STORE.make_text_path("x", sha256(b"abc").hexdigest())[len("/nix/store") :]
    with pytest.raises(FormatError, match="not in the store directory"):
        NIX_STORE.parse(path)


NAMES = st.text(alphabet="abcXYZ019+-._?=", min_size=1, max_size=40).filter(store_path.is_valid_name)


@given(st.binary(min_size=20, max_size=20), NAMES)
def test_store_paths_round_trip(digest: bytes, name: str) -> None:
    path = f"/nix/store/{base32.encode(digest)}-{name}"
    assert NIX_STORE.render(NIX_STORE.parse(path)) == path
    assert store_path.parse_base_name(NIX_STORE.base_name(path)).name == name


HASH = "vylz2d5mzcgx8z67q4xi43zhzf5zrld5"


@pytest.mark.parametrize(
    "text",
    ["", "/nix/store", f"/nix/store/{HASH}", f"/nix/store/{HASH}-", f"/nix/store/{HASH}-a/b", f"/nix/store/{HASH}-a\n"]
    + [f"/nix/store/{HASH}-{name}" for name in ("a b", ".", "..", ".-a", "..-a", "ü", "a" * 212, "a\0")]
    + [f"/nix/store/{HASH[:-1]}e-a", f"/nix/store//{HASH}-a", f"nix/store/{HASH}-a", f"/nix/store/../store/{HASH}-a"],
)
def test_a_text_that_is_no_store_path_is_refused(text: str) -> None:
    assert not NIX_STORE.contains(text)
    with pytest.raises(FormatError):
        NIX_STORE.parse(text)


def test_the_longest_and_the_oddest_names_are_paths() -> None:
    for name in ("a" * 211, "a+b.c?d=e_f-g", ".hidden", "-", "..."):
        assert NIX_STORE.parse(f"/nix/store/{HASH}-{name}").name == name


@pytest.mark.parametrize(
    "path", ["", "/", "nix/store", "/nix/store/", "/nix//store", "/nix/../store", "/nix/store:x", "/a\nb"]
)
def test_a_store_directory_is_absolute_normalised_and_unambiguous(path: str) -> None:
    with pytest.raises(FormatError):
        StoreDir(path)


@given(st.one_of(st.text(), st.text(alphabet="/a.:\\ é,\ud800").map(lambda text: f"/{text}")))
def test_whatever_is_a_store_directory_holds_the_paths_made_in_it(path: str) -> None:
    try:
        store_dir = StoreDir(path)
    except FormatError:
        return
    made = store_dir.make_text_path("x", "00")
    assert store_dir.render(store_dir.parse(made)) == made


PARSERS: tuple[Callable[[str], object], ...] = (
    base32.decode,
    hashing.parse_hash,
    hashing.parse_sha256,
    store_path.parse_base_name,
    NIX_STORE.parse,
    StoreDir,
    PublicKey.parse,
    SecretKey.parse,
    split_signature,
    lambda text: ca.path_of_content(NIX_STORE, "x", text),
)
SEEDS = (
    f"sha256:{HELLO_NIX32}",
    "sha256-WJG1tSLV3whtD/CxEPvZ0hu0/HFjrzTQgoai6Eb2vgM=",
    f"/nix/store/{HASH}-name",
    f"{HASH}-name",
    f"fixed:r:sha256:{HELLO_NIX32}",
    "key-1:dm3Yph9LVuVqzWMpLwxgOBXr1wIBnEQ0fWj6kT7yPeM=",
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.text(max_size=3)) + text[at + draw(st.integers(0, 2)) :]
    return text


@given(st.one_of(st.text(), mutated()), st.sampled_from(PARSERS))
def test_any_text_either_parses_or_is_refused_with_an_offset(text: str, parse: Callable[[str], object]) -> None:
    try:
        parse(text)
    except FormatError as error:
        refusal = error
    else:
        return
    assert 0 <= refusal.offset <= len(text)
    assert str(refusal).endswith(f"(at byte {refusal.offset})")
