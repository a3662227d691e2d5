"""Uploads over HTTP: what `nix copy` sends, what no client should send, and what must not be left behind."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import aiohttp
import orjson
import pytest
import zstandard
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yarl import URL

from coordinator.caches.opening import OpenCache
from coordinator.config import CacheSettings
from coordinator.http.binary_cache import puts
from coordinator.http.binary_cache import puts as http_puts
from coordinator.http.binary_cache.routes import add_cache_routes
from coordinator.security.tokens import CacheAccess, TokenSet
from infra.cache.cache import Cache
from infra.nix.hashing import sha256_text
from infra.nix.nar import NarData, NarFile, write_events
from infra.nix.narinfo import NarInfo, StoredNar
from infra.nix.path_info import PathInfo
from infra.objects.compression import nar_key
from infra.objects.hashed_put import QUICK_OBJECT_BYTES
from tests.support.cache import base_name, lying, open_cache, secret_key, store_path
from tests.support.disks import fill, small_disk
from tests.support.patience import PATIENCE_S

WRITER = "a-writer-token-of-enough-length"
BASIC = "Basic " + base64.b64encode(f"ci:{WRITER}".encode()).decode()
A, B = store_path("a"), store_path("b")
DRV = store_path("built.drv")


@dataclass
class Writable:
    cache: Cache
    directory: Path
    port: int
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/cache"

    async def put(self, address: str, data: bytes, **headers: str) -> tuple[int, str]:
        told = {"Authorization": BASIC, **headers}
        async with self.http.put(f"{self.url}/{address}", data=io.BytesIO(data), headers=told) as answer:
            return answer.status, await answer.text()

    async def status(self, address: str, method: str = "HEAD", authorization: str = BASIC) -> int:
        headers = {"Authorization": authorization} if authorization else {}
        async with self.http.request(method, f"{self.url}/{address}", headers=headers) as answer:
            return answer.status

    def left_behind(self) -> list[str]:
        """Return the keys in the object store that no path names."""
        root = self.directory / "objects"
        return [str(file) for file in root.rglob("*") if file.is_file() and file.parent.name != "nar"]


@asynccontextmanager
async def serve(cache: Cache, directory: Path) -> AsyncGenerator[Writable, None]:
    access = CacheAccess(writers=TokenSet([WRITER]))
    app = web.Application()
    add_cache_routes(app, OpenCache("default", "/cache", CacheSettings(), cache, access))
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession() as http:
            yield Writable(cache, directory, runner.addresses[0][1], http)
    finally:
        await runner.cleanup()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncGenerator[Writable, None]:
    async with open_cache(tmp_path) as cache, serve(cache, tmp_path) as server:
        yield server


@dataclass(frozen=True)
class Upload:
    """A path as a client has it: the object and what it says of it."""

    data: bytes
    info: NarInfo

    @property
    def narinfo_address(self) -> str:
        return f"{base_name(self.info.store_path)[:32]}.narinfo"


def upload_of(path: str, nar: bytes, *references: str) -> Upload:
    data = zstandard.ZstdCompressor(level=1).compress(nar)
    file_hash = sha256_text(sha256(data).digest())
    names = tuple(sorted(base_name(reference) for reference in references))
    info = PathInfo(path, sha256_text(sha256(nar).digest()), len(nar), names)
    return Upload(data, NarInfo(info, StoredNar(nar_key(file_hash), "zstd", file_hash, len(data))))


async def send(served: Writable, upload: Upload) -> tuple[int, str]:
    status, text = await served.put(upload.info.stored.url, upload.data)
    assert status == 200, text
    return await served.put(upload.narinfo_address, upload.info.render())


# What clients do.


@pytest.mark.parametrize("size", [1, 100_000, QUICK_OBJECT_BYTES + 1, 20_000_000])
async def test_an_uploaded_path_is_verified_signed_and_served(served: Writable, size: int) -> None:
    upload = upload_of(A, os.urandom(size))
    assert await served.status(upload.info.stored.url) == 404
    status, _ = await served.put(upload.info.stored.url, upload.data)
    assert status == 200
    # To its writers the object is there, to others not before it is published.
    url = upload.info.stored.url
    assert [await served.status(url), await served.status(url, authorization="")] == [200, 404]
    status, text = await served.put(upload.narinfo_address, upload.info.signed(("x:y",)).render())
    assert (status, text) == (200, "")
    async with served.http.get(f"{served.url}/{upload.narinfo_address}") as answer:
        shown = await answer.text()
    assert shown.count("Sig: ") == 1
    assert "Sig: drover-test-1:" in shown
    async with served.http.get(f"{served.url}/{upload.info.stored.url}") as answer:
        assert await answer.read() == upload.data
    assert served.left_behind() == []
    assert await send(served, upload) == (200, "")


async def test_an_uploaded_object_that_is_swept_is_not_claimed_any_more(served: Writable) -> None:
    upload = upload_of(A, b"nar")
    await served.put(upload.info.stored.url, upload.data)
    await served.cache.objects.delete(upload.info.stored.url)
    assert [await served.status(upload.info.stored.url, method) for method in ("HEAD", "GET")] == [404, 404]


async def test_references_come_first(served: Writable) -> None:
    a, b = upload_of(A, b"first"), upload_of(B, b"second", A, B)
    status, sentence = await send(served, b)
    assert (status, base_name(A) in sentence) == (422, True)
    assert await served.status(b.narinfo_address) == 404
    assert [await send(served, each) for each in (a, b)] == [(200, "")] * 2


async def test_other_bits_for_a_published_path_are_a_conflict_and_change_nothing(served: Writable) -> None:
    first, other = upload_of(A, b"first"), upload_of(A, b"other")
    await send(served, first)
    status, sentence = await send(served, other)
    assert (status, "other bits" in sentence) == (409, True)
    async with served.http.get(f"{served.url}/{first.narinfo_address}") as answer:
        assert first.info.path.nar_hash in await answer.text()
    assert (await served.cache.info()).conflicts == 1


async def test_two_uploads_of_one_path_at_once_are_one(served: Writable) -> None:
    upload = upload_of(A, os.urandom(3_000_000))
    assert await asyncio.gather(*(send(served, upload) for _ in range(8))) == [(200, "")] * 8
    assert served.left_behind() == []


async def test_a_log_is_kept_for_those_who_ask(served: Writable) -> None:
    address = f"log/{base_name(DRV)}"
    assert await served.status(address) == 404
    for text in (b"building\n", b"building again\n" * 100_000):
        assert await served.put(address, text) == (200, "")
        async with served.http.get(f"{served.url}/{address}") as answer:
            assert await answer.read() == text
    assert await served.status(address) == 200
    assert (await served.put(f"log/{base_name(A)}", b"x"))[0] == 400


async def test_what_nobody_vouches_for_is_taken_and_dropped(served: Writable) -> None:
    for address in (f"{base_name(A)[:32]}.ls", f"debuginfo/{'a' * 40}.debug"):
        assert await served.put(address, b"{}") == (200, "")
        assert await served.status(address) == 404


@pytest.mark.parametrize(("text", "status"), [(b"StoreDir: /nix/store\n", 200), (b"StoreDir: /x\n", 409), (b"", 409)])
async def test_the_cache_cannot_be_made_another(served: Writable, text: bytes, status: int) -> None:
    assert (await served.put("nix-cache-info", text))[0] == status


# Lies.


async def test_an_object_that_has_not_the_hash_in_its_name_is_not_stored(served: Writable) -> None:
    for size in (100, QUICK_OBJECT_BYTES + 100_000):
        upload = upload_of(A, os.urandom(size))
        # A flipped bit, since a byte put in the last one's place may be that byte.
        damaged = upload.data[:-1] + bytes([upload.data[-1] ^ 1])
        status, sentence = await served.put(upload.info.stored.url, damaged)
        assert (status, "hash" in sentence) == (400, True)
        assert await served.status(upload.info.stored.url) == 404
    assert served.left_behind() == []
    for name in ("x.nar.zst", "../x", "a" * 52 + ".nar.gz", "%2e%2e%2fkey", "b" * 52 + ".nar.zst/x"):
        assert (await served.put(f"nar/{name}", b"x"))[0] in {400, 404, 405}


LIES = st.sampled_from(
    [
        {"nar_hash": sha256_text(sha256(b"x").digest())},
        {"nar_size": 4},
        {"file_size": 5},
        {"file_hash": sha256_text(sha256(b"x").digest())},
        {"compression": "none"},
        {"url": "nar/" + "a" * 52 + ".nar.zst"},
        {"url": "../secret"},
        {"url": "http://elsewhere/nar/x"},
        {"store_path": B},
        {"ca": "nonsense"},
        {"deriver": base_name(B)},
        {"references": (base_name(B),)},
    ]
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lie=LIES)
async def test_a_narinfo_that_lies_is_refused_for_good(served: Writable, lie: dict[str, object]) -> None:
    upload = upload_of(A, b"the nar")
    await served.put(upload.info.stored.url, upload.data)
    status, sentence = await served.put(upload.narinfo_address, lying(upload.info, lie).render())
    assert 400 <= status < 500
    assert status not in {408, 429}
    assert sentence.endswith("\n")
    assert await served.status(upload.narinfo_address) == 404


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
async def test_a_mutated_narinfo_is_either_the_same_claim_or_refused(served: Writable, data: st.DataObject) -> None:
    upload = upload_of(A, b"the nar", A)
    await served.put(upload.info.stored.url, upload.data)
    text = bytearray(upload.info.render())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    status, _ = await served.put(upload.narinfo_address, bytes(text))
    assert status in {200, 400, 409, 422}
    if status == 200:
        async with served.http.get(f"{served.url}/{upload.narinfo_address}") as answer:
            assert upload.info.path.nar_hash in await answer.text()


# Sockets of our own.


async def exchange(port: int, head: str, body: bytes = b"", *, cut: bool = False) -> bytes:
    """Send a request as it stands, perhaps closing right after it; returns all that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + body)
        await writer.drain()
        if cut:
            writer.write_eof()
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


