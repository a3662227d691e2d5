"""Scanning finds what a plain search finds, however cut; sources are what their path says or are refused."""

from __future__ import annotations

from hashlib import sha256
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.nix import base32, nar
from infra.nix.ca import SourceDigest, SourceHashes, path_of_content, verify_source
from infra.nix.errors import FormatError, SourcePathError
from infra.nix.nar import NarData, NarDirectory, NarDirectoryEnd, NarFile
from infra.nix.references import Scanner
from infra.nix.store_path import StoreDir

NIX_STORE = StoreDir("/nix/store")
DIGITS = st.text(alphabet=base32.ALPHABET, min_size=32, max_size=32)


@given(st.sets(DIGITS, max_size=5), st.data())
def test_what_occurs_is_found_however_the_content_is_cut(candidates: set[str], data: st.DataObject) -> None:
    pool = [candidate.encode() for candidate in sorted(candidates)]
    parts = [st.binary(max_size=40), st.text(alphabet=base32.ALPHABET, max_size=80).map(str.encode)]
    parts += [st.sampled_from(pool), st.sampled_from([part[:31] for part in pool])] if pool else []
    content = b"".join(data.draw(st.lists(st.one_of(parts), max_size=8)))
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=10))), len(content)]
    scanner = Scanner(candidates)
    for start, end in pairwise(cuts):
        scanner.feed(content[start:end])
    assert scanner.found == {candidate for candidate in candidates if candidate.encode() in content}


@pytest.mark.parametrize("length", [32, 33, 100, 5000])
def test_a_candidate_in_a_long_run_of_hash_characters_is_found(length: int) -> None:
    wanted = "0123456789abcdfghijklmnpqrsvwxyz"
    content = (b"a" * length + wanted.encode() + b"0" * length) * 2
    for size in (1, 31, 32, 4096):
        scanner = Scanner([wanted, "z" * 32])
        for at in range(0, len(content), size):
            scanner.feed(content[at : at + size])
        assert scanner.found == {wanted}


@pytest.mark.parametrize("candidate", ["", "a" * 31, "e" * 32, "A" * 32, "a" * 33])
def test_only_hash_parts_can_be_looked_for(candidate: str) -> None:
    with pytest.raises(FormatError):
        Scanner([candidate])


def digest(archive: bytes, step: int = 7) -> SourceHashes:
    result = SourceDigest()
    for at in range(0, len(archive), step):
        result.feed(archive[at : at + step])
    return result.finish()


def plain_file(content: bytes, *, executable: bool = False) -> bytes:
    return b"".join(nar.write_events([NarFile(b"", executable, len(content)), NarData(content)]))


REFERENCE = "/nix/store/1p9q0bz6f22dyxh4lw8xs08p4201vyq4-f"


def test_a_source_is_recognised_by_each_method() -> None:
    archive = plain_file(b"abc")
    hashes = digest(archive)
    nar_hex, flat_hex = sha256(archive).hexdigest(), sha256(b"abc").hexdigest()
    assert hashes.nar_size == len(archive)
    text = NIX_STORE.make_text_path("x", flat_hex)
    assert text == "/nix/store/vylz2d5mzcgx8z67q4xi43zhzf5zrld5-x"
    cases = {
        (text, ()): "text:sha256:",
        (NIX_STORE.make_text_path("x", flat_hex, [REFERENCE]), (REFERENCE,)): "text:sha256:",
        (NIX_STORE.make_source_path("x", nar_hex), ()): "fixed:r:sha256:",
        (NIX_STORE.make_source_path("x", nar_hex, [REFERENCE]), (REFERENCE,)): "fixed:r:sha256:",
        (NIX_STORE.make_fixed_output_path("x", "", "sha256", flat_hex), ()): "fixed:sha256:",
    }
    for (path, refs), method in cases.items():
        ca = verify_source(NIX_STORE, path, hashes, refs)
        assert ca.startswith(method)
        assert path_of_content(NIX_STORE, "x", ca, refs) == path


def test_a_source_that_lies_is_refused_by_name() -> None:
    path = NIX_STORE.make_text_path("x", sha256(b"abc").hexdigest())
    for archive in (plain_file(b"abd"), plain_file(b"abc", executable=True)):
        with pytest.raises(SourcePathError) as refusal:
            verify_source(NIX_STORE, path, digest(archive))
        assert refusal.value.member == path
    with pytest.raises(SourcePathError):
        verify_source(NIX_STORE, path, digest(plain_file(b"abc")), [REFERENCE])


def test_a_directory_has_no_flat_hash_even_if_it_holds_one_file() -> None:
    events = [NarDirectory(b""), NarFile(b"f", False, 1), NarData(b"x"), NarDirectoryEnd()]
    assert digest(b"".join(nar.write_events(events))).flat_hash == ""
    with pytest.raises(FormatError, match="cut short"):
        digest(plain_file(b"abc")[:-8])
