"""A start of a node that is cancelled: nothing is left of it, however often and wherever that happens."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.farm import processes_naming
from workers.ray_transport.access import LOOPBACK, make_token_file
from workers.ray_transport.node_process import RayNode


class Sleeper(RayNode):
    """A node that never gets ready."""

    def argv(self, directory: Path) -> list[str]:
        return [sys.executable, "-c", f"import time; {str(directory)!r}; time.sleep(600)"]

    def env(self, base: Mapping[str, str]) -> dict[str, str]:
        return dict(base)

    async def check(self) -> None:
        pass


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="dt", dir="/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize("turns", [1, 2, 3, 4, 6, 9, 14])
async def test_a_start_that_is_cancelled_again_and_again_leaves_no_process(base: Path, turns: int) -> None:
    node = Sleeper(
        description="the node",
        token_file=make_token_file(base / "token"),
        host=LOOPBACK,
        base_dir=base,
        start_deadline_s=60,
        keep=None,
    )
    starting = asyncio.create_task(node.start())
    for _ in range(turns):
        await asyncio.sleep(0)
    starting.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
        starting.cancel()
    await asyncio.wait((starting,))
    assert starting.cancelled()
    assert not processes_naming(str(base))
    assert names_in(base) == ["token"]


def names_in(directory: Path) -> list[str]:
    """Return the names of what lies in a directory."""
    return [path.name for path in directory.iterdir()]