def put_head(address: str, length: int, *more: str, token: str = BASIC) -> str:
    lines = [f"PUT /cache/{address} HTTP/1.1", "Host: x", f"Content-Length: {length}", f"Authorization: {token}", *more]
    return "\r\n".join(lines) + "\r\n\r\n"


@pytest.mark.parametrize(
    ("length", "token", "status"), [(10, "Basic eA==", b"401"), (10, "", b"401"), (1 << 50, BASIC, b"413")]
)
async def test_a_sender_without_the_right_is_refused_before_the_body(
    served: Writable, length: int, token: str, status: bytes
) -> None:
    upload = upload_of(A, b"x")
    for address in (upload.info.stored.url, upload.narinfo_address, f"log/{base_name(DRV)}", "nix-cache-info"):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(put_head(address, length, "Expect: 100-continue", token=token).encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.split(b" ")[1] == status
        assert b"Connection: close" in answer
        writer.close()
        await writer.wait_closed()


async def test_a_disk_without_room_refuses_before_the_body(served: Writable) -> None:
    free = shutil.disk_usage(served.directory).free
    upload = upload_of(A, b"x")
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(put_head(upload.info.stored.url, free + 1, "Expect: 100-continue").encode())
    assert (await reader.readuntil(b"\r\n")).split(b" ")[1] == b"413"
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("size", [100_000, 2 * QUICK_OBJECT_BYTES])
async def test_a_disk_that_fills_up_under_a_body_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(puts, "RESERVE_BYTES", 0)
    upload = upload_of(A, os.urandom(size))
    with small_disk(tmp_path / "objects", 4) as disk:
        async with open_cache(tmp_path) as cache, serve(cache, tmp_path) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(put_head(upload.info.stored.url, len(upload.data), "Expect: 100-continue").encode())
            await reader.readuntil(b"\r\n\r\n")
            (disk / "nar").mkdir()
            fill(disk / "nar" / "rubbish")
            writer.write(upload.data)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.split(b" ")[1] == b"424"
            assert b"no room is left; make some" in await reader.read()
            writer.close()
            await writer.wait_closed()
            assert served.left_behind() == []
            assert await served.status(upload.info.stored.url) == 404
            (disk / "nar" / "rubbish").unlink()
            assert await send(served, upload) == (200, "")


async def test_the_body_is_requested_once_all_is_well(served: Writable) -> None:
    upload = upload_of(A, b"x")
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    for _ in range(2):
        writer.write(put_head(upload.info.stored.url, len(upload.data), "Expect: 100-continue").encode())
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(upload.data)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("sent", [0, 1000, QUICK_OBJECT_BYTES * 20])
async def test_ten_gibibytes_announced_and_cut_leave_nothing(served: Writable, sent: int) -> None:
    upload = upload_of(A, b"x")
    before = served.left_behind()
    answer = await exchange(served.port, put_head(upload.info.stored.url, 10 << 30), b"\x00" * sent, cut=True)
    assert not answer or 400 <= int(answer.split(b" ")[1]) < 500
    assert served.left_behind() == before == []
    assert await served.status(upload.info.stored.url) == 404
    # The cache goes on.
    assert await send(served, upload) == (200, "")


async def test_a_silent_body_is_given_up(served: Writable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_puts, "SILENCE_S", 0.05)
    upload = upload_of(A, os.urandom(QUICK_OBJECT_BYTES * 2))
    for sent in (b"", upload.data[: QUICK_OBJECT_BYTES + 10]):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(put_head(upload.info.stored.url, len(upload.data)).encode() + sent)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        writer.close()
        await writer.wait_closed()
    assert served.left_behind() == []


async def test_a_body_that_trickles_is_given_up(served: Writable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_puts, "SILENCE_S", 0.3)
    upload = upload_of(A, os.urandom(QUICK_OBJECT_BYTES * 2))
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(put_head(upload.info.stored.url, len(upload.data)).encode())
    answer = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
    # A byte at a time is never silence, and less than the least pace.
    while not (await asyncio.wait([answer], timeout=0.02))[0]:
        writer.write(b"x")
    assert answer.result().startswith(b"HTTP/1.1 400 ")
    writer.close()
    await writer.wait_closed()
    assert served.left_behind() == []


async def test_bodies_without_a_length_or_in_another_encoding_are_refused(served: Writable) -> None:
    upload = upload_of(A, b"x")
    assert (await served.put(upload.info.stored.url, upload.data, **{"Content-Encoding": "gzip"}))[0] == 415
    head = put_head(upload.info.stored.url, 0).replace("Content-Length: 0", "Transfer-Encoding: chunked")
    assert b" 411 " in (await exchange(served.port, head, b"0\r\n\r\n")).split(b"\r\n")[0]


# The installed Nix as the client.


async def nix(*argv: str, home: Path, store: Path) -> tuple[int, str, str]:
    """Run a Nix program with a home and a store of its own."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "NIX_CONF_DIR": str(home),
    }
    options = ["--option", "build-users-group", "", "--option", "substituters", ""]
    options += ["--option", "experimental-features", "nix-command"]
    process = await asyncio.create_subprocess_exec(
        *(*argv, "--store", str(store), *options),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode is not None
    return process.returncode, out.decode().strip(), err.decode()


@dataclass
class Client:
    """A home with a netrc and a store with two paths, of which the second refers to the first."""

    home: Path
    first: str
    second: str

    async def copy(self, *argv: str, store: str = "origin") -> tuple[int, str]:
        netrc = str(self.home / "netrc")
        code, _, err = await nix(
            "nix", "copy", *argv, "--option", "netrc-file", netrc, home=self.home, store=self.home / store
        )
        return code, err

    def use_token(self, token: str) -> None:
        (self.home / "netrc").write_text(f"machine 127.0.0.1 login ci password {token}\n")


@pytest.fixture
async def client(tmp_path: Path) -> Client:
    home = tmp_path / "home"
    (home / "tree").mkdir(parents=True)
    (home / "tree" / "big").write_bytes(os.urandom(3_000_000))
    code, tree, err = await nix("nix-store", "--add", str(home / "tree"), home=home, store=home / "origin")
    assert code == 0, err
    expression = f'builtins.toFile "b" "see ${{builtins.storePath "{tree}"}}"'
    evaluate = ("nix-instantiate", "--eval", "--read-write-mode", "-E", expression)
    code, second, err = await nix(*evaluate, home=home, store=home / "origin")
    assert code == 0, err
    made = Client(home, tree, second.strip('"'))
    made.use_token(WRITER)
    return made


async def test_nix_copies_to_the_cache_and_back(served: Writable, client: Client) -> None:
    to = f"{served.url}?compression=zstd&write-nar-listing=true"
    code, err = await client.copy("--to", to, client.second)
    assert code == 0, err
    assert await served.cache.missing([client.first, client.second]) == set()
    code, err = await client.copy("--to", to, "--refresh", client.second)
    assert code == 0, err
    key = str(secret_key().public)
    back = ("--from", served.url, client.second, "--option", "trusted-public-keys")
    code, err = await client.copy(*back, key, store="back")
    assert code == 0, err
    read = client.home / "back" / client.second.removeprefix("/")
    assert read.read_text() == f"see {client.first}"
    code, _, err = await nix("nix-store", "--verify", "--check-contents", home=client.home, store=client.home / "back")
    assert code == 0, err


async def test_nix_without_the_token_is_refused_at_once(served: Writable, client: Client) -> None:
    client.use_token("wrong-token-of-enough-length")
    code, err = await client.copy("--to", f"{served.url}?compression=zstd", client.second)
    assert code != 0
    assert "401" in err
    assert await served.cache.missing([client.first]) == {client.first}
    assert served.left_behind() == []


async def test_realisations_are_signed_and_answered_in_both_layouts(served: Writable) -> None:
    upload = upload_of(A, b"built")
    by_hash = f"realisations/sha256:{'a' * 64}!out.doi"
    by_drv = f"build-trace-v2/{base_name(store_path('built.drv'))}/out.doi"
    value = {"outPath": base_name(A), "signatures": []}
    old = {**value, "id": f"sha256:{'a' * 64}!out", "dependentRealisations": {}}
    bodies = {by_hash: orjson.dumps(old), by_drv: orjson.dumps(value)}
    for address, body in bodies.items():
        assert (await served.put(address, body))[0] == 422
    await send(served, upload)
    for address, body in bodies.items():
        assert [await served.put(address, body) for _ in range(2)] == [(200, "")] * 2
        for asked in (address, address.replace("!", "%21")):
            async with served.http.get(URL(f"{served.url}/{asked}", encoded=True)) as answer:
                assert answer.status == 200
                told = orjson.loads(await answer.read())
                assert told["outPath"] == base_name(A)
                assert len(told["signatures"]) == 1
    await send(served, upload_of(B, b"other"))
    assert (await served.put(by_hash, orjson.dumps({**old, "outPath": base_name(B)})))[0] == 409
    for bad in (b"", b"{}", b"[1]", orjson.dumps({**old, "id": "sha256:0!out"})):
        assert (await served.put(by_hash, bad))[0] == 400
    for nowhere in ("realisations/x.doi", "build-trace-v2/x/out.doi", f"realisations/sha256:{'b' * 64}!out.doi"):
        assert await served.status(nowhere) == 404


async def test_the_files_of_a_nar_are_listed(served: Writable) -> None:
    nar = b"".join(write_events([NarFile(b"", True, 5), NarData(b"hello")]))
    upload = upload_of(A, nar)
    await send(served, upload)
    async with served.http.get(f"{served.url}/{base_name(A)[:32]}.ls") as answer:
        listing = orjson.loads(await answer.read())
    assert listing == {
        "version": 1,
        "root": {"type": "regular", "size": 5, "executable": True, "narOffset": nar.index(b"hello")},
    }
    await send(served, upload_of(B, b"no archive"))
    for path in (B, store_path("absent")):
        assert await served.status(f"{base_name(path)[:32]}.ls", "GET") == 404


async def test_an_uploaded_path_is_kept_for_the_retention(served: Writable) -> None:
    await send(served, upload_of(A, b"kept"))
    (root,) = await served.cache.roots()
    assert (root.kind, root.name, root.paths) == ("put", base_name(A), 1)
    assert root.expires_at is not None
