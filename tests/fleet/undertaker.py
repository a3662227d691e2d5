"""Undertaker of a fleet: ends what is left of it and removes its directory, however its keeper came to its end.

The keeper (`tests.fleet.__main__`) starts it in a session of its own, so that neither Ctrl-C nor a closed terminal
reaches it, and holds the other end of its standard input. The kernel closes that end with the keeper, also where this
is killed. A keeper that stops in order has ended its parts before; then there is only the directory to remove.

A process belongs to a fleet by what stands in its environment. Its command line does not count: a person may read a
log of the fleet, or work in its directory.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from infra.process_tree import process_tree, signal_all
from tests.support.processes import sweep_dead_groups
from workers.ray_transport.node_process import default_base_dir
from workers.ray_transport.node_records import sweep_stale

#: Seconds that a coordinator has to end its nodes and their builds once its keeper is gone.
ORDERLY_S = 10.0
#: Seconds that killed processes may take to disappear.
KILL_S = 60.0
LOOK_AGAIN_S = 0.05


def members(root: Path) -> dict[int, str]:
    """Return pid -> command line of every process of the fleet in `root`, this one not counted."""
    mark, home = f"DROVER_TEST_MARK={root}".encode(), f"HOME={root}/".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        # Of others, or gone meanwhile.
        with suppress(OSError):
            words = (entry / "environ").read_bytes().split(b"\0")
            if any(word == mark or word.startswith(home) for word in words):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry.name)] = command.decode(errors="replace").strip()
    return found


def clear(root: Path) -> tuple[str, ...]:
    """End the fleet in `root` and remove all that it made; returns what is left, a sentence each."""
    coordinators = [pid for pid, command in members(root).items() if "drover up " in command]
    for pid in coordinators:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    _until(lambda: not members(root), ORDERLY_S if coordinators else 0.0)
    _until(lambda: not _killed(root), KILL_S)
    # Nodes of Ray have directories of their own, with short paths; a control group outlives its processes.
    sweep_stale(default_base_dir())
    sweep_dead_groups()
    left = [f"process {pid} does not end: {command}" for pid, command in members(root).items()]
    _remove(root)
    if root.exists():
        left.append(f"{root} cannot be removed")
    return tuple(left)


def _killed(root: Path) -> bool:
    """Kill the processes of a fleet with all below them; return whether there were any."""
    found = members(root)
    for pid in found:
        signal_all(process_tree(pid), signal.SIGKILL)
    return bool(found)


def _until(condition: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(LOOK_AGAIN_S)


def _remove(root: Path) -> None:
    """Remove a directory with Nix stores in it, whose directories are closed to writing."""
    for directory, _, _ in os.walk(root):
        with suppress(OSError):
            Path(directory).chmod(0o700)
    shutil.rmtree(root, ignore_errors=True)


def main(root: Path) -> int:
    """Wait for the keeper's end, clear, and write what is left as JSON for a keeper that still reads."""
    sys.stdin.buffer.read()
    left = clear(root)
    with suppress(OSError):
        print(json.dumps(left), flush=True)
    return len(left)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
