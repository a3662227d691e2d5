"""No body and no head hurts a farm, whoever sends it: a 4xx each, for little memory and no stall."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import socket
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from infra.nix import base32
from tests.support.attack import FarmUnderAttack, exchange
from tests.support.bodies import NASTY
from tests.support.loop import LoopStalls
from tests.support.routes import addresses as route_addresses

pytestmark = pytest.mark.e2e

#: Longest slice of the loop, in seconds of processor time: the house's bound.
STALL_S = 0.05
#: Memory that a public question may cost, and a submission, whose largest body is 48 MiB of up to 100,000 roots.
STRANGERS_BYTES = 48 * 1024 * 1024
HOLDERS_BYTES = 256 * 1024 * 1024
#: What the bombs become where somebody inflates them.
BOMB_BYTES = 64 * 1024 * 1024

#: More than the sockets of both sides hold.
LONG_BYTES = 16 * 1024 * 1024

#: Addresses whose bodies are opaque bytes that a holder of a token may send, whatever they are.
OPAQUE = re.compile(r"/cache/(log/|debuginfo/|[0-9a-z]{32}\.ls$)")
#: An address that takes no body and looks at none.
BODILESS = "/api/v1/caches/default/resign"
#: Streams of members, of which there may be none.
STREAMS = re.compile(r"/api/v1/intake/(derivations|sources)$")

ONES = {"1 MB of ones": 500_000, "8 MB of ones": 4_000_000}
BODIES = {
    **NASTY,
    **{name: b"[" + b",".join([b"1"] * count) + b"]" for name, count in ONES.items()},
    "a million unknown keys": b"{" + b",".join(b'"k%d":1' % number for number in range(1_000_000)) + b"}",
}


@dataclass(frozen=True, slots=True)
class Raw:
    """Headers and bytes as they stand; `ends`: the sender says that no more comes, so there may be no answer."""

    headers: str
    body: bytes
    ends: bool = False


def _bombs() -> dict[str, bytes]:
    plain = b"[" * BOMB_BYTES
    return {
        "gzip": gzip.compress(plain, 1),
        "deflate": zlib.compress(plain, 1),
        "br": gzip.compress(plain[:1024], 1),
        "zstd": zstandard.compress(plain, 1),
        "identity, gzip": gzip.compress(plain[:1024], 1),
    }


def chunked(body: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:1000], body[1000:]) if part) + b"0\r\n\r\n"


def requests() -> dict[str, Raw]:
    """Return what comes after the request's first lines."""
    sent = {name: Raw(f"Content-Length: {len(body)}", body) for name, body in BODIES.items()}
    for name in ("8 MB of ones", "a million unknown keys", "deep arrays"):
        sent[f"{name}, in chunks"] = Raw("Transfer-Encoding: chunked", chunked(BODIES[name]))
    for coding, body in _bombs().items():
        sent[f"a bomb of {coding}"] = Raw(f"Content-Encoding: {coding}\r\nContent-Length: {len(body)}", body)
    coded = "Content-Encoding: gzip\r\nTransfer-Encoding: chunked"
    return {
        **sent,
        "a bomb in chunks": Raw(coded, chunked(gzip.compress(bytes(BOMB_BYTES), 1))),
        "less than announced": Raw("Content-Length: 1000", b'{"paths":', ends=True),
        "a length below zero": Raw("Content-Length: -1", b"{}"),
        "a length with a sign": Raw("Content-Length: +2", b"{}"),
        "a length of many digits": Raw(f"Content-Length: {'9' * 5000}", b"{}"),
        "two lengths": Raw("Content-Length: 2\r\nContent-Length: 3", b"{} "),
        "a length and chunks": Raw("Content-Length: 2\r\nTransfer-Encoding: chunked", chunked(b"{}")),
        "a chunk of no number": Raw("Transfer-Encoding: chunked", b"zz\r\n{}\r\n0\r\n\r\n"),
        "a chunk of many digits": Raw("Transfer-Encoding: chunked", b"f" * 100 + b"\r\n{}\r\n"),
        "a chunk that is longer than it says": Raw("Transfer-Encoding: chunked", b"1\r\n{}{}{}\r\n0\r\n\r\n"),
        "chunks that end early": Raw("Transfer-Encoding: chunked", b"ff\r\n{}", ends=True),
    }


@pytest.fixture(scope="module")
def addresses() -> list[tuple[str, str]]:
    """Method and address of every route that may have a body."""
    return sorted({(route.method, address) for route, address, _ in route_addresses("/cache") if route.method != "GET"})


@pytest.fixture(scope="module")
def narinfo(readme_farm: FarmUnderAttack) -> str:
    """Address of a narinfo that the farm has."""
    built = readme_farm.build_text('shell "good" "echo good > $out"', "--json")
    assert built.returncode == 0, built.stderr
    path: str = json.loads(built.stdout.splitlines()[-1])["roots"][0]["outputs"]["out"]
    return f"/cache/{Path(path).name[:32]}.narinfo"


def _is_right(status: int, address: str, name: str, raw: Raw, *, token: bool) -> bool:
    if 400 <= status < 500 or (raw.ends and status == 0):
        return True
    if token and (OPAQUE.match(address) or address == BODILESS):
        return status == 200
    return token and name == "nothing" and STREAMS.match(address) is not None and status == 204


