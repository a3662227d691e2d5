"""A process killed at any moment of uploading and publishing leaves a cache that tells the truth and goes on."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.cache import Conflict, Published, fetch_nar
from infra.cache.objects import sweep_incoming
from infra.nix import narinfo
from tests.support.cache import STORE_DIR, base_name, open_cache, publish, store_path

# Publishes chains of paths for ever, large and small, and says so once the cache has confirmed them.
PUBLISHER = """
import asyncio, itertools, os, sys
from pathlib import Path
from tests.support.cache import candidate, open_cache, store_path

async def main():
    async with open_cache(Path(sys.argv[1])) as cache:
        for number in itertools.count():
            chain = [store_path(f"{sys.argv[2]}-{number}-{link}") for link in range(4)]
            claims = [
                await candidate(cache, path, os.urandom(9_000_000 if link == 2 else 300), chain[:link])
                for link, path in enumerate(chain)
            ]
            await cache.publish(claims)
            print(*chain, flush=True)

asyncio.run(main())
"""


def kill_a_publisher(directory: Path, name: str, delay_s: float) -> list[str]:
    """Kill it `delay_s` after it confirmed its first chain; returns all that it had confirmed."""
    with subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, str(directory), name],
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
            assert set(info.references) <= names
            assert sum([len(data) async for data in fetch_nar(cache.objects, info)]) == info.nar_size
        await sweep_incoming(cache.objects, before=time.time() + 60)
        # The same paths with other random bits: what was published stays, what was not can be.
        for path in known[: len(answered) + 1]:
            assert isinstance(await publish(cache, path), Published if path in missing else Conflict)
