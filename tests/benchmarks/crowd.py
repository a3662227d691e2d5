"""Five submissions of 20,000 steps each at one time, beside builds that run: what they cost everything else.

Measured before, while the five clients send and the farm takes them in, and with their 100,000 steps waiting: the time
of an answer about a submission and about the farm, and the time from a worker's report until a watcher has the event
of that very build. Builds run on at the same pace all the while; each comes through the whole of the coordinator. They
are of a submission that comes before the others, because the stand-in has few slots. Clients are processes of their own
that yield the processor to everything else (`nice`), as others' machines would be; their derivations are made before.
The peer of each figure is the target of 50 ms.

    python -m tests.benchmarks.crowd [--clients N] [--steps N] [--postgres]
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
from pydantic import BaseModel, ConfigDict

from coordinator.api.requests import IntakeQuery, RootRequest, SubmitRequest
from coordinator.api.sent_streams import encode_derivations, in_thread
from coordinator.client.api_client import ApiClient
from tests.benchmarks.observability_farm import Place
from tests.benchmarks.observability_loads import PATIENCE_S, SLICE_S, coordinator
from tests.benchmarks.processes import memory_mb, processor_s
from tests.benchmarks.report import arguments, progress, publish
from tests.benchmarks.restart_farm import layered
from tests.support.loop import LoopStalls
from tests.support.servers import MortalPostgres

TARGET_S: Final = 0.05
#: Steps of the submission whose builds run, and those built before.
STEPS, BUILT = 5_000, 100
#: Seconds of the phases that nothing ends, between two questions, and between two builds.
QUIET_S: Final = 15.0
ASK_EVERY_S: Final = 0.05
BUILD_EVERY_S: Final = 0.3


class Client(BaseModel):
    """What one client process is to do."""

    model_config = ConfigDict(frozen=True)

    url: str
    token_file: Path
    steps: int
    seed: int


async def send(client: Client) -> None:
    """Make a graph, say so, wait for a line, and submit it; prints the seconds until it was accepted."""
    everything, roots = layered(client.steps, client.seed)
    print("made", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    began = time.monotonic()
    async with ApiClient(client.url, client.token_file.read_text().strip()) as api:
        names = tuple(made.name for made in everything)
        missing = await api.missing(IntakeQuery(store_dir="/nix/store", derivations=names, sources=()))
        lacking = set(missing.derivations)
        members = ((made.name, made.data) for made in everything if made.name in lacking)
        await api.send_derivations(in_thread(encode_derivations(members)))
        wanted = tuple(RootRequest(attr=made.name, drv=made.drv) for made in roots)
        view = await api.submit(SubmitRequest(roots=wanted, label=f"crowd {client.seed}"))
    if view.counts.total != client.steps:
        raise SystemExit(f"{view.counts.total} steps were accepted, not {client.steps}")
    print(time.monotonic() - began, flush=True)


class Watcher:
    """A stream of events of the submission that builds: when each step was first seen to be built."""

    def __init__(self, http: aiohttp.ClientSession, place: Place) -> None:
        self._http = http
        self._url = f"{place.url}/api/v1/submissions/{place.submission}/events"
        self._opened = asyncio.Event()
        self._built: dict[str, asyncio.Future[float]] = {}

    async def run(self) -> None:
        async with self._http.get(self._url) as answer:
            answer.raise_for_status()
            kind = b""
            async for line in answer.content:
                if line.startswith(b"event: "):
                    kind = line.removeprefix(b"event: ").strip()
                elif line.startswith(b"data: ") and kind == b"snapshot":
                    self._opened.set()
                elif line.startswith(b"data: ") and kind == b"step":
                    step = json.loads(line.removeprefix(b"data: "))["step"]
                    if step["state"] in ("publishing", "done") and not self._seen(step["key"]).done():
                        self._seen(step["key"]).set_result(time.monotonic())

    async def opened(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._opened.wait()

    async def built(self, step: str) -> float:
        """Return when the event of a step's build came."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._seen(step)

    def _seen(self, step: str) -> asyncio.Future[float]:
        return self._built.setdefault(step, asyncio.get_running_loop().create_future())


