"""One farm for this folder: a native and an emulated worker, an upstream that lies on request, and locks to fill."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from infra.nix import aterm
from infra.nix.derivation import Derivation
from infra.nix.path_info import PathInfo
from infra.objects.nar_writer import upload_nar
from tests.support.cache import chunked
from tests.support.farm import FARMS, Farm, WorkerSpec, nix_store
from tests.support.package_set import SYSTEMS, PackageSet
from tests.support.patience import PATIENCE_S
from tests.support.upstreams import UPSTREAM_KEY, LyingUpstream, lying_upstream
from tests.support.wishes import flox_lock

BUSYBOX = {"sandbox-paths": "/bin/sh=/bin/busybox"}
_T = TypeVar("_T")


@dataclass
class PopulatedFarm:
    """The farm, the packages that locks are made of, and the upstream. Other tests of the folder share it."""

    farm: Farm
    upstream: LyingUpstream
    #: Runs something in the loop that serves the upstream.
    at_upstream: Callable[[Coroutine[Any, Any, Any]], Any]
    root: Path
    packages: PackageSet
    #: (attribute, system) -> its derivation's path, and the derivation.
    derivations: dict[tuple[str, str], tuple[str, Derivation]] = field(default_factory=dict)

    def entry(self, attr: str, system: str, **changes: Any) -> dict[str, Any]:
        """A package as Flox locks it, with its true derivation and output."""
        drv, derivation = self.derivations[attr, system]
        return {
            "attr_path": attr,
            "derivation": drv,
            "install_id": attr,
            "locked_url": "https://github.com/flox/nixpkgs?rev=4f0dadbf38ee4cf4cc38cbc232b7708fddf965bc",
            "name": drv[44:-4],
            "version": "1.0",
            "outputs_to_install": ["out", "out"],
            "outputs": {output.name: output.path for output in derivation.outputs},
            "system": system,
            "group": "toplevel",
            "priority": 5,
            **changes,
        }

    def output(self, attr: str, system: str = SYSTEMS[0]) -> str:
        path: str = self.entry(attr, system)["outputs"]["out"]
        return path

    def lock(self, name: str, entries: Sequence[Mapping[str, Any]]) -> Path:
        """Write a `manifest.lock` into a directory of its own."""
        file = self.root / name / "manifest.lock"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(flox_lock(entries, systems=SYSTEMS))
        return file

    def populate(self, *arguments: str | Path, **told: Any) -> tuple[int, dict[str, Any]]:
        """Run `drover populate`; returns its status and its JSON."""
        done = self.farm.drover("populate", "--store", self.farm.eval_store, "--json", *arguments, **told)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    def offer(self, attr: str, system: str = SYSTEMS[0], nar: bytes | None = None) -> str:
        """Let the upstream have a package, whose NAR is its text unless one is given; returns its path."""
        path = self.output(attr, system)

        async def publish() -> None:
            cache = self.upstream.cache
            uploaded = await upload_nar(cache.objects, chunked(nar or a_nar(attr)))
            await cache.publish([uploaded.narinfo(PathInfo(path, "", 0))])
            self.upstream.known.append(path)

        self.at_upstream(publish())
        return path


def a_nar(text: str) -> bytes:
    """The NAR of a file with a text."""

    def word(data: bytes) -> bytes:
        return len(data).to_bytes(8, "little") + data + b"\0" * (-len(data) % 8)

    words = ("nix-archive-1", "(", "type", "regular", "contents", text, ")")
    return b"".join(word(each.encode()) for each in words)


def evaluate(farm: Farm, packages: PackageSet) -> dict[tuple[str, str], tuple[str, Derivation]]:
    """Instantiate all packages for all systems into the client's store."""
    attrs = [attr for attr in packages.packages if "." not in attr]
    found = {}
    for system in SYSTEMS:
        names = [word for attr in attrs for word in ("-A", attr)]
        done = nix_instantiate(farm.eval_store, packages.file, *names, "--argstr", "system", system)
        for attr, drv in zip(attrs, done.split(), strict=True):
            data = Path(f"{farm.eval_store}{drv}").read_bytes()
            found[attr, system] = (drv, aterm.parse(data))
    return found


def nix_instantiate(store: Path, file: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["nix-instantiate", "--store", str(store), str(file), *arguments, "--option", "substituters", ""],
        env={**os.environ, "HOME": str(store)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def beside(make: Callable[[], Any]) -> Iterator[tuple[Any, Callable[[Coroutine[Any, Any, _T]], _T]]]:
    """Enter an asynchronous context in a loop of a thread of its own; gives what it gives, and what runs there."""
    ready: Future[Any] = Future()
    loop = asyncio.new_event_loop()
    end = asyncio.Event()

    async def serve() -> None:
        async with make() as made:
            ready.set_result(made)
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()

    def call(coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(PATIENCE_S)

    try:
        yield ready.result(PATIENCE_S), call
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(PATIENCE_S)
        loop.close()


@pytest.fixture(scope="session")
def populated(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[PopulatedFarm]:
    root = tmp_path_factory.mktemp("populate")

    @asynccontextmanager
    async def upstream() -> AsyncIterator[LyingUpstream]:
        async with lying_upstream(root / "upstream") as made:
            yield made

    with beside(upstream) as (served, call):
        settings = f"""
[cache]
[[cache.upstreams]]
url = "{served.url}"
public_keys = ["{UPSTREAM_KEY.public}"]
"""
        (root / "farm").mkdir()
        workers = [
            WorkerSpec("native", slots=4, nix_options=BUSYBOX),
            WorkerSpec("mac", slots=4, emulate=("aarch64-darwin",), nix_options=BUSYBOX),
        ]
        farm = Farm(root / "farm", workers, settings=settings)
        packages = PackageSet(root / "packages")
        try:
            farm.start()
            made = PopulatedFarm(farm, served, call, root, packages, evaluate(farm, packages))
            farm.wait_for_workers(2)
            pytestconfig.stash.setdefault(FARMS, []).append(farm)
            yield made
        finally:
            farm.stop()
            farm.clear()


def fetched_by_nix(farm: Farm, store: Path, *paths: str) -> None:
    """A plain Nix client fetches paths, with signatures on, and proves their contents."""
    done = farm.fetch(store, *paths)
    assert done.returncode == 0, done.stderr
    checked = nix_store(store, "--verify", "--check-contents")
    assert checked.returncode == 0, checked.stderr
