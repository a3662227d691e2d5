"""Environment of every process of the farm's Ray cluster: the token by its path, and how long to wait for peers.

* No process uses Ray without token authentication. The token travels as the *path* of a file that only its owner can
  read, never as a value in an environment, an argument or a log.
* Every RAY_* setting stands in `ray_env`; what the caller's own environment says about Ray is dropped.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workers.errors import WorkerError

LOOPBACK = "127.0.0.1"
TOKEN_BYTES = 32
#: Seconds that nodes and drivers wait for a head that is away before they end themselves, and their builds.
HEAD_AWAY_S = 24 * 3600


class RayNodeError(WorkerError):
    """A Ray node cannot be started, or not safely; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class NodeHealth:
    """Times after which the head declares a node dead, which is final: its raylet then ends itself and its builds.

    A node whose processes are gone is dead after `failures * period_ms` (about 6 s); a node that is silent, because its
    machine sleeps or is overloaded, after `failures * timeout_ms + (failures - 1) * period_ms` (35 s). Only the head's
    values count. A farm over a VPN or with Macs that nap wants longer ones.
    """

    period_ms: int = 2000
    timeout_ms: int = 10_333
    failures: int = 3

    @classmethod
    def after(cls, silence_s: float) -> NodeHealth:
        """Give a node up after so many seconds of silence, at least 6."""
        usual = cls()
        pauses_ms = (usual.failures - 1) * usual.period_ms
        return cls(timeout_ms=int((silence_s * 1000 - pauses_ms) / usual.failures))


def is_loopback(host: str) -> bool:
    """Return whether `host` is the one loopback address that Ray listens on alone; others of 127/8 are refused.

    Ray 2.60 binds to all interfaces for every node address but 127.0.0.1 and ::1 (measured).
    """
    return host == LOOPBACK


def make_token_file(path: Path) -> Path:
    """Return `path`, made with a new random token if it is not there; mode 0400.

    Raises:
        RayNodeError: the file that is there is not a plain file of ours, is empty, or can be read by others.
    """
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(TOKEN_BYTES))
            file.flush()
            os.fsync(file.fileno())
    check_token_file(path)
    return path


def check_token_file(path: Path) -> None:
    """Accept a token file that only its owner, who we are, can read. Raises `RayNodeError`."""
    try:
        found = path.lstat()
    except OSError as error:
        raise RayNodeError(f"the Ray token file {path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise RayNodeError(f"the Ray token file {path} is not a plain file; remove it")
    if found.st_uid != os.geteuid():
        raise RayNodeError(f"the Ray token file {path} belongs to another user")
    if found.st_mode & 0o077:
        raise RayNodeError(
            f"the Ray token file {path} can be read by others (mode {stat.S_IMODE(found.st_mode):04o}): whoever reads "
            "it can run code on every worker; remove it, a new one is made at the next start"
        )
    if found.st_size < TOKEN_BYTES:
        raise RayNodeError(f"the Ray token file {path} is too short to be a token; remove it")


def ray_env(
    token_file: Path, *, base: Mapping[str, str], loopback: bool, health: NodeHealth | None = None
) -> dict[str, str]:
    """Return the environment of any process that uses Ray: `base` without its RAY_* and with ours.

    Ray reads these when it is imported, so the driver too must set them before that. All nodes and drivers of a farm
    use the same values.
    """
    health = health or NodeHealth()
    env = {name: value for name, value in base.items() if not name.startswith(("RAY_", "DROVER_RAY_"))}
    env |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_enable_timeline": "0",
        "RAY_task_events_report_interval_ms": "0",
        # Builds run below the agent; a nice value of 15, Ray's default, would be theirs too.
        "RAY_worker_niceness": "0",
        # A detached agent never drains; Ray would wait 30 s for it on SIGTERM.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        # Ray would kill the agent, and with it all builds of its machine, when one build fills the memory.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_AWAY_S),
        # Looks of servers at what a farm does not use, ten times a second: an object store, idle processes, queues of
        # tasks. They were half of what a node takes at rest.
        "RAY_object_manager_timer_freq_ms": "1000",
        "RAY_raylet_check_gc_period_milliseconds": "10000",
        "RAY_local_fs_monitor_interval_ms": "10000",
        "RAY_kill_idle_workers_interval_ms": "5000",
        "RAY_gcs_pull_resource_loads_period_milliseconds": "10000",
        "RAY_io_context_monitor_probe_interval_ms": "10000",
        "RAY_raylet_report_resources_period_milliseconds": "1000",
        # Threads that wait for transfers of an object store wake four times a second each.
        "RAY_object_manager_rpc_threads_num": "1",
        # Loads of tasks, of which a farm has none; notes for people who debug Ray.
        "RAY_core_worker_internal_heartbeat_ms": "10000",
        "RAY_report_worker_backlog_interval_ms": "10000",
        "RAY_debug_dump_period_milliseconds": "600000",
        "RAY_health_check_initial_delay_ms": "5000",
        "RAY_health_check_period_ms": str(health.period_ms),
        "RAY_health_check_timeout_ms": str(health.timeout_ms),
        "RAY_health_check_failure_threshold": str(health.failures),
        # Off means "this host is 127.0.0.1", on any system; on means its routable address (ray_constants.py).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if loopback else "1",
    }
    return env
