"""`./run bench proxy`: a closure of small paths over a long line, by plain Nix beside Nix through `drover cache proxy`.

The line is a relay (`tests.support.distance`): 50 ms each way, a round trip for a new connection, slow start. A real
coordinator serves 2,000 paths in 25 layers, each path referring to four below it. Plain Nix (settings as they come)
fetches the root into an empty store; then Nix does so through a new proxy with an empty directory, whose upstream is
the same relay; then again through that proxy, started anew, into another empty store. Seconds of each, smaller is
better; the target is a fifth of plain Nix's time.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from infra.cache.cache import Cache
from infra.nix.narinfo import NarInfo
from infra.nix.signing import SecretKey, generate
from infra.nix.store_path import StoreDir
from infra.objects.nar_writer import upload_nar
from infra.objects.store import open_object_store
from tests.benchmarks.processes import processor_s
from tests.benchmarks.report import arguments, progress, publish
from tests.support.cache import base_name, chunked, narinfo_of, store_path
from tests.support.farm import nix_store
from tests.support.ports import free_port
from tests.support.small_cache import nar_of

LAYERS = 25
REFERENCES = 4


def main() -> None:
    parser = arguments("a closure over a long line, by plain Nix and through drover cache proxy", runs=1)
    parser.add_argument("--paths", type=int, default=2000, help="of the closure (default: %(default)s)")
    parser.add_argument("--one-way-ms", type=float, default=50.0, help="of the line (default: %(default)s)")
    parser.add_argument("--jobs", default="", help="max-jobs of both, for a Nix that fetches so many paths at one time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drover-proxy-") as directory, ExitStack() as stack:
        top = Path(directory)
        (state := top / "state").mkdir(mode=0o700)
        progress(f"publishing {options.paths} paths")
        key = generate("bench", os.urandom(32))
        root = asyncio.run(fill(state, key, options.paths))
        server = urlsplit(stack.enter_context(printing(["-m", "tests.benchmarks.cache_server", str(state)]))[0])
        line = ["-m", "tests.support.distance", str(server.port), str(options.one_way_ms)]
        distant = f"http://127.0.0.1:{stack.enter_context(printing(line))[0]}{server.path}"
        nix = {"trusted-public-keys": str(key.public), "require-sigs": "true"}
        if options.jobs:
            nix["max-jobs"] = options.jobs
        plain, through, again, used = [], [], [], []
        for run in range(options.runs):
            own = top / f"run-{run}"
            own.mkdir()
            with proxy(own / "proxy", distant) as (address, pid):
                through.append(fetch(own / "through", root, options.paths, {**nix, "substituters": address}))
                used.append(processor_s(pid))
            progress(f"run {run + 1}: through the proxy {through[-1]:.1f} s, processor of the proxy {used[-1]:.1f} s")
            with proxy(own / "proxy", distant) as (address, _):
                again.append(fetch(own / "again", root, options.paths, {**nix, "substituters": address}))
            progress(f"run {run + 1}: through the proxy again {again[-1]:.1f} s")
            plain.append(fetch(own / "plain", root, options.paths, {**nix, "substituters": distant}))
            progress(f"run {run + 1}: plain Nix {plain[-1]:.1f} s")
        extra = {"paths": options.paths, "one_way_ms": options.one_way_ms, "line": "relay", "proxy_processor_s": used}
        for bench, ours in (("proxy", through), ("proxy-again", again)):
            publish(
                bench, ours=ours, peer=plain, unit="s", bigger_is_better=False, as_json=options.json, **extra,
                share=round(ours[0] / plain[0], 3), target=0.2,
            )  # fmt: skip


async def fill(state: Path, key: SecretKey, paths: int) -> str:
    """Publish the closure; returns its root."""
    objects = open_object_store((state / "objects").as_uri())
    cache = await Cache.open(
        f"sqlite+aiosqlite:///{state}/cache.sqlite3",
        objects,
        store_dir=StoreDir("/nix/store"),
        keys=[key],
        now=time.time,
    )
    chance = random.Random(1)
    width = (paths - 1) // LAYERS
    layers: list[list[str]] = []
    claims: list[NarInfo] = []
    for number in range(paths):
        path = store_path(f"package-{number}-1.0")
        below = layers[-2] if len(layers) > 1 else []
        if number == paths - 1:
            references = layers[-1]
        else:
            if number % width == 0 and len(layers) < LAYERS:
                layers.append([])
                below = layers[-2] if len(layers) > 1 else []
            own = [below[len(layers[-1]) % len(below)]] if below else []
            references = own + chance.sample(below, min(REFERENCES - 1, len(below)))
            layers[-1].append(path)
        nar = nar_of(chance.randbytes(chance.choice((300, 2_000, 20_000))))
        uploaded = await upload_nar(objects, chunked(nar))
        claims.append(narinfo_of(path, uploaded, sorted({base_name(each) for each in references})))
    await cache.publish(claims)
    await cache.close()
    return claims[-1].store_path


def fetch(store: Path, root: str, paths: int, options: Mapping[str, str]) -> float:
    """Fetch the closure into an empty store; returns the seconds."""
    began = time.monotonic()
    done = nix_store(store, "-r", root, options=options, timeout_s=900)
    took_s = time.monotonic() - began
    if done.returncode != 0:
        raise SystemExit(f"Nix failed:\n{done.stderr[-2000:]}")
    there = len(list((store / "nix/store").glob("*-package-*")))
    if there != paths:
        raise SystemExit(f"{there} of {paths} paths were fetched")
    return took_s


@contextmanager
def proxy(directory: Path, upstream: str) -> Iterator[tuple[str, int]]:
    """Run the command; gives its address and process."""
    port = str(free_port())
    drover = str(Path(sys.executable).with_name("drover"))
    command = ["cache", "proxy", "--upstream", upstream, "--port", port, "--dir", str(directory), "--netrc", ""]
    with printing(command, program=drover, lines=2) as (_, line, pid):
        yield line.rpartition(" ")[2], int(pid)


@contextmanager
def printing(arguments: Sequence[str], *, program: str = sys.executable, lines: int = 1) -> Iterator[list[str]]:
    """Run a program that prints lines once it is ready; gives them and, last, the process' number."""
    process = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield [*(process.stdout.readline().strip() for _ in range(lines)), str(process.pid)]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
