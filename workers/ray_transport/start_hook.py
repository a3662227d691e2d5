"""Start hook of the farm's Ray nodes: runs inside `ray start`, before that starts anything.

`workers.ray_transport.node_process` names the hook in the environment of every node, beside the variables below.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from workers.ray_transport.access import LOOPBACK
from workers.ray_transport.cluster_identity import cluster_at, cluster_lost
from workers.ray_transport.node_records import STOP_GRACE_S, watch_owner
from workers.ray_transport.redis import FLAGS_FILE, read_password

#: End the node when this process is no longer its parent.
PARENT_VARIABLE = "DROVER_RAY_PARENT"
#: The node lives on loopback.
LOOPBACK_VARIABLE = "DROVER_RAY_LOOPBACK"
#: End the node when the head at this address is another than it has joined.
HEAD_VARIABLE = "DROVER_RAY_HEAD"
#: In the node's private directory: why the start hook has ended it.
ENDED_FILE = "ended"
#: The node's private directory; marks its processes.
DIRECTORY_VARIABLE = "DROVER_RAY_DIR"
#: How often a node looks whether its head still is the one that it joined, seconds.
SAME_HEAD_EVERY_S = 3.0


def prepare_node(ray_params: Any, head: bool) -> None:
    """Bind the node to loopback where that was requested, and watch over its end. Ray calls it (RAY_START_HOOK).

    The node ends when the program that owns it is gone for too long, or its head is another one, because `ray start`
    itself would live on. A head gets Redis's password.
    """
    parent = os.environ.get(PARENT_VARIABLE, "")
    directory = os.environ.get(DIRECTORY_VARIABLE, "")
    if parent.isdecimal() and directory:
        watch = (Path(directory), int(parent))
        threading.Thread(target=_end_with, args=watch, name="drover-owner-watch", daemon=True).start()
        flags = Path(directory) / FLAGS_FILE
        if head and flags.exists():
            _use_redis_password(ray_params, flags)
        if address := os.environ.get(HEAD_VARIABLE, ""):
            watch_head = (Path(directory), address)
            threading.Thread(target=_end_with_head, args=watch_head, name="drover-head-watch", daemon=True).start()
    if not head and os.environ.get(LOOPBACK_VARIABLE):
        import ray._private.services as ray_services  # noqa: PLC0415 - only inside `ray start`

        # `ray start` takes "this host" for its routable address, also where 127.0.0.1 was given (services.py,
        # resolve_ip_for_localhost), and there is no switch.
        ray_services.get_node_ip_address = lambda *_: LOOPBACK
        ray_params.node_ip_address = LOOPBACK


def _use_redis_password(ray_params: Any, flags: Path) -> None:
    """Give Redis's password to `ray start` and to the GCS, in no command line: Ray has no other way, as of 2.60."""
    import ray._private.services as ray_services  # noqa: PLC0415 - only inside `ray start`
    from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER  # noqa: PLC0415

    ray_params.redis_password = read_password(flags)

    def without(start: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *positional, **named: start(*positional, **{**named, "redis_password": ""})

    def started(command: list[str], process_type: str, *positional: Any, **named: Any) -> Any:
        extra = [f"--flagfile={flags}"] if process_type == PROCESS_TYPE_GCS_SERVER else []
        return start_process([*command, *extra], process_type, *positional, **named)

    start_process = ray_services.start_ray_process
    ray_services.start_ray_process = started
    ray_services.start_gcs_server = without(ray_services.start_gcs_server)
    ray_services.start_raylet = without(ray_services.start_raylet)


def _end_with(directory: Path, parent: int) -> None:
    watch_owner(directory, parent)
    _end_node()


def _end_with_head(directory: Path, address: str) -> None:
    joined = ""
    while True:
        now = cluster_at(address)
        if joined and now and now != joined:
            break
        joined = joined or now
        time.sleep(SAME_HEAD_EVERY_S)
    (directory / ENDED_FILE).write_text(cluster_lost(address))
    _end_node()


def _end_node() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_GRACE_S)
    # The group holds Ray's servers; the workers' processes end when their raylet is gone.
    os.killpg(0, signal.SIGKILL)


#: What RAY_START_HOOK is set to.
START_HOOK: Final = f"{prepare_node.__module__}.{prepare_node.__name__}"
