"""Contents of fixed outputs: what a derivation promises, and whether an archive keeps it."""

from __future__ import annotations

import hashlib

import pytest

from infra.nix import nar
from infra.nix.content import ContentCheck, FixedContent
from infra.nix.errors import FormatError
from infra.nix.hashing import DIGEST_SIZES
from infra.nix.nar import NarData, NarDirectory, NarDirectoryEnd, NarFile
from tests.support.graphs import Maker


def plain_file(content: bytes, *, executable: bool = False) -> bytes:
    return b"".join(nar.write_events([NarFile(b"", executable, len(content)), NarData(content)]))


DIRECTORY = b"".join(nar.write_events([NarDirectory(b""), NarFile(b"f", False, 3), NarData(b"abc"), NarDirectoryEnd()]))


def holds(wanted: FixedContent, archive: bytes, step: int = 5) -> bool:
    check = ContentCheck(wanted)
    for at in range(0, len(archive), step):
        check.feed(archive[at : at + step])
    return check.holds()


@pytest.mark.parametrize("algo", sorted(DIGEST_SIZES))
def test_an_archive_holds_a_content_only_by_the_method_and_the_bytes_that_were_promised(algo: str) -> None:
    flat = FixedContent("", algo, hashlib.new(algo, b"abc").digest())
    whole = FixedContent("r:", algo, hashlib.new(algo, DIRECTORY).digest())
    assert holds(flat, plain_file(b"abc"))
    assert holds(whole, DIRECTORY)
    assert not holds(flat, plain_file(b"abd"))
    assert not holds(flat, plain_file(b"abc", executable=True)), "Nix refuses an executable file"
    assert not holds(flat, DIRECTORY), "a directory is no plain file, even with the one file in it"
    assert not holds(whole, plain_file(b"abc"))
    with pytest.raises(FormatError):
        holds(flat, plain_file(b"abc")[:-8])


def test_a_derivation_says_its_content_at_its_beginning_and_an_address_says_the_same() -> None:
    make = Maker()
    fixed = make.fixed("source.tar.gz", b"abc")
    content = FixedContent.of_derivation(fixed.data)
    assert content is not None
    assert content == FixedContent("", "sha256", hashlib.sha256(b"abc").digest())
    assert content.path(make.store, "source.tar.gz") == fixed.outputs["out"]
    assert FixedContent.parse(content.address) == content
    assert FixedContent.parse(f"fixed:r:sha256:{'0' * 64}") == FixedContent("r:", "sha256", bytes(32))
    assert FixedContent.of_derivation(make.plain("plain").data) is None
    assert FixedContent.of_derivation(make.floating("floating").data) is None
    assert FixedContent.of_derivation(fixed.data.replace(b'"sha256"', b'"sha1"')) is None, "a digest of another length"
    for text in ("text:sha256:" + "0" * 64, "fixed:sha256:0", "fixed:x:sha256:" + "0" * 64, ""):
        with pytest.raises(FormatError):
            FixedContent.parse(text)
