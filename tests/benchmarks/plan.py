"""Seconds of `drover plan` for a lock of 500 packages on four systems, beside one request for each narinfo.

Ours: the whole command as a person runs it, with `--json`. Of each system's packages 300 are in the farm's cache, 100
in an upstream's (both with closures of some hundred libraries), of 50 the farm has derivations, and 50 are nowhere.
The first time the farm has asked its upstream nothing; `again_s` is what the same plan takes then. Peer: a plain client
in this process, 25 connections as Nix has them, that requests the narinfo of each path of the same closures from the
farm and, where it is not there, from the upstream. It says no more than what can be fetched. Target: 5 s.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from coordinator.api.sent_streams import encode_derivations, in_thread
from coordinator.client.api_client import ApiClient
from infra.nix import narinfo
from infra.nix.store_path import StoreDir
from tests.benchmarks.processes import processor_s
from tests.benchmarks.report import arguments, progress, publish
from tests.support.graphs import Made, Maker
from tests.support.wishes import SYSTEMS, catalog_entry, flox_lock, store_path

BIN = Path(sys.executable).parent
CONNECTIONS = 25
LIBRARIES, REFERENCES = 400, 8
#: Of 500 packages: those of the farm's cache, and those of its upstream; of the others half are known.
HERE, UPSTREAM = 0.6, 0.2
Paths = dict[str, list[str]]


class Farm:
    """A coordinator as a child."""

    def __init__(self, state_dir: Path, paths: Paths, *upstreams: tuple[str, str]) -> None:
        wanted = state_dir.with_suffix(".json")
        wanted.write_text(json.dumps({"paths": paths, "upstreams": upstreams}))
        self.token_file = state_dir / "api-token"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.plan_farm", state_dir, wanted], stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self.cache_url, self.key = self._process.stdout.readline().split()
        self.url = self.cache_url.removesuffix("/cache")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def corpus(count: int, seed: int) -> tuple[Paths, Paths, bytes, list[Made]]:
    """Return the paths of farm and upstream, a lock, and derivations that the farm is to have, inputs first."""
    chance = random.Random(seed)
    ours: Paths = {}
    theirs: Paths = {}
    entries, made = [], []
    for system in SYSTEMS:
        libraries: list[str] = []
        for number in range(LIBRARIES):
            library = store_path(f"library-{number}", system)
            ours[library] = theirs[library] = chance.sample(libraries, min(len(libraries), REFERENCES))
            libraries.append(library)
        maker = Maker(system=system)
        bases = [maker.plain(f"base-{number}-1") for number in range(50)]
        made += bases
        for number in range(count):
            name, path = f"package-{number}", store_path(f"package-{number}-1", system)
            drv = store_path(f"package-{number}-1.drv", system)
            if number < HERE * count:
                ours[path] = chance.sample(libraries, REFERENCES)
            elif number < (HERE + UPSTREAM) * count:
                own = store_path(f"library-of-{number}", system)
                theirs[own] = chance.sample(libraries, REFERENCES)
                theirs[path] = [own, *chance.sample(libraries, REFERENCES)]
            elif number % 2:
                made.append(maker.plain(f"package-{number}-1", chance.sample(bases, 5)))
                path, drv = made[-1].outputs["out"], made[-1].drv
            entries.append({**catalog_entry(name, system), "derivation": drv, "outputs": {"out": path}})
    return ours, theirs, flox_lock(entries), made


async def send(farm: Farm, made: list[Made]) -> None:
    token = await asyncio.to_thread(farm.token_file.read_text)
    async with ApiClient(farm.url, token.strip()) as client:
        await client.send_derivations(in_thread(encode_derivations([(each.name, each.data) for each in made])))


def plan(farm: Farm, lock: Path) -> tuple[float, dict[str, int], tuple[float, float]]:
    """Return the seconds of one command, how many wishes are in which state, and processor seconds of both sides."""
    command: list[str | Path] = [
        BIN / "drover",
        "plan",
        lock,
        "--json",
        "--coordinator",
        farm.url,
        "--token-file",
        farm.token_file,
    ]
    began, farm_s = time.monotonic(), processor_s(farm.pid)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    took, farm_s = time.monotonic() - began, processor_s(farm.pid) - farm_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    states: dict[str, int] = {}
    for wish in json.loads(done.stdout)["wishes"]:
        states[wish["state"]] = states.get(wish["state"], 0) + 1
    return took, states, (own_s, farm_s)


async def ask_one_by_one(farm: Farm, upstream: Farm, paths: list[str]) -> tuple[float, int]:
    """Return the seconds of a plain client for the closures of some paths, and its requests."""
    store_dir = StoreDir("/nix/store")
    seen = set(paths)
    waiting: asyncio.Queue[str] = asyncio.Queue()
    for path in paths:
        waiting.put_nowait(path)
    requests = 0

    async def work(session: aiohttp.ClientSession) -> None:
        nonlocal requests
        while True:
            path = await waiting.get()
            for cache in (farm, upstream):
                requests += 1
                async with session.get(f"{cache.cache_url}/{path[11:43]}.narinfo") as answer:
                    if answer.status == 200:
                        info = narinfo.parse(await answer.read(), store_dir)
                        for reference in info.path.reference_paths:
                            if reference not in seen:
                                seen.add(reference)
                                waiting.put_nowait(reference)
                        break
            waiting.task_done()

    began = time.monotonic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
        workers = [asyncio.create_task(work(session)) for _ in range(CONNECTIONS)]
        await waiting.join()
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return time.monotonic() - began, requests


def main() -> None:
    parser = arguments("seconds to plan a lock of 500 packages on four systems", runs=3)
    parser.add_argument("--count", type=int, default=500, help="packages of the lock (default: %(default)s)")
    options = parser.parse_args()
    first, again, peer = [], [], []
    states: dict[str, int] = {}
    requests, processor = 0, (0.0, 0.0)
    with tempfile.TemporaryDirectory(prefix="drover-plan-") as directory:
        top = Path(directory)
        ours, theirs, text, made = corpus(options.count, 1)
        lock = top / "manifest.lock"
        lock.write_bytes(text)
        wanted = [each["outputs"]["out"] for each in json.loads(text)["packages"]]
        upstream = Farm(top / "upstream", theirs)
        try:
            for run in range(options.runs):
                farm = Farm(top / f"farm-{run}", ours, (upstream.cache_url, upstream.key))
                try:
                    asyncio.run(send(farm, made))
                    took, states, processor = plan(farm, lock)
                    first.append(took)
                    again.append(plan(farm, lock)[0])
                    took, requests = asyncio.run(ask_one_by_one(farm, upstream, wanted))
                    peer.append(took)
                finally:
                    farm.stop()
                progress(f"run {run}: first {first[-1]:.2f} s, again {again[-1]:.2f} s, one by one {peer[-1]:.2f} s")
        finally:
            upstream.stop()
    publish(
        "plan",
        ours=first,
        peer=peer,
        unit="s",
        bigger_is_better=False,
        as_json=options.json,
        again_s=round(statistics.median(again), 3),
        again_spread_s=[round(min(again), 3), round(max(again), 3)],
        states=states,
        processor_s={"command": round(processor[0], 2), "coordinator": round(processor[1], 2)},
        peer_requests=requests,
        target_s=5.0,
    )


if __name__ == "__main__":
    main()
