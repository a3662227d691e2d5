"""Many streams of events of one submission: how long an event takes to the last of them, and what they cost."""

from __future__ import annotations

import asyncio
import socket
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from coordinator.http.connections import raise_descriptor_limit
from tests.benchmarks.observability_farm import UNREAD_S, Place
from tests.benchmarks.observability_loads import PATIENCE_S, SLICE_S, coordinator
from tests.benchmarks.processes import memory_mb, processor_s
from tests.benchmarks.report import progress
from tests.support.loop import LoopStalls

#: Streams that are opened at one time.
OPENED_AT_ONCE: Final = 50
#: Steps of the submission, and those built before.
STEPS, BUILT = 5_000, 100
#: Seconds in which all that follows from a report has arrived.
QUIET_S: Final = 2.0
_WANTED: Final = b"event: step"


def watchers(root: Path, count: int, runs: int) -> dict[str, object]:
    """Measure `count` watchers."""
    raise_descriptor_limit()
    with coordinator(root, STEPS, BUILT) as (place, process):
        return asyncio.run(_measure(place, process, count, runs))


async def _measure(place: Place, process: subprocess.Popen[str], count: int, runs: int) -> dict[str, object]:
    def build(number: int) -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"build {number}\n")
        process.stdin.flush()
        return float(process.stdout.readline().split()[0])

    before_mb = memory_mb(place.pid)
    streams = Watchers(place, count)
    with LoopStalls(place.url) as opening:
        began = time.monotonic()
        await streams.open()
        opened_s = time.monotonic() - began
    progress(f"{count} watchers after {opened_s:.1f} s")
    await asyncio.sleep(QUIET_S)
    latencies, costs = [], []
    with LoopStalls(place.url) as stalls:
        for _ in range(runs * 3):
            own_s = processor_s(place.pid)
            latencies.append(await streams.round(lambda: build(1)))
            await asyncio.sleep(QUIET_S)
            costs.append(processor_s(place.pid) - own_s)
            progress(f"last watcher after {latencies[-1]:.2f} s, {costs[-1]:.2f} s of processor")
        many = await streams.round(lambda: build(200))
        await asyncio.sleep(QUIET_S)
    return {
        "watchers": count,
        "last_after_s": [round(statistics.median(latencies), 3), round(max(latencies), 3)],
        "last_after_s_of_200_reports": round(many, 3),
        "processor_s_an_event": round(statistics.median(costs), 3),
        "slices_over_50_ms": stalls.over(SLICE_S),
        "slices_over_50_ms_while_opening": opening.over(SLICE_S),
        "opened_in_s": round(opened_s, 1),
        "memory_mb_before_and_with_all": [round(before_mb), round(memory_mb(place.pid))],
        "stalled_reader_dropped_after_s": await _stalled(place, streams, build),
    }


async def _stalled(place: Place, streams: Watchers, build: Callable[[int], float]) -> float | None:
    """Return how long one that reads nothing was kept, and counted, once there was too much for it; None: for ever."""
    dropped = _dropped(place)
    writer = await streams.stalled()
    began = time.monotonic()
    while _dropped(place) == dropped:
        if time.monotonic() - began > UNREAD_S * 10:
            return None
        await asyncio.to_thread(build, 200)
        await asyncio.sleep(0.3)
    took_s = time.monotonic() - began
    writer.transport.abort()
    return round(took_s, 1)


def _dropped(place: Place) -> str:
    with urllib.request.urlopen(f"{place.url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return next((line for line in lines if line.startswith("drover_connections_closed_total") and "silent" in line), "")


class Watchers:
    """Streams of events; a round ends when each has got an event of a step."""

    def __init__(self, place: Place, count: int) -> None:
        self._host, _, port = place.url.removeprefix("http://").partition(":")
        self._port = int(port)
        token = place.token_file.read_text().strip()
        path = f"/api/v1/submissions/{place.submission}/events"
        self.head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        self._count = count
        self.number = 0
        self._got = 0
        self._last_at = 0.0
        self._all = asyncio.Event()

    async def open(self) -> None:
        """Connect all, and wait for the first snapshot of each."""
        for first in range(0, self._count, OPENED_AT_ONCE):
            many = range(first, min(first + OPENED_AT_ONCE, self._count))
            await asyncio.gather(*(self._connect() for _ in many))

    async def stalled(self) -> asyncio.StreamWriter:
        """Connect one that does not read on."""
        # With little room in between: it is the coordinator's part of it that shall fill up.
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.connect((self._host, self._port))
        reader, writer = await asyncio.open_connection(sock=plain, limit=1 << 20)
        writer.write(self.head)
        await reader.readuntil(b"event: snapshot")
        transport: Any = writer.transport
        transport.pause_reading()
        return writer

    async def round(self, build: Callable[[], float]) -> float:
        """Return the seconds from a report until every watcher has an event of a step."""
        self.number += 1
        self._got = 0
        self._all.clear()
        began = await asyncio.to_thread(build)
        async with asyncio.timeout(PATIENCE_S):
            await self._all.wait()
        return self._last_at - began

    def note(self) -> None:
        """One more stream has an event of this round."""
        self._got += 1
        self._last_at = time.monotonic()
        if self._got == self._count:
            self._all.set()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        await loop.create_connection(lambda: _Stream(self, ready), self._host, self._port)
        async with asyncio.timeout(PATIENCE_S):
            await ready


class _Stream(asyncio.Protocol):
    """One stream."""

    def __init__(self, watchers: Watchers, ready: asyncio.Future[None]) -> None:
        self._watchers = watchers
        self._ready = ready
        self._round = 0
        self._end = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._watchers.head)

    def data_received(self, data: bytes) -> None:
        # What is looked for may come in two parts.
        text = self._end + data
        self._end = text[-len(_WANTED) :]
        if not self._ready.done():
            if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200 "):
                raise SystemExit(f"a watcher was refused: {data!r}")
            if b"event: snapshot" in text:
                self._ready.set_result(None)
        elif self._round != self._watchers.number and _WANTED in text:
            self._round = self._watchers.number
            self._watchers.note()
