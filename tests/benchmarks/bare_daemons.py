"""Two bare connections to Nix daemons that build a file's derivations: the limit of what any farm over Nix can do.

Each connection takes the next derivation as soon as its last one is built. Nothing is evaluated, sent, uploaded, signed
or published in the measured time; the .drv files are made before.

A worker's daemons do more for each build than plain ones: a user of its own builds it, and all that this user runs is
killed before and after. `isolated` says what the farm could do at most with the builds of strangers.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from infra.daemon import DaemonConnection, Options, open_stdio
from tests.benchmarks.beside_nix import FLAGS, LIMIT_S, ROOT, remove
from tests.support.farm import Farm, processes_naming
from workers.agent.build import basic_derivation

CONNECTIONS = 2


@dataclass(frozen=True, slots=True)
class Daemon:
    """How a daemon is started: command and environment."""

    command: list[str]
    environment: dict[str, str]


def plain(store: Path) -> Daemon:
    """Return a daemon without build users, as `nix-build` has none beside it."""
    command = ["nix-daemon", "--stdio", "--store", str(store), *FLAGS]
    return Daemon(command, {"PATH": os.environ["PATH"], "HOME": str(store)})


def isolated(farm: Farm) -> Daemon:
    """Return the daemon of a farm's worker, as the kernel lists it: its isolation, its options, its store.

    Raises:
        SystemExit: no worker of the farm has one now.
    """
    for pid in processes_naming(str(farm.root)):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
            environment = Path(f"/proc/{pid}/environ").read_text().split("\0")[:-1]
        except OSError:
            continue
        if any(word.endswith("infra/daemon/owner.py") for word in command):
            return Daemon(command, dict(word.split("=", 1) for word in environment))
    raise SystemExit(f"no worker of the farm in {farm.root} has a daemon; its log is {farm.log_path}")


def build_bare(file: Path, store: Path, daemon: Daemon) -> float:
    """Seconds to build all derivations of a file, none of which has inputs; they are made in a store that is removed.

    Raises:
        SystemExit: one of them failed, or all together took longer than LIMIT_S.
    """
    words: list[str | Path] = ["nix-instantiate", file, "-A", ROOT, "--store", store, *FLAGS]
    made = subprocess.run(words, check=True, capture_output=True, text=True)
    drvs = [line.partition("!")[0] for line in made.stdout.split()]
    # A chroot store has its files below its root.
    todo = deque((drv, Path(f"{store}{drv}").read_bytes()) for drv in drvs)
    try:
        return asyncio.run(_build_all(todo, daemon))
    except TimeoutError:
        raise SystemExit(
            f"bare connections built {len(drvs) - len(todo)} of {len(drvs)} derivations in {LIMIT_S:.0f} s; "
            "this machine is busy: take a smaller --count"
        ) from None
    finally:
        remove(store)


async def _build_all(todo: deque[tuple[str, bytes]], daemon: Daemon) -> float:
    connections = [await open_stdio(daemon.command, daemon.environment) for _ in range(CONNECTIONS)]
    try:
        for connection in connections:
            await connection.set_options(Options(build_cores=1))
        began = time.monotonic()
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            for connection in connections:
                group.create_task(_build_next(connection, todo))
        return time.monotonic() - began
    finally:
        for connection in connections:
            await connection.close()


async def _build_next(connection: DaemonConnection, todo: deque[tuple[str, bytes]]) -> None:
    while todo:
        drv, data = todo.popleft()
        result = await connection.build_derivation(drv, basic_derivation(data, ()), lambda _event: None)
        if not result.status.is_success:
            raise SystemExit(f"{drv} was not built: {result.error_msg}")
