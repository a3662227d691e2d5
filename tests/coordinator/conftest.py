"""A whole coordinator in this process: real SQLite, real HTTP, real agents over real Nix; only Ray is left out."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from coordinator.api.models import Ended, StepStatus, SubmissionView, WatchEvent
from coordinator.api.requests import ClientStage, IntakeQuery, RootRequest, SubmitRequest
from coordinator.api.sent_streams import encode_derivations, in_thread
from coordinator.client.api_client import ApiClient
from coordinator.client.closure import LocalStore, describe_sources, read_closure
from coordinator.config import LimitSettings, OwnerSettings, Settings
from coordinator.evaluation.inputs import Inputs, evaluation_of
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.main import Coordinator, FleetFactory, open_coordinator
from infra.clock import Clock
from infra.nix.store_path import base_name_of
from tests.support.local_fleet import InProcessFleet
from tests.support.patience import PATIENCE_S
from workers.agent.agent import Agent
from workers.agent.settings import WorkerSettings
from workers.wire.fleet import Fleet
from workers.wire.messages import FarmInfo

PRELUDE = """
let
  run = name: script: runOn "x86_64-linux" {} name script;
  runOn = system: extra: name: script: derivation ({
    inherit name system; builder = "/bin/sh"; args = [ "-c" script ];
    PATH = "/bin";
  } // extra);
in
"""


@dataclasses.dataclass
class OpenedFarm:
    """A running coordinator, a client of it, and a place to evaluate."""

    __test__ = False

    coordinator: Coordinator
    client: ApiClient
    root: Path
    settings: Settings

    async def evaluate(self, text: str, *attrs: str) -> tuple[RootRequest, ...]:
        """Evaluate an attribute set and send what the farm lacks of it."""
        file = self.root / "default.nix"
        await asyncio.to_thread(file.write_text, PRELUDE + text)
        store = LocalStore(root=str(self.root / "client"))
        inputs = Inputs((str(file),), attrs=attrs, flags=("--option", "substituters", "", *store.flags))
        limits = PoolLimits(1, 2 << 30)
        wanted = (await evaluation_of(inputs, limits, env=os.environ, on_messages=lambda _: None)).wanted
        closure = read_closure(store, [each.drv for each in wanted])
        sources = [header.path for header in (await describe_sources(store, closure.sources)).headers]
        names = {base_name_of(path): path for path in closure.derivations}
        missing = await self.client.missing(
            IntakeQuery(store_dir="/nix/store", derivations=tuple(names), sources=tuple(sources))
        )
        wanting = set(missing.derivations)
        members = [(name, store.read(path)) for name, path in names.items() if name in wanting]
        if members:
            await self.client.send_derivations(in_thread(encode_derivations(members)))
        return tuple(RootRequest(attr=each.attr, drv=each.drv) for each in wanted)

    async def submit(
        self, text: str, *attrs: str, label: str = "", stages: tuple[ClientStage, ...] = ()
    ) -> SubmissionView:
        roots = await self.evaluate(text, *attrs)
        return await self.client.submit(SubmitRequest(roots=roots, label=label, stages=stages))

    async def watch(self, submission: str) -> list[WatchEvent]:
        """Read the whole stream of a submission."""
        async with asyncio.timeout(PATIENCE_S):
            return [event async for event in self.client.watch(submission)]

    async def ended(self, submission: str) -> SubmissionView:
        last = (await self.watch(submission))[-1]
        assert isinstance(last, Ended)
        return last.submission

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - what is waited for is another program's doing
                await asyncio.sleep(0.02)

    def open_gate(self, name: str) -> None:
        """Let go on what waits in a builder for a gate, see `waiting_for`."""
        (self.root / "gates" / name).touch()

    def key_of(self, name: str) -> str:
        """The key of the only step with this name."""
        (key,) = (row.key for row in self.coordinator.views.rows() if row.key[33:] == name)
        return key

    def states(self, submission: str) -> dict[str, StepStatus]:
        views = self.coordinator.views
        rows, _ = views.steps_after(views.submission(submission), frozenset(), 0, 1000)
        return {step.name: step.state for step in map(views.step_view, rows)}


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append(record)


@pytest.fixture(autouse=True)
def only_listed_refusals() -> Iterator[list[logging.LogRecord]]:
    """Fail a test in which a route refuses something with a status that its record does not list."""
    records, logger = _Records(), logging.getLogger("coordinator.http.routing")
    logger.addHandler(records)
    try:
        yield records.all
        assert [record.getMessage() for record in records.all] == []
    finally:
        logger.removeHandler(records)


OpenFarm = Callable[..., AbstractAsyncContextManager[OpenedFarm]]


def waiting_for(gate: str) -> str:
    """Return what a builder of a farm's own workers waits with until the test opens that gate."""
    return f"while [ ! -e /gates/{gate} ]; do sleep 0.1; done"


def nix_workers(
    root: Path,
    names: Sequence[str],
    kind: type[InProcessFleet] = InProcessFleet,
    nix_options: Mapping[str, str] | None = None,
) -> FleetFactory:
    """Workers with a chroot store each, in a fleet of that kind."""

    @asynccontextmanager
    async def start(info: FarmInfo) -> AsyncIterator[Fleet]:
        async with AsyncExitStack() as stack:
            agents = [
                await stack.enter_async_context(
                    Agent(
                        WorkerSettings(
                            name=name,
                            state_dir=root / name / "state",
                            store=str(root / name / "store"),
                            slots=2,
                            yield_to_others=False,
                            nix_options=dict(nix_options or {}),
                        )
                    )
                )
                for name in names
            ]
            yield kind(info, agents, long_poll_s=0.5)

    return start


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_dir=tmp_path / "farm", port=0, limits=LimitSettings(request_bytes=1024 * 1024))


@pytest.fixture
def open_farm(tmp_path: Path, settings: Settings) -> OpenFarm:
    """Start a farm in the test's directory; may be called again after the block, which is a restart."""

    @asynccontextmanager
    async def start(
        *names: str,
        fleet: FleetFactory | None = None,
        clock: Clock | None = None,
        owners: tuple[OwnerSettings, ...] = (),
    ) -> AsyncIterator[OpenedFarm]:
        gates = tmp_path / "gates"
        gates.mkdir(exist_ok=True)
        options = {"sandbox-paths": f"/bin/sh=/bin/busybox /gates={gates}"}
        factory = fleet or nix_workers(tmp_path / "workers", names, nix_options=options)
        told = settings.model_copy(update={"owners": owners}) if owners else settings
        async with (
            open_coordinator(told, factory, clock=clock) as coordinator,
            ApiClient(coordinator.ready.url, coordinator.ready.token_file.read_text().strip()) as client,
        ):
            yield OpenedFarm(coordinator, client, tmp_path, settings)

    return start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-screens", action="store_true", help="write tests/coordinator/screens anew")


@pytest.fixture
def rewrite_screens(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--rewrite-screens", default=False))
