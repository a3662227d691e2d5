"""`drover cache push` whose process is killed: nothing half is published, and the next push goes on where it was."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

import pytest

from coordinator.config import Settings
from tests.support.farm import nix_store
from tests.support.patience import PATIENCE_S
from tests.support.uploads import Site, opened

#: Bytes of a path that travels alone, in two pieces, and paths that travel in packs.
LARGE_BYTES: Final = 6 * 1024 * 1024
SMALL_PATHS: Final = 3


class Gate:
    """A port before a coordinator that lets so many bytes of its clients through, and then no more."""

    def __init__(self, url: str, allowed: int) -> None:
        self._to = urlsplit(url)
        self._allowed = allowed
        self.passed = 0
        self.reached = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1")
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, onward = await asyncio.open_connection(self._to.hostname, self._to.port)
        answers = asyncio.create_task(self._answers(there, writer))
        try:
            while data := await reader.read(64 * 1024):
                data = data[: self._allowed - self.passed]
                self.passed += len(data)
                onward.write(data)
                await onward.drain()
                if self.passed == self._allowed:
                    self.reached.set()
        except ConnectionError:
            pass
        finally:
            onward.close()
            answers.cancel()
            await asyncio.wait([answers])
            writer.close()

    async def _answers(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The answer to the last bytes is not seen by the client.
        while (data := await there.read(64 * 1024)) and not self.reached.is_set():
            writer.write(data)
            await writer.drain()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield await opened(stack, Settings(state_dir=tmp_path / "farm", port=0))


def closure(root: Path, name: str) -> list[str]:
    """Add a large path and some small ones, new to every cache, to the store below `root`."""
    files = []
    for number in range(SMALL_PATHS + 1):
        file = root / f"{name}-{number}"
        file.write_bytes(os.urandom(2000 if number else LARGE_BYTES))
        files.append(str(file))
    done = nix_store(root / "store", "--add", *files)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


async def pusher(site: Site, root: Path, url: str, paths: list[str]) -> asyncio.subprocess.Process:
    words = ("cache", "push", "--json", "--store", str(root / "store"), "--keep-as", "it", *paths)
    farm = ("--coordinator", url, "--token-file", str(site.coordinator.ready.token_file))
    drover = Path(sys.executable).parent / "drover"
    return await asyncio.create_subprocess_exec(drover, *words, *farm, stdout=asyncio.subprocess.PIPE)


async def push(site: Site, root: Path, url: str, paths: list[str]) -> int:
    """Push to the end; returns how many bytes of objects were sent."""
    process = await pusher(site, root, url, paths)
    printed, _ = await process.communicate()
    said = json.loads(printed)
    assert (process.returncode, said["failed"], said["published"] + said["present"]) == (0, [], len(paths))
    return int(said["sent_bytes"])


async def test_a_pusher_that_is_killed_publishes_nothing_half_and_the_next_takes_up_where_it_was(
    site: Site, tmp_path: Path
) -> None:
    url = site.coordinator.ready.cache_url.removesuffix("/cache")
    objects = site.coordinator.cache.objects

    async def published(paths: list[str]) -> list[bool]:
        return [await site.nar(path.rpartition("/")[2]) is not None for path in paths]

    async def arrived_bytes() -> int:
        return sum([entry.size_bytes async for entry in objects.list("incoming")])

    async def until_arrived(size: int) -> None:
        # What was let through is kept block by block.
        for _ in range(30_000):
            if await arrived_bytes() >= size:
                return
            await asyncio.sleep(0.01)
        pytest.fail(f"{size} bytes were let through, and are not kept")

    async with Gate(url, sys.maxsize) as gate:
        sent_bytes = await push(site, tmp_path, gate.url, closure(tmp_path, "whole"))
        whole = gate.passed
    # Names of one length, since what is sent holds them: the last ends in the midst of the commit's body.
    for name, allowed in (("start", 200), ("early", whole // 4), ("later", whole * 3 // 4), ("ended", whole - 100)):
        paths = closure(tmp_path, name)
        async with asyncio.timeout(PATIENCE_S), Gate(url, allowed) as gate:
            process = await pusher(site, tmp_path, gate.url, paths)
            await gate.reached.wait()
            if name == "later":
                await until_arrived(LARGE_BYTES // 4)
            process.kill()
            assert await process.wait() < 0
        assert await published(paths) == [False] * len(paths), name
        again = await push(site, tmp_path, url, paths)
        assert await published(paths) == [True] * len(paths), name
        if name in {"later", "ended"}:
            assert again < sent_bytes - LARGE_BYTES // 4, name
        assert await arrived_bytes() == 0, name
