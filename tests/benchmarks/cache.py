"""The cache beside nginx, over the same files, at the same load, in turns.

    narinfo   wrk asks for 1,000 narinfos round and round on 1 and on 64 connections: median and p99 latency, requests/s
    nar       wrk fetches one NAR of 64 MiB on 1 and on 16 connections: bytes/s

Ours is a whole coordinator (one process, uvloop, SQLite, a directory) without workers. The peer is Debian's nginx with
one worker, sendfile, no logs and the narinfos as files. Both are warm. One line is printed for each measurement: for
narinfos the figures are the median latency in microseconds, for NARs MiB/s; ratio is ours over the peer, bigger is
better, so the targets are 0.67 (1.5 times nginx's latency) and 0.9.

`cpu_us` in the details is the processor time of the server for one request (user and system, all its processes): it
says nearly the same on a busy machine as on a quiet one, which latency does not.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

from infra.cache.cache import Cache
from infra.nix.signing import generate
from infra.nix.store_path import StoreDir
from infra.objects.nar_writer import upload_nar
from infra.objects.store import open_object_store
from tests.benchmarks.report import arguments, progress, publish
from tests.support.cache import base_name, chunked, narinfo_of, store_path

NARINFOS = 1000
NAR_BYTES = 64 * 1024 * 1024
NARINFO_CONNECTIONS = (1, 64)
NAR_CONNECTIONS = (1, 16)

NGINX = """
worker_processes 1; daemon off; pid {top}/nginx.pid; error_log {top}/nginx.log error;
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 100000000; keepalive_timeout 120;
  open_file_cache off;
  client_body_temp_path {top}/t1; proxy_temp_path {top}/t2; fastcgi_temp_path {top}/t3; uwsgi_temp_path {top}/t4;
  scgi_temp_path {top}/t5;
  types {{ text/x-nix-narinfo narinfo; application/x-nix-nar zst; }}
  server {{
    listen 127.0.0.1:{port};
    location /cache/ {{ alias {www}/; }}
  }}
}}
"""

#: wrk's script: the next path for each request, and one line of JSON at the end. Latencies are microseconds.
LUA = """
local paths = {{ {paths} }}
local at = 0
request = function()
  at = at % #paths + 1
  return wrk.format("GET", paths[at])
end
done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{{"p50": %f, "p99": %f, "requests": %d, "bytes": %d, "us": %d, "errors": %d}}\\n',
    latency:percentile(50), latency:percentile(99), summary.requests, summary.bytes, summary.duration,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """Result of wrk: latencies in microseconds, rates per second; and the server's processor time for one request."""

    p50: float
    p99: float
    requests_s: float
    bytes_s: float
    cpu_us: float


