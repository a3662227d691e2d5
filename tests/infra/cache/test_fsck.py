"""Verification finds what is broken, repair mends it or takes it away whole; signing anew changes signatures only."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from infra.cache.cache import Cache
from infra.cache.catalog.database import paths, writing
from infra.cache.publishing.claims import AlreadyPublished, Published
from infra.cache.publishing.realisations import Registered
from infra.cache.repair.fsck import FsckReport
from infra.cache.retention.collector import CollectPlan
from infra.nix import narinfo as narinfo_format
from infra.nix.narinfo import NarInfo
from infra.nix.realisation import Realisation, RealisationLayout
from infra.nix.signing import PublicKey
from tests.support.cache import (
    STORE_DIR,
    base_name,
    chunked,
    object_file,
    open_cache,
    secret_key,
    store_path,
    uploaded_claim,
)

LOW, MIDDLE, TOP, OTHER = (store_path(name) for name in ("low", "middle", "top", "other"))
NARS = {path: os.urandom(300) + path.encode() for path in (LOW, MIDDLE, TOP, OTHER)}
NEEDS = {LOW: [LOW], MIDDLE: [LOW], TOP: [MIDDLE], OTHER: []}


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[Cache]:
    async with open_cache(tmp_path) as opened:
        claims = [await uploaded_claim(opened, path, NARS[path], NEEDS[path]) for path in NARS]
        assert await opened.publish(claims) == [Published(path) for path in NARS]
        yield opened


class Elsewhere:
    """A worker or upstream that has some NARs, or other bits in their place."""

    def __init__(self, nars: dict[str, bytes]) -> None:
        self.name = "elsewhere"
        self.nars = nars
        self.asked: list[str] = []

    async def nar(self, info: NarInfo) -> AsyncGenerator[bytes, None] | None:
        self.asked.append(info.store_path)
        nar = self.nars.get(info.store_path)
        return None if nar is None else chunked(nar)


async def text(cache: Cache, path: str) -> bytes | None:
    return await cache.narinfo(base_name(path)[:32])


async def file_of(cache: Cache, path: str) -> Path:
    return object_file(cache, await uploaded_claim(cache, path, NARS[path]))


def found(report: FsckReport) -> dict[str, tuple[str, str]]:
    return {fault.path: (fault.fault, fault.outcome) for fault in report.faults}


async def test_a_whole_cache_has_no_faults(cache: Cache) -> None:
    for full in (False, True):
        report = await cache.verify(full=full)
        assert (report.checked, report.broken, report.faults) == (4, 0, ())


async def test_a_lost_and_a_short_object_are_found_without_reading_a_changed_one_by_reading(cache: Cache) -> None:
    (await file_of(cache, LOW)).unlink()
    short = await file_of(cache, MIDDLE)
    short.write_bytes(short.read_bytes()[:-1])
    changed = await file_of(cache, OTHER)
    changed.write_bytes(bytes(reversed(changed.read_bytes())))
    quick = found(await cache.verify())
    assert quick.keys() == {LOW, MIDDLE}
    assert quick[LOW] == ("its object is gone", "left as it is")
    assert "bytes, not" in quick[MIDDLE][0]
    assert found(await cache.verify(full=True)).keys() == {LOW, MIDDLE, OTHER}


async def test_a_lost_object_is_mended_from_a_source_and_only_by_the_very_same_bits(cache: Cache) -> None:
    signed = narinfo_format.parse(await text(cache, LOW) or b"", STORE_DIR)
    (await file_of(cache, LOW)).unlink()
    changed = await file_of(cache, OTHER)
    changed.write_bytes(bytes(reversed(changed.read_bytes())))
    liar, honest = Elsewhere({LOW: b"other bits", OTHER: b"x" * len(NARS[OTHER])}), Elsewhere(NARS)
    report = await cache.verify(full=True, repair=True, sources=[liar, honest])
    assert (report.broken, report.repaired, report.hidden) == (2, 2, 0)
    assert liar.asked == honest.asked == [LOW, OTHER]
    assert (await cache.verify(full=True)).broken == 0
    mended = narinfo_format.parse(await text(cache, LOW) or b"", STORE_DIR)
    assert (mended.path.sigs, mended.path.nar_hash) == (signed.path.sigs, signed.path.nar_hash)


async def test_a_path_that_no_source_has_goes_with_its_referrers_and_can_be_published_again(cache: Cache) -> None:
    await cache.pin("keep", [TOP])
    (await file_of(cache, LOW)).unlink()
    report = await cache.verify(repair=True, sources=[Elsewhere({})])
    assert (report.broken, report.hidden, report.dragged) == (1, 1, 2)
    assert [await text(cache, path) for path in (LOW, MIDDLE, TOP)] == [None] * 3
    assert await text(cache, OTHER)
    # A pin brings nothing back that is broken.
    await cache.collect(CollectPlan())
    assert await cache.missing([LOW, MIDDLE, TOP]) == {LOW, MIDDLE, TOP}
    again = [await uploaded_claim(cache, path, NARS[path], NEEDS[path]) for path in (LOW, MIDDLE, TOP)]
    assert await cache.publish(again) == [Published(path) for path in (LOW, MIDDLE, TOP)]
    assert (await cache.verify(full=True)).broken == 0


async def test_paths_that_refer_to_a_lost_path_are_reported_and_nothing_else_is_suspected(cache: Cache) -> None:
    absent = store_path("absent")
    assert await cache.lost([TOP], [LOW, OTHER, absent]) == set()
    (await file_of(cache, LOW)).unlink()
    (await file_of(cache, OTHER)).unlink()
    assert await cache.lost([TOP], [LOW, OTHER, absent]) == {LOW}
    assert await cache.lost([TOP, absent], []) == {LOW, absent}


async def test_lost_paths_are_restored_from_a_source_or_leave_with_all_that_refers_to_them(cache: Cache) -> None:
    absent = store_path("absent")
    for path in (LOW, OTHER):
        (await file_of(cache, path)).unlink()
    sources = [Elsewhere({OTHER: NARS[OTHER], absent: b"somebody's word for a path that has no record"})]
    restored = await cache.restore([LOW, OTHER, TOP, absent], sources)
    assert (set(restored.here), set(restored.gone)) == ({OTHER}, {LOW, TOP, absent})
    assert set(sources[0].asked) == {LOW, OTHER}
    assert await cache.missing(NARS) == {LOW, MIDDLE, TOP}
    assert (await cache.verify(full=True)).broken == 0


async def test_a_narinfo_that_cannot_be_read_is_a_fault_of_its_own(cache: Cache) -> None:
    async with writing(cache.database) as connection:
        await connection.execute(paths.update().where(paths.c.store_path == OTHER).values(narinfo=b"not one"))
    assert found(await cache.verify()) == {OTHER: ("its narinfo cannot be read", "left as it is")}
    assert (await cache.verify(repair=True)).hidden == 1
    assert await cache.publish([await uploaded_claim(cache, OTHER, NARS[OTHER])]) == [Published(OTHER)]


async def test_sums_tell_what_is_stored_and_what_sharing_saves(cache: Cache) -> None:
    twin = store_path("twin")
    claim = await uploaded_claim(cache, twin, NARS[OTHER])
    await cache.publish([claim])
    await cache.lease("somebody", [LOW, store_path("not-there")], 60.0)
    await cache.keep("push", "one", [TOP], None)
    await cache.pin("two", [LOW])
    info = await cache.info()
    assert (info.paths, info.tombstoned, info.dangling, info.leases) == (5, 0, 0, 2)
    assert info.nar_bytes == sum(map(len, NARS.values())) + len(NARS[OTHER])
    assert info.saved_bytes == claim.stored.file_size
    assert dict(info.roots) == {"push": 1, "pin": 1}


async def test_keys_come_and_go_without_touching_a_nar(tmp_path: Path) -> None:
    old, new = secret_key("old-1", 1), secret_key("new-1", 2)
    realisation = Realisation(RealisationLayout.BY_HASH, f"sha256:{'0' * 64}!out", base_name(LOW))

    def signers(body: bytes, keys: tuple[PublicKey, ...]) -> list[str]:
        info = narinfo_format.parse(body, STORE_DIR)
        good = [key.name for key in keys for sig in info.path.sigs if key.verify(info.path.fingerprint(), sig)]
        assert len(good) == len(info.path.sigs)
        return good

    async with open_cache(tmp_path, [old]) as cache:
        await cache.publish([await uploaded_claim(cache, path, NARS[path], NEEDS[path]) for path in NARS])
        assert (await cache.register(realisation)).outcome is Registered.NEW
        before = narinfo_format.parse(await text(cache, LOW) or b"", STORE_DIR)
    for keys, names in (([old, new], ["old-1", "new-1"]), ([new], ["new-1"])):
        async with open_cache(tmp_path, keys) as cache:
            report = await cache.resign()
            assert (report.narinfos, report.realisations) == (4, 1)
            assert (await cache.resign()).narinfos == 0
            for path in NARS:
                assert signers(await text(cache, path) or b"", (old.public, new.public)) == names
            after = narinfo_format.parse(await text(cache, LOW) or b"", STORE_DIR)
            assert after.signed(before.path.sigs) == before
            body = (await cache.realisation(realisation.layout, realisation.key) or b"").decode()
            assert [name for name in ("old-1", "new-1") if f'"{name}:' in body] == names
    async with open_cache(tmp_path, [old]) as cache:
        assert {fault.fault for fault in (await cache.verify()).faults} == {"no present key has signed it"}
        assert (await cache.verify(repair=True)).repaired == 4
        assert (await cache.verify()).broken == 0


async def test_a_realisation_is_taken_once_for_what_is_here_and_goes_with_its_path(cache: Cache) -> None:
    low = Realisation(RealisationLayout.BY_HASH, f"sha256:{'1' * 64}!out", base_name(LOW))
    top = Realisation(RealisationLayout.BY_HASH, f"sha256:{'2' * 64}!out", base_name(TOP), ((low.key, base_name(LOW)),))
    assert (await cache.register(top)).outcome is Registered.MISSING
    assert (await cache.register(low)).outcome is Registered.NEW
    assert (await cache.register(top)).outcome is Registered.NEW
    assert (await cache.register(top)).outcome is Registered.SAME
    assert (await cache.register(replace(low, out_path=base_name(OTHER)))).outcome is Registered.CONFLICT
    absent = replace(low, key=f"sha256:{'3' * 64}!out", out_path=base_name(store_path("absent")))
    assert (await cache.register(absent)).outcome is Registered.MISSING
    assert await cache.realisation(low.layout, low.key)
    await cache.collect(CollectPlan(fresh_s=0.0))
    assert await cache.realisation(low.layout, low.key) is None
    await cache.pin("again", [LOW])
    assert await cache.realisation(low.layout, low.key)
    assert await cache.publish([await uploaded_claim(cache, LOW, NARS[LOW], NEEDS[LOW])]) == [AlreadyPublished(LOW)]
