"""Collecting garbage: what is wanted stays, what is not goes, in steps that anything may come between."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from infra.cache.cache import Cache
from infra.cache.errors import CollectorBusyError
from infra.cache.publishing.claims import AlreadyPublished, Conflict, Published, Rejected, RejectReason
from infra.cache.retention.collector import CollectPlan, collector_lock
from infra.objects.errors import CacheError
from tests.support.cache import base_name, object_file, open_cache, publish, store_path, uploaded_claim

A, B, C, D, E = (store_path(name) for name in "abcde")
DAY_S = 86400.0
#: Collects without waiting for anybody.
AT_ONCE = CollectPlan(grace_s=0, fresh_s=0)


class Clock:
    """The time of a test; it starts today, because objects are dated by the system."""

    def __init__(self) -> None:
        self.time = time.time()

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def cache(tmp_path: Path, database_url: str, clock: Clock) -> AsyncIterator[Cache]:
    async with open_cache(tmp_path, database_url=database_url, now=clock) as opened:
        yield opened


async def visible(cache: Cache, *paths: str) -> list[bool]:
    answers = [await cache.narinfo(base_name(path)[:32]) is not None for path in paths]
    missing = await cache.missing(paths)
    assert answers == [path not in missing for path in paths]
    return answers


async def publish_chain(cache: Cache) -> None:
    """A <- B <- C, and D alone."""
    for path, references in ((A, []), (B, [A]), (C, [B, C]), (D, [])):
        assert await publish(cache, path, references=references) == Published(path)


async def test_paths_that_a_root_names_stay_with_all_that_they_refer_to(cache: Cache) -> None:
    await publish_chain(cache)
    await cache.pin("release", [B])
    report = await cache.collect(AT_ONCE)
    assert (report.reachable, report.tombstoned, report.deleted_paths) == (2, 2, 0)
    assert await visible(cache, A, B, C, D) == [True, True, False, False]
    report = await cache.collect(AT_ONCE)
    assert (report.deleted_paths, report.deleted_objects) == (2, 2)
    assert (await cache.info()).paths == 2
    assert await cache.unpin("release")
    assert not await cache.unpin("release")
    assert (await cache.collect(AT_ONCE)).tombstoned == 2
    assert (await cache.collect(AT_ONCE)).deleted_objects == 2
    assert [entry.key async for entry in cache.objects.list("nar")] == []


async def test_a_tombstoned_path_is_absent_but_its_object_is_served_until_it_is_deleted(
    cache: Cache, clock: Clock
) -> None:
    claim = await uploaded_claim(cache, A)
    await cache.publish([claim])
    assert await visible(cache, A) == [True]
    plan = replace(AT_ONCE, grace_s=DAY_S)
    await cache.collect(plan)
    assert await visible(cache, A) == [False]
    assert await cache.object_size(claim.stored.url) == claim.stored.file_size
    clock.time += DAY_S - 1
    assert (await cache.collect(plan)).deleted_paths == 0
    clock.time += 2
    assert (await cache.collect(plan)).deleted_paths == 1
    assert await cache.object_size(claim.stored.url) is None
    assert not object_file(cache, claim).exists()


async def test_nothing_may_newly_refer_to_a_tombstoned_path_until_it_is_named_again(cache: Cache) -> None:
    await publish_chain(cache)
    await cache.collect(AT_ONCE)
    outcome = await publish(cache, E, references=[B])
    assert isinstance(outcome, Rejected)
    assert outcome.reason is RejectReason.MISSING_REFERENCES
    assert await cache.lease("me", [B], 60) == set()
    assert await visible(cache, A, B, C) == [True, True, False]
    assert await publish(cache, E, references=[B]) == Published(E)
    assert await publish(cache, C, references=[B, C]) == AlreadyPublished(C)
    assert await visible(cache, C) == [True]
    await cache.collect(AT_ONCE)
    assert isinstance(await publish(cache, C, b"other bits"), Conflict)
    assert await visible(cache, C) == [True]


async def test_a_lease_keeps_what_is_there_and_what_is_published_later_until_it_ends(
    cache: Cache, clock: Clock
) -> None:
    await publish(cache, A)
    assert await cache.lease("upload", [A, B, "/elsewhere/x"], 60) == {B, "/elsewhere/x"}
    await cache.collect(AT_ONCE)
    await publish(cache, B, references=[A])
    await cache.collect(AT_ONCE)
    assert await visible(cache, A, B) == [True, True]
    clock.time += 50
    assert await cache.renew("upload", 60)
    clock.time += 50
    assert (await cache.collect(AT_ONCE)).tombstoned == 0
    clock.time += 11
    assert not await cache.renew("upload", 60)
    assert (await cache.collect(AT_ONCE)).tombstoned == 2
    assert await cache.lease("upload", [B], 60) == set()
    await cache.release("upload")
    await cache.release("upload")
    assert (await cache.collect(AT_ONCE)).tombstoned == 2


async def test_a_root_is_kept_as_its_last_request_named_it(cache: Cache, clock: Clock) -> None:
    await publish_chain(cache)
    await cache.keep("push", "ci-1", [A, D, E], clock.time + 10)
    await cache.keep("push", "ci-1", [B, E], clock.time + 100)
    (root,) = await cache.roots()
    assert (root.kind, root.name, root.paths, root.expires_at) == ("push", "ci-1", 2, clock.time + 100)
    await cache.collect(AT_ONCE)
    assert await visible(cache, A, B, C, D) == [True, True, False, False]
    await cache.keep("push", "ci-1", [B], clock.time - 1)
    assert await cache.roots() == []
    assert (await cache.collect(AT_ONCE)).lapsed_roots == 1
    assert await visible(cache, A, B) == [False, False]
    await cache.keep("push", "ci-1", [B], None)
    assert await visible(cache, A, B) == [True, True]
    await cache.drop("push", "ci-1")
    await cache.drop("push", "ci-1")
    for kind, name, paths in (("", "x", [A]), ("pin", "", [A]), ("pin", "x", ["/etc/passwd"]), ("pin", "x" * 600, [])):
        with pytest.raises(CacheError):
            await cache.keep(kind, name, paths, None)


async def test_why_a_path_is_kept_is_shown_with_the_chain_of_references(cache: Cache) -> None:
    await publish_chain(cache)
    await cache.pin("top", [C])
    await cache.pin("later", [E])
    await cache.lease("me", [A], 60)
    assert [(k.kind, k.name, k.chain) for k in await cache.why(A)] == [("lease", "me", (A,)), ("pin", "top", (C, B, A))]
    assert [k.chain for k in await cache.why(E)] == [(E,)]
    assert await cache.why(D) == []
    assert await cache.why("/etc/passwd") == []


async def test_what_the_coordinator_names_and_what_is_fresh_is_kept(cache: Cache, clock: Clock) -> None:
    await publish_chain(cache)
    assert (await cache.collect(replace(AT_ONCE, fresh_s=60))).tombstoned == 0
    clock.time += 61
    report = await cache.collect(replace(AT_ONCE, fresh_s=60, also=frozenset({C, "/elsewhere/x"})))
    assert report.tombstoned == 1
    report = await cache.collect(replace(AT_ONCE, also=frozenset({D})))
    assert (report.tombstoned, report.revived, report.deleted_paths) == (3, 1, 0)
    assert await visible(cache, C, D) == [False, True]


async def test_an_object_lives_as_long_as_one_path_names_it(cache: Cache) -> None:
    first, second = await uploaded_claim(cache, A, b"same"), await uploaded_claim(cache, B, b"same")
    assert first.stored.url == second.stored.url
    await cache.publish([first, second])
    await cache.pin("one", [B])
    await cache.collect(AT_ONCE)
    report = await cache.collect(AT_ONCE)
    assert (report.deleted_paths, report.deleted_objects) == (1, 0)
    assert await visible(cache, A, B) == [False, True]
    await cache.unpin("one")
    await cache.collect(AT_ONCE)
    assert (await cache.collect(AT_ONCE)).deleted_objects == 1


async def test_bits_that_lost_go_with_the_path_that_they_were_offered_for(cache: Cache) -> None:
    await publish(cache, A, b"first")
    losing = await uploaded_claim(cache, A, b"other")
    assert isinstance((await cache.publish([losing]))[0], Conflict)
    await cache.pin("a", [A])
    far = replace(AT_ONCE, orphan_s=-DAY_S)
    assert (await cache.collect(far)).orphans == 0
    assert object_file(cache, losing).exists()
    await cache.unpin("a")
    await cache.collect(AT_ONCE)
    report = await cache.collect(AT_ONCE)
    assert (report.deleted_objects, (await cache.info()).conflicts) == (2, 0)


async def test_objects_and_leftovers_that_nobody_names_are_swept_when_they_are_old(cache: Cache, clock: Clock) -> None:
    orphan = await uploaded_claim(cache, A)
    await publish(cache, B)
    await cache.pin("b", [B])
    await cache.objects.put_bytes("incoming/0123", b"half")
    report = await cache.collect(AT_ONCE)
    assert (report.orphans, report.abandoned_uploads) == (0, 0)
    clock.time += 2 * DAY_S
    for dry_run in (True, False):
        report = await cache.collect(replace(AT_ONCE, dry_run=dry_run))
        assert (report.orphans, report.abandoned_uploads) == (1, 1)
    assert await cache.objects.head(orphan.stored.url) is None
    assert await visible(cache, B) == [True]
    # The same bits again are a new object.
    assert await publish(cache, A) == Published(A)


async def test_a_size_budget_ends_whole_roots_the_last_used_first_to_stay(cache: Cache, clock: Clock) -> None:
    sizes = {}
    for path, references in ((A, []), (B, [A]), (C, [A]), (D, []), (E, [])):
        claim = await uploaded_claim(cache, path, path.encode() * 100, references)
        await cache.publish([claim])
        sizes[path] = claim.stored.file_size
    for path in (B, C, D):
        clock.time += 1000
        await cache.keep("submission", base_name(path), [path], None)
    await cache.pin("e", [E])
    clock.time += 1000
    await cache.touch([base_name(B)[:32]])
    assert [root.name for root in await cache.roots()] == [base_name(B), "e", base_name(D), base_name(C)]
    room = sizes[E] + sizes[B] + sizes[A] + sizes[D]
    assert (await cache.collect(replace(AT_ONCE, max_bytes=room + sizes[C]))).expired_roots == ()
    for dry_run in (True, False):
        report = await cache.collect(replace(AT_ONCE, max_bytes=room, dry_run=dry_run))
        assert (report.expired_roots, report.tombstoned) == ((f"submission {base_name(C)}",), 1)
    report = await cache.collect(replace(AT_ONCE, max_bytes=1))
    assert report.expired_roots == (f"submission {base_name(B)}", f"submission {base_name(D)}")
    assert await visible(cache, A, B, C, D, E) == [False, False, False, False, True]


async def test_a_rehearsal_changes_nothing_and_returns_the_same_numbers(cache: Cache, clock: Clock) -> None:
    await publish_chain(cache)
    await cache.publish([await uploaded_claim(cache, B, b"other bits", [A])])
    await cache.pin("d", [D])
    for _ in range(3):
        wished = await cache.collect(replace(AT_ONCE, dry_run=True))
        again = await cache.collect(replace(AT_ONCE, dry_run=True))
        done = await cache.collect(AT_ONCE)
        for report in (wished, again):
            assert replace(report, dry_run=False, phase_seconds={}) == replace(done, phase_seconds={})
        assert cache.counters.collections
    assert (cache.counters.tombstoned_paths, cache.counters.deleted_paths, cache.counters.deleted_objects) == (3, 3, 4)
    assert {"expire", "mark", "delete", "erase", "tombstone", "sweep"} <= cache.counters.phase_seconds.keys()


async def test_one_process_collects_at_a_time(tmp_path: Path, postgres_url: str) -> None:
    async with (
        open_cache(tmp_path, database_url=postgres_url) as one,
        open_cache(tmp_path, database_url=postgres_url) as other,
    ):
        async with collector_lock(one.database):
            with pytest.raises(CollectorBusyError):
                await other.collect(AT_ONCE)
        await other.collect(AT_ONCE)
        await one.collect(AT_ONCE)
