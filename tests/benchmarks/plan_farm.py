"""A coordinator without workers whose cache has given paths: `python -m tests.benchmarks.plan_farm STATE_DIR PATHS`.

PATHS is a JSON file: `{"paths": {path: [references]}, "upstreams": [[url, key]]}`. Prints the cache's address and
its public key once all are published, and serves until it is told to end.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import uvloop

from coordinator.config import CacheSettings, Settings, UpstreamSettings
from coordinator.main import open_coordinator
from infra.cache.cache import Cache
from infra.objects.nar_writer import upload_nar
from tests.support.cache import base_name, chunked, narinfo_of
from tests.support.local_fleet import InProcessFleet

#: Paths of one publication.
BATCH = 1000


async def fill(cache: Cache, paths: dict[str, list[str]]) -> None:
    """Publish paths, of which references come first."""
    uploaded = await upload_nar(cache.objects, chunked(os.urandom(300)))
    claims = [narinfo_of(path, uploaded, sorted(map(base_name, refs))) for path, refs in paths.items()]
    for start in range(0, len(claims), BATCH):
        await cache.publish(claims[start : start + BATCH])


async def run(state_dir: Path, wanted: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    given = json.loads(await asyncio.to_thread(wanted.read_text))
    upstreams = tuple(UpstreamSettings(url=url, public_keys=(key,)) for url, key in given["upstreams"])
    settings = Settings(state_dir=state_dir, port=0, cache=CacheSettings(upstreams=upstreams))
    async with open_coordinator(settings, lambda info: nullcontext(InProcessFleet(info, []))) as coordinator:
        await fill(coordinator.cache, given["paths"])
        print(coordinator.ready.cache_url, coordinator.cache.public_keys[0], flush=True)
        await stop.wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(Path(sys.argv[1]), Path(sys.argv[2])))
