"""Requests to an agent to stop in order: two files in its state directory, written by the program that started it.

    stop-request    written by the starter: Unix time after which running builds are handed back
    stopped         written by the agent once it holds no lease and every event it sent is acknowledged

The agent takes no new lease from the request on. The program that stops a worker is not always connected to it (`drover
worker` only runs the node), so this does not go over the transport. A request lasts until the agent starts anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

_log = logging.getLogger(__name__)

REQUEST_FILE = "stop-request"
STOPPED_FILE = "stopped"
#: How often either side looks, seconds.
LOOK_EVERY_S = 0.2
#: Seconds after the grace in which handed back builds are ended and reported.
FLUSH_S = 5.0


def requested(state_dir: Path) -> float | None:
    """Return the Unix time at which running builds are handed back; None without a request."""
    try:
        return float((state_dir / REQUEST_FILE).read_text())
    except (OSError, ValueError):
        return None


def answer(state_dir: Path) -> None:
    """Say that the agent has stopped."""
    with suppress(OSError):
        (state_dir / STOPPED_FILE).touch()


def forget(state_dir: Path) -> None:
    """Remove what an earlier stop left: the agent starts."""
    for name in (REQUEST_FILE, STOPPED_FILE):
        (state_dir / name).unlink(missing_ok=True)


async def stop_agents(state_dirs: Sequence[Path], grace_s: float, force_stop: Callable[[], bool]) -> None:
    """Ask agents to stop; return when all have, or FLUSH_S after the grace. True of `force_stop` ends the grace."""
    waiting = list(state_dirs)
    deadline = time.time() + grace_s
    _ask(waiting, deadline)
    while waiting and time.time() < deadline + FLUSH_S:
        if force_stop() and deadline > time.time():
            deadline = time.time()
            _ask(waiting, deadline)
        waiting = [state_dir for state_dir in waiting if not (state_dir / STOPPED_FILE).exists()]
        await asyncio.sleep(LOOK_EVERY_S)
    for state_dir in waiting:
        _log.warning("the worker in %s did not stop in time; its builds will be done again", state_dir)


def _ask(state_dirs: Sequence[Path], deadline: float) -> None:
    for state_dir in state_dirs:
        with suppress(OSError):
            fresh = state_dir / f"{REQUEST_FILE}.new"
            fresh.write_text(str(deadline))
            fresh.replace(state_dir / REQUEST_FILE)
