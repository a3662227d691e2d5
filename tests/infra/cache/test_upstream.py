"""An upstream counts for what it has with a trusted signature, and for nothing else."""

from __future__ import annotations

import asyncio
import lzma
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from infra.cache.pulls import upstream as upstream_module
from infra.cache.pulls.upstream import UPSTREAM_CONCURRENCY, Upstream, UpstreamError
from infra.nix import narinfo as narinfo_format
from infra.nix.hashing import sha256_text
from infra.nix.narinfo import NarInfo, StoredNar
from infra.nix.path_info import PathInfo
from infra.nix.store_path import StoreDir
from infra.objects.compression import nar_key
from infra.objects.errors import CacheError, CorruptNarError
from tests.support.cache import STORE_DIR, base_name, secret_key, store_path
from tests.support.served import served
from tests.support.small_cache import SmallCache

KEY = secret_key("upstream-1", 7)
NAR = b"nar of a" * 300_000


def signed(info: NarInfo) -> bytes:
    return info.signed((KEY.sign(info.path.fingerprint()),)).render()


def narinfo_of(path: str, nar: bytes = NAR) -> tuple[NarInfo, bytes]:
    packed = lzma.compress(nar, preset=0)
    file_hash = sha256_text(sha256(packed).digest())
    nar_hash = sha256_text(sha256(nar).digest())
    stored = StoredNar(nar_key(file_hash, "xz"), "xz", file_hash, len(packed))
    return NarInfo(PathInfo(path, nar_hash, len(nar)), stored), packed


def named(info: NarInfo, path: str) -> NarInfo:
    return NarInfo(replace(info.path, store_path=path), info.stored)


