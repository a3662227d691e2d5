"""A coordinator with remote evaluation, without workers, and trees to send it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.api.evaluations import EvaluationView
from coordinator.api.requests import RemoteEvaluationRequest
from coordinator.api.sent_streams import in_thread
from coordinator.api.trees import compressed
from coordinator.client.api_client import ApiClient
from coordinator.config import OwnerSettings, Settings
from coordinator.environment_settings import EnvironmentSettings
from coordinator.main import Coordinator, open_coordinator
from coordinator.remote_settings import RemoteEvaluationSettings
from infra.nix.nar import NarData, NarDirectory, NarDirectoryEnd, NarEvent, NarFile, NarSymlink, write_events
from tests.support.local_fleet import no_workers
from tests.support.patience import PATIENCE_S

#: A derivation called as its attribute.
DERIVATION = 'derivation { name = "%s"; system = "x86_64-linux"; builder = "/bin/sh"; }'
#: A file's text, or for a symlink its target.
Files = Mapping[str, str | bytes | Path]


def events(files: Files) -> Iterator[NarEvent]:
    """Yield the NAR of a tree without the checks that a client makes; a `Path` is a symlink's target."""
    tree: dict[bytes, Any] = {}
    for path, value in files.items():
        *above, last = path.encode("utf-8", "surrogateescape").split(b"/")
        at = tree
        for name in above:
            at = at.setdefault(name, {})
        at[last] = value
    yield from _directory(b"", tree)


def _directory(name: bytes, tree: Mapping[bytes, Any]) -> Iterator[NarEvent]:
    yield NarDirectory(name)
    for each, value in sorted(tree.items()):
        if isinstance(value, dict):
            yield from _directory(each, value)
        elif isinstance(value, Path):
            yield NarSymlink(each, str(value).encode())
        else:
            data = value.encode() if isinstance(value, str) else value
            yield NarFile(each, False, len(data))
            if data:
                yield NarData(data)
    yield NarDirectoryEnd()


@dataclass
class RemoteFarm:
    """A running coordinator and a client of it."""

    __test__ = False

    coordinator: Coordinator
    client: ApiClient
    settings: Settings

    async def send(self, nar_events: Iterable[NarEvent]) -> str:
        """Send a tree; returns its name."""
        nar = await asyncio.to_thread(lambda: b"".join(write_events(nar_events)))
        name = hashlib.sha256(nar).hexdigest()
        await self.client.send_tree(name, in_thread(compressed([nar])))
        return name

    async def begin(self, files: Files, **ask: Any) -> EvaluationView:
        """Send a tree and begin its evaluation."""
        if not {"file", "expression"} & ask.keys():
            ask["file"] = "default.nix"
        return await self.client.evaluate(RemoteEvaluationRequest(tree=await self.send(events(files)), **ask))

    async def end(self, evaluation: str) -> EvaluationView:
        """Return an evaluation once it has ended."""
        async with asyncio.timeout(PATIENCE_S):
            view = await self.client.evaluation(evaluation)
            while not view.state.ended:
                view = await self.client.evaluation(evaluation, view.state)
        return view

    async def evaluate(self, files: Files, **ask: Any) -> EvaluationView:
        """Evaluate a tree to its end."""
        return await self.end((await self.begin(files, **ask)).id)

    async def attribute(self, expression: str, **ask: Any) -> EvaluationView:
        """Evaluate a set with an attribute `bad` that is an expression, beside a good one."""
        good = DERIVATION % "good"
        return await self.evaluate({"default.nix": f"{{ good = {good}; bad = {expression}; }}"}, **ask)


@asynccontextmanager
async def remote_farm(
    root: Path,
    owner: OwnerSettings | None = None,
    environments: EnvironmentSettings | None = None,
    /,
    **remote: Any,
) -> AsyncIterator[RemoteFarm]:
    """Run a coordinator for as long as the block does."""
    wanted = {"enabled": True, "memory_mib": 1024, "scratch_mib": 128, "timeout_s": PATIENCE_S, "at_once": 2, **remote}
    settings = Settings(
        state_dir=root / "state",
        port=0,
        owners=(owner,) if owner else (),
        environments=environments or EnvironmentSettings(),
        remote_evaluation=RemoteEvaluationSettings(**wanted),
    )
    async with open_coordinator(settings, no_workers) as coordinator:
        token = coordinator.ready.token_file.read_text().strip()
        async with ApiClient(coordinator.ready.url, token) as client:
            yield RemoteFarm(coordinator, client, settings)
