"""Real agents over real `nix-daemon` processes and chroot stores, a real cache over HTTP beside them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from infra.nix import aterm, narinfo, signing
from infra.nix.derivation import Derivation, DerivationOutput
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import StoreDir
from infra.objects.store import open_object_store
from tests.support.patience import PATIENCE_S
from workers.agent.agent import Agent
from workers.agent.settings import WorkerSettings
from workers.wire.messages import Batch, BuildLimits, FarmInfo, LeaseOrder, Output, Report, StageChange, Succeeded

STORE = "/nix/store"
STORE_DIR = StoreDir(STORE)
KEY = signing.generate("farm-1", b"k" * 32)


def hash_part(text: str) -> str:
    """A hash part of its own for each text; input-addressed paths are not checked by the daemon."""
    alphabet = "0123456789abcdfghijklmnpqrsvwxyz"
    return "".join(alphabet[byte % 32] for byte in hashlib.sha256(text.encode()).digest()[:32])


def drv(
    name: str,
    script: str,
    *,
    outputs: Sequence[str] = ("out",),
    system: str = "x86_64-linux",
    env: Mapping[str, str] | None = None,
    fixed: tuple[str, str, str] | None = None,
) -> tuple[str, Derivation]:
    """A derivation that runs a shell script, as (drv path, derivation). `fixed` is (path, algorithm, hex)."""
    paths = {
        out: f"{STORE}/{hash_part(name + out + script)}-{name}" + ("" if out == "out" else f"-{out}") for out in outputs
    }
    made = tuple(DerivationOutput(out, paths[out]) for out in sorted(outputs))
    if fixed is not None:
        paths = {"out": fixed[0]}
        made = (DerivationOutput("out", *fixed),)
    variables = {"name": name, "system": system, "builder": "/bin/sh", **paths, **(env or {})}
    return f"{STORE}/{hash_part('drv' + name + script)}-{name}.drv", Derivation(
        outputs=made,
        input_drvs=(),
        input_srcs=(),
        system=system,
        builder="/bin/sh",
        args=(b"-c", script.encode()),
        env=tuple(sorted((key.encode(), value.encode()) for key, value in variables.items())),
    )


def order(made: tuple[str, Derivation], inputs: Sequence[str] = (), *, attempt: int = 1, **limits: int) -> LeaseOrder:
    path, derivation = made
    return LeaseOrder(
        step=path.rpartition("/")[2],
        attempt=attempt,
        drv_path=path,
        derivation=aterm.render(derivation),
        inputs=tuple(inputs),
        limits=BuildLimits.model_validate(limits),
    )


class FarmCache:
    """The coordinator's cache, reduced to the one question that workers ask."""

    def __init__(self) -> None:
        self.narinfos: dict[str, NarInfo] = {}
        self.questions: list[list[str]] = []
        #: Answers nothing while it is set.
        self.away = False
        #: Narinfos of one answer.
        self.at_most = 500
        #: Signs what is published; another key is a cache that is not the farm's.
        self.key = KEY

    def publish(self, output: Output) -> None:
        unsigned = output.narinfo()
        self.narinfos[unsigned.base_name] = unsigned.signed((self.key.sign(unsigned.path.fingerprint()),))

    async def answer(self, request: web.Request) -> web.Response:
        asked = (await request.json())["paths"]
        self.questions.append(asked)
        if self.away:
            raise web.HTTPServiceUnavailable
        found: dict[str, str] = {}
        missing: list[str] = []
        # The nearest first, as the coordinator does where it must leave some out.
        wanted = deque(asked)
        while wanted and len(found) < self.at_most:
            name = wanted.popleft()
            if name in found or name in missing:
                continue
            info = self.narinfos.get(name)
            if info is None:
                missing.append(name)
                continue
            found[name] = info.render().decode()
            wanted.extend(info.path.references)
        return web.json_response({"narinfos": list(found.values()), "missing": missing})


