"""Store of an evaluation that imports from derivations: the client's own, whose builds the farm makes.

Each evaluator speaks with a socket of its own, behind which a `nix-daemon --stdio` of the client's store stands
(`infra.daemon.proxy`). An evaluator never waits for a build: a request for outputs that are not there is refused with a
mark, which comes back in what Nix prints of the attribute. That attribute is evaluated again when the build has ended.
A request gets to the daemon only when `ImportBuilds` has made the outputs valid in the store, so that the daemon has
nothing left to do; and its `max-jobs` is 0.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import quote

from coordinator.evaluation.source import NixValue, store_root

#: The daemon must look again for what it did not find before the build.
_DAEMON: Final = ("nix-daemon", "--stdio", "--option", "narinfo-cache-negative-ttl", "0")
_BUILD_NOTHING: Final = ("--option", "max-jobs", "0", "--option", "builders", "")
#: Says that an evaluation needs a build which it may not make.
NO_IMPORTS: Final = ("--option", "allow-import-from-derivation", "false")


class ImportBuilds(Protocol):
    """Maker of what an evaluation imports."""

    async def are_there(self, paths: Sequence[str]) -> bool:
        """Return whether paths (`PATH.drv!out`) are valid in the client's store."""

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
    """Doors to one store, and the builds that were asked for at them. Make it with `open_store`."""

    def __init__(self, builds: ImportBuilds, env: Mapping[str, str]) -> None:
        self._maker = builds
        self._env = env
        #: Made with the first door.
        self._directory: Path | None = None
        self._opening = asyncio.Lock()
        self._doors: list[ImportDoor] = []
        self._tasks: set[asyncio.Task[None]] = set()
        #: What nothing that is evaluated can guess.
        self._mark = f"drover-{os.urandom(16).hex()} waits for build "
        self._marked = re.compile(re.escape(self._mark) + "([0-9]+)")
        #: Paths of each request that was refused, by its number, and the numbers by paths.
        self._requests: list[tuple[str, ...]] = []
        self._numbers: dict[tuple[str, ...], int] = {}
        #: Builds that have begun, by the number of their request.
        self._builds: dict[int, asyncio.Task[str | None]] = {}

    def awaited(self, messages: str) -> int | None:
        """Return the number of the request that ended an attribute; None where something else did."""
        match = self._marked.search(messages)
        return int(match[1]) if match else None

    def build(self, number: int, attr: str) -> asyncio.Task[str | None]:
        """Begin the build of a request, unless it has begun; the first attribute that wants it names it."""
        if number not in self._builds:
            build = self._maker.build(self._requests[number], attr)
            self._builds[number] = asyncio.create_task(build, name="build of an import")
        return self._builds[number]

    async def _before_build(self, paths: Sequence[str]) -> str | None:
        """Return None where the daemon has nothing to build, or else the error that the evaluator gets."""
        wanted = tuple(sorted(paths))
        number = self._numbers.get(wanted)
        build = None if number is None else self._builds.get(number)
        if build is not None and build.done():
            return build.result()
        if build is None and await self._maker.are_there(wanted):
            return None
        if wanted not in self._numbers:
            self._numbers[wanted] = len(self._requests)
            self._requests.append(wanted)
        return f"{self._mark}{self._numbers[wanted]}"

    async def door(self, source: NixValue) -> ImportDoor:
        """Open a door for one evaluator of a source, whose flags say which store."""
        # Slow to import, and few evaluations import from derivations.
        from infra.daemon.channel import Channel  # noqa: PLC0415
        from infra.daemon.child import Child  # noqa: PLC0415
        from infra.daemon.errors import DaemonError  # noqa: PLC0415
        from infra.daemon.proxy import serve_client  # noqa: PLC0415

        async with self._opening:
            if self._directory is None:
                import tempfile  # noqa: PLC0415 - slow to import

                # Below /tmp, because the path of a socket has at most 107 bytes (on macOS 103).
                made = await asyncio.to_thread(tempfile.mkdtemp, prefix="drover-", dir="/tmp")  # noqa: S108 - 0700
                self._directory = Path(made)
        path = str(self._directory / str(len(self._doors)))
        root = store_root(source.flags)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            client = Channel(reader, writer)
            try:
                child = await Child.start([*_DAEMON, *(("--store", root) if root else ())], self._env)
                upstream = Channel(child.reader, child.writer, child)
                try:
                    await serve_client(client, upstream, self._before_build)
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
        """End all connections, and the wait for builds."""
        for door in self._doors:
            door.close()
        for build in self._builds.values():
            build.cancel()
        await asyncio.gather(*self._tasks, *self._builds.values(), return_exceptions=True)
        if self._directory is not None:
            import shutil  # noqa: PLC0415 - slow to import

            with suppress(OSError):
                await asyncio.to_thread(shutil.rmtree, self._directory)


@asynccontextmanager
async def open_store(builds: ImportBuilds, env: Mapping[str, str]) -> AsyncIterator[ImportStore]:
    """Open the client's store for evaluators, as long as the block runs."""
    store = ImportStore(builds, env)
    try:
        yield store
    finally:
        await store.close()


def _without_store(flags: Sequence[str]) -> tuple[str, ...]:
    if "--store" not in flags:
        return tuple(flags)
    at = flags.index("--store")
    return (*flags[:at], *flags[at + 2 :])


def may_import(flags: Sequence[str]) -> bool:
    """Return whether an evaluation with these flags may import from derivations."""
    return NO_IMPORTS[1:] not in {tuple(flags[at : at + 2]) for at in range(len(flags))}
