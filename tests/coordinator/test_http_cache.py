"""The cache as its clients see it: a real server, the installed Nix, and requests that no client would send."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yarl import URL

from coordinator.api.cache_routes import MAX_QUESTION
from coordinator.caches.opening import OpenCache
from coordinator.config import CacheSettings
from coordinator.http.binary_cache import closures
from coordinator.http.binary_cache.closures import QUESTION_BOUNDS
from coordinator.http.binary_cache.routes import add_cache_routes
from coordinator.security.tokens import CacheAccess
from infra.cache.cache import Cache
from infra.cache.publishing.claims import Published
from infra.nix import base32, narinfo
from infra.nix.content import FixedContent
from infra.nix.nar import NarData, NarFile, write_events
from infra.nix.narinfo import NarInfo
from infra.objects.errors import ObjectStoreError
from infra.objects.nar_writer import QUICK_BYTES, upload_nar
from infra.objects.store import ObjectStore
from infra.substituter.closures import ClosureAnswer, QuestionAnswerError, QuestionRefusedError
from tests.support.cache import (
    STORE_DIR,
    base_name,
    chunked,
    narinfo_of,
    object_file,
    open_cache,
    publish,
    secret_key,
    store_path,
    uploaded_claim,
)

A, B, C = (store_path(name) for name in ("a", "b", "c"))
LOG = store_path("built.drv")


async def log_for(derivation: str) -> AsyncIterator[bytes] | None:
    return chunked(b"building\n\xff\x00done\n") if derivation == base_name(LOG) else None


@dataclass
class Served:
    cache: Cache
    url: str
    port: int
    http: aiohttp.ClientSession


@asynccontextmanager
async def serve(cache: Cache) -> AsyncGenerator[Served, None]:
    app = web.Application()
    add_cache_routes(app, OpenCache("default", "/cache", CacheSettings(), cache, CacheAccess()), log_for=log_for)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession() as http:
            yield Served(cache, f"http://127.0.0.1:{port}/cache", port, http)
    finally:
        await runner.cleanup()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncGenerator[Served, None]:
    async with open_cache(tmp_path) as cache, serve(cache) as server:
        yield server


@pytest.fixture(params=["directory", "remote"])
async def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Served, None]:
    objects = ObjectStore("memory:///") if request.param == "remote" else None
    async with open_cache(tmp_path, objects=objects) as cache, serve(cache) as server:
        yield server


def narinfo_url(path: str) -> str:
    return f"{base_name(path)[:32]}.narinfo"


# What a client is told.


async def test_a_client_learns_what_the_cache_is(served: Served) -> None:
    async with served.http.get(f"{served.url}/nix-cache-info") as answer:
        assert await answer.text() == "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"
        assert answer.headers["Content-Type"].startswith("text/x-nix-cache-info")


async def test_a_published_path_is_answered_with_its_narinfo_and_whole_object(any_store: Served) -> None:
    nar = os.urandom(200_000)
    claim = await uploaded_claim(any_store.cache, A, nar)
    await any_store.cache.publish([claim])
    async with any_store.http.get(f"{any_store.url}/{narinfo_url(A)}") as answer:
        assert answer.headers["Content-Type"] == "text/x-nix-narinfo"
        info = narinfo.parse(await answer.read(), STORE_DIR)
    assert info.signed(()) == claim
    async with any_store.http.get(f"{any_store.url}/{info.stored.url}") as answer:
        assert answer.status == 200
        assert "Content-Encoding" not in answer.headers
        assert "immutable" in answer.headers["Cache-Control"]
        assert answer.headers["Accept-Ranges"] == "bytes"
        assert answer.headers["ETag"]
        assert len(await answer.read()) == answer.content_length == info.stored.file_size


@pytest.mark.parametrize("size", [1000, QUICK_BYTES + 1_000_000])
async def test_a_cut_transfer_is_resumed_where_it_ended(any_store: Served, size: int) -> None:
    claim = await uploaded_claim(any_store.cache, A, os.urandom(size))
    await any_store.cache.publish([claim])
    whole = await any_store.cache.objects.get_bytes(claim.stored.url)
    last = len(whole) - 1
    for header, start, stop in [
        ("bytes=0-", 0, len(whole)),
        ("bytes=700-", 700, len(whole)),
        ("bytes=10-19", 10, 20),
        ("bytes=-5", len(whole) - 5, len(whole)),
        (f"bytes={last}-{last + 100}", last, len(whole)),
        (f"bytes=-{last + 100}", 0, len(whole)),
    ]:
        async with any_store.http.get(f"{any_store.url}/{claim.stored.url}", headers={"Range": header}) as answer:
            assert (answer.status, header) == (206, header)
            assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
            assert await answer.read() == whole[start:stop]
    for header in (f"bytes={len(whole)}-", "bytes=5-2", "bytes=x-"):
        async with any_store.http.get(f"{any_store.url}/{claim.stored.url}", headers={"Range": header}) as answer:
            assert answer.status == 416
            assert answer.headers["Content-Range"] == f"bytes */{len(whole)}"
            assert answer.headers["Cache-Control"] == "no-store"


async def test_a_source_that_is_here_is_had_by_its_hash_as_from_any_hashed_mirror(any_store: Served) -> None:
    text = os.urandom(300_000)
    plain = FixedContent("", "sha256", sha256(text).digest())
    made = await fixed_claim(any_store.cache, plain, text)
    lying = FixedContent("", "sha1", bytes(20))
    lie = await fixed_claim(any_store.cache, lying, b"other")
    await any_store.cache.publish([made, lie, await uploaded_claim(any_store.cache, A, text)])
    base = f"{any_store.url}/mirror"
    sri = b64encode(plain.digest).decode()
    for place in (f"sha256/{plain.digest.hex()}", f"sha256/{base32.encode(plain.digest)}", f"/sha256-{sri}"):
        async with any_store.http.get(URL(f"{base}/{place}", encoded=True)) as answer:
            assert (answer.status, await answer.read() == text) == (200, True)
            assert "immutable" in answer.headers["Cache-Control"]
        async with any_store.http.head(URL(f"{base}/{place}", encoded=True)) as head:
            assert (head.status, head.content_length) == (200, len(text))
    # Nothing is here of these, and what lies about its content is not sent whole.
    for place in (f"sha256/{'0' * 64}", "sha256/x", f"md4/{'0' * 32}", f"sha1/{plain.digest.hex()}", "sha256/"):
        async with any_store.http.get(f"{base}/{place}") as answer:
            assert (place, answer.status) == (place, 404)
    with pytest.raises(aiohttp.ClientPayloadError):
        async with any_store.http.get(f"{base}/sha1/{'0' * 40}") as answer:
            await answer.read()


async def fixed_claim(cache: Cache, content: FixedContent, file: bytes) -> NarInfo:
    """Return the claim on the path of a fixed output that holds a file."""
    archive = b"".join(write_events([NarFile(b"", executable=False, size=len(file)), NarData(file)]))
    claim = await uploaded_claim(cache, content.path(STORE_DIR, "source"), archive)
    return replace(claim, path=replace(claim.path, ca=content.address))


async def test_head_agrees_with_get_in_every_state(any_store: Served) -> None:
    states: dict[str, int] = {"nix-cache-info": 200, f"log/{base_name(LOG)}": 200, f"log/{base_name(A)}": 404}
    published, uploaded = await uploaded_claim(any_store.cache, A), await uploaded_claim(any_store.cache, B)
    await any_store.cache.publish([published])
    states |= {narinfo_url(A): 200, published.stored.url: 200, narinfo_url(B): 404, uploaded.stored.url: 404}
    lost = await uploaded_claim(any_store.cache, C)
    await any_store.cache.publish([lost])
    await any_store.cache.objects.delete(lost.stored.url)
    # Of a remote store the narinfo is believed; what counts is that its object is not claimed to be there.
    states |= {lost.stored.url: 404, narinfo_url(C): 404 if any_store.cache.objects.local_path("x") else 200}
    states |= {"nothing": 404, "": 404, "nar/": 404, "narinfos": 404, narinfo_url("/nix/store/" + "e" * 32): 404}
    for path, status in states.items():
        async with (
            any_store.http.get(f"{any_store.url}/{path}") as get,
            any_store.http.head(f"{any_store.url}/{path}") as head,
        ):
            assert (path, get.status, head.status) == (path, status, status)
            body = await get.read()
            if not path.startswith("log/"):
                assert head.content_length == get.content_length == len(body)
            assert await head.read() == b""
            for name in ("Content-Type", "Accept-Ranges", "ETag", "Cache-Control"):
                assert head.headers.get(name) == get.headers.get(name)
            if status == 404:
                assert get.headers["Cache-Control"] == "no-store"


async def test_a_broken_cache_is_absent_rather_than_failing(tmp_path: Path, served: Served) -> None:
    claim = await uploaded_claim(served.cache, A)
    async with open_cache(tmp_path) as other:
        # The cache that is served remembers nothing of it.
        await other.publish([claim])
    with sqlite3.connect(tmp_path / "cache.sqlite") as vandal:
        vandal.executescript("DROP TABLE refs; DROP TABLE conflicts; DROP TABLE paths;")
    vandal.close()
    for path in (narinfo_url(A), narinfo_url(B), claim.stored.url):
        async with served.http.get(f"{served.url}/{path}") as answer:
            assert answer.status == 404
            assert answer.headers["Cache-Control"] == "no-store"
    async with served.http.post(f"{served.url}/narinfos", json={"paths": [base_name(A)]}) as answer:
        assert answer.status == 503


class BreakingStore(ObjectStore):
    """A remote store whose connection breaks in the middle of an object."""

    async def get_stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        async for chunk in super().get_stream(key, start, None if end is None else end // 2):
            yield chunk
        raise ObjectStoreError("the connection broke")


async def test_a_transfer_that_breaks_is_seen_to_be_short(tmp_path: Path) -> None:
    async with open_cache(tmp_path, objects=BreakingStore("memory:///")) as cache, serve(cache) as served:
        # The narinfo is there and the object is whole; only what is sent of it breaks.
        claim = await uploaded_claim(cache, A, os.urandom(5_000_000))
        await cache.publish([claim])
        async with served.http.get(f"{served.url}/{claim.stored.url}") as answer:
            assert (answer.status, answer.content_length) == (200, claim.stored.file_size)
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()


async def test_other_methods_are_refused_cleanly(served: Served) -> None:
    claim = await uploaded_claim(served.cache, A)
    await served.cache.publish([claim])
    for path in ("nix-cache-info", narinfo_url(A), claim.stored.url):
        for method in ("PUT", "POST", "DELETE"):
            async with served.http.request(method, f"{served.url}/{path}", data=b"x") as answer:
                assert answer.status == 405
                assert answer.headers["Allow"] == "GET,HEAD"


async def test_a_builds_log_is_sent_raw(served: Served) -> None:
    async with served.http.get(f"{served.url}/log/{base_name(LOG)}") as answer:
        assert await answer.read() == b"building\n\xff\x00done\n"
    for name in (base_name(store_path("other.drv")), base_name(A), "..%2f..%2fkey", "x.drv"):
        async with served.http.get(f"{served.url}/log/{name}") as answer:
            assert answer.status == 404


# One question for a closure.


async def test_one_question_answers_a_closure_references_first(served: Served) -> None:
    await publish(served.cache, A)
    await publish(served.cache, B, references=[A])
    await publish(served.cache, C, references=[A, B, C])
    unknown = base_name(store_path("unknown"))
    question = {"paths": [base_name(C), unknown, "nonsense/../x"], "closure": True}
    async with served.http.post(f"{served.url}/narinfos", json=question) as answer:
        told = await answer.json()
    infos = [narinfo.parse(text.encode(), STORE_DIR) for text in told["narinfos"]]
    assert [info.store_path for info in infos] == [A, B, C]
    assert sorted(told["missing"]) == sorted([unknown, "nonsense/../x"])
    async with served.http.post(f"{served.url}/narinfos", json={"paths": [base_name(C)], "closure": False}) as answer:
        assert len((await answer.json())["narinfos"]) == 1


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"paths": 5}', b'{"paths": [5]}', b'{"paths": [], "x": 1}', b"\xff"]
)
async def test_a_question_that_is_none_is_refused_with_a_sentence(served: Served, body: bytes) -> None:
    async with served.http.post(f"{served.url}/narinfos", data=body) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["message"].startswith("the request's ")


async def test_a_question_is_bounded(served: Served) -> None:
    async with served.http.post(f"{served.url}/narinfos", data=b" " * (QUESTION_BOUNDS.size_bytes + 1)) as answer:
        assert answer.status == 413
        assert f"{QUESTION_BOUNDS.size_bytes} bytes" in (await answer.json())["error"]["message"]
    async with served.http.post(f"{served.url}/narinfos", json={"paths": ["a"] * (MAX_QUESTION + 1)}) as answer:
        assert answer.status == 400


async def test_an_answer_holds_the_nearest_of_a_large_closure(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    await publish(served.cache, A)
    await publish(served.cache, B, references=[A])
    await publish(served.cache, C, references=[B])
    monkeypatch.setattr(closures, "NARINFOS_AT_ONCE", 2)
    async with served.http.post(f"{served.url}/narinfos", json={"paths": [base_name(C)]}) as answer:
        told = await answer.json()
    infos = [narinfo.parse(text.encode(), STORE_DIR) for text in told["narinfos"]]
    assert ([info.store_path for info in infos], told["missing"]) == ([B, C], [])


async def pages_of(served: Served, *names: str, closure: bool = True) -> tuple[list[list[str]], list[str]]:
    """Return what the client of the question reads, page by page as it comes: names of paths, and what is missing."""
    question = ClosureAnswer(served.http, served.url, {}, names, closure)
    pages = [
        [narinfo.parse(text, STORE_DIR).path.store_path[44:] for text in texts] async for texts in question.narinfos()
    ]
    return pages, question.missing


async def test_a_closure_of_several_pages_is_read_whole_by_hash_parts_or_names(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = [store_path(f"n{number:02}") for number in range(16)]
    claims = [
        await uploaded_claim(served.cache, path, references=chain[max(0, number - 1) : number + 1])
        for number, path in enumerate(chain)
    ]
    await served.cache.publish(claims)
    root, lost, unknown = base_name(chain[-1]), base_name(chain[3]), base_name(store_path("unknown"))
    # The first page is compressed, each later one goes on below it; inside a page references come first.
    monkeypatch.setattr(closures, "NARINFOS_AT_ONCE", 9)
    monkeypatch.setattr(closures, "COMPRESSED_FROM", 8)
    monkeypatch.setattr(closures, "TEXTS_AT_ONCE", 4)
    pages, missing = await pages_of(served, root[:32], unknown)
    assert sorted(name for page in pages for name in page) == [f"n{number:02}" for number in range(16)]
    assert (pages[0][-1], pages[0] == sorted(pages[0]), missing) == ("n15", True, [unknown])
    monkeypatch.setattr(closures, "PAGE_BYTES", 1200)
    [text] = (await served.cache.read_page([4]))[0]
    await served.cache.objects.delete(narinfo.parse(text, STORE_DIR).stored.url)
    pages, missing = await pages_of(served, root)
    assert (len(pages) > 4, sum(map(len, pages)), missing) == (True, 15, [lost])
    assert await pages_of(served, root, closure=False) == ([["n15"]], [])


async def test_more_questions_at_one_time_than_may_be_wait_for_their_turn_and_are_told_to_come_again(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = base_name(A)
    monkeypatch.setattr(closures, "TURN_S", 0.05)
    monkeypatch.setattr(closures, "WALKS_AT_ONCE", 0)
    async with serve(served.cache) as crowded:
        async with crowded.http.post(f"{crowded.url}/narinfos", json={"paths": [unknown]}) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
        with pytest.raises(QuestionRefusedError, match="status 503"):
            await pages_of(crowded, unknown)


async def test_what_was_published_a_moment_ago_is_answered_without_the_database(
    tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish(served.cache, A)
    await publish(served.cache, B, references=[A, B])
    claim = await uploaded_claim(served.cache, C, references=[B])
    await served.cache.publish([claim])
    with sqlite3.connect(tmp_path / "cache.sqlite") as vandal:
        vandal.executescript("DROP TABLE refs; DROP TABLE conflicts; DROP TABLE paths;")
    vandal.close()
    names = [path[44:] for path in (A, B, C)]
    assert await pages_of(served, base_name(C), base_name(A)[:32]) == ([names], [])
    assert await pages_of(served, base_name(C), base_name(B), closure=False) == ([names[1:]], [])
    # What is not wholly in memory needs the database: here it shows by failing.
    for question in (
        [base_name(C), "nonsense"],
        [base_name(C), base_name(store_path("other"))],
        [f"{base_name(C)}-other"],
    ):
        with pytest.raises(QuestionRefusedError, match="status 503"):
            await pages_of(served, *question)
    monkeypatch.setattr(closures, "NARINFOS_AT_ONCE", 2)
    with pytest.raises(QuestionRefusedError, match="status 503"):
        await pages_of(served, base_name(C))
    monkeypatch.undo()
    await served.cache.objects.delete(claim.stored.url)
    with pytest.raises(QuestionRefusedError, match="status 503"):
        await pages_of(served, base_name(C))


async def test_an_answer_in_another_layout_is_read_too_and_one_that_is_none_is_refused() -> None:
    bad = (b"[]", b'{"narinfos":[\n5\n],"missing":[]}', b'{"narinfos":[\n"a"')
    answers = iter((b'{"narinfos": ["a\\n"], "missing": ["x"]}', *bad))

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=next(answers), content_type="application/json")

    app = web.Application()
    app.router.add_post("/cache/narinfos", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        question = ClosureAnswer(http, str(server.make_url("/cache")), {}, ["x"])
        assert ([page async for page in question.narinfos()], question.missing) == ([[b"a\n"]], ["x"])
        for _ in bad:
            with pytest.raises(QuestionAnswerError):
                [page async for page in question.narinfos()]


# What no client sends.


async def raw(port: int, target: bytes, method: bytes = b"GET") -> tuple[int, bytes]:
    """Send a request target as it stands: no client library gets to tidy it up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(method + b" " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


PIECES = st.sampled_from(
    [
        b"..",
        b".",
        b"",
        b"%2e%2e",
        b"%2F",
        b"/",
        b"\\",
        b"%5c",
        b"nar",
        b"secret",
        b"objects",
        b"cache.sqlite",
        b"%00",
        b"%ff",
        b"nar/" + b"0" * 52 + b".nar.zst",
        b"0" * 32 + b".narinfo",
        b"log",
        b"?x=1",
        b"#",
        b"%252e%252e",
        b"incoming",
        b"%0d%0aX: y",
    ]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(parts=st.lists(PIECES, min_size=1, max_size=8), method=st.sampled_from([b"GET", b"HEAD"]))
async def test_no_address_leads_out_of_the_cache(
    served: Served, tmp_path: Path, parts: list[bytes], method: bytes
) -> None:
    (tmp_path / "secret").write_bytes(b"SECRET")
    await served.cache.objects.put_bytes("nar/secret", b"SECRET")
    await served.cache.objects.put_bytes("incoming/secret", b"SECRET")
    status, body = await raw(served.port, b"/cache/" + b"/".join(parts), method)
    assert status in {400, 404}
    assert b"SECRET" not in body
    assert b"SQLite" not in body


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(target=st.binary(max_size=60).filter(lambda text: not set(text) & set(b"\r\n \t")))
async def test_no_bytes_in_an_address_make_the_server_fail(served: Served, target: bytes) -> None:
    status, _ = await raw(served.port, b"/cache/" + target)
    assert status in {400, 404}


# The installed Nix as the client.


async def nix(*argv: str, home: Path, store: Path) -> tuple[int, str, str]:
    """Run a Nix program with a home and a store of its own."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "NIX_CONF_DIR": str(home),
    }
    options = ["--store", str(store), "--option", "build-users-group", "", "--option", "sandbox", "true"]
    process = await asyncio.create_subprocess_exec(
        *argv, *options, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode().strip(), err.decode()


@dataclass
class Realiser:
    """`nix-store -r` into an empty store that trusts one key."""

    served: Served
    home: Path

    async def __call__(self, path: str, key: str, store: str) -> tuple[int, str]:
        code, _, err = await nix(
            *("nix-store", "--realise", path, "--option", "substituters", self.served.url),
            *("--option", "trusted-public-keys", key, "--option", "require-sigs", "true"),
            *("--option", "narinfo-cache-negative-ttl", "0"),
            home=self.home,
            store=self.home / store,
        )
        return code, err


async def make_paths(home: Path) -> list[str]:
    """Make a tree, and texts that refer to each other, in a store of their own; returns them references first."""
    tree = home / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    (tree / "run").write_text("#!/bin/sh\n")
    (tree / "run").chmod(0o755)
    (tree / "deep" / "er" / "big").write_bytes(os.urandom(QUICK_BYTES + 500_000))
    (tree / "link").symlink_to("run")
    code, added, err = await nix("nix-store", "--add", str(tree), home=home, store=home / "origin")
    assert code == 0, err
    expression = (
        f'let t = builtins.storePath "{added}"; a = builtins.toFile "a" "first"; '
        'in builtins.toFile "b" "see ${a}" + ":" + a'
    )
    code, out, err = await nix(
        "nix-instantiate", "--eval", "--read-write-mode", "-E", expression, home=home, store=home / "origin"
    )
    assert code == 0, err
    b, a = out.strip('"').split(":")
    return [added, a, b]


async def offer(cache: Cache, home: Path, path: str, references: list[str]) -> NarInfo:
    real = home / "origin" / path.removeprefix("/")
    process = await asyncio.create_subprocess_exec("nix-store", "--dump", str(real), stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    uploaded = await upload_nar(cache.objects, chunked(out))
    # Without a content address nothing but the signature can make a client accept it.
    return narinfo_of(path, uploaded, [base_name(reference) for reference in references])


async def test_an_unmodified_nix_fetches_what_the_farms_key_signed_and_nothing_else(
    tmp_path: Path, served: Served
) -> None:
    realise = Realiser(served, tmp_path)
    trusted = str(served.cache.public_keys[0])
    tree, a, b = await make_paths(tmp_path)
    claims = [
        await offer(served.cache, tmp_path, b, [a]),
        await offer(served.cache, tmp_path, a, []),
        await offer(served.cache, tmp_path, tree, []),
    ]
    code, err = await realise(b, trusted, "before")
    assert code != 0, err
    assert await served.cache.publish(claims) == [Published(claim.store_path) for claim in claims]
    # A fresh client: the first may remember that there was nothing.
    for path in (b, tree):
        code, err = await realise(path, trusted, "after")
        assert code == 0, err
    assert (tmp_path / "after" / b.removeprefix("/")).read_text() == f"see {a}"
    fetched, made = (tmp_path / store / tree.removeprefix("/") for store in ("after", "origin"))
    for name in ("run", "deep/er/big"):
        assert (fetched / name).read_bytes() == (made / name).read_bytes()
    assert os.access(fetched / "run", os.X_OK)
    assert (fetched / "link").readlink() == Path("run")
    code, _, err = await nix("nix-store", "--verify", "--check-contents", home=tmp_path, store=tmp_path / "after")
    assert code == 0, err

    # A key of the same name that is not ours.
    code, err = await realise(b, str(secret_key(seed=9).public), "distrusting")
    assert code != 0
    assert "trusted-public-keys" in err
    assert not (tmp_path / "distrusting" / b.removeprefix("/")).exists()

    # Bits that changed after they were published.
    file = object_file(served.cache, claims[1])
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    code, err = await realise(b, trusted, "corrupted")
    assert code != 0, err
    assert not (tmp_path / "corrupted" / b.removeprefix("/")).exists()


async def test_nix_fetches_from_the_farm_what_no_address_has_any_more(tmp_path: Path, served: Served) -> None:
    text = os.urandom(100_000)
    content = FixedContent("", "sha256", sha256(text).digest())
    await served.cache.publish([await fixed_claim(served.cache, content, text)])
    expression = (
        'derivation { name = "renamed"; system = "builtin"; builder = "builtin:fetchurl"; outputHashMode = "flat"; '
        f'outputHashAlgo = "sha256"; outputHash = "{content.digest.hex()}"; url = "http://127.0.0.1:9/gone"; }}'
    )
    mirror = ("--option", "hashed-mirrors", f"{served.url}/mirror")
    code, path, err = await nix(
        "nix-build", "--no-out-link", "-E", expression, *mirror, home=tmp_path, store=tmp_path / "s"
    )
    assert code == 0, err
    assert (tmp_path / "s" / path.removeprefix("/")).read_bytes() == text