@pytest.mark.parametrize("token", [False, True], ids=["a stranger", "a token holder"])
def test_every_nasty_body_at_every_route_is_refused_for_little(
    readme_farm: FarmUnderAttack, addresses: list[tuple[str, str]], token: bool
) -> None:
    assert ("POST", "/cache/narinfos") in addresses
    assert len(addresses) > 15
    authorization = f"Authorization: Bearer {readme_farm.token}\r\n" if token else ""
    before = readme_farm.process.rss_bytes
    readme_farm.process.reset_peak()
    wrong = []
    with LoopStalls(readme_farm.url) as stalls:
        for name, raw in requests().items():
            for method, address in addresses:
                head = f"{method} {address} HTTP/1.1\r\nHost: localhost\r\n{authorization}{raw.headers}\r\n\r\n"
                status = readme_farm.send_raw(head.encode() + raw.body, half_close=raw.ends)
                if not _is_right(status, address, name, raw, token=token):
                    wrong.append((status, method, address, name))
    assert wrong == []
    assert stalls.over(STALL_S) == 0, readme_farm.log_path.read_text(errors="replace")[-4000:]
    assert readme_farm.process.peak_rss_bytes - before < (HOLDERS_BYTES if token else STRANGERS_BYTES)
    assert readme_farm.request("POST", "/cache/narinfos", b'{"paths":[]}').status == 200
    assert readme_farm.request("GET", "/api/v1/farm", token=readme_farm.token).status == 200


def _begin_body(client: socket.socket, head: str) -> bytes:
    """Send a head, wait until the coordinator asks for the body or refuses it, and send nine bytes of it."""
    client.sendall(f"{head}Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n".encode())
    answer = client.recv(4096)
    client.sendall(b'{"paths":')
    return answer


def _leave(client: socket.socket, *, reset: bool) -> None:
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def _abandoned(farm: FarmUnderAttack) -> int:
    """Requests whose client left, by the farm's own count. Two answers lie between: what was before them is done."""
    farm.health()
    shown = farm.request("GET", "/metrics").body.decode()
    found = re.search(r"^drover_requests_abandoned_total(?:\{.*\})? (\d+)", shown, re.MULTILINE)
    return int(found[1]) if found else 0


def test_clients_that_leave_in_the_middle_are_counted_and_leave_no_word_in_the_log(
    readme_farm: FarmUnderAttack, addresses: list[tuple[str, str]]
) -> None:
    logged, abandoned = readme_farm.log_path.stat().st_size, _abandoned(readme_farm)
    authorization = f"Authorization: Bearer {readme_farm.token}\r\n"
    asked = 0
    for reset in (False, True):
        for method, address in addresses:
            for token in ("", authorization):
                client = readme_farm.connect()
                head = f"{method} {address} HTTP/1.1\r\nHost: localhost\r\n{token}"
                asked += b" 100 " in _begin_body(client, head)
                _leave(client, reset=reset)
    # Not all that ask for a body read it, and an upload by Nix that ends early is an answer of its own.
    assert asked > len(addresses)
    assert _abandoned(readme_farm) - abandoned > len(addresses) // 2

    data = bytes(LONG_BYTES)
    name = f"/cache/nar/{base32.encode(hashlib.sha256(data).digest())}.nar"
    assert readme_farm.request("PUT", name, data, token=readme_farm.token).status == 200
    waits = 'derivation { name = "waits"; system = "riscv64-linux"; builder = "/bin/sh"; }'
    sent = readme_farm.build_text(waits, "--detach")
    assert sent.returncode == 0, sent.stderr
    submission = f"/api/v1/submissions/{readme_farm.api('submissions')[0]['id']}"
    for reset in (False, True):
        for address in (name, f"{submission}/events"):
            client = readme_farm.connect()
            client.sendall(f"GET {address} HTTP/1.1\r\nHost: localhost\r\n{authorization}\r\n".encode())
            assert client.recv(64).startswith(b"HTTP/1.1 200 ")
            _leave(client, reset=reset)
    # A change is written to the streams, whose clients are gone.
    assert readme_farm.request("POST", f"{submission}/cancel", token=readme_farm.token).status == 200
    for garbage in (b"\x16\x03\x01\x02", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n"):
        assert readme_farm.send_raw(garbage, half_close=True) in {0, 400}
    _abandoned(readme_farm)
    with readme_farm.log_path.open("rb") as log:
        log.seek(logged)
        assert log.read().decode(errors="replace") == ""


TWO_READINGS = {
    "a user before the host": "Host: evil@127.0.0.1",
    "a port that is no number": "Host: 127.0.0.1:abc",
    "a port that is none": "Host: 127.0.0.1:0",
    "no host": "Accept: */*",
    "two hosts": "Host: localhost\r\nHost: localhost",
    "two tokens": "Host: localhost\r\nAuthorization: Bearer {token}\r\nAuthorization: Bearer {token}",
    "a good and a bad token": "Host: localhost\r\nAuthorization: Bearer {token}\r\nAuthorization: Basic eDp5",
}


@pytest.mark.parametrize("head", TWO_READINGS)
def test_a_head_that_can_be_read_in_two_ways_is_refused_everywhere(
    readme_farm: FarmUnderAttack, narinfo: str, head: str
) -> None:
    lines = TWO_READINGS[head].format(token=readme_farm.token)
    for address in ("/api/v1/farm", "/cache/nix-cache-info", "/healthz", narinfo):
        with readme_farm.connect() as client:
            # A narinfo in memory is answered before aiohttp looks at it; what comes next on that connection is not.
            good = f"GET {narinfo} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            assert exchange(client, good.encode()) == 200
            assert exchange(client, f"GET {address} HTTP/1.1\r\n{lines}\r\n\r\n".encode()) == 400
