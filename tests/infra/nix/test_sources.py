"""Sources are what their path says or are refused."""

from __future__ import annotations

from hashlib import sha256

import pytest

from infra.nix import nar
from infra.nix.ca import SourceHashes, path_of_content, verify_source
from infra.nix.errors import FormatError, SourcePathError
from infra.nix.nar import NarData, NarDirectory, NarDirectoryEnd, NarFile
from infra.nix.store_path import StoreDir
from tests.support.sources import hashes_of

NIX_STORE = StoreDir("/nix/store")


def digest(archive: bytes, step: int = 7) -> SourceHashes:
    return hashes_of(archive[at : at + step] for at in range(0, len(archive), step))


def plain_file(content: bytes, *, executable: bool = False) -> bytes:
    return b"".join(nar.write_events([NarFile(b"", executable, len(content)), NarData(content)]))


REFERENCE = "/nix/store/1p9q0bz6f22dyxh4lw8xs08p4201vyq4-f"


def test_a_source_is_recognised_by_each_method() -> None:
    archive = plain_file(b"abc")
    hashes = digest(archive)
    nar_hex, flat_hex = sha256(archive).hexdigest(), sha256(b"abc").hexdigest()
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
    events: list[nar.NarEvent] = [NarDirectory(b""), NarFile(b"f", False, 1), NarData(b"x"), NarDirectoryEnd()]
    assert digest(b"".join(nar.write_events(events))).flat_hash == ""
    with pytest.raises(FormatError, match="cut short"):
        digest(plain_file(b"abc")[:-8])
