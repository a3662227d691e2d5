"""Requests to an agent to stop in order: files in its state directory, of it and of the program that started it.

    stop-request    written by the starter: Unix time after which running builds are handed back
    stop-bell       a pipe of the agent's; a byte from the starter means that there is a request
    stopped         written by the agent once it holds no lease and every event it sent is acknowledged

The agent takes no new lease from the request on. The program that stops a worker is not always connected to it (`drover
worker` only runs the node), so this does not go over the transport. A request lasts until the agent starts anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_log = logging.getLogger(__name__)

REQUEST_FILE = "stop-request"
STOPPED_FILE = "stopped"
BELL_FILE = "stop-bell"
#: How often either side looks, seconds, and an agent that has a bell.
LOOK_EVERY_S = 0.2
LOOK_BESIDE_BELL_S = 10.0
#: Read from the bell at one time; each request leaves one.
BELL_BYTES = 64
#: Seconds after the grace in which handed back builds are ended and reported.
FLUSH_S = 5.0


def requested(state_dir: Path) -> float | None:
    """Return the Unix time at which running builds are handed back; None without a request."""
    try:
        return float((state_dir / REQUEST_FILE).read_text())
    except (OSError, ValueError):
        return None


async def wait_for_request(state_dir: Path) -> float:
    """Return what `requested` does once there is a request; for the agent."""
    with _bell(state_dir) as rung:
        while (deadline := requested(state_dir)) is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S if rung is None else LOOK_BESIDE_BELL_S):
                    await (asyncio.Event() if rung is None else rung).wait()
            if rung is not None:
                rung.clear()
    return deadline


@contextmanager
def _bell(state_dir: Path) -> Iterator[asyncio.Event | None]:
    """Give an event that the bell sets; None where the file system has no pipes."""
    path, loop, rung = state_dir / BELL_FILE, asyncio.get_running_loop(), asyncio.Event()
    try:
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        # For both ways: a pipe without a writer is at its end all the time.
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield None
        return

    def hear() -> None:
        os.read(descriptor, BELL_BYTES)
        rung.set()

    loop.add_reader(descriptor, hear)
    try:
        yield rung
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


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
            bell = os.open(state_dir / BELL_FILE, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(bell, b"!")
            finally:
                os.close(bell)
