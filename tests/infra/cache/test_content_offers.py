"""A content that is here has every name that a fixed output wants for it, once it is proven."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from infra.cache.cache import Cache
from infra.cache.publishing.claims import Published
from infra.cache.pulls import content_offers
from infra.cache.pulls.content_offers import ContentOffers
from infra.nix.content import FixedContent
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import hash_part_of
from infra.objects.store import BlockingSource
from tests.infra.nix.test_content import DIRECTORY, plain_file
from tests.support.cache import STORE_DIR, object_file, open_cache, store_path, uploaded_claim
from tests.support.patience import PATIENCE_S

ABC = FixedContent("", "sha256", hashlib.sha256(b"abc").digest())
TREE = FixedContent("r:", "sha1", hashlib.sha1(DIRECTORY, usedforsecurity=False).digest())


async def put(cache: Cache, content: FixedContent, name: str, archive: bytes) -> NarInfo:
    """Publish a path with a content address, true or not."""
    claim = await uploaded_claim(cache, content.path(STORE_DIR, name), archive)
    claim = NarInfo(replace(claim.path, ca=content.address), claim.stored)
    assert await cache.publish([claim]) == [Published(claim.store_path)]
    return claim


async def test_a_content_under_one_name_is_published_under_others_without_a_copy(
    tmp_path: Path, database_url: str
) -> None:
    async with open_cache(tmp_path, database_url=database_url) as cache:
        await put(cache, ABC, "one", plain_file(b"abc"))
        await put(cache, TREE, "tree", DIRECTORY)
        offers = ContentOffers(cache)
        other = FixedContent("", "sha256", hashlib.sha256(b"elsewhere").digest())
        archive = FixedContent("r:", "sha256", hashlib.sha256(plain_file(b"abc")).digest())
        wanted = {
            ABC.path(STORE_DIR, "two"): ABC,
            TREE.path(STORE_DIR, "wood"): TREE,
            archive.path(STORE_DIR, "as-archive"): archive,
        }
        assert await offers.offer({**wanted, other.path(STORE_DIR, "two"): other}) == wanted.keys()
        assert offers.published == 3
        two = await cache.narinfo(hash_part_of(ABC.path(STORE_DIR, "two")))
        one = await cache.narinfo(hash_part_of(ABC.path(STORE_DIR, "one")))
        assert two is not None
        assert one is not None
        fields = [dict(line.split(": ", 1) for line in text.decode().splitlines()) for text in (one, two)]
        assert fields[0]["URL"] == fields[1]["URL"], "one object"
        assert fields[1]["CA"] == ABC.address
        assert fields[1]["References"] == ""


async def test_what_does_not_hold_what_its_metadata_says_is_not_offered(tmp_path: Path) -> None:
    async with open_cache(tmp_path) as cache:
        await put(cache, ABC, "liar", plain_file(b"something else"))
        wanted = {ABC.path(STORE_DIR, "two"): ABC}
        assert await ContentOffers(cache).offer(wanted) == frozenset()
        torn = FixedContent("", "sha256", hashlib.sha256(b"torn").digest())
        claim = await put(cache, torn, "torn", plain_file(b"torn"))
        file = object_file(cache, claim)
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        assert await ContentOffers(cache).offer({torn.path(STORE_DIR, "two"): torn}) == frozenset()
        assert await cache.missing(wanted) == wanted.keys()


async def test_a_path_that_refers_to_others_holds_no_fixed_output(tmp_path: Path) -> None:
    async with open_cache(tmp_path) as cache:
        nar = plain_file(b"refers")
        content = FixedContent("r:", "sha256", hashlib.sha256(nar).digest())
        path = store_path("refers")
        await cache.publish([await uploaded_claim(cache, path, nar, [path])])
        assert await ContentOffers(cache).offer({content.path(STORE_DIR, "two"): content}) == frozenset()


async def test_an_offer_reads_no_more_than_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_cache(tmp_path) as cache:
        await put(cache, ABC, "one", plain_file(b"abc"))
        monkeypatch.setattr(content_offers, "MAX_OFFERED_BYTES", 10)
        assert await ContentOffers(cache).offer({ABC.path(STORE_DIR, "two"): ABC}) == frozenset()


async def test_an_offer_that_is_given_up_reads_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    reads: list[int] = []

    class Long:
        """A NAR of many pieces, the first of which takes its time."""

        def __init__(self, source: BlockingSource, _: NarInfo) -> None:
            self._source = source

        def read(self) -> bytes:
            reads.append(len(reads))
            begun.set()
            assert go_on.wait(PATIENCE_S)
            return b"x" if len(reads) < 100 else b""

        def close(self) -> None:
            self._source.close()
            closed.set()

    async with open_cache(tmp_path) as cache:
        await put(cache, TREE, "tree", DIRECTORY)
        monkeypatch.setattr(content_offers, "VerifiedNar", Long)
        offer = asyncio.create_task(ContentOffers(cache).offer({TREE.path(STORE_DIR, "wood"): TREE}))
        assert await asyncio.to_thread(begun.wait, PATIENCE_S)
        offer.cancel()
        await asyncio.wait([offer])
        go_on.set()
        assert await asyncio.to_thread(closed.wait, PATIENCE_S)
        assert reads == [0]
