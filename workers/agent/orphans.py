"""Orphaned builders, found and ended: before an agent begins, and when a daemon of its own dies.

An agent that dies takes its builds with it: its daemons see the end of their streams, and the owner of each daemon ends
the rest (`infra.daemon.owner`). Only when owner and daemon are killed at once, as by `kill -9` over a whole node, does
a builder go on. Two marks find such leftovers:

* daemons and owners carry `MARK` in their environment, which Nix does not pass on to builders;
* a sandboxed builder has a root directory of its own, `<store>/<name>.drv.chroot`. One that has no living Nix process
  above it serves no build any more, of this agent or another.

What ran outside the sandbox of a shared store and lost agent, owner and daemon in one moment is not found, and on macOS
there is neither a root directory to look at nor a readable environment: there a person must end such a builder.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from infra.process_tree import Process, live_processes, signal_all, still_alive

_log = logging.getLogger(__name__)

#: Environment variable of daemons and owners: the state directory of the worker that they belong to.
MARK = "DROVER_WORKER_DIR"
#: Seconds that killed processes may take to disappear, and between two looks.
GONE_WITHIN_S = 5.0
LOOK_AGAIN_S = 0.02


def sweep_earlier_agents(state_dir: Path, store: Path) -> int:
    """End what is left of earlier agents of the worker with this directory and this physical store.

    Returns how many processes were ended. Blocks; only for the holder of the worker's lock.
    """
    everyone = live_processes()
    left = {process for process in everyone.values() if _carries_mark(process.pid, state_dir)}
    left |= _orphaned_builders(everyone, store, {process.pid for process in left})
    return _end(left, "an earlier worker")


def sweep_orphans(store: Path) -> int:
    """End the orphaned builders in this physical store, those without daemon and owner; returns as above.

    Blocks; for an agent whose daemon is gone, before it reports that: what is built again elsewhere must not run on
    here.
    """
    return _end(_orphaned_builders(live_processes(), store, set()), "a Nix daemon that was killed")


def _end(left: set[Process], whose: str) -> int:
    if not left:
        return 0
    signal_all(left, signal.SIGKILL)
    deadline = time.monotonic() + GONE_WITHIN_S
    while still_alive(left) and time.monotonic() < deadline:
        time.sleep(LOOK_AGAIN_S)
    _log.warning("ended %d processes that %s left behind", len(left), whose)
    return len(left)


def _carries_mark(pid: int, state_dir: Path) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{MARK}={state_dir}".encode() in environment.split(b"\0")


def _orphaned_builders(everyone: dict[int, Process], store: Path, ended: set[int]) -> set[Process]:
    """Processes in a build's root directory of this store with no Nix process above them but those in `ended`."""
    elsewhere = {pid: root for pid in everyone if (root := _root_of(pid)) not in (None, _root_of(os.getpid()))}
    if not elsewhere:
        return set()
    roots = set()
    with suppress(OSError), os.scandir(store) as entries:
        for entry in entries:
            if entry.name.endswith(".chroot"):
                roots |= {_identity(Path(entry.path)), _identity(Path(entry.path, "root"))}
    roots.discard(None)
    return {
        everyone[pid]
        for pid, root in elsewhere.items()
        if root in roots and not _below_nix(everyone[pid], everyone, ended)
    }


def _below_nix(process: Process, everyone: dict[int, Process], ended: set[int]) -> bool:
    above = everyone.get(process.parent)
    while above is not None:
        with suppress(OSError):
            name = Path(f"/proc/{above.pid}/comm").read_text(errors="replace")
            # One that is dying has no memory any more, and so no command line.
            lives = bool(Path(f"/proc/{above.pid}/cmdline").read_bytes()) and above.pid not in ended
            if name.startswith("nix") and lives:
                return True
        above = everyone.get(above.parent)
    return False


def _root_of(pid: int) -> tuple[int, int] | None:
    return _identity(Path(f"/proc/{pid}/root"))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
