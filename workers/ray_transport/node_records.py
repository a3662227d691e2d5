"""Records of the owner of each running Ray node, so that another process can take the node over or clear it away.

A node's private directory holds `node.json`: the node's leader, its owner (the program that
started it or took it over), how long it may go on without an owner, and a fingerprint of how it was started. A *record*
is a small file at a place that the next owner knows (in the farm's state directory); it names the private directory.

* An owner that ends in order ends its nodes. One that is killed leaves them running: the next owner with the same
  fingerprint takes them over, with the builds on them.
* The watch inside the node (`watch_owner`, in its leader) ends a node that had no owner for its `outlive_s`.
* `sweep_stale` clears away what the dead left: nodes whose leader is gone, and nodes that may not go on alone.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from infra.process_tree import (
    Process,
    children,
    identity,
    is_alive,
    live_processes,
    process_tree,
    signal_all,
    still_alive,
)
from workers.ray_transport.access import RayNodeError

_log = logging.getLogger(__name__)

DIRECTORY_PREFIX = "drover-ray-"
#: Unix socket paths end at 103 bytes on macOS; Ray appends "/r/session_<date>_<pid>/sockets/plasma_store".
SOCKET_PATH_BYTES = 103
RAY_SOCKET_SUFFIX_BYTES = 68
NODE_FILE = "node.json"
#: Written as the last step of a node's start: the address of the cluster.
CLUSTER_FILE = "r/ray_current_cluster"
#: How often the watch looks for an owner that is gone, and for one that is there and whose end the system reports,
#: seconds.
WATCH_EVERY_S = 1.0
WATCH_OWNED_S = 30.0
#: Seconds that a node may take to end by itself.
STOP_GRACE_S = 5.0
#: Seconds that killed processes may take to disappear.
KILL_GRACE_S = 5.0
LOOK_AGAIN_S = 0.05

#: Process id and start time.
Identity = tuple[int, str]


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """Content of `node.json`."""

    owner: Identity
    node: Identity
    outlive_s: float
    fingerprint: str

    def write(self, directory: Path) -> None:
        """Replace the note in `directory` in one step."""
        fresh = directory / f"{NODE_FILE}.new"
        body = {
            "owner": list(self.owner),
            "node": list(self.node),
            "outlive_s": self.outlive_s,
            "fingerprint": self.fingerprint,
        }
        fresh.write_text(json.dumps(body))
        fresh.replace(directory / NODE_FILE)


def read_note(directory: Path) -> NodeRecord | None:
    """Read the note of a private directory; None where it is not ours or is not (yet) a note."""
    try:
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return None
        record = json.loads((directory / NODE_FILE).read_text())
        match record:
            case {
                "owner": [int(owner), str(owner_started)],
                "node": [int(node), str(node_started)],
                "outlive_s": int() | float() as outlive_s,
                "fingerprint": str(fingerprint),
            }:
                return NodeRecord((owner, owner_started), (node, node_started), outlive_s, fingerprint)
            case _:
                return None
    except (OSError, ValueError):
        return None


def private_directory(base: Path) -> Path:
    """Make a directory of mode 0700 below `base`. Raises `RayNodeError` where socket paths would get too long."""
    try:
        made = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir=base))
    except OSError as error:
        raise RayNodeError(f"no directory for Ray can be made in {base}: {error.strerror}") from None
    if len(os.fsencode(made)) + RAY_SOCKET_SUFFIX_BYTES > SOCKET_PATH_BYTES + 4 * (sys.platform == "linux"):
        made.rmdir()
        raise RayNodeError(f"the path {base} is too long for Ray's sockets; choose a shorter one")
    return made


def own_identity() -> Identity:
    """Return this process's identity."""
    return identity(os.getpid())


def take_over(record: Path, fingerprint: str) -> tuple[Path, Process] | None:
    """Become the owner of the recorded node if it runs as the fingerprint wants; end it where it runs otherwise.

    Returns its directory and its leader, or None where a node must be started.
    """
    try:
        directory = Path(record.read_text().strip())
    except OSError:
        return None
    note = read_note(directory) if directory.name.startswith(DIRECTORY_PREFIX) else None
    if note is None:
        return None
    leader = live_processes().get(note.node[0])
    # A leader that cannot go on, say because it is stopped, may be left without its servers: that is no node.
    alive = leader is not None and leader.started == note.node[1] and bool(children(leader.pid))
    if alive and leader is not None and note.fingerprint == fingerprint and (directory / CLUSTER_FILE).exists():
        NodeRecord(own_identity(), note.node, note.outlive_s, fingerprint).write(directory)
        return directory, leader
    _clear(directory, note)
    return None


def watch_owner(directory: Path, parent: int) -> None:
    """Return once the node in `directory` had no owner for longer than it may; `parent` counts until the note is there.

    For the node's own process.
    """
    owned_at = time.monotonic()
    while True:
        note = read_note(directory)
        owner = note.owner[0] if note is not None and is_alive(*note.owner) else None
        if owner is not None or os.getppid() == parent:
            owned_at = time.monotonic()
            _wait_for_end(parent if owner is None else owner)
        elif note is None or time.monotonic() - owned_at >= note.outlive_s:
            return
        else:
            time.sleep(WATCH_EVERY_S)


def _wait_for_end(pid: int) -> None:
    """Return once a process has ended, at the latest after a while; soon where its end cannot be waited for."""
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):
        # Not on this system, or gone already.
        time.sleep(WATCH_EVERY_S)
        return
    try:
        select.select([descriptor], [], [], WATCH_OWNED_S)
    finally:
        os.close(descriptor)


def sweep_stale(base: Path) -> Sequence[Path]:
    """End nodes in `base` that have no owner and may not go on alone, remove their directories, and return these."""
    swept: list[Path] = []
    for directory in sorted(base.glob(f"{DIRECTORY_PREFIX}*")):
        note = read_note(directory)
        # Without a note: another farm may be between making its directory and writing it; nothing lives there yet.
        if note is None or is_alive(*note.owner) or (note.outlive_s > 0 and is_alive(*note.node)):
            continue
        _clear(directory, note)
        swept.append(directory)
        _log.warning("removed a Ray node that an earlier run left behind in %s", directory)
    return swept


def _clear(directory: Path, note: NodeRecord) -> None:
    """Kill what is left of a node and remove its directory."""
    pid, started = note.node
    leader = live_processes().get(pid)
    # A new leader under the old number is a stranger; a session without a leader keeps its number reserved.
    if leader is None or leader.started == started:
        left = {process for process in process_tree(pid) if process.pid != os.getpid()}
        signal_all(left, signal.SIGKILL)
        deadline = time.monotonic() + KILL_GRACE_S
        while (left := still_alive(left)) and time.monotonic() < deadline:
            time.sleep(LOOK_AGAIN_S)
    with suppress(OSError):
        shutil.rmtree(directory)