class Probe:
    """Asks and builds at a steady pace while a phase lasts."""

    def __init__(self, place: Place, process: subprocess.Popen[str], watcher: Watcher) -> None:
        self._place = place
        self._process = process
        self._watcher = watcher
        self.answers: list[float] = []
        self.events: list[float] = []

    @asynccontextmanager
    async def phase(self) -> AsyncIterator[dict[str, Any]]:
        """Measure as long as the block runs; what it gives is filled at its end."""
        self.answers, self.events = [], []
        found: dict[str, Any] = {}
        own_s, began = processor_s(self._place.pid), time.monotonic()
        tasks = [asyncio.create_task(self._ask()), asyncio.create_task(self._build())]
        with LoopStalls(self._place.url) as stalls:
            yield found
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(ended, asyncio.CancelledError):
                    raise SystemExit(f"a probe failed: {ended!r}")
        found |= {
            "answer_ms": _spread(self.answers),
            "event_ms": _spread(self.events),
            "slices_over_50_ms": stalls.over(SLICE_S),
            "processor": round((processor_s(self._place.pid) - own_s) / (time.monotonic() - began), 2),
            "memory_mb": round(memory_mb(self._place.pid)),
        }

    async def _ask(self) -> None:
        token = self._place.token_file.read_text().strip()
        paths = (f"/api/v1/submissions/{self._place.submission}", "/api/v1/farm", "/api/v1/submissions?limit=10")
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as http:
            while True:
                for path in paths:
                    began = time.monotonic()
                    async with http.get(self._place.url + path) as answer:
                        answer.raise_for_status()
                        await answer.read()
                    self.answers.append(time.monotonic() - began)
                    await asyncio.sleep(ASK_EVERY_S)

    async def _build(self) -> None:
        while True:
            began, step = await asyncio.to_thread(self._one)
            self.events.append(await self._watcher.built(step) - began)
            await asyncio.sleep(BUILD_EVERY_S)

    def _one(self) -> tuple[float, str]:
        """Have one built; returns when the worker got to know, whose report follows at once, and the step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        began = time.monotonic()
        self._process.stdin.write("build 1\n")
        self._process.stdin.flush()
        return began, self._process.stdout.readline().split()[1]


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    picked = {"p50": statistics.median(ordered), "p95": ordered[int(len(ordered) * 0.95)], "most": ordered[-1]}
    return {name: round(1000 * value, 1) for name, value in picked.items()} | {"count": len(ordered)}


async def measure(place: Place, process: subprocess.Popen[str], clients: int, steps: int) -> dict[str, Any]:
    makers = [await _start(Client(url=place.url, token_file=place.token_file, steps=steps, seed=100 + number))
              for number in range(clients)]  # fmt: skip
    for maker in makers:
        assert (await _line(maker)) == "made"
    token = place.token_file.read_text().strip()
    headers, patience = {"Authorization": f"Bearer {token}"}, aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(headers=headers, timeout=patience, read_bufsize=1 << 20) as http:
        watcher = Watcher(http, place)
        watching = asyncio.create_task(watcher.run())
        await watcher.opened()
        found = await _phases(Probe(place, process, watcher), makers)
        watching.cancel()
    return found


async def _phases(probe: Probe, makers: Sequence[asyncio.subprocess.Process]) -> dict[str, Any]:
    async with probe.phase() as before:
        await asyncio.sleep(QUIET_S)
    progress(f"before: {before}")
    async with probe.phase() as during:
        for maker in makers:
            assert maker.stdin is not None
            maker.stdin.write(b"go\n")
            await maker.stdin.drain()
        accepted = [float(await _line(maker)) for maker in makers]
    progress(f"during: {during}")
    async with probe.phase() as after:
        await asyncio.sleep(QUIET_S)
    progress(f"after: {after}")
    return {"accepted_s": [round(each, 1) for each in accepted], "before": before, "during": during, "after": after}


async def _start(client: Client) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        "nice", "-n", "10", sys.executable, "-m", "tests.benchmarks.crowd", "--client", client.model_dump_json(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        line = await process.stdout.readline()
    if not line:
        raise SystemExit("a client ended early; its message is above")
    return line.decode().strip()


@contextmanager
def _database(*, postgres: bool) -> Iterator[str]:
    """Give the address of an empty database of a PostgreSQL for as long as the block runs, or nothing."""
    if not postgres:
        yield ""
        return
    # A socket's path has at most 107 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="drover-pg-") as directory,
        MortalPostgres(Path(directory), durable=True) as running,
    ):
        yield running.server.url(running.server.create_database())


def main() -> None:
    parser = arguments(__doc__ or "", runs=1)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20_000, help="of each client (default: %(default)s)")
    parser.add_argument("--postgres", action="store_true", help="on a PostgreSQL of its own instead of SQLite")
    parser.add_argument("--client", help="for the bench itself: be one client")
    options = parser.parse_args()
    if options.client:
        asyncio.run(send(Client.model_validate_json(options.client)))
        return
    with (
        tempfile.TemporaryDirectory(prefix="drover-bench-") as directory,
        _database(postgres=options.postgres) as url,
        coordinator(Path(directory), STEPS, BUILT, url) as (place, process),
    ):
        found = asyncio.run(measure(place, process, options.clients, options.steps))
    bench = "crowd on PostgreSQL" if options.postgres else "crowd"
    for phase in ("before", "during", "after"):
        for what in ("answer_ms", "event_ms"):
            publish(
                f"{bench} {phase}: {what.partition('_')[0]}", ours=[found[phase][what]["p95"]], peer=[TARGET_S * 1000],
                unit="ms (95 of 100)", bigger_is_better=False, as_json=False, most=found[phase][what]["most"],
            )  # fmt: skip
    print(json.dumps({"bench": "crowd", **found}), flush=True)


if __name__ == "__main__":
    main()
