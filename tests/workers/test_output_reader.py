"""Outputs are read from their files where these can be read, else through the daemon; the object is the same."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.nix.path_info import PathInfo
from infra.objects.store import LocalObjectStore, ObjectStore
from tests.support.farm import nix_store
from tests.support.patience import PATIENCE_S
from workers.agent import outputs
from workers.agent.attempt_record import Moving
from workers.agent.daemon_pool import DaemonOpener, DaemonSession, SessionPool
from workers.agent.farm_sources import FarmSources
from workers.agent.output_reader import HERE_BYTES, OutputError, OutputReader
from workers.wire.messages import Output

from .conftest import STORE, AgentHarness

SIZES = [10, HERE_BYTES + 10, 9_000_000]


@dataclass
class BuiltOutputs:
    """A store with paths in it, and what reads them."""

    root: Path
    sessions: SessionPool
    objects: LocalObjectStore
    sources: FarmSources

    @property
    def files(self) -> Path:
        return self.root / "store" / STORE.lstrip("/")

    def reader(self, files: Path | None) -> OutputReader:
        return OutputReader(self.sessions, files)

    async def add(self, size: int) -> PathInfo:
        """Add a file that does not compress."""
        file = self.root / f"file-{size}"
        file.write_bytes(os.urandom(size))
        done = nix_store(self.root / "store", "--add", str(file))
        [info] = (await self.reader(None).infos([done.stdout.strip()])).values()
        return info

    async def deliver(self, reader: OutputReader, info: PathInfo, moving: Moving | None = None) -> Output:
        sources = self.sources
        [output] = await outputs.deliver(
            reader, lambda: sources, {"out": info}, "", within_s=0.0, waits=lambda _: None, moving=moving
        )
        return output

    def left(self, folder: str) -> list[Path]:
        place = self.root / "objects" / folder
        return sorted(place.iterdir()) if place.exists() else []


@pytest.fixture
async def built(bench: AgentHarness, tmp_path: Path) -> AsyncIterator[BuiltOutputs]:
    argv = ["nix-daemon", "--stdio", "--store", str(tmp_path / "store"), "--option", "build-users-group", ""]
    objects = LocalObjectStore(tmp_path / "objects")
    async with AsyncExitStack() as stack:
        sources = FarmSources(bench.farm, objects)
        stack.push_async_callback(sources.close)
        session = DaemonSession(DaemonOpener(argv, STORE))
        stack.push_async_callback(session.close)
        yield BuiltOutputs(tmp_path, SessionPool([session]), objects, sources)


@pytest.mark.parametrize("size", SIZES)
async def test_files_and_the_daemon_give_the_same_object(built: BuiltOutputs, size: int) -> None:
    info = await built.add(size)
    moving = Moving()
    read = await built.deliver(built.reader(built.files), info, moving)
    assert (moving.done_bytes, moving.path) == (info.nar_size, info.store_path)
    assert read == await built.deliver(built.reader(None), info)
    assert read.nar_hash == info.nar_hash
    assert len(built.left("nar")) == 1
    assert built.left("incoming") == []
    built.sources.store = ObjectStore("memory:///")
    assert read == await built.deliver(built.reader(built.files), info)


async def test_files_that_are_not_there_are_asked_of_the_daemon(built: BuiltOutputs) -> None:
    info = await built.add(100_000)
    moving = Moving()
    elsewhere = built.reader(built.root / "elsewhere")
    assert await built.deliver(elsewhere, info, moving) == await built.deliver(built.reader(None), info)
    assert moving.done_bytes == info.nar_size


@pytest.mark.parametrize("size", SIZES)
async def test_an_output_that_changed_since_it_was_built_is_not_delivered(built: BuiltOutputs, size: int) -> None:
    info = await built.add(size)
    place = built.files / info.base_name
    place.chmod(0o644)
    data = bytearray(place.read_bytes())
    # A flipped bit, since a byte put in another's place may be that byte.
    data[0] ^= 1
    place.write_bytes(data)
    with pytest.raises(OutputError, match="changed since it was built"):
        await built.deliver(built.reader(built.files), info)
    assert built.left("incoming") == []


class HeldStore(LocalObjectStore):
    """A store whose writer stops after each piece until it may go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def put_pieces_now(self, pieces: Iterable[bytes], key: Callable[[], str]) -> None:
        def held() -> Iterator[bytes]:
            for piece in pieces:
                yield piece
                self.begun.set()
                self.go_on.wait(PATIENCE_S)

        super().put_pieces_now(held(), key)


async def test_a_delivery_that_is_cancelled_leaves_nothing(built: BuiltOutputs) -> None:
    info = await built.add(9_000_000)
    held = built.sources.store = HeldStore(built.root / "objects")
    delivery = asyncio.create_task(built.deliver(built.reader(built.files), info))
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.to_thread(held.begun.wait, PATIENCE_S)
    delivery.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not delivery.done()
    held.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await delivery
    assert built.left("incoming") == built.left("nar") == []
