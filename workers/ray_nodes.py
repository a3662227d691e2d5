"""Start and stop Ray nodes as supervised child processes, closed to strangers.

A node is one `ray start --block` in a session of its own, with a private directory (mode 0700) around everything that
Ray writes: Ray makes its own session directory and sockets accessible to all. Rules of this file:

* A node never starts without token authentication. The token travels as the *path* of a file that only its owner can
  read, never as a value in an environment, an argument or a log.
* Every RAY_* setting stands in `ray_env`; what the caller's own environment says about Ray is dropped.
* On loopback nothing listens on another interface. Ray rewrites "localhost" to the routable address of the host, so a
  loopback node is started through `workers.ray_fleet.prepare_node` (Ray's own start hook), which undoes that.
* Leaving the context ends the whole process tree: SIGTERM, a named grace, SIGKILL, then a look at what is left. When
  this process is killed instead, the start hook ends the node, and `sweep_stale` removes what the dead left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from workers.errors import WorkerError
from workers.process_tree import identity, live_processes, process_tree, signal_all, still_alive
from workers.settings import SETTINGS_VARIABLE

log = logging.getLogger(__name__)

#: Node label that names a drover worker; its value is the worker's name.
WORKER_LABEL = "drover.worker"
#: Read by the start hook: end the node when this process is no longer its parent.
PARENT_VARIABLE = "DROVER_RAY_PARENT"
#: Read by the start hook: the node lives on loopback.
LOOPBACK_VARIABLE = "DROVER_RAY_LOOPBACK"
#: The node's private directory; marks its processes.
DIRECTORY_VARIABLE = "DROVER_RAY_DIR"
LOOPBACK = "127.0.0.1"

#: Ray refuses less than 75 MiB; messages up to 100 KiB do not touch the object store at all.
OBJECT_STORE_BYTES = 80 * 1024 * 1024
#: Seconds until a starting node must be ready: 2 s on idle cores, over a minute where 15 programs share two.
START_DEADLINE_S = 240.0
#: Ray itself gives a node 30 s, without a switch (node.py); an overloaded machine gets this many tries.
START_TRIES = 3
RAY_TOO_SLOW = "timed out during startup"
#: Seconds that a node may take to end by itself, and that killed processes may take to disappear.
STOP_GRACE_S = 5.0
KILL_GRACE_S = 5.0
#: Unix socket paths end at 103 bytes on macOS; Ray appends "/r/session_<date>_<pid>/sockets/plasma_store".
SOCKET_PATH_BYTES = 103
RAY_SOCKET_SUFFIX_BYTES = 68
#: How often a starting or ending node is looked at, seconds.
LOOK_AGAIN_S = 0.05
#: Lines of Ray's output that an error quotes.
QUOTED_LINES = 8
TOKEN_BYTES = 32
DIRECTORY_PREFIX = "drover-ray-"
NODE_FILE = "node.json"
#: Syntax of a label value (Kubernetes'); Ray refuses others.
WORKER_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
#: How `ray start --block` tells which of its servers ended (scripts.py, _log_unexpected_subprocess_exit_details).
RAY_EXIT = re.compile(r"(\w+) \[exit code=(-?[0-9]+)\]")
CLUSTER_ADDRESS = re.compile(r"\S+:[0-9]{1,5}")


class RayNodeError(WorkerError):
    """A Ray node cannot be started, or not safely; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class NodeHealth:
    """When the head declares a node dead, which is final: its raylet then ends itself and its builds.

    A node whose processes are gone is dead after `failures * period_ms` (about 6 s); a node that is silent, because its
    machine sleeps or is overloaded, after `failures * timeout_ms + (failures - 1) * period_ms` (35 s). Only the head's
    values count. A farm over a VPN or with Macs that nap wants longer ones.
    """

    period_ms: int = 1000
    timeout_ms: int = 5000
    failures: int = 6


