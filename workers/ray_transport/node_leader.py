"""Leader of a node's Ray servers: waits for their end, and ends them when the node's owner is gone or its head another.

`workers.ray_transport.node_start` becomes this program by an exec, so the servers are its children. It loads nothing
but the standard library: one runs beside every node, for as long as the node lives.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from workers.ray_transport.cluster_identity import cluster_at, cluster_lost
from workers.ray_transport.node_records import STOP_GRACE_S, watch_owner

#: End the node when this process is no longer its parent.
PARENT_VARIABLE = "DROVER_RAY_PARENT"
#: The node's private directory; marks its processes.
DIRECTORY_VARIABLE = "DROVER_RAY_DIR"
#: In the node's private directory: why its leader has ended it.
ENDED_FILE = "ended"
#: How often a node looks whether its head still is the one that it joined, seconds.
SAME_HEAD_EVERY_S = 3.0
STANDARD_ERROR = 2
#: Seconds that one server may take to end by itself; two of them are less than the leader's own.
SERVER_GRACE_S = 2.0


def become(*, cluster_file: Path, cluster: str, cluster_id: str, servers: Mapping[str, int]) -> NoReturn:
    """Replace this process by the leader of `servers` (name -> process id of a child), which are ended in this order.

    It writes `cluster`, the head's address, to `cluster_file` once it watches. Where the node has joined a cluster,
    `cluster_id` is that.
    """
    words = json.dumps({"file": str(cluster_file), "address": cluster, "id": cluster_id, "servers": servers})
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    sys.stdout.flush()
    for descriptor in [int(entry.name) for entry in Path("/dev/fd").iterdir()]:
        # Ray's connections are among them, which are no longer read.
        with suppress(OSError):
            os.set_inheritable(descriptor, descriptor <= STANDARD_ERROR)
    # Neither site-packages nor the working directory are searched.
    os.execve(sys.executable, [sys.executable, "-S", "-P", "-m", __name__, words], environment)  # noqa: S606 - a shell is not wanted


def main(words: str) -> NoReturn:
    """Lead until a server ends, which ends the node, or until SIGTERM."""
    orders = json.loads(words)
    servers: dict[str, int] = orders["servers"]
    stopping = threading.Event()
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _watch(orders["address"], orders["id"])
    Path(orders["file"]).write_text(orders["address"])
    ended: dict[int, int] = {}
    while not (ended or stopping.is_set()):
        ended |= _reaped(woken, None)
    for name, pid in servers.items():
        if pid in ended:
            _note(f"{name} ended with status {ended[pid]}")
    for pid in servers.values():
        if stopping.is_set():
            _end(pid, ended, woken)
        elif pid not in ended:
            os.kill(pid, signal.SIGKILL)
    os._exit(0 if stopping.is_set() else 1)


def _end(pid: int, ended: dict[int, int], woken: socket.socket) -> None:
    """End one child, gently at first."""
    until = time.monotonic() + SERVER_GRACE_S
    if pid not in ended:
        os.kill(pid, signal.SIGTERM)
    while pid not in ended:
        if (left_s := until - time.monotonic()) <= 0:
            os.kill(pid, signal.SIGKILL)
            return
        ended |= _reaped(woken, left_s)


def _reaped(woken: socket.socket, within_s: float | None) -> dict[int, int]:
    """Return the status of each child that has ended, by process id; waits for a signal where none has."""
    ended: dict[int, int] = {}
    for wait_s in (0.0, within_s):
        if select.select([woken], [], [], wait_s)[0]:
            woken.recv(4096)
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = os.waitstatus_to_exitcode(found[1])
        if ended:
            break
    return ended


def _note(text: str) -> None:
    if directory := os.environ.get(DIRECTORY_VARIABLE, ""):
        (Path(directory) / ENDED_FILE).write_text(text)


def _watch(address: str, cluster_id: str) -> None:
    """End the node when the program that owns it is gone for too long, or its head is another one."""
    parent = os.environ.get(PARENT_VARIABLE, "")
    directory = os.environ.get(DIRECTORY_VARIABLE, "")
    if not (parent.isdecimal() and directory):
        return
    owner = (Path(directory), int(parent))
    threading.Thread(target=_end_with, args=owner, name="drover-owner-watch", daemon=True).start()
    if cluster_id:
        head = (address, cluster_id)
        threading.Thread(target=_end_with_head, args=head, name="drover-head-watch", daemon=True).start()


def _end_with(directory: Path, parent: int) -> None:
    watch_owner(directory, parent)
    _end_node()


def _end_with_head(address: str, joined: str) -> None:
    while cluster_at(address) in {"", joined}:
        time.sleep(SAME_HEAD_EVERY_S)
    _note(cluster_lost(address))
    _end_node()


def _end_node() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_GRACE_S)
    # The group holds Ray's servers; the workers' processes end when their raylet is gone.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
