"""Store of an evaluation that imports from derivations: the client's own, whose builds the farm makes.

Each evaluator speaks with a socket of its own, behind which a `nix-daemon --stdio` of the client's store stands
(`infra.daemon.proxy`). Before that daemon gets a request to build, `ImportBuilds` has made the outputs valid in the
store, so that it has nothing left to do; and its `max-jobs` is 0.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import quote

from coordinator.evaluation.source import NixValue

#: The daemon must look again for what it did not find before the build.
_DAEMON: Final = ("nix-daemon", "--stdio", "--option", "narinfo-cache-negative-ttl", "0")
_BUILD_NOTHING: Final = ("--option", "max-jobs", "0", "--option", "builders", "")
#: Says that an evaluation needs a build which it may not make.
NO_IMPORTS: Final = ("--option", "allow-import-from-derivation", "false")


class ImportBuilds(Protocol):
    """Maker of what an evaluation imports."""

    async def build(self, paths: Sequence[str], attr: str) -> str | None:
        """Make paths (`PATH.drv!out`) valid in the client's store.

        Returns None, or the error that the attribute ends in.
        """


class ImportDoor:
    """The store as one evaluator sees it."""

    def __init__(self, url: str, close: Callable[[], None]) -> None:
        self._url = url
        self._close = close

    def source(self, source: NixValue) -> NixValue:
        """Return a source that is evaluated through this door."""
        flags = _without_store(source.flags)
        return replace(source, flags=(*flags, "--store", self._url, *_BUILD_NOTHING))

    def close(self) -> None:
        """End its connections."""
        self._close()


class ImportStore:
    """Doors to one store. Make it with `open_store`."""

    def __init__(self, directory: Path, builds: ImportBuilds, env: Mapping[str, str]) -> None:
        self._directory = directory
        self._builds = builds
        self._env = env
        self._doors: list[ImportDoor] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def door(
        self, source: NixValue, attr: Callable[[], str], pause: Callable[[], None], resume: Callable[[], None]
    ) -> ImportDoor:
        """Open a door for one evaluator.

        Args:
            source: What it evaluates; its flags say which store.
            attr: Returns the attribute that is evaluated now.
            pause: Called when a build begins, for which no evaluation is to blame.
            resume: Called when it has ended.
        """
        # Slow to import, and few evaluations import from derivations.
        from infra.daemon.channel import Channel  # noqa: PLC0415
        from infra.daemon.child import Child  # noqa: PLC0415
        from infra.daemon.errors import DaemonError  # noqa: PLC0415
        from infra.daemon.proxy import serve_client  # noqa: PLC0415

        path = str(self._directory / str(len(self._doors)))
        root = store_root(source.flags)

        async def before_build(paths: Sequence[str]) -> str | None:
            pause()
            try:
                return await self._builds.build(paths, attr())
            finally:
                resume()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            client = Channel(reader, writer)
            try:
                child = await Child.start([*_DAEMON, *(("--store", root) if root else ())], self._env)
                upstream = Channel(child.reader, child.writer, child)
                try:
                    await serve_client(client, upstream, before_build)
                finally:
                    await upstream.close()
            except DaemonError:
                pass  # The evaluator says that its store ended, with the attribute that it was at.
            finally:
                await client.close()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(serve(reader, writer), name="store of an evaluator")
            mine.add(task)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(mine.discard)

        def close() -> None:
            server.close()
            for task in mine:
                task.cancel()

        mine: set[asyncio.Task[None]] = set()
        server = await asyncio.start_unix_server(connected, path)
        door = ImportDoor(f"unix://{path}" + (f"?root={quote(root)}" if root else ""), close)
        self._doors.append(door)
        return door

    async def close(self) -> None:
        """End all connections."""
        for door in self._doors:
            door.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def open_store(builds: ImportBuilds, env: Mapping[str, str]) -> AsyncIterator[ImportStore]:
    """Open the client's store for evaluators, as long as the block runs."""
    # Below /tmp, because the path of a socket has at most 107 bytes (on macOS 103).
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="drover-", dir="/tmp"))  # noqa: S108 - 0700
    store = ImportStore(directory, builds, env)
    try:
        yield store
    finally:
        await store.close()
        with suppress(OSError):
            await asyncio.to_thread(shutil.rmtree, directory)


def store_root(flags: Sequence[str]) -> str:
    """Return the directory of `--store DIR`; empty: the machine's own store."""
    return flags[flags.index("--store") + 1].rstrip("/") if "--store" in flags else ""


def _without_store(flags: Sequence[str]) -> tuple[str, ...]:
    if "--store" not in flags:
        return tuple(flags)
    at = flags.index("--store")
    return (*flags[:at], *flags[at + 2 :])


def may_import(flags: Sequence[str]) -> bool:
    """Return whether an evaluation with these flags may import from derivations."""
    return NO_IMPORTS[1:] not in {tuple(flags[at : at + 2]) for at in range(len(flags))}
