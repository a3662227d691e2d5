"""Publishing: only what is true and complete becomes visible, and it stays what it was."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.cache import cache as cache_module
from infra.cache.cache import Cache
from infra.cache.catalog import catalog as catalog_module
from infra.cache.errors import ClosureTooLargeError, MetadataError
from infra.cache.publishing import publisher as publisher_module
from infra.cache.publishing.claims import (
    AlreadyPublished,
    Conflict,
    Published,
    Rejected,
    RejectReason,
    references_first,
)
from infra.nix import narinfo
from infra.nix.hashing import sha256_text
from infra.nix.narinfo import NarInfo, StoredNar
from infra.nix.path_info import PathInfo
from infra.objects.compression import nar_key
from infra.objects.errors import CacheError
from tests.support.cache import (
    STORE_DIR,
    base_name,
    lying,
    object_file,
    open_cache,
    publish,
    secret_key,
    store_path,
    uploaded_claim,
)

A, B, C, D, LOST = (store_path(name) for name in ("a", "b", "c", "d", "lost"))
OTHER = sha256_text(sha256(b"other").digest())


@pytest.fixture
async def cache(tmp_path: Path, database_url: str) -> AsyncIterator[Cache]:
    async with open_cache(tmp_path, database_url=database_url) as opened:
        yield opened


async def visible(cache: Cache, path: str) -> bool:
    text = await cache.narinfo(base_name(path)[:32])
    assert (text is None) == (path in await cache.missing([path]))
    return text is not None


def reason(outcome: object) -> RejectReason:
    assert isinstance(outcome, Rejected), outcome
    return outcome.reason


async def test_a_published_path_is_answered_signed_by_every_key(tmp_path: Path) -> None:
    keys = [secret_key("old-1", 1), secret_key("new-2", 2)]
    async with open_cache(tmp_path, keys) as cache:
        await publish(cache, B)
        bare = await uploaded_claim(cache, A, b"nar of a", sorted([B, A]))
        path = replace(bare.path, deriver=base_name(store_path("a.drv")), ca="fixed:r:sha256:" + 52 * "0")
        claim = replace(bare, path=path)
        assert not await visible(cache, A)
        assert await cache.publish([claim]) == [Published(A)]
        assert await visible(cache, A)
        info = narinfo.parse(await cache.narinfo(claim.hash_part) or b"", STORE_DIR)
        assert info.signed(()) == claim
        fingerprint = info.path.fingerprint()
        assert [any(key.verify(fingerprint, sig) for sig in info.path.sigs) for key in cache.public_keys] == [
            True,
            True,
        ]
        sums = await cache.info()
        assert (sums.paths, sums.nar_bytes, sums.conflicts) == (2, len(B) + 8, 0)
    async with open_cache(tmp_path) as reopened:
        assert await visible(reopened, A)


async def test_published_again_is_no_change_and_other_bits_are_a_recorded_conflict(cache: Cache) -> None:
    first = await uploaded_claim(cache, A, b"first")
    await cache.publish([first])
    text = await cache.narinfo(first.hash_part)
    assert await publish(cache, A, b"first") == AlreadyPublished(A)
    other = await uploaded_claim(cache, A, b"other")
    for _ in range(2):
        assert await cache.publish([other]) == [Conflict(A, first.path.nar_hash, other.path.nar_hash)]
    assert await cache.narinfo(first.hash_part) == text
    assert (await cache.info()).conflicts == 1


async def test_a_conflict_is_recorded_only_of_bits_that_exist(cache: Cache) -> None:
    claim = await uploaded_claim(cache, A)
    await cache.publish([claim])
    (outcome,) = await cache.publish([replace(claim, path=replace(claim.path, nar_hash=OTHER))])
    assert reason(outcome) is RejectReason.CORRUPT
    assert (await cache.info()).conflicts == 0


async def test_two_publishes_of_one_path_at_once_have_one_winner(cache: Cache) -> None:
    claims = [await uploaded_claim(cache, A, b"bits %d" % (number % 2)) for number in range(8)]
    outcomes = await asyncio.gather(*(cache.publish([claim]) for claim in claims))
    kinds = sorted(type(outcome).__name__ for (outcome,) in outcomes)
    assert kinds == ["AlreadyPublished"] * 3 + ["Conflict"] * 4 + ["Published"]
    kinds = sorted(
        type(outcome).__name__
        for outcome in await cache.publish([await uploaded_claim(cache, B), *[await uploaded_claim(cache, B)] * 2])
    )
    assert kinds == ["AlreadyPublished"] * 2 + ["Published"]


async def test_a_path_is_published_only_after_all_it_refers_to(cache: Cache) -> None:
    a, b, c = (
        await uploaded_claim(cache, A),
        await uploaded_claim(cache, B, references=[A]),
        await uploaded_claim(cache, C, references=[B, C]),
    )
    (refused,) = await cache.publish([c])
    assert reason(refused) is RejectReason.MISSING_REFERENCES
    assert isinstance(refused, Rejected)
    assert refused.missing == (base_name(B),)
    assert not await visible(cache, C)
    assert await cache.publish([c, b, a]) == [Published(C), Published(B), Published(A)]
    narinfos, missing = await cache.closure([C, LOST, "/elsewhere/x"])
    assert [narinfo.parse(text, STORE_DIR).store_path for text in narinfos] == [A, B, C]
    assert missing == sorted([LOST, "/elsewhere/x"])
    narinfos, missing = await cache.closure([C], recursive=False)
    assert [narinfo.parse(text, STORE_DIR).store_path for text in narinfos] == [C]


async def test_a_failed_claim_takes_only_those_along_that_refer_to_it(cache: Cache) -> None:
    bad = await uploaded_claim(cache, A)
    object_file(cache, bad).unlink()
    batch = [
        await uploaded_claim(cache, D, references=[C]),
        bad,
        await uploaded_claim(cache, C),
        await uploaded_claim(cache, B, references=[A, C]),
    ]
    outcomes = await cache.publish(batch)
    assert outcomes[0] == Published(D)
    assert reason(outcomes[1]) is RejectReason.MISSING_OBJECT
    assert outcomes[2] == Published(C)
    assert reason(outcomes[3]) is RejectReason.MISSING_REFERENCES
    assert await cache.missing([A, B, C, D]) == {A, B}


async def test_paths_that_refer_to_each_other_are_refused(cache: Cache) -> None:
    outcomes = await cache.publish(
        [await uploaded_claim(cache, A, references=[B]), await uploaded_claim(cache, B, references=[A])]
    )
    assert [reason(outcome) for outcome in outcomes] == [RejectReason.MISSING_REFERENCES] * 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("size", [500, 2_000_000])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), RejectReason.MISSING_OBJECT),
        (flip, RejectReason.CORRUPT),
        (lambda path: os.truncate(path, path.stat().st_size - 1), RejectReason.CORRUPT),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), RejectReason.CORRUPT),
    ],
)
async def test_an_object_that_is_not_what_was_claimed_is_refused(
    cache: Cache, size: int, damage: Callable[[Path], None], expected: RejectReason
) -> None:
    claim = await uploaded_claim(cache, A, os.urandom(size))
    damage(object_file(cache, claim))
    assert reason((await cache.publish([claim]))[0]) is expected
    assert not await visible(cache, A)
    assert await publish(cache, A, b"a retry") == Published(A)


@pytest.mark.parametrize(
    "lie",
    [
        {"nar_hash": OTHER},
        {"nar_size": 1},
        {"nar_size": 1 << 30},
        {"file_size": 1},
        {"file_size": 1 << 30},
        {"file_hash": OTHER, "url": nar_key(OTHER)},
    ],
)
async def test_a_claim_that_lies_about_a_sound_object_is_refused(cache: Cache, lie: dict[str, Any]) -> None:
    false = lying(await uploaded_claim(cache, A), lie)
    assert reason((await cache.publish([false]))[0]) in {RejectReason.CORRUPT, RejectReason.MISSING_OBJECT}
    assert not await visible(cache, A)


@pytest.mark.parametrize(
    "lie",
    [
        {"store_path": "/nix/store/../../etc/passwd"},
        {"store_path": base_name(A)},
        {"store_path": "/other/store/" + base_name(A)},
        {"url": "nar/../../key"},
        {"url": nar_key(OTHER)},
        {"compression": "none"},
        {"nar_hash": "sha256:" + "0" * 64},
        {"file_hash": "md5:" + "0" * 32},
        {"nar_size": 0},
        {"nar_size": 1 << 62},
        {"file_size": -1},
        {"references": ("not-a-path",)},
        {"references": (A,)},
        {"deriver": base_name(B)},
        {"deriver": "x\nSig: forged"},
        {"ca": "fixed:r:sha256:x\nSig: forged"},
    ],
)
async def test_a_malformed_claim_is_refused_without_looking(cache: Cache, lie: dict[str, Any]) -> None:
    false = lying(await uploaded_claim(cache, A), lie)
    good = await uploaded_claim(cache, B)
    outcomes = await cache.publish([false, good])
    assert reason(outcomes[0]) is RejectReason.MALFORMED
    assert outcomes[1] == Published(B)


async def test_another_path_with_a_published_hash_part_is_refused(cache: Cache) -> None:
    await publish(cache, A)
    assert reason(await publish(cache, A + "-other-name")) is RejectReason.MALFORMED
    assert reason(await publish(cache, B, references=[A + "-other-name"])) is RejectReason.MISSING_REFERENCES
    assert await cache.missing([A + "-other-name"]) == {A + "-other-name"}


async def test_a_bomb_costs_no_more_than_an_honest_object(cache: Cache) -> None:
    data = zstandard.ZstdCompressor().compress(bytes(64 * 1024 * 1024)) * 64
    file_hash = sha256_text(sha256(data).digest())
    await cache.objects.put_bytes(nar_key(file_hash), data)
    claim = NarInfo(PathInfo(A, OTHER, 1000), StoredNar(nar_key(file_hash), "zstd", file_hash, len(data)))
    (outcome,) = await cache.publish([claim])
    assert isinstance(outcome, Rejected)
    # Not "the file's hash" or "4294967296 bytes": it was left as soon as it exceeded its promise.
    assert "more than 1000 bytes" in outcome.message


async def test_a_lost_object_is_absent_everywhere_and_comes_back_with_its_bits(cache: Cache) -> None:
    claim = await uploaded_claim(cache, A, b"the bits")
    await cache.publish([claim])
    await publish(cache, B, references=[A])
    assert await visible(cache, A)
    object_file(cache, claim).unlink()
    assert not await visible(cache, A)
    assert (await cache.closure([B]))[1] == [A]
    assert reason(await publish(cache, C, references=[A])) is RejectReason.MISSING_REFERENCES
    # The same NAR, compressed by another release of zstd.
    data = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(b"the bits") + zstandard.compress(b"")
    file_hash = sha256_text(sha256(data).digest())
    await cache.objects.put_bytes(nar_key(file_hash), data)
    again = replace(claim, stored=StoredNar(nar_key(file_hash), "zstd", file_hash, len(data)))
    assert await cache.publish([again]) == [AlreadyPublished(A)]
    info = narinfo.parse(await cache.narinfo(claim.hash_part) or b"", STORE_DIR)
    assert (info.stored.url, info.path.nar_hash) == (again.stored.url, claim.path.nar_hash)
    assert cache.public_keys[0].verify(info.path.fingerprint(), info.path.sigs[0])
    assert (await cache.closure([B]))[1] == []


async def test_what_a_crash_leaves_is_invisible_and_in_nobodys_way(tmp_path: Path) -> None:
    async with open_cache(tmp_path) as cache:
        claim = await uploaded_claim(cache, A)  # uploaded, never published
        await cache.objects.put_bytes("incoming/0123", b"half an upload")
        assert not await visible(cache, A)
        assert await cache.object_size(claim.stored.url) is None
    async with open_cache(tmp_path) as cache:
        assert await publish(cache, A) == Published(A)


async def test_nothing_is_visible_of_a_publish_whose_transaction_fails(tmp_path: Path) -> None:
    async with open_cache(tmp_path) as cache:
        claims = [await uploaded_claim(cache, A), await uploaded_claim(cache, B, references=[A])]
        with closing(sqlite3.connect(tmp_path / "cache.sqlite")) as vandal, vandal:
            vandal.execute("CREATE TRIGGER full BEFORE INSERT ON refs BEGIN SELECT RAISE(ABORT, 'disk full'); END")
        with pytest.raises(MetadataError, match="disk full"):
            await cache.publish(claims)
        assert await cache.missing([A, B]) == {A, B}
        with closing(sqlite3.connect(tmp_path / "cache.sqlite")) as vandal, vandal:
            vandal.execute("DROP TRIGGER full")
        assert await cache.publish(claims) == [Published(A), Published(B)]


async def test_narinfos_that_are_asked_for_together_are_looked_up_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [store_path(f"many{number}") for number in range(50)]
    async with open_cache(tmp_path) as cache:
        await cache.publish([await uploaded_claim(cache, path) for path in names])
        # What was just published needs no question; after a restart nothing is remembered.
        assert all(cache.narinfo_in_memory(base_name(path)[:32]) for path in names)
    async with open_cache(tmp_path) as cache:
        asked: list[int] = []
        rows = catalog_module.Catalog.rows

        async def counted(
            catalog: catalog_module.Catalog, connection: AsyncConnection, hash_parts: Sequence[str]
        ) -> dict[str, catalog_module.Row]:
            asked.append(len(hash_parts))
            return await rows(catalog, connection, hash_parts)

        monkeypatch.setattr(catalog_module.Catalog, "rows", counted)
        parts = [base_name(path)[:32] for path in [*names, LOST]]
        assert cache.narinfo_in_memory(parts[0]) is None
        leaver, *others = [asyncio.create_task(cache.narinfo(part)) for part in [*parts, *parts]]
        await asyncio.sleep(0)
        leaver.cancel()
        texts = await asyncio.gather(*others)
        assert asked == [51]
        found = [narinfo.parse(text, STORE_DIR).store_path for text in texts if text is not None]
        assert found == [*names[1:], *names]


async def test_a_question_that_fails_is_an_error_for_each_who_asked(tmp_path: Path) -> None:
    async with open_cache(tmp_path) as cache:
        await publish(cache, A)
    async with open_cache(tmp_path) as cache:
        with closing(sqlite3.connect(tmp_path / "cache.sqlite")) as vandal, vandal:
            vandal.execute("ALTER TABLE paths RENAME TO away")
        failed = await asyncio.gather(*(cache.narinfo(base_name(A)[:32]) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(error, MetadataError) for error in failed)
        with closing(sqlite3.connect(tmp_path / "cache.sqlite")) as vandal, vandal:
            vandal.execute("ALTER TABLE away RENAME TO paths")
        assert await visible(cache, A)


async def test_a_cancelled_publish_leaves_the_cache_usable(cache: Cache) -> None:
    large = await uploaded_claim(cache, A, os.urandom(20_000_000))
    work = asyncio.create_task(cache.publish([large]))
    # Begun, by turns of the loop and not by time: a busy machine may end it in any time.
    for _ in range(10):
        await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert await cache.publish([large]) == [Published(A)]


async def test_questions_and_batches_are_bounded(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "MAX_CLOSURE", 3)
    chain = [store_path(f"chain{number}") for number in range(4)]
    batch = [await uploaded_claim(cache, path, references=chain[:number]) for number, path in enumerate(chain)]
    assert await cache.publish(batch) == [Published(path) for path in chain]
    assert len((await cache.closure(chain[2:3]))[0]) == 3
    for question in (chain[3:], [store_path(f"{number}") for number in range(4)]):
        with pytest.raises(ClosureTooLargeError):
            await cache.closure(question)
    monkeypatch.setattr(cache_module, "MAX_BATCH", 3)
    with pytest.raises(CacheError, match="limit is 3"):
        await cache.publish(batch)


async def test_what_is_done_in_pieces_to_spare_the_loop_is_what_it_is_in_one(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(catalog_module, "REFERRERS_AT_ONCE", 1)
    monkeypatch.setattr(catalog_module, "LOOK_INLINE", 0)
    monkeypatch.setattr(publisher_module, "ROWS_AT_ONCE", 2)
    chain = [store_path(f"chain{number}") for number in range(7)]
    batch = [await uploaded_claim(cache, path, references=chain[:number]) for number, path in enumerate(chain)]
    blocked = await uploaded_claim(cache, A, references=[LOST])
    outcomes = await cache.publish([blocked, *reversed(batch)])
    assert outcomes[1:] == [Published(path) for path in reversed(chain)]
    assert isinstance(outcomes[0], Rejected)
    assert await cache.publish(batch) == [AlreadyPublished(path) for path in chain]
    texts, missing = await cache.closure([chain[-1], LOST])
    assert ([narinfo.parse(text, STORE_DIR).store_path for text in texts], missing) == (chain, [LOST])
    assert len((await cache.closure([chain[3], chain[5]], recursive=False))[0]) == 2
    object_file(cache, batch[0]).unlink()
    assert await cache.missing([*chain, LOST]) == {chain[0], LOST}
    assert await cache.lost(chain[-1:], ()) == {chain[0]}


GRAPHS = st.dictionaries(st.integers(0, 9), st.frozensets(st.integers(0, 12), max_size=4), max_size=10)


@given(GRAPHS, st.frozensets(st.integers(0, 12)))
def test_each_path_comes_after_all_it_refers_to_and_none_is_refused_without_cause(
    graph: dict[int, frozenset[int]], held: frozenset[int]
) -> None:
    path = {number: store_path(f"n{number}") for number in range(13)}
    present = {base_name(path[number]) for number in held - graph.keys()}
    claims = [
        NarInfo(
            PathInfo(path[node], OTHER, 1, tuple(base_name(path[to]) for to in edges)), StoredNar("", "zstd", OTHER, 1)
        )
        for node, edges in graph.items()
    ]
    ordered, blocked = references_first(claims, present)
    seen = set(present)
    for claim in ordered:
        assert set(claim.path.references) <= seen | {claim.base_name}
        seen.add(claim.base_name)
    assert {claim.store_path for claim in ordered} | blocked.keys() == {claim.store_path for claim in claims}
    assert len(ordered) + len(blocked) == len(claims)
    for lacking in blocked.values():
        assert lacking
        assert not set(lacking) & seen