@dataclass(frozen=True)
class Server:
    url: str
    pid: int

    def cpu_s(self) -> float:
        """Processor seconds of the process and its children so far."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        ticks = 0
        for pid in [str(self.pid), *children]:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


async def fill(state: Path, www: Path) -> tuple[list[str], str]:
    """Publish small paths and a large one; returns the addresses of their narinfos, and of the large NAR."""
    objects = open_object_store((state / "objects").as_uri())
    cache = await Cache.open(
        f"sqlite+aiosqlite:///{state}/cache.sqlite3",
        objects,
        store_dir=StoreDir("/nix/store"),
        keys=[generate("bench", os.urandom(32))],
        now=time.time,
    )
    claims = []
    previous: list[str] = []
    for index in range(NARINFOS):
        path = store_path(f"package-{index}-1.0")
        uploaded = await upload_nar(objects, chunked(os.urandom(200)))
        claims.append(narinfo_of(path, uploaded, previous[-8:]))
        previous.append(base_name(path))
    large = narinfo_of(store_path("large"), await upload_nar(objects, chunked(os.urandom(NAR_BYTES))))
    await cache.publish([*claims, large])
    addresses = []
    for claim in claims:
        text = await cache.narinfo(claim.hash_part)
        if text is None:
            raise SystemExit("a path was not published")
        (www / f"{claim.hash_part}.narinfo").write_bytes(text)
        addresses.append(f"/cache/{claim.hash_part}.narinfo")
    (www / "nar").symlink_to(state / "objects" / "nar")
    await cache.close()
    return addresses, f"/cache/{large.stored.url}"


@contextmanager
def coordinator(state: Path) -> Iterator[Server]:
    """Run ours."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.cache_server", str(state)], stdout=subprocess.PIPE, text=True
    )
    try:
        if process.stdout is None or not (url := process.stdout.readline().strip()):
            raise SystemExit("the coordinator did not start")
        yield Server(f"http://{urlsplit(url).netloc}", process.pid)
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def nginx(top: Path, www: Path) -> Iterator[Server]:
    """Run the peer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = top / "nginx.conf"
    config.write_text(NGINX.format(top=top, port=port, www=www))
    # As root nginx would give its worker to a user that cannot read what we made.
    user = ["-g", "user root;"] if os.geteuid() == 0 else []
    process = subprocess.Popen([shutil.which("nginx") or "/usr/sbin/nginx", "-c", str(config), *user])
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        yield Server(f"http://127.0.0.1:{port}", process.pid)
    finally:
        process.terminate()
        process.wait(30)


def wrk(server: Server, script: Path, connections: int, seconds: int) -> Load:
    before = server.cpu_s()
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(script), server.url],
        check=True,
        capture_output=True,
        text=True,
    )
    spent = server.cpu_s() - before
    told = json.loads(done.stdout.strip().splitlines()[-1])
    if told["errors"]:
        raise SystemExit(f"{server.url} failed under load: {told}")
    taken, requests = told["us"] / 1e6, told["requests"]
    return Load(told["p50"], told["p99"], requests / taken, told["bytes"] / taken, spent / max(requests, 1) * 1e6)


def write_script(file: Path, paths: list[str]) -> Path:
    file.write_text(LUA.format(paths=", ".join(f'"{path}"' for path in paths)))
    return file


def main() -> None:
    parser = arguments("narinfo latency and NAR throughput beside nginx", runs=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each measurement (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drover-cache-") as directory, ExitStack() as stack:
        top = Path(directory)
        (state := top / "state").mkdir(mode=0o700)
        (www := top / "www").mkdir()
        progress(f"publishing {NARINFOS} small paths and one of {NAR_BYTES // 1024**2} MiB")
        narinfos, nar = asyncio.run(fill(state, www))
        scripts = {
            "narinfo": (write_script(top / "narinfo.lua", narinfos), NARINFO_CONNECTIONS),
            "nar": (write_script(top / "nar.lua", [nar]), NAR_CONNECTIONS),
        }
        servers = {"ours": stack.enter_context(coordinator(state)), "peer": stack.enter_context(nginx(top, www))}
        for server in servers.values():
            for path in narinfos:
                with urlopen(f"{server.url}{path}") as answer:
                    answer.read()
        for kind, (script, levels) in scripts.items():
            for connections in levels:
                loads: dict[str, list[Load]] = {"ours": [], "peer": []}
                for server in servers.values():
                    wrk(server, script, connections, 1)
                for run in range(options.runs):
                    for side, server in servers.items():
                        loads[side].append(wrk(server, script, connections, options.seconds))
                    progress(f"{kind} {connections}: run {run + 1} of {options.runs}")
                report(kind, connections, loads, as_json=options.json)


def report(kind: str, connections: int, loads: dict[str, list[Load]], *, as_json: bool) -> None:
    details = {
        side: {
            "p50_us": [round(load.p50) for load in each],
            "p99_us": [round(load.p99) for load in each],
            "cpu_us": [round(load.cpu_us, 1) for load in each],
            "requests_s": [round(load.requests_s) for load in each],
        }
        for side, each in loads.items()
    }
    latency = kind == "narinfo"
    publish(
        f"cache-{kind}-{connections}",
        ours=[load.p50 if latency else load.bytes_s / 1024**2 for load in loads["ours"]],
        peer=[load.p50 if latency else load.bytes_s / 1024**2 for load in loads["peer"]],
        unit="us" if latency else "MiB/s",
        bigger_is_better=not latency,
        as_json=as_json,
        details=details,
    )


if __name__ == "__main__":
    main()
