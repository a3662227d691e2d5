"""Paths come from upstreams verified, each by itself: what is bad is named with its reason, what is good is taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.api.mirroring import MirroredOutcome, MirrorState, MirrorView
from coordinator.api.requests import MirrorRequest
from coordinator.caches import mirroring as mirroring_module
from coordinator.caches.mirroring import Mirroring
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import RefusedError
from coordinator.config import CacheSettings, OwnerSettings, Populating, Settings, UpstreamSettings
from coordinator.main import open_coordinator
from infra.cache.cache import Cache
from infra.cache.pulls import closure_search
from infra.cache.pulls import mirror as mirror_module
from infra.cache.pulls.upstream import Upstream
from infra.nix import narinfo as narinfo_format
from infra.nix.store_path import hash_part_of
from infra.objects.errors import StoreFullError
from infra.objects.store import LocalObjectStore
from tests.support.cache import STORE_DIR, open_cache, publish, store_path
from tests.support.local_fleet import no_workers
from tests.support.patience import PATIENCE_S
from tests.support.upstreams import UPSTREAM_KEY, Lie, LyingUpstream, lying_upstream

#: Ten paths; each but the first refers to the one before it in its pair.
TEN = [store_path(f"package-{number}") for number in range(10)]
HERE, MIRRORED, RECORDED, NOWHERE, REFUSED = MirroredOutcome


@dataclass
class Place:
    """A cache, its upstream, and the room between them."""

    cache: Cache
    upstream: LyingUpstream
    room: Mirroring

    async def had(self, *paths: str) -> dict[str, MirroredOutcome]:
        return {each.path: each.outcome for each in await self.room.have(paths)}

    async def ended(self, name: str) -> MirrorView:
        async with asyncio.timeout(PATIENCE_S):
            view = await self.room.view(name)
            while not view.state.ended:
                view = await self.room.view(name, view.state)
            return view


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with (
        lying_upstream(tmp_path / "elsewhere") as served,
        open_cache(tmp_path) as cache,
        Upstream(served.url, [UPSTREAM_KEY.public], STORE_DIR, lambda: 0.0) as upstream,
    ):
        for number, path in enumerate(TEN):
            await publish(served.cache, path, references=[path] if number % 2 == 0 else [TEN[number - 1], path])
        served.known = TEN
        yield Place(cache, served, Mirroring(cache, [upstream], lambda: 0.0))


async def test_a_path_comes_with_its_closure_and_what_is_here_is_not_fetched_again(place: Place) -> None:
    nowhere = store_path("nowhere")
    assert await place.had(TEN[1], nowhere) == {TEN[1]: MIRRORED, nowhere: NOWHERE}
    assert await place.cache.missing(TEN[:2]) == set()
    text = await place.cache.narinfo(hash_part_of(TEN[1]))
    assert text is not None
    assert b"Sig: drover-test-1:" in text
    assert await place.had(*TEN[:3]) == {TEN[0]: HERE, TEN[1]: HERE, TEN[2]: MIRRORED}
    assert len(place.upstream.nars) == 3


async def test_of_ten_paths_two_are_bad_and_eight_are_taken(place: Place) -> None:
    for lie, reason in {
        Lie.WRONG_NAR: "sent a wrong NAR",
        Lie.WRONG_KEY: "without a valid signature by elsewhere-1",
        Lie.OTHER_PATH: "has another path there, /nix/store/",
        Lie.ERROR: "answered 500",
        Lie.CIRCLE: "redirects in a circle",
        Lie.CUT: "broke off the NAR",
        Lie.GARBAGE: "what is no narinfo of this store",
    }.items():
        ten = [store_path(f"{lie.value.replace(' ', '-')}-{number}") for number in range(10)]
        for path in ten:
            await publish(place.upstream.cache, path, references=[path])
        bad = {ten[3], ten[6]}
        for path in bad:
            place.upstream.lie(path, lie)
        outcomes = {each.path: each for each in await place.room.have(ten)}
        assert {path: each.outcome for path, each in outcomes.items()} == {
            path: REFUSED if path in bad else MIRRORED for path in ten
        }
        assert all(place.upstream.url in outcomes[path].reason and reason in outcomes[path].reason for path in bad)
        assert await place.cache.missing(ten) == bad


async def test_what_stands_on_a_bad_path_is_not_published_and_says_which_one_that_is(place: Place) -> None:
    place.upstream.lie(TEN[0], Lie.WRONG_KEY)
    place.upstream.lie(TEN[2], Lie.WRONG_NAR)
    outcomes = {each.path: each for each in await place.room.have([TEN[1], TEN[3]])}
    assert {each.outcome for each in outcomes.values()} == {REFUSED}
    assert outcomes[TEN[1]].reason.startswith(
        f"it refers to {TEN[0]}: the upstream {place.upstream.url} has it without"
    )
    assert TEN[2][11:] in outcomes[TEN[3]].reason
    assert await place.cache.missing(TEN) == set(TEN)


async def test_what_one_upstream_lacks_or_lies_about_is_had_from_the_next(place: Place, tmp_path: Path) -> None:
    async with (
        lying_upstream(tmp_path / "second") as served,
        Upstream(served.url, [UPSTREAM_KEY.public], STORE_DIR, lambda: 0.0) as second,
    ):
        other = store_path("other")
        for path in (TEN[0], TEN[2], other):
            await publish(served.cache, path, references=[path])
        place.upstream.lie(TEN[0], Lie.WRONG_NAR)
        place.upstream.lie(TEN[2], Lie.ERROR)
        room = Mirroring(place.cache, [*place.room._upstreams, second], lambda: 0.0)  # noqa: SLF001
        outcomes = await room.have([TEN[0], TEN[2], TEN[4], other])
        assert [each.outcome for each in outcomes] == [MIRRORED] * 4
        assert [each.upstream for each in outcomes] == [served.url, served.url, place.upstream.url, served.url]


async def test_an_upstream_that_is_gone_in_the_middle_costs_the_rest_and_not_what_came(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "CHUNK_PATHS", 2)
    place.upstream.gone_after = 4
    outcomes = await place.room.have(TEN)
    taken = [each.path for each in outcomes if each.outcome is MIRRORED]
    assert len(taken) == 4
    assert {each.reason for each in outcomes if each.outcome is REFUSED and "refers to" not in each.reason} == {
        reason for each in outcomes if "answered 503" in (reason := each.reason)
    }
    place.upstream.gone_after = None
    assert sorted((await place.had(*TEN)).values()) == [HERE] * 4 + [MIRRORED] * 6
    assert len(place.upstream.nars) == 10, "nothing is fetched twice"


async def test_an_upstream_that_is_away_is_left_out_after_a_few_questions(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closure_search, "TRIES", 1)
    place.upstream.gone_after = 0
    many = [store_path(f"many-{number}") for number in range(200)]
    outcomes = await place.room.have(many)
    assert {each.outcome for each in outcomes} == {REFUSED}
    assert all("answered 503" in each.reason for each in outcomes)
    assert await place.had(TEN[0]) == {TEN[0]: REFUSED}, "it is asked again by the next run"


async def test_an_upstream_that_is_recorded_gives_no_bytes_but_for_what_a_mirrored_path_stands_on(
    place: Place, tmp_path: Path
) -> None:
    async with (
        lying_upstream(tmp_path / "team") as served,
        Upstream(served.url, [UPSTREAM_KEY.public], STORE_DIR, lambda: 0.0) as team,
        Upstream(place.upstream.url, [UPSTREAM_KEY.public], STORE_DIR, lambda: 0.0, mirrored=False) as public,
    ):
        tool, theirs = store_path("tool"), store_path("theirs")
        await publish(served.cache, TEN[4], references=[TEN[4]])
        await publish(served.cache, tool, references=[TEN[4]])
        await publish(served.cache, theirs)
        room = Mirroring(place.cache, [public, team], lambda: 100.0)
        outcomes = {each.path: each for each in await room.have([TEN[1], tool, theirs])}
        assert {path: each.outcome for path, each in outcomes.items()} == {
            **dict.fromkeys((tool, theirs), MIRRORED),
            TEN[1]: RECORDED,
        }
        assert outcomes[TEN[1]].upstream == place.upstream.url
        assert await place.cache.narinfo(hash_part_of(TEN[1])) is None, "the cache does not claim to have it"
        known = await room.records.known([*TEN, tool])
        assert known.keys() == {TEN[0], TEN[1]}
        info = narinfo_format.parse(known[TEN[1]].narinfo, STORE_DIR)
        assert any(UPSTREAM_KEY.public.verify(info.path.fingerprint(), each) for each in info.path.sigs)
        # What is published later is here, and a record is believed for a while only.
        await place.had(TEN[0])
        assert (await room.records.known(TEN)).keys() == {TEN[1]}
        later = Mirroring(place.cache, [], lambda: 100.0 + mirroring_module.LEASE_S * 24 * 8)
        assert await later.records.known(TEN) == {}


async def test_a_run_that_is_cancelled_goes_on_where_it_stopped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "CHUNK_PATHS", 1)
    begun = await place.room.begin(TEN, "ada", "tools")
    async with asyncio.timeout(PATIENCE_S):
        while len((await place.room.view(begun.id)).paths) == 0 and len(place.upstream.nars) < 3:
            await place.room.view(begun.id)
            await asyncio.sleep(0)
        place.upstream.open.clear()
        place.upstream.wanted.clear()
        await place.upstream.wanted.wait()
    cancelled = await place.room.cancel(begun.id)
    assert cancelled.state is MirrorState.CANCELLED
    assert await place.room.cancel(begun.id) == cancelled
    place.upstream.open.set()
    (root,) = [root for root in await place.cache.roots() if root.kind == "populate"]
    assert (root.name, root.paths) == ("ada/tools", 10)
    missing = len(await place.cache.missing(TEN))
    assert 0 < missing < 10
    view = await place.ended((await place.room.begin(TEN, "ada", "tools")).id)
    assert (view.state, view.taken, view.here) == (MirrorState.DONE, missing, 10 - missing)


async def test_a_store_that_is_full_ends_the_run_with_one_sentence_and_keeps_what_came(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "CHUNK_PATHS", 1)
    put, stored = LocalObjectStore.put_bytes, [0]

    async def some(self: LocalObjectStore, key: str, data: bytes) -> None:
        stored[0] += 1
        if stored[0] > 3:
            raise StoreFullError("no room is left in the object store")
        await put(self, key, data)

    monkeypatch.setattr(LocalObjectStore, "put_bytes", some)
    view = await place.ended((await place.room.begin(TEN, "ada")).id)
    assert (view.state, view.taken) == (MirrorState.FAILED, 3)
    assert view.error == "no room is left in the object store; what was had before stays, so begin it again."
    assert len(await place.cache.missing(TEN)) == 7


async def test_a_run_is_bounded_by_paths_and_bytes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Mirroring(place.cache, place.room._upstreams, lambda: 0.0, max_bytes=10)  # noqa: SLF001
    view = await small.begin(TEN, "ada")
    async with asyncio.timeout(PATIENCE_S):
        while not view.state.ended:
            view = await small.view(view.id, view.state)
    assert "more than 10 bytes of their closure" in view.error
    monkeypatch.setattr(closure_search, "MAX_SEARCHED", 5)
    assert "more than 5 paths" in (await place.ended((await place.room.begin(TEN, "ada")).id)).error
    assert place.upstream.nars == []


async def test_an_owner_has_bounded_runs_and_a_farm_that_starts_anew_goes_on(
    settings: Settings, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADA", "a" * 32)
    trusted = UpstreamSettings(url=place.upstream.url, public_keys=(str(UPSTREAM_KEY.public),))
    recorded = trusted.model_copy(update={"populate": Populating.RECORD})
    owners = (OwnerSettings(name="ada", tokens=("env:ADA",)),)
    told = settings.model_copy(update={"cache": CacheSettings(upstreams=(trusted, recorded)), "owners": owners})
    request = MirrorRequest(paths=tuple(TEN), keep_as="tools")
    place.upstream.open.clear()
    async with open_coordinator(told, no_workers) as farm, ApiClient(farm.ready.url, "a" * 32) as client:
        begun = [await client.mirror(request) for _ in range(mirroring_module.MAX_OF_OWNER)]
        with pytest.raises(RefusedError, match="ada has 4 open runs"):
            await client.mirror(request)
        with pytest.raises(RefusedError, match="is no path of the farm's store"):
            await client.mirror(MirrorRequest(paths=("/elsewhere/store/x",)))
        for each in begun[1:]:
            assert (await client.cancel_mirroring(each.id)).state is MirrorState.CANCELLED
        await place.upstream.wanted.wait()
    place.upstream.open.set()
    async with open_coordinator(told, no_workers) as farm, ApiClient(farm.ready.url, "a" * 32) as client:
        with pytest.raises(RefusedError, match="begin it again, which fetches nothing twice"):
            await client.mirroring(begun[0].id)
        view = await client.mirror(request)
        while not view.state.ended:
            view = await client.mirroring(view.id, view.state)
        assert (view.state, view.error) == (MirrorState.DONE, "")
        assert {each.outcome for each in view.paths} <= {HERE, MIRRORED}
        assert await farm.cache.missing(TEN) == set()
