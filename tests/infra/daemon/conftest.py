"""A real Nix daemon on a store of its own, and the small derivations that the stories build in it."""

import asyncio
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from infra.daemon import (
    BasicDerivation,
    BasicOutput,
    DaemonConnection,
    Options,
    Upload,
    open_stdio,
)
from infra.daemon.wire import Encoder
from infra.nix import base32
from infra.nix.hashing import compress_hash, sha256_text
from infra.nix.path_info import PathInfo
from infra.nix.store_path import base_name_of

SETTINGS = {
    "build-users-group": "",
    "sandbox": "true",
    "sandbox-fallback": "false",
    "sandbox-paths": "/bin/sh=/bin/busybox /bin/busybox",
    "substituters": "",
}


def store_path(name: str, seed: str = "") -> str:
    """Return a store path that nobody computed from anything."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return f"/nix/store/{base32.encode(compress_hash(digest))}-{name}"


def nar_of_file(content: bytes) -> bytes:
    """Return the NAR of a regular file."""
    out = Encoder()
    for token in (b"nix-archive-1", b"(", b"type", b"regular", b"contents", content, b")"):
        out.string(token)
    return out.getvalue()


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


class Store:
    """A chroot store, its connections, and derivations to build in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.connections: list[DaemonConnection] = []

    @property
    def command(self) -> list[str]:
        options = [word for name, value in SETTINGS.items() for word in ("--option", name, value)]
        return ["nix-daemon", "--stdio", "--store", str(self.directory), *options]

    @property
    def env(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.directory)}

    async def open(self, **overrides: str) -> DaemonConnection:
        connection = await open_stdio(self.command, self.env)
        self.connections.append(connection)
        await connection.set_options(Options(build_cores=1, overrides=overrides))
        return connection

    def derivation(
        self, name: str, script: str, *, inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = ("out",)
    ) -> tuple[str, BasicDerivation]:
        """Return the path and the derivation of a shell script, whose variables are its outputs."""
        paths = {o: store_path(name if o == "out" else f"{name}-{o}", script) for o in outputs}
        return store_path(f"{name}.drv", script), BasicDerivation(
            outputs=tuple(BasicOutput(o, path) for o, path in paths.items()),
            inputs=inputs,
            system="x86_64-linux",
            builder=b"/bin/sh",
            args=(b"-c", script.encode()),
            env=((b"name", name.encode()), *((o.encode(), path.encode()) for o, path in paths.items())),
        )

    def upload(self, name: str, content: bytes, *, references: tuple[str, ...] = ()) -> Upload:
        nar = nar_of_file(content)
        digest = hashlib.sha256(nar).digest()
        info = PathInfo(store_path(name), sha256_text(digest), len(nar), tuple(map(base_name_of, references)))
        return Upload(info, pieces(nar))


class Bare(Store):
    """A store without a chroot, whose builds run outside the sandbox; on Linux only then can a process escape."""

    @property
    def command(self) -> list[str]:
        return ["nix-daemon", "--stdio", "--option", "build-users-group", "", "--option", "sandbox", "false"]

    @property
    def env(self) -> dict[str, str]:
        places = {"NIX_STORE_DIR": "store", "NIX_STATE_DIR": "var", "NIX_LOG_DIR": "log", "NIX_CONF_DIR": "etc"}
        return super().env | {name: str(self.directory / place) for name, place in places.items()}

    async def open(self, **overrides: str) -> DaemonConnection:
        (self.directory / "var").mkdir(parents=True, exist_ok=True)
        return await super().open(**overrides)

    def derivation(
        self, name: str, script: str, *, inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = ("out",)
    ) -> tuple[str, BasicDerivation]:
        drv_path, made = super().derivation(name, script, inputs=inputs, outputs=outputs)
        here = str(self.directory / "store")
        moved = tuple(BasicOutput(out.name, out.path.replace("/nix/store", here)) for out in made.outputs)
        env = tuple((key, value.replace(b"/nix/store", here.encode())) for key, value in made.env)
        return drv_path.replace("/nix/store", here), replace(made, outputs=moved, env=env)


async def add(connection: DaemonConnection, upload: Upload, *, many: bool) -> None:
    """Add a path by either of the two operations."""
    if many:
        await connection.add_multiple_to_store([upload], dont_check_sigs=True)
    else:
        await connection.add_to_store_nar(upload, dont_check_sigs=True)


def processes_mentioning(text: str) -> list[int]:
    """Return the processes whose environment contains a text (a builder's has the paths of its outputs)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if text.encode() in environment:
                found.append(int(entry.name))
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come true; the test's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110 - the ends of other people's processes set no event
        await asyncio.sleep(0.01)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    value = Store(tmp_path / "store")
    yield value
    for connection in value.connections:
        await connection.close()


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A directory whose path is short enough for a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="dd") as directory:
        yield Path(directory)