@dataclass
class ReportReader:
    """Events of one agent so far, put together as a coordinator would."""

    agent: Agent
    ack: int = 0
    logs: dict[str, bytes] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)
    stages: list[StageChange] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)

    async def hear(self, wait_s: float = 5.0, max_bytes: int = 1 << 20) -> Batch:
        batch = Batch.model_validate(await self.agent.events(self.ack, max_bytes, wait_s))
        self.ack = batch.last
        self.batches.append(batch)
        for event in batch.events:
            match event:
                case Report():
                    assert event.step not in self.reports, "a lease is reported once"
                    self.reports[event.step] = event
                case StageChange():
                    self.stages.append(event)
                case _:
                    so_far = self.logs.get(event.step, b"")
                    assert event.offset == len(so_far)
                    assert event.step not in self.reports, "no log comes after the report"
                    self.logs[event.step] = so_far + event.data
        return batch

    async def build(self, *orders: LeaseOrder) -> list[Report]:
        """Hand over the orders and wait for all of their reports."""
        await self.agent.start_many([one.dump() for one in orders])
        return await self.finish(*orders)

    async def finish(self, *orders: LeaseOrder) -> list[Report]:
        async with asyncio.timeout(PATIENCE_S):
            while not all(one.step in self.reports for one in orders):
                await self.hear()
        return [self.reports[one.step] for one in orders]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self.hear(0.2)


class BuilderGate:
    """What builders wait for until a test opens it: `WAITS` is their line, `options` are those of their agent."""

    WAITS = "while [ ! -e /gate/open ]; do sleep 0.1; done"

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._open = directory / "open"
        self.options = {"sandbox-paths": f"/bin/sh=/bin/busybox /gate={directory}"}

    def open(self) -> None:
        self._open.touch()


class AgentHarness:
    """Makes agents with stores of their own that serve one farm."""

    def __init__(self, root: Path, cache: FarmCache, farm: FarmInfo, stack: AsyncExitStack) -> None:
        self.root = root
        self.cache = cache
        self.farm = farm
        self._stack = stack

    async def agent(self, name: str = "one", *, greet: bool = True, **settings: Any) -> ReportReader:
        agent = Agent(
            WorkerSettings(
                name=name,
                state_dir=self.root / name / "state",
                store=str(self.root / name / "store"),
                **({"slots": 2, "yield_to_others": False} | settings),
            )
        )
        await self._stack.enter_async_context(agent)
        if greet:
            await agent.hello(self.farm.dump())
        return ReportReader(agent)

    def publish(self, report: Report) -> tuple[Output, ...]:
        """Put the outputs of a successful report into the cache."""
        assert isinstance(report.result, Succeeded), report.result
        for output in report.result.outputs:
            self.cache.publish(output)
        return report.result.outputs


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A temporary directory whose read-only store can be removed again."""
    yield tmp_path
    for directory, _, _ in os.walk(tmp_path):
        Path(directory).chmod(0o755)
    shutil.rmtree(tmp_path)


@pytest.fixture
async def bench(root: Path) -> AsyncIterator[AgentHarness]:
    cache = FarmCache()
    app = web.Application()
    app.router.add_post("/cache/narinfos", cache.answer)
    runner = web.AppRunner(app)
    objects_url = (root / "objects").as_uri()
    await open_object_store(objects_url).write_marker()
    async with AsyncExitStack() as stack:
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        farm = FarmInfo(
            cache_url=f"http://127.0.0.1:{port}/cache",
            public_keys=(str(KEY.public),),
            object_store_url=objects_url,
        )
        yield AgentHarness(root, cache, farm, stack)


@pytest.fixture
def gate(root: Path) -> BuilderGate:
    return BuilderGate(root / "gate")


Made = Callable[..., Awaitable[ReportReader]]


def nar_of(bench: AgentHarness, output: Output) -> bytes:
    """The NAR of an uploaded output."""
    import zstandard  # noqa: PLC0415 - only this helper needs it

    data = (bench.root / "objects" / output.url).read_bytes()
    assert len(data) == output.file_size
    with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
        nar: bytes = reader.read()
    assert len(nar) == output.nar_size
    return nar


def parse_narinfo(text: bytes) -> NarInfo:
    return narinfo.parse(text, STORE_DIR)
