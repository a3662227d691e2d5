"""A coordinator with one real agent in its process: `python -m tests.benchmarks.farm_server STATE_DIR`.

Prints its address, and serves until it is told to end.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import uvloop

from coordinator.config import Settings
from coordinator.main import Ready
from coordinator.run import serve
from tests.coordinator.conftest import nix_workers


async def run(state_dir: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    def tell(ready: Ready) -> None:
        print(ready.cache_url, flush=True)

    await serve(Settings(state_dir=state_dir, port=0), nix_workers(state_dir / "workers", ["w"]), ready=tell, stop=stop)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(Path(sys.argv[1])))
