"""A process killed at any moment of uploading and publishing leaves a cache that tells the truth and goes on."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.cache.publishing.claims import Conflict, Published
from infra.cache.retention.collector import CollectPlan
from infra.nix import narinfo
from infra.objects.nar_reader import fetch_nar
from infra.objects.store import sweep_incoming
from tests.support.cache import STORE_DIR, base_name, open_cache, publish, store_path

# Publishes chains of paths for ever, large and small, and says so once the cache has confirmed them.
PUBLISHER = """
import asyncio, itertools, os, sys
from pathlib import Path
from tests.support.cache import uploaded_claim, open_cache, store_path

async def main():
    async with open_cache(Path(sys.argv[1])) as cache:
        for number in itertools.count():
            chain = [store_path(f"{sys.argv[2]}-{number}-{link}") for link in range(4)]
            claims = [
                await uploaded_claim(cache, path, os.urandom(9_000_000 if link == 2 else 300), chain[:link])
                for link, path in enumerate(chain)
            ]
            await cache.publish(claims)
            print(*chain, flush=True)

asyncio.run(main())
"""


def kill_a_publisher(directory: Path, name: str, delay_s: float, program: str = PUBLISHER) -> list[str]:
    """Kill it `delay_s` after it confirmed its first chain; returns all that it had confirmed."""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(directory), name],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
        text=True,
    ) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read()
    # The kill may have cut the last line.
    return [path for line in told.splitlines(keepends=True) if line.endswith("\n") for path in line.split()]


@pytest.mark.parametrize("delay_s", [0.0, 0.013, 0.029, 0.047])
async def test_after_a_kill_everything_that_is_answered_can_be_fetched(tmp_path: Path, delay_s: float) -> None:
    confirmed = await asyncio.to_thread(kill_a_publisher, tmp_path, "chain", delay_s)
    async with open_cache(tmp_path) as cache:
        assert confirmed
        assert not await cache.missing(confirmed)
        known = [store_path(f"chain-{number}-{link}") for number in range(50) for link in range(4)]
        narinfos, missing = await cache.closure(known)
        answered = [narinfo.parse(text, STORE_DIR) for text in narinfos]
        names = {base_name(info.store_path) for info in answered}
        assert len(names) == len(answered) == len(known) - len(missing)
        for info in answered:
            assert set(info.path.references) <= names
            assert sum([len(data) async for data in fetch_nar(cache.objects, info)]) == info.path.nar_size
        await sweep_incoming(cache.objects, before=time.time() + 60)
        # The same paths with other random bits: what was published stays, what was not can be.
        for path in known[: len(answered) + 1]:
            assert isinstance(await publish(cache, path), Published if path in missing else Conflict)


# Publishes chains, keeps only the newest, and collects the others at once, for ever.
COLLECTOR = """
import asyncio, itertools, os, sys
from pathlib import Path
from infra.cache.retention.collector import CollectPlan
from tests.support.cache import uploaded_claim, open_cache, store_path

async def main():
    async with open_cache(Path(sys.argv[1])) as cache:
        for number in itertools.count():
            chain = [store_path(f"{sys.argv[2]}-{number}-{link}") for link in range(3)]
            await cache.publish([
                await uploaded_claim(cache, path, os.urandom(300), chain[:link]) for link, path in enumerate(chain)
            ])
            await cache.pin("newest", chain[-1:])
            print(*chain, flush=True)
            await cache.collect(CollectPlan(grace_s=0, fresh_s=0, orphan_s=0))

asyncio.run(main())
"""


@pytest.mark.parametrize("delay_s", [0.011, 0.037, 0.061, 0.083])
async def test_after_a_kill_of_a_collector_nothing_is_lost_and_the_rest_goes(tmp_path: Path, delay_s: float) -> None:
    told = await asyncio.to_thread(kill_a_publisher, tmp_path, "gc", delay_s, COLLECTOR)
    newest = told[-3:]
    number = int(newest[0].rpartition("gc-")[2].partition("-")[0])
    # The kill may have come between the pin of the next chain and its word.
    after = [store_path(f"gc-{number + 1}-{link}") for link in range(3)]
    async with open_cache(tmp_path) as cache:
        assert not await cache.missing(newest) or not await cache.missing(after)
        assert (await cache.verify(full=True)).broken == 0
        for _ in range(2):
            await cache.collect(CollectPlan(grace_s=0, fresh_s=0, orphan_s=0))
        info = await cache.info()
        assert (info.paths, info.tombstoned, info.dangling) == (3, 0, 0)
        assert len(list((tmp_path / "objects" / "nar").iterdir())) == 3
        again = store_path("again")
        assert await publish(cache, again) == Published(again)
