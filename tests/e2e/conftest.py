"""One farm for the whole folder: a coordinator, a Ray head and three worker nodes, each with a store of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.farm import FARMS, Farm, WorkerSpec
from tests.support.otlp import OtlpReceiver, receiving

BUSYBOX = {"sandbox-paths": "/bin/sh=/bin/busybox"}


@pytest.fixture(scope="session")
def receiver() -> Iterator[OtlpReceiver]:
    """Receiver of the farm's traces."""
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory that builders see as /gates: they wait there for a file of a name of their own."""
    gates = tmp_path_factory.mktemp("gates")
    gates.chmod(0o755)
    return gates


def waiting_for(gate: str) -> str:
    """Return what a builder's script waits with."""
    return f"while [ ! -e /gates/{gate} ]; do sleep 0.1; done"


@pytest.fixture(scope="session")
def farm(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config, receiver: OtlpReceiver, gates: Path
) -> Iterator[Farm]:
    busybox = {"sandbox-paths": f"{BUSYBOX['sandbox-paths']} /gates={gates}"}
    farm = Farm(
        tmp_path_factory.mktemp("farm"),
        [
            WorkerSpec("one", slots=2, features=("large-memory",), nix_options=busybox),
            WorkerSpec("two", slots=2, features=("large-memory", "spare"), nix_options=busybox),
            WorkerSpec("mac", slots=2, features=("large-memory",), emulate=("aarch64-darwin",), nix_options=busybox),
        ],
        settings=f'otlp_endpoint = "{receiver.url}"',
    )
    try:
        farm.start().wait_for_workers(3)
        pytestconfig.stash.setdefault(FARMS, []).append(farm)
        yield farm
    finally:
        farm.stop()


@pytest.fixture
def expression(tmp_path: Path) -> Expression:
    return Expression(tmp_path)


class Expression:
    """Writes Nix files of raw derivations; every test's names are its own, so that nothing is in the cache before."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, text: str, name: str = "default.nix") -> Path:
        file = self.directory / name
        file.write_text(
            f"""
            let
              shell = name: script: shellFor "x86_64-linux" {{ inherit name; }} script;
              shellFor = system: extra: script: derivation ({{
                inherit system; builder = "/bin/sh"; args = [ "-c" script ]; salt = "{self.directory}";
              }} // extra);
            in {{ {text} }}
            """
        )
        return file