def is_loopback(host: str) -> bool:
    """Say whether `host` is the one loopback address that Ray listens on alone; other 127/8 addresses are refused.

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
        "RAY_health_check_initial_delay_ms": "5000",
        "RAY_health_check_period_ms": str(health.period_ms),
        "RAY_health_check_timeout_ms": str(health.timeout_ms),
        "RAY_health_check_failure_threshold": str(health.failures),
        # Off means "this host is 127.0.0.1", on any system; on means its routable address (ray_constants.py).
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if loopback else "1",
    }
    return env


class _RayNode:
    """One `ray start --block` child and its private directory; see the module for the rules."""

    def __init__(
        self,
        *,
        what: str,
        token_file: Path,
        host: str,
        base_dir: Path,
        start_deadline_s: float,
    ) -> None:
        _check_host(host)
        check_token_file(token_file)
        self._what = what
        self._token_file = token_file
        self._host = host
        self._base_dir = base_dir
        self._start_deadline_s = start_deadline_s
        self._child: asyncio.subprocess.Process | None = None
        self._dir: Path | None = None
        self._stopping = False
        #: `host:port` of the cluster's head, known once the node is ready.
        self._cluster = ""

    @property
    def pid(self) -> int:
        """Process and session id of the node. Raises `RayNodeError` before it has started."""
        if self._child is None:
            raise RayNodeError(f"{self._what} is not running")
        return self._child.pid

    @property
    def directory(self) -> Path:
        """The node's private directory. Raises `RayNodeError` before it has started."""
        if self._dir is None:
            raise RayNodeError(f"{self._what} is not running")
        return self._dir

    def argv(self, directory: Path) -> list[str]:
        """Return the command line that runs this node with its files below `directory`."""
        raise NotImplementedError

    def env(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of this node, made of `base`."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        """Start, and return when the node is ready. Raises `RayNodeError`, having cleaned up."""
        await asyncio.to_thread(sweep_stale, self._base_dir)
        self.check()
        tries = START_TRIES
        while True:
            tries -= 1
            self._stopping = False
            self._dir = private_directory(self._base_dir)
            try:
                await self._start(self._dir)
                await self._wait_ready(self._dir)
            except BaseException as error:
                await self.stop()
                if isinstance(error, RayNodeError) and RAY_TOO_SLOW in str(error) and tries:
                    log.warning("%s did not start within Ray's own 30 s; once more", self._what)
                    continue
                raise
            return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the node; see `stop`."""
        await self.stop()

    async def wait_failed(self) -> str:
        """Return the reason, in one sentence, when the node ends although nobody asked it to; otherwise never."""
        if self._child is None:
            raise RayNodeError(f"{self._what} is not running")
        code = await self._child.wait()
        if self._stopping:
            await asyncio.get_running_loop().create_future()
        return f"{self._what} ended unexpectedly with status {code}{self._last_words()}"

    async def stop(self) -> None:
        """End the node's whole process tree and remove its directory. Idempotent; at most about 15 s."""
        self._stopping = True
        child, directory = self._child, self._dir
        if child is not None:
            await _end_tree(child, self._what)
        self._child = None
        if directory is not None:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        self._dir = None

    def check(self) -> None:
        """Look for what would make the start fail late or obscurely. Raises `RayNodeError`."""

    async def _start(self, directory: Path) -> None:
        base = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
        env = self.env(base) | {PARENT_VARIABLE: str(os.getpid()), DIRECTORY_VARIABLE: str(directory)}
        # Any hook will do for the watch over the parent; it also binds to loopback where that is wanted.
        env["RAY_START_HOOK"] = "workers.ray_fleet.prepare_node"
        with (directory / "start.log").open("wb") as output:
            self._child = await asyncio.create_subprocess_exec(
                *self.argv(directory),
                env=env,
                # Python puts the working directory first on the path of everything Ray starts: let it be ours.
                cwd=directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        note = {"owner": identity(os.getpid()), "node": identity(self._child.pid)}
        (directory / NODE_FILE).write_text(json.dumps(note))

    async def _wait_ready(self, directory: Path) -> None:
        child = self._child
        if child is None:
            raise RayNodeError(f"{self._what} is not running")
        try:
            async with asyncio.timeout(self._start_deadline_s):
                # Ray writes this file as the last step of a start.
                while not (address := _read_cluster(directory / "r" / "ray_current_cluster")):
                    if child.returncode is not None:
                        raise RayNodeError(
                            f"{self._what} did not start (status {child.returncode}){self._last_words()}"
                        )
                    await asyncio.sleep(LOOK_AGAIN_S)
        except TimeoutError:
            raise RayNodeError(
                f"{self._what} was not ready within {self._start_deadline_s:.0f} s{self._last_words()}"
            ) from None
        self._cluster = address

    def _last_words(self) -> str:
        if self._dir is None:
            return ""
        try:
            text = (self._dir / "start.log").read_text(errors="replace")
        except OSError:
            return ""
        if ended := RAY_EXIT.findall(text):
            return "; " + ", ".join(f"{server} ended with status {code}" for server, code in ended)
        lines = [line for line in text.splitlines() if line.strip()][-QUOTED_LINES:]
        return "; its last lines:\n" + "\n".join(lines) if lines else ""


class RayHead(_RayNode):
    """The farm's Ray head: membership and addresses, no builds.

    `host` is where it listens; everything but 127.0.0.1 makes Ray listen on **all** interfaces of the machine, so a
    farm of several machines needs a private network around it. `port` 0 takes a free one.
    """

    def __init__(
        self,
        *,
        token_file: Path,
        host: str = LOOPBACK,
        port: int = 0,
        health: NodeHealth | None = None,
        base_dir: Path | None = None,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        super().__init__(
            what="the Ray head",
            token_file=token_file,
            host=host,
            base_dir=base_dir or default_base_dir(),
            start_deadline_s=start_deadline_s,
        )
        self._port = port
        self._health = health

    @property
    def address(self) -> str:
        """`host:port` for nodes and drivers. Raises `RayNodeError` before the head is ready."""
        if not self._cluster:
            raise RayNodeError("the Ray head is not running")
        return self._cluster

    def check(self) -> None:
        """Refuse a port that is taken: Ray would take 50 s to fail at it."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, self._port))
            except OSError as error:
                raise RayNodeError(
                    f"the Ray head cannot listen on {self._host}, port {self._port}: {error.strerror}"
                ) from None

    def argv(self, directory: Path) -> list[str]:
        """Return the command line of the head."""
        return [
            *_ray_start(directory),
            "--head",
            f"--node-ip-address={self._host}",
            f"--port={self._port}",
            "--include-dashboard=false",
            # No autoscaler is configured.
            "--no-monitor",
        ]

    def env(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return the head's environment."""
        return ray_env(self._token_file, base=base, loopback=is_loopback(self._host), health=self._health)


class RayWorkerNode(_RayNode):
    """A worker's Ray node; `workers.ray_fleet` starts the agent on it once the label is seen.

    `settings_file` is read by the agent, on this machine. Several nodes may share a machine.
    """

    def __init__(
        self,
        *,
        name: str,
        head: str,
        token_file: Path,
        settings_file: Path,
        host: str = LOOPBACK,
        base_dir: Path | None = None,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        if not WORKER_NAME.fullmatch(name):
            raise RayNodeError(
                f"the worker name {name!r} must be 1 to 63 letters, digits, '.', '_' or '-', and begin and end with a "
                "letter or digit"
            )
        if not CLUSTER_ADDRESS.fullmatch(head):
            raise RayNodeError(f"the address of the Ray head must be host:port, not {head!r}")
        super().__init__(
            what=f"the Ray node of worker {name}",
            token_file=token_file,
            host=host,
            base_dir=base_dir or default_base_dir(),
            start_deadline_s=start_deadline_s,
        )
        self._name = name
        self._head = head
        self._settings_file = settings_file

    def argv(self, directory: Path) -> list[str]:
        """Return the command line of the node; an operator's service may run it as it is, with `env`."""
        return [
            *_ray_start(directory),
            f"--address={self._head}",
            f"--node-ip-address={self._host}",
            f"--node-name={self._name}",
            f"--labels={WORKER_LABEL}={self._name}",
            # Nodes that share an address must not hand out the same fixed ports: let the system choose.
            "--min-worker-port=0",
            "--max-worker-port=0",
        ]

    def env(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return the node's environment."""
        loopback = is_loopback(self._host)
        env = ray_env(self._token_file, base=base, loopback=loopback)
        env[SETTINGS_VARIABLE] = str(self._settings_file)
        if loopback:
            # `ray start --address` insists on a multi-node system; the hook brings loopback back.
            env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
            env["RAY_START_HOOK"] = "workers.ray_fleet.prepare_node"
            env[LOOPBACK_VARIABLE] = "1"
        return env


def _ray_start(directory: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        # Ray makes this directory writable for all; the one around it is closed.
        f"--temp-dir={directory / 'r'}",
        # The agent asks for no CPU, and Ray then starts no idle processes in advance.
        "--num-cpus=0",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--include-log-monitor=false",
        "--disable-usage-stats",
    ]


def _check_host(host: str) -> None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise RayNodeError(f"a Ray node needs a numeric address to listen on, not {host!r}") from None
    if address.is_loopback and not is_loopback(host):
        raise RayNodeError(f"Ray listens on all interfaces for {host}; use {LOOPBACK} to stay on this machine")
    if address.is_unspecified:
        raise RayNodeError(f"{host} is no address that other nodes can reach; give the one on the farm's network")


def default_base_dir() -> Path:
    """Return where private directories are made: a short path, since Unix socket paths are limited."""
    return Path("/tmp")  # noqa: S108 - what is made in it is 0700 with a random name


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


def _read_cluster(path: Path) -> str:
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return text if CLUSTER_ADDRESS.fullmatch(text) else ""


async def _end_tree(child: asyncio.subprocess.Process, what: str) -> None:
    """SIGTERM to the leader, which ends its own; SIGKILL to what is left; then nothing of the tree may live."""
    tree = await asyncio.to_thread(process_tree, child.pid)
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_GRACE_S):
            await child.wait()
    tree |= await asyncio.to_thread(process_tree, child.pid)
    left = await asyncio.to_thread(still_alive, tree)
    signal_all(left, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(KILL_GRACE_S):
            while left:
                await asyncio.sleep(LOOK_AGAIN_S)
                left = await asyncio.to_thread(still_alive, left)
    await child.wait()
    if left:
        log.error("%s left processes behind: %s", what, sorted(process.pid for process in left))


def sweep_stale(base: Path) -> Sequence[Path]:
    """End nodes in `base` whose owner died without ending them, remove their directories, and return these.

    A node is ours to end if its directory is ours, its recorded owner no longer lives, and its processes are of the
    session that was recorded.
    """
    swept: list[Path] = []
    for directory in sorted(base.glob(f"{DIRECTORY_PREFIX}*")):
        try:
            found = directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            note = json.loads((directory / NODE_FILE).read_text())
            owner, node = (_recorded(note[key]) for key in ("owner", "node"))
        except (OSError, ValueError, KeyError, TypeError):
            # Another farm may be between making its directory and writing the note; nothing lives there yet.
            continue
        everyone = live_processes()
        if owner[0] in everyone and everyone[owner[0]].started == owner[1]:
            continue
        leader = everyone.get(node[0])
        # A new leader under the old number is a stranger; a session without a leader keeps its number reserved.
        if leader is None or leader.started == node[1]:
            signal_all((p for p in process_tree(node[0]) if p.pid != os.getpid()), signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)
        swept.append(directory)
        log.warning("removed a Ray node that an earlier run left behind in %s", directory)
    return swept


def _recorded(value: object) -> tuple[int, str]:
    match value:
        case [str(pid), str(started)] if pid.isdecimal():
            return int(pid), started
        case _:
            raise ValueError("not a process")