@dataclass
class Origin:
    """A binary cache with a prefix, which counts what it is asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    status: int = 404
    asked: list[str] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    now: float = 0.0
    #: Where all is, if it is not here.
    moved_to: str = ""
    _under_way: int = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        await asyncio.sleep(0)
        self._under_way -= 1
        if self.moved_to:
            raise web.HTTPFound(self.moved_to)
        body = self.files.get(request.path.removeprefix("/prefix/"))
        return web.Response(status=self.status) if body is None else web.Response(body=body)

    def add(self, path: str, nar: bytes = NAR) -> NarInfo:
        info, packed = narinfo_of(path, nar)
        self.files[f"{base_name(path)[:32]}.narinfo"] = signed(info)
        self.files[info.stored.url] = packed
        return info


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    made = Origin()
    app = web.Application()
    app.router.add_get("/{anything:.*}", made.answer)
    async with TestServer(app) as server:
        made.url = str(server.make_url("/prefix"))
        yield made


@pytest.fixture
async def upstream(origin: Origin) -> AsyncGenerator[Upstream, None]:
    async with Upstream(
        f"{origin.url}/", [secret_key("old-1").public, KEY.public], STORE_DIR, lambda: origin.now
    ) as made:
        yield made


A, B, C, D = (store_path(name) for name in "abcd")


async def test_only_what_is_signed_by_a_trusted_key_for_that_very_path_is_there(
    origin: Origin, upstream: Upstream
) -> None:
    info = origin.add(A)
    other_key = named(info, B).signed((secret_key("upstream-1", 8).sign(b""),)).render()
    origin.files[f"{base_name(B)[:32]}.narinfo"] = other_key
    origin.files[f"{base_name(C)[:32]}.narinfo"] = signed(info)
    origin.files[f"{base_name(D)[:32]}.narinfo"] = signed(named(info, D)).replace(b"NarSize: 2", b"NarSize: 3")
    assert await upstream.present([A, B, C, D]) == {A}
    (found,) = (await upstream.narinfos([base_name(A)[:32]])).values()
    assert found.signed(()) == info
    # The hash part is right, the name is not.
    assert await upstream.present([f"{A}-other"]) == set()


async def test_answers_are_remembered_and_that_there_is_none_for_less_than_a_minute(
    origin: Origin, upstream: Upstream
) -> None:
    origin.add(A)
    for _ in range(2):
        assert await upstream.present([A, B]) == {A}
    assert len(origin.asked) == 2
    origin.add(B)
    origin.now += 59
    assert await upstream.present([A, B]) == {A, B}
    assert len(origin.asked) == 3
    origin.now += upstream_module.FOUND_S
    assert await upstream.present([A]) == {A}
    assert len(origin.asked) == 4


async def test_an_upstream_that_is_a_farm_is_asked_for_a_closure_at_once_and_believed_as_little() -> None:
    farm = SmallCache(key=KEY)
    chain = farm.chain("p", 6)
    part = base_name(chain[2])[:32]
    forged = farm.infos[part]
    farm.infos[part] = forged.signed((secret_key("upstream-1", 8).sign(forged.path.fingerprint()),))
    lost = store_path("lost")
    async with (
        served(farm.answer, "/cache") as url,
        Upstream(url, [KEY.public], STORE_DIR, lambda: 0.0) as upstream,
    ):
        assert await upstream.present([chain[-1], chain[-2], lost]) == {chain[-1], chain[-2]}
        # What they reach came along; what is not signed by the key is asked for by itself, and no more believed.
        assert await upstream.present([*chain, lost]) == {path for path in chain if path != chain[2]}
        assert farm.asked == {"POST narinfos": 1, "GET narinfo": 1}


@pytest.mark.parametrize("most", [0, upstream_module.MAX_UNJUDGED_BYTES])
async def test_what_came_along_is_verified_once_and_when_it_is_wanted(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_module, "MAX_UNJUDGED_BYTES", most)
    judged: list[str] = []

    def counted(text: bytes, store_dir: StoreDir) -> NarInfo:
        judged.append(text.split(b"/")[3][:32].decode())
        return narinfo_format.parse(text, store_dir)

    monkeypatch.setattr(upstream_module, "narinfo_format", SimpleNamespace(parse=counted))
    farm = SmallCache(key=KEY)
    chain = farm.chain("p", 6)
    async with (
        served(farm.answer, "/cache") as url,
        Upstream(url, [KEY.public], STORE_DIR, lambda: 0.0) as upstream,
    ):
        assert await upstream.present(chain[-2:]) == set(chain[-2:])
        assert len(judged) == (2 if most else 6)
        for _ in range(2):
            assert (await upstream.inquire(chain[0])).info is not None
            assert await upstream.present(chain[1:]) == set(chain[1:])
        assert sorted(judged) == sorted({base_name(path)[:32] for path in chain})


async def test_memory_and_requests_at_one_time_are_bounded(
    origin: Origin, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_module, "REMEMBERED", 10)
    paths = [store_path(f"many-{number}") for number in range(100)]
    assert await upstream.present(paths) == set()
    assert len(origin.asked) == 100
    assert origin.most_at_once <= UPSTREAM_CONCURRENCY
    # All but those that are remembered are asked for again.
    assert await upstream.present(paths) == set()
    assert len(origin.asked) == 100 + 90


async def test_an_upstream_that_fails_has_nothing_and_is_left_alone_for_a_while(
    origin: Origin, upstream: Upstream
) -> None:
    origin.status = 503
    assert await upstream.present([store_path(f"many-{number}") for number in range(100)]) == set()
    assert len(origin.asked) <= UPSTREAM_CONCURRENCY
    origin.add(A)
    assert await upstream.present([A]) == set()
    origin.now += upstream_module.REST_S
    assert await upstream.present([A]) == {A}


async def test_an_upstream_that_leads_to_what_is_no_host_is_left_alone_for_a_while(
    origin: Origin, upstream: Upstream
) -> None:
    info = origin.add(store_path("a"))
    origin.moved_to = f"http://{'a' * 64}/"
    assert await upstream.narinfos([info.hash_part]) == {}
    origin.moved_to = ""
    assert await upstream.narinfos([info.hash_part]) == {}
    origin.now += upstream_module.REST_S
    assert set(await upstream.narinfos([info.hash_part])) == {info.hash_part}


async def test_a_narinfo_without_end_is_not_read(
    origin: Origin, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin.add(A)
    monkeypatch.setattr(upstream_module, "MAX_NARINFO_BYTES", 100)
    assert await upstream.present([A]) == set()


async def test_a_nar_with_the_same_hash_is_fetched_verified(origin: Origin, upstream: Upstream) -> None:
    info = origin.add(A)
    stream = await upstream.nar(NarInfo(info.path, StoredNar("ours", "zstd", "", 0)))
    assert stream is not None
    assert b"".join([piece async for piece in stream]) == NAR
    other = replace(info.path, nar_hash=sha256_text(sha256(b"other").digest()))
    assert await upstream.nar(NarInfo(other, info.stored)) is None
    assert await upstream.nar(narinfo_of(B)[0]) is None


async def test_a_nar_that_is_wrong_lost_or_left_early_is_an_error_or_nothing(
    origin: Origin, upstream: Upstream
) -> None:
    info = origin.add(A)
    stream = await upstream.nar(info)
    assert stream is not None
    assert await anext(stream)
    await stream.aclose()
    origin.files[info.stored.url] = lzma.compress(NAR[:-1] + b"x", preset=0)
    stream = await upstream.nar(info)
    assert stream is not None
    with pytest.raises(CorruptNarError):
        [piece async for piece in stream]
    del origin.files[info.stored.url]
    stream = await upstream.nar(info)
    assert stream is not None
    with pytest.raises(UpstreamError, match="answered 404"):
        [piece async for piece in stream]


def test_an_upstream_needs_an_address_and_a_key() -> None:
    for url in ("file:///etc", "http://", "cache.example"):
        with pytest.raises(CacheError, match="http"):
            Upstream(url, [KEY.public], STORE_DIR, lambda: 0.0)
    with pytest.raises(CacheError, match="public key"):
        Upstream("http://cache.example", [], STORE_DIR, lambda: 0.0)
