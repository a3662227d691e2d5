"""`.ls` files: made once from verified objects, within bounds, None for whatever cannot be listed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.cache import listing
from infra.cache.cache import Cache
from infra.cache.listing import Listings
from infra.nix.nar import NarData, NarFile, write_events
from tests.support.cache import object_file, open_cache, store_path, uploaded_claim

A, B = store_path("a"), store_path("b")


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[Cache]:
    async with open_cache(tmp_path) as opened:
        yield opened


def nar(content: bytes) -> bytes:
    return b"".join(write_events([NarFile(b"", executable=False, size=len(content)), NarData(content)]))


def expected(size: int) -> bytes:
    return b'{"version":1,"root":{"type":"regular","size":%d,"narOffset":96}}' % size


async def test_many_who_ask_at_once_share_one_reading_and_later_ones_need_none(cache: Cache) -> None:
    claim = await uploaded_claim(cache, A, nar(b"abc"))
    await cache.publish([claim])
    listings = Listings(cache)
    asked = [asyncio.create_task(listings.listing(claim.hash_part)) for _ in range(20)]
    await asyncio.sleep(0)
    asked[0].cancel()
    answers = await asyncio.gather(*asked[1:])
    assert set(answers) == {expected(3)}
    # The object has the right size but other bytes now: only memory can answer.
    file = object_file(cache, claim)
    file.write_bytes(bytes(file.stat().st_size))
    assert await listings.listing(claim.hash_part) == expected(3)
    assert await Listings(cache).listing(claim.hash_part) is None
    file.unlink()
    assert await listings.listing(claim.hash_part) is None
    await listings.close()


async def test_an_object_that_is_no_nar_or_not_published_has_no_listing(cache: Cache) -> None:
    claim = await uploaded_claim(cache, A, b"verified, but not an archive")
    await cache.publish([claim])
    listings = Listings(cache)
    assert await listings.listing(claim.hash_part) is None
    assert await listings.listing("0" * 32) is None


async def test_the_limits_hold(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = [await uploaded_claim(cache, path, nar(bytes([size]) * size)) for path, size in ((A, 10), (B, 200))]
    await cache.publish(claims)
    first, second = (claim.hash_part for claim in claims)
    monkeypatch.setattr(listing, "LISTINGS_IN_MEMORY_BYTES", len(expected(10)))
    listings = Listings(cache)
    assert await listings.listing(first) == expected(10)
    assert await listings.listing(second) == expected(200)
    assert listings.held_bytes == 0
    monkeypatch.setattr(listing, "MAX_LISTED_NAR_BYTES", 200)
    assert await Listings(cache).listing(second) is None
    monkeypatch.setattr(listing, "MAX_LISTINGS_WANTED", 0)
    assert await Listings(cache).listing(first) is None
