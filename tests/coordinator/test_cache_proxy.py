"""`drover cache proxy`: real Nix through it, and upstreams that behave well and badly."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from coordinator.cache_proxy import lookups, prefetch, server, upstream
from coordinator.cache_proxy.disk import ProxyFiles
from coordinator.cache_proxy.errors import ProxyError, ProxySettingsError
from coordinator.cache_proxy.late_writer import WAITING_BYTES, LateWriter
from coordinator.cache_proxy.model import ProxySettings
from coordinator.cache_proxy.proxy import checked, running
from coordinator.caches.opening import OpenCache
from coordinator.config import CacheSettings
from coordinator.http.binary_cache.routes import add_cache_routes
from coordinator.security.tokens import CacheAccess
from infra.nix import narinfo
from tests.support.cache import STORE_DIR, base_name, open_cache, secret_key, store_path, uploaded_claim
from tests.support.farm import nix_store
from tests.support.patience import PATIENCE_S
from tests.support.ports import free_port
from tests.support.served import served
from tests.support.small_cache import SmallCache, nar_of

MIB = 1024 * 1024
GONE = "http://127.0.0.1:1/cache"


@pytest.fixture
def settings(tmp_path: Path) -> ProxySettings:
    return ProxySettings((), tmp_path / "proxy", 64 * MIB, port=0)


@asynccontextmanager
async def proxied(settings: ProxySettings, *upstreams: str) -> AsyncIterator[aiohttp.ClientSession]:
    """Run a proxy; gives a client whose addresses are the proxy's."""
    async with (
        running(replace(settings, upstreams=upstreams)) as url,
        aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as client,
    ):
        yield client


async def realise(store: Path, path: str, url: str, cache: SmallCache) -> subprocess.CompletedProcess[str]:
    """Fetch a path with plain Nix, which verifies signatures."""
    options = {
        "substituters": url,
        "trusted-public-keys": str(cache.key.public),
        "require-sigs": "true",
        "narinfo-cache-negative-ttl": "0",
    }
    return await asyncio.to_thread(nix_store, store, "-r", path, options=options)


def here(store: Path, paths: list[str]) -> list[str]:
    return [path for path in paths if (store / path.lstrip("/")).exists()]


async def get(client: aiohttp.ClientSession, address: str) -> tuple[int, bytes]:
    async with client.get(address) as answer:
        return answer.status, await answer.read()


async def info_of(client: aiohttp.ClientSession, path: str) -> narinfo.NarInfo:
    status, text = await get(client, f"/{base_name(path)[:32]}.narinfo")
    assert status == 200
    return narinfo.parse(text, STORE_DIR)


@pytest.mark.parametrize("closures", [True, False], ids=["a farm", "a plain cache"])
async def test_nix_has_a_closure_through_the_proxy_which_asks_for_all_of_it_at_once(
    settings: ProxySettings, tmp_path: Path, closures: bool
) -> None:
    cache = SmallCache(closures=closures)
    paths = cache.chain("p", 12, size=1000)
    cache.add("unwanted")
    async with served(cache.answer, "/cache") as url, running(replace(settings, upstreams=(url,))) as address:
        done = await realise(tmp_path / "store", paths[-1], address, cache)
        assert done.returncode == 0, done.stderr
        assert here(tmp_path / "store", paths) == paths
        # Once each, whatever Nix asked, and nothing that it did not want.
        narinfos, questions = (0, 1) if closures else (len(paths), 1)
        kinds = ("GET narinfo", "POST narinfos", "GET nar")
        assert [cache.asked[kind] for kind in kinds] == [narinfos, questions, len(paths)]
        # Signatures are passed on, and Nix is who verifies them.
        stranger = SmallCache(key=secret_key("other-1", 2))
        refused = await realise(tmp_path / "other", paths[0], address, stranger)
        assert (refused.returncode != 0, here(tmp_path / "other", paths)) == (True, [])


async def test_what_a_farm_s_own_routes_answer_is_what_nix_gets(settings: ProxySettings, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    async with open_cache(tmp_path / "cache") as cache:
        paths = [store_path(f"farm-{number}") for number in range(5)]
        await cache.publish(
            [
                await uploaded_claim(cache, path, nar_of(path.encode()), paths[max(0, number - 2) : number])
                for number, path in enumerate(paths)
            ]
        )
        app = web.Application()
        add_cache_routes(app, OpenCache("default", "/cache", CacheSettings(), cache, CacheAccess()))
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/cache"
        async with running(replace(settings, upstreams=(url,))) as address:
            done = await realise(tmp_path / "store", paths[-1], address, SmallCache())
        await runner.cleanup()
    assert done.returncode == 0, done.stderr
    assert here(tmp_path / "store", paths) == paths


async def test_a_nar_that_is_not_what_its_narinfo_says_is_never_served_whole_and_nix_has_it_elsewhere(
    settings: ProxySettings, tmp_path: Path
) -> None:
    bad, good = SmallCache(), SmallCache()
    paths = bad.chain("p", 4, size=300_000)
    good.chain("p", 4, size=300_000)
    url = bad.infos[base_name(paths[1])[:32]].stored.url
    whole = bad.nars[url]
    bad.nars[url] = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    async with served(bad.answer, "/cache") as first, served(good.answer, "/cache") as second:
        async with running(replace(settings, upstreams=(first,))) as address:
            done = await realise(tmp_path / "store", paths[-1], f"{address} {second}", good)
            assert done.returncode == 0, done.stderr
            assert here(tmp_path / "store", paths) == paths
            assert good.asked["GET nar"] == 1
            assert len(list((settings.directory / "nar").iterdir())) == 3
        # The proxy passes the liar over, and has it from its next upstream.
        async with proxied(settings, first, second) as client:
            info = await info_of(client, paths[1])
            assert (await get(client, f"/{info.stored.url}"))[0] == 404
            assert await get(client, f"/{(await info_of(client, paths[1])).stored.url}") == (200, whole)


async def test_a_large_nar_is_served_while_it_comes_but_its_end_only_if_it_is_right(
    settings: ProxySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "WHOLE_BYTES", 1000)
    cache = SmallCache()
    small = replace(settings, max_bytes=20 * MIB)
    sizes = {"bad": 3 * MIB, "good": 3 * MIB, "huge": 12 * MIB}
    paths = [cache.add(name, os.urandom(size)) for name, size in sizes.items()]
    infos = [cache.infos[base_name(path)[:32]] for path in paths]
    whole = cache.nars[infos[0].stored.url]
    cache.nars[infos[0].stored.url] = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    go_on = asyncio.Event()

    async def in_halves(request: web.Request) -> web.StreamResponse | None:
        if "/nar/" not in request.path:
            return None
        body = cache.nars[request.path.removeprefix("/cache/")]
        answer = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await answer.prepare(request)
        await answer.write(body[: len(body) // 2])
        await go_on.wait()
        await answer.write(body[len(body) // 2 :])
        return answer

    cache.first = in_halves
    async with served(cache.answer, "/cache") as url, proxied(small, url) as client:
        for path, info in zip(paths, infos, strict=True):
            go_on.clear()
            address = f"/{(await info_of(client, path)).stored.url}"
            async with client.get(address) as one, client.get(address) as other:
                assert (one.status, other.status, one.content_length) == (200, 200, info.stored.file_size)
                go_on.set()
                if path == paths[0]:
                    with pytest.raises(aiohttp.ClientPayloadError):
                        await one.read()
                else:
                    assert await one.read() == await other.read() == cache.nars[info.stored.url]
        # Once each; kept is what is right, and takes no more than half of the bound.
        assert cache.asked["GET nar"] == 3
        assert [file.name[:32] for file in (small.directory / "nar").iterdir()] == [base_name(paths[1])[:32]]


@contextmanager
def command(directory: Path, *upstreams: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command; gives its process and address."""
    program = Path(sys.executable).with_name("drover")
    flags = [word for url in upstreams for word in ("--upstream", url)]
    arguments: tuple[str | Path, ...] = (
        "cache",
        "proxy",
        *flags,
        "--dir",
        directory,
        "--port",
        str(free_port()),
        "--netrc",
        "",
    )
    with subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(2)]
            assert lines[1].startswith("one line for nix.conf: extra-substituters = http://127.0.0.1:")
            yield process, lines[1].split()[-1]
        finally:
            process.kill()


def until_written(directory: Path, count: int) -> None:
    """Wait for small files, which are written a little after they are served."""
    give_up_at = time.monotonic() + PATIENCE_S
    while sum(file.stat().st_size > 0 for file in directory.iterdir()) < count:
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


async def test_a_proxy_that_was_killed_has_all_of_its_disk_again_but_what_was_damaged(tmp_path: Path) -> None:
    cache = SmallCache()
    paths = cache.chain("p", 6)
    async with served(cache.answer, "/cache") as url:
        with ExitStack() as stack:
            process, address = await asyncio.to_thread(stack.enter_context, command(tmp_path / "proxy", url))
            assert (await realise(tmp_path / "one", paths[-1], address, cache)).returncode == 0
            await asyncio.to_thread(until_written, tmp_path / "proxy/nar", len(paths))
            process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.wait)
        kept = sorted((tmp_path / "proxy/nar").iterdir())
        (tmp_path / "proxy/partial/left").write_bytes(b"half")
        damaged = next(file for file in kept if file.name.startswith(base_name(paths[2])[:32]))
        damaged.write_bytes(bytes(damaged.stat().st_size))
        before = cache.asked["GET nar"]
        with ExitStack() as stack:
            process, address = await asyncio.to_thread(stack.enter_context, command(tmp_path / "proxy", url))
            assert (await realise(tmp_path / "two", paths[-1], address, cache)).returncode == 0
            assert here(tmp_path / "two", paths) == paths
            assert cache.asked["GET nar"] == before + 1
            assert not list((tmp_path / "proxy/partial").iterdir())
            # Ctrl-C ends it in order.
            process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(process.wait, PATIENCE_S) == 0


async def test_one_upstream_that_is_down_costs_nothing_but_what_only_it_has(
    settings: ProxySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "FRESH_S", -1.0)
    cache = SmallCache(closures=False)
    paths = cache.chain("p", 5)
    async with served(cache.answer, "/cache") as url, running(replace(settings, upstreams=(GONE, url))) as address:
        done = await realise(tmp_path / "one", paths[-1], address, cache)
        assert done.returncode == 0, done.stderr
        assert here(tmp_path / "one", paths) == paths
    # All are down: what is on disk is served, however old.
    async with running(replace(settings, upstreams=(url,))) as address:
        done = await realise(tmp_path / "two", paths[-1], address, cache)
        assert done.returncode == 0, done.stderr


async def _status(_request: web.Request) -> web.StreamResponse | None:
    return web.Response(status=500)


async def _circle(request: web.Request) -> web.StreamResponse | None:
    raise web.HTTPFound(request.path)


async def _page(_request: web.Request) -> web.StreamResponse | None:
    return web.Response(text="<html>welcome</html>", content_type="text/html")


async def _token(_request: web.Request) -> web.StreamResponse | None:
    return web.Response(status=401)


async def _cut(request: web.Request) -> web.StreamResponse | None:
    answer = web.StreamResponse(headers={"Content-Length": "1000"})
    await answer.prepare(request)
    await answer.write(b'{"narinfos":[\n')
    assert request.transport is not None
    request.transport.abort()
    return answer


@pytest.mark.parametrize("first", [_status, _circle, _page, _token, _cut])
async def test_an_upstream_that_fails_in_any_way_is_an_absence_for_nix_and_is_left_alone(
    settings: ProxySettings, first: object
) -> None:
    cache = SmallCache()
    path = cache.add("p")
    cache.first = first  # type: ignore[assignment]
    async with served(cache.answer, "/cache") as url, proxied(settings, url) as client:
        for _ in range(3):
            status, _ = await get(client, f"/{base_name(path)[:32]}.narinfo")
            assert status == 404
        assert sum(cache.asked.values()) <= 25
        assert (await get(client, "/nix-cache-info"))[1] == b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 20\n"


async def test_lies_of_an_upstream_are_absences(settings: ProxySettings) -> None:
    cache = SmallCache()
    paths = cache.chain("p", 3)
    parts = [base_name(path)[:32] for path in paths]
    # A narinfo under another path's name, of another store, with a codec that cannot be verified; a NAR elsewhere.
    cache.infos[parts[0]] = cache.infos[parts[1]]
    other = cache.infos[parts[2]]
    huge = replace(cache.infos[parts[1]].path, store_path=f"/nix/store/{'c' * 32}-huge")
    lies = {
        "b" * 32: replace(other, stored=replace(other.stored, compression="br")),
        parts[2]: replace(other, stored=replace(other.stored, url="file:///etc/passwd")),
        "c" * 32: replace(
            cache.infos[parts[1]], stored=replace(cache.infos[parts[1]].stored, file_size=2**60), path=huge
        ),
    }
    cache.infos |= lies
    async with served(cache.answer, "/cache") as url, proxied(settings, url) as client:
        for part in (parts[0], "b" * 32):
            assert (await get(client, f"/{part}.narinfo"))[0] == 404
        for path in (paths[2], huge.store_path):
            info = await info_of(client, path)
            assert info.stored.url.startswith("nar/")
            assert (await get(client, f"/{info.stored.url}"))[0] == 404


async def test_absences_are_remembered_for_a_while_and_a_flood_of_them_is_a_few_questions(
    settings: ProxySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SmallCache()
    parts = [base_name(store_path(f"miss-{number}"))[:32] for number in range(300)]
    async with served(cache.answer, "/cache") as url, proxied(settings, url) as client:
        statuses = await asyncio.gather(*(get(client, f"/{part}.narinfo") for part in parts for _ in range(2)))
        assert {status for status, _ in statuses} == {404}
        assert cache.asked["POST narinfos"] < 30
        asked = sum(cache.asked.values())
        await asyncio.gather(*(get(client, f"/{part}.narinfo") for part in parts))
        assert sum(cache.asked.values()) == asked
        # More than may wait are absent at once, and nothing is remembered of them.
        monkeypatch.setattr(lookups, "MAX_WAITING", 0)
        path = cache.add("new")
        assert (await get(client, f"/{base_name(path)[:32]}.narinfo"))[0] == 404
        monkeypatch.setattr(lookups, "MAX_WAITING", 10)
        await info_of(client, path)


async def test_a_transfer_that_breaks_goes_on_where_it_was(settings: ProxySettings) -> None:
    cache = SmallCache()
    path = cache.add("p", os.urandom(400_000))
    ranges: list[str] = []

    async def cut_once(request: web.Request) -> web.StreamResponse | None:
        if "/nar/" not in request.path:
            return None
        body = cache.nars[request.path.removeprefix("/cache/")]
        ranges.append(request.headers.get("Range", ""))
        if len(ranges) > 1:
            start = int(ranges[-1].removeprefix("bytes=").removesuffix("-"))
            return web.Response(status=206, body=body[start:])
        answer = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await answer.prepare(request)
        await answer.write(body[:200_000])
        await asyncio.sleep(0)
        assert request.transport is not None
        request.transport.close()
        return answer

    cache.first = cut_once
    async with served(cache.answer, "/cache") as url, proxied(settings, url) as client:
        info = await info_of(client, path)
        status, body = await get(client, f"/{info.stored.url}")
        assert (status, len(body)) == (200, info.stored.file_size)
        assert (ranges[0], ranges[1].startswith("bytes=")) == ("", True)
        # Whole on disk: ranges, and nothing more from upstream.
        async with client.get(f"/{info.stored.url}", headers={"Range": "bytes=399990-"}) as answer:
            assert (answer.status, await answer.read()) == (206, body[399_990:])
        assert len(ranges) == 2


async def test_nars_are_fetched_ahead_of_nix_within_a_bound_once_it_comes_for_the_first(
    settings: ProxySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SmallCache()
    paths = cache.chain("p", 8, size=100)
    size = max(info.stored.file_size for info in cache.infos.values())
    monkeypatch.setattr(prefetch, "AHEAD_BYTES", 3 * size + 1)
    came = asyncio.Semaphore(0)

    async def count(request: web.Request) -> None:
        if "/nar/" in request.path:
            came.release()

    cache.first = count
    async with served(cache.answer, "/cache") as url, proxied(settings, url) as client:
        infos = [await info_of(client, path) for path in paths[:6]]
        assert cache.asked["GET nar"] == 0
        for at in range(3):
            assert (await get(client, f"/{infos[at].stored.url}"))[0] == 200
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(6):
                await came.acquire()
        # Those whose narinfos were asked for, references first, and no others.
        names = [each for each in cache.addresses if each.startswith("nar/")]
        assert names[:2] == [cache.infos[each.hash_part].stored.url for each in infos[:2]]
        assert set(names) == {cache.infos[each.hash_part].stored.url for each in infos}


def test_the_bound_holds_and_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    files = ProxyFiles(tmp_path, 10 * 4096)
    files.open()
    with pytest.raises(ProxyError, match="another proxy uses"):
        ProxyFiles(tmp_path, 10 * 4096).open()
    for number in range(12):
        files.write(f"nar/{number}", bytes(4000))
        assert files.use("nar/0") is not None
    assert (len(files), files.size_bytes) == (10, 10 * 4096)
    assert [number for number in range(12) if f"nar/{number}" not in files] == [1, 2]
    files.write("narinfo/large", bytes(5 * 4096))
    assert files.read("narinfo/large") == bytes(5 * 4096)
    assert files.size_bytes == 10 * 4096
    files.close()
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.glob("n*/*")) == 10 * 4096
    files.open()
    assert files.use("nar/0") is not None
    os.utime(tmp_path / "nar/11", (1, 1))
    files.close()
    again = ProxyFiles(tmp_path, 6 * 4096)
    again.open()
    assert again.size_bytes == sum(file.stat().st_blocks * 512 for file in tmp_path.glob("n*/*")) <= 6 * 4096
    assert again.read("nar/0") == bytes(4000)
    assert again.read("nar/11") is None
    again.close()


def test_small_files_are_written_late_but_for_one_that_is_needed_and_what_a_disk_refuses_is_absent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = LateWriter()
    # The disk is busy until somebody reads.
    os.mkfifo(tmp_path / "pipe")
    writer.write(tmp_path / "pipe", b"zero")
    writer.write(tmp_path / "a", b"one")
    writer.write(tmp_path / "no such directory/b", b"two")
    assert writer.content(tmp_path / "a") == b"one"
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "pipe").read_bytes() == b"zero"
    writer.settle(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"one"
    writer.write(tmp_path / "a", b"three")
    writer.write(tmp_path / "large", bytes(WAITING_BYTES))
    assert (tmp_path / "large").stat().st_size == WAITING_BYTES
    writer.close()
    assert (tmp_path / "a").read_bytes() == b"three"
    assert list(writer.lost) == [tmp_path / "no such directory/b"]
    assert "cannot be kept: No such file or directory" in caplog.text


async def test_a_token_goes_to_its_host_alone_and_not_to_other_machines(
    settings: ProxySettings, tmp_path: Path
) -> None:
    cache = SmallCache()
    path = cache.add("p")
    file = tmp_path / "netrc"
    file.write_text("machine 127.0.0.1 login drover password secret\n")
    private = replace(settings, netrc=str(file))
    async with served(cache.answer, "/cache") as url, proxied(private, url) as client:
        info = await info_of(client, path)
        assert (await get(client, f"/{info.stored.url}"))[0] == 200
        assert set(cache.tokens) == {"Basic ZHJvdmVyOnNlY3JldA=="}
        async with client.get("/nix-cache-info", headers={"Host": "evil.example.org"}) as answer:
            assert answer.status == 421
        count = len(cache.tokens)
    async with served(cache.answer, "/cache") as elsewhere:
        other = replace(private, directory=tmp_path / "other")
        async with proxied(other, elsewhere.replace("127.0.0.1", "localhost")) as client:
            await info_of(client, path)
            assert set(cache.tokens[count:]) == {""}
    with pytest.raises(ProxySettingsError, match="listens on this machine alone"):
        checked(replace(private, upstreams=("http://127.0.0.1/cache",), listen="0.0.0.0"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"upstreams": ()}, "--upstream https://farm"),
        ({"upstreams": ("ftp://x",)}, "an upstream is written like"),
        ({"upstreams": ("https://u:p@x/cache",)}, "a token belongs into the file of --netrc"),
        ({"upstreams": ("http://localhost:7879",), "port": 7879}, "is this proxy itself"),
        ({"max_bytes": 1}, "--max-size must be at least 16M"),
        ({"netrc": "/nowhere/netrc"}, "cannot read /nowhere/netrc"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_a_way_on(
    settings: ProxySettings, change: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ProxySettingsError, match=sentence):
        checked(replace(settings, **{"upstreams": ("https://x/cache",)} | change))  # type: ignore[arg-type]
    assert upstream.CONNECT_S < lookups.ANSWER_S
