"""Start and stop Ray nodes as supervised child processes, closed to strangers.

A node is one `ray start --block` in a session of its own, with a private directory (mode 0700) around everything that
Ray writes: Ray makes its own session directory and sockets accessible to all. Rules of this file:

* What a node is told of the token and of time limits comes from `workers.ray_transport.access`.
* On loopback nothing listens on another interface. Ray rewrites "localhost" to the routable address of the host, so a
  loopback node is started through `workers.ray_transport.fleet.prepare_node` (Ray's own start hook), which undoes that.
* Leaving the context ends the whole process tree: SIGTERM, a named grace, SIGKILL, then a look at what is left. When
  this process is killed instead, a node with a record goes on for a while and is taken over by the next start
  (`workers.ray_transport.node_records`); any other is ended by its start hook.
* The head's tables (nodes, actors) lie on disk where it is given a place: killed and started again at the same address
  it finds its nodes again, and they wait for it, so no build is lost with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from infra.process_tree import Process, children, identity, is_alive, process_tree, signal_all, still_alive
from workers.agent.settings import SETTINGS_VARIABLE
from workers.ray_transport.access import (
    LOOPBACK,
    NodeHealth,
    RayNodeError,
    check_listens,
    check_token_file,
    is_loopback,
    ray_env,
)
from workers.ray_transport.node_records import (
    CLUSTER_FILE,
    KILL_GRACE_S,
    LOOK_AGAIN_S,
    NodeNote,
    own_identity,
    private_directory,
    sweep_stale,
    take_over,
)
from workers.ray_transport.redis import RedisStore, check_redis

log = logging.getLogger(__name__)

#: Node label that names a drover worker; its value is the worker's name.
WORKER_LABEL = "drover.worker"
#: Read by the start hook: end the node when this process is no longer its parent.
PARENT_VARIABLE = "DROVER_RAY_PARENT"
#: Read by the start hook: the node lives on loopback.
LOOPBACK_VARIABLE = "DROVER_RAY_LOOPBACK"
#: Read by the start hook: end the node when the head at this address is another than it has joined.
HEAD_VARIABLE = "DROVER_RAY_HEAD"
#: In the node's private directory: why the start hook has ended it.
ENDED_FILE = "ended"
#: The node's private directory; marks its processes.
DIRECTORY_VARIABLE = "DROVER_RAY_DIR"

#: Ray refuses less than 75 MiB; messages up to 100 KiB do not touch the object store at all.
OBJECT_STORE_BYTES = 80 * 1024 * 1024
#: Seconds until a starting node must be ready: 2 s on idle cores, over a minute where 15 programs share two.
START_DEADLINE_S = 240.0
#: Ray itself gives a node 30 s, without a switch (node.py); an overloaded machine gets this many tries.
START_TRIES = 3
RAY_TOO_SLOW = "timed out during startup"
#: Seconds that a head is waited for by a node that joins, and seconds between two looks.
HEAD_WITHIN_S = 60.0
HEAD_EVERY_S = 0.5
#: Seconds that a node may take to end by itself.
STOP_GRACE_S = 5.0
#: How often a node is looked at, seconds.
WATCH_S = 0.2
#: Seconds that Ray has for noticing itself that a part of a node has ended.
NOTICE_S = 5.0
#: Lines of Ray's output that an error quotes.
QUOTED_LINES = 8
#: Syntax of a label value (Kubernetes'); Ray refuses others.
WORKER_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
#: How `ray start --block` tells which of its servers ended (scripts.py, _log_unexpected_subprocess_exit_details).
RAY_EXIT = re.compile(r"(\w+) \[exit code=(-?[0-9]+)\]")
CLUSTER_ADDRESS = re.compile(r"\S+:[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Keep:
    """Makes a node go on when its owner is killed: where the next owner finds it, how long it goes on alone."""

    record: Path
    outlive_s: float


class RayNode:
    """One `ray start --block` child and its private directory; see the module for the rules."""

    def __init__(
        self,
        *,
        what: str,
        token_file: Path,
        host: str,
        base_dir: Path,
        start_deadline_s: float,
        keep: Keep | None,
    ) -> None:
        _check_host(host)
        check_token_file(token_file)
        self._keep = keep
        self._what = what
        self._token_file = token_file
        self._host = host
        self._base_dir = base_dir
        self._start_deadline_s = start_deadline_s
        #: The leader's process id and start time, while there is one; its handle where it is our child.
        self._leader: tuple[int, str] | None = None
        self._child: asyncio.subprocess.Process | None = None
        #: What the leader has started (raylet, and the head's tables): without one of them it is no node.
        self._parts: frozenset[Process] = frozenset()
        self._dir: Path | None = None
        #: Found running and taken over.
        self.adopted = False
        self._stopping = False
        #: `host:port` of the cluster's head, known once the node is ready.
        self._cluster = ""

    @property
    def pid(self) -> int:
        """Process and session id of the node. Raises `RayNodeError` before it has started."""
        if self._leader is None:
            raise RayNodeError(f"{self._what} is not running")
        return self._leader[0]

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

    def _fingerprint(self) -> str:
        """What must be the same for a running node to be taken over."""
        nowhere = Path("/")
        env = {name: value for name, value in self.env({}).items() if name.startswith(("RAY_", "DROVER_"))}
        told = [self.argv(nowhere), sorted(env.items()), self.reads()]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def reads(self) -> str:
        """Return the text of what the node reads from disk, which must not have changed under a running node."""
        return ""

    async def __aenter__(self) -> Self:
        """Start, and return when the node is ready. Raises `RayNodeError`, having cleaned up."""
        await asyncio.to_thread(sweep_stale, self._base_dir)
        if self._keep is not None:
            running = await asyncio.to_thread(take_over, self._keep.record, self._fingerprint())
            if running is not None:
                self._dir, leader = running
                self._leader = (leader.pid, leader.started)
                self._cluster = _read_cluster(self._dir / CLUSTER_FILE)
                self._parts = await asyncio.to_thread(children, leader.pid)
                self.adopted = True
                return self
        await self.start()
        return self

    async def start(self) -> None:
        """Start the node, which does not run. Raises `RayNodeError`, having cleaned up."""
        await self.check()
        self.adopted = False
        tries = START_TRIES
        while True:
            tries -= 1
            self._stopping = False
            self._dir = private_directory(self._base_dir)
            try:
                await self._start(self._dir)
                await self._wait_ready(self._dir)
                self._parts = await asyncio.to_thread(children, self.pid)
            except BaseException as error:
                await self.stop()
                if isinstance(error, RayNodeError) and RAY_TOO_SLOW in str(error) and tries:
                    log.warning("%s did not start within Ray's own 30 s; once more", self._what)
                    continue
                raise
            return

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the node; see `stop`."""
        await self.stop()

    def leave(self) -> None:
        """Let the node go on without us: `stop`, and leaving the context, do nothing after it."""
        self._stopping = True
        self._leader = self._child = self._dir = None

    async def wait_failed(self) -> str:
        """Return the reason, in one sentence, when the node ends although nobody asked it to; otherwise never."""
        if self._leader is None:
            raise RayNodeError(f"{self._what} is not running")
        ending = await self._ending(*self._leader)
        if self._stopping:
            await asyncio.get_running_loop().create_future()
        return f"{self._what} {ending}{self._last_words()}"

    async def _ending(self, leader: int, started: str) -> str:
        """Wait until the leader is gone, or lives on without what makes it a node: say which.

        A raylet that ends in order, say because the agent beside it was killed, is nothing to `ray start --block`.
        """
        waits_s = NOTICE_S
        while is_alive(leader, started):
            if any(not is_alive(part.pid, part.started) for part in self._parts):
                # Most ends it does notice, and then says what they were.
                if waits_s <= 0:
                    return "lives on without its raylet"
                waits_s -= WATCH_S
            await asyncio.sleep(WATCH_S)
        status = f" with status {await self._child.wait()}" if self._child is not None else ""
        return f"ended unexpectedly{status}"

    async def stop(self) -> None:
        """End the node's whole process tree and remove its directory. Idempotent; at most about 15 s."""
        self._stopping = True
        leader, directory, child = self._leader, self._dir, self._child
        if leader is not None:
            await _end_tree(leader[0], self._what)
        if child is not None:
            await child.wait()
        self._leader = self._child = None
        if directory is not None:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        self._dir = None

    async def check(self) -> None:
        """Look for what would make the start fail late or obscurely. Raises `RayNodeError`."""

    def prepare(self, directory: Path) -> None:
        """Put what the node reads into its private directory."""

    async def _start(self, directory: Path) -> None:
        self.prepare(directory)
        base = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
        env = self.env(base) | {PARENT_VARIABLE: str(os.getpid()), DIRECTORY_VARIABLE: str(directory)}
        # Any hook will do for the watch over the parent; it also binds to loopback where that is wanted.
        env["RAY_START_HOOK"] = "workers.ray_transport.fleet.prepare_node"
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
        self._leader = identity(self._child.pid)
        outlive_s = self._keep.outlive_s if self._keep else 0.0
        NodeNote(own_identity(), self._leader, outlive_s, self._fingerprint()).write(directory)
        if self._keep is not None:
            self._keep.record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._keep.record.write_text(f"{directory}\n")

    async def _wait_ready(self, directory: Path) -> None:
        child = self._child
        if child is None:
            raise RayNodeError(f"{self._what} is not running")
        try:
            async with asyncio.timeout(self._start_deadline_s):
                # Ray writes this file as the last step of a start.
                while not (address := _read_cluster(directory / CLUSTER_FILE)):
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
        with contextlib.suppress(OSError):
            return "; " + (self._dir / ENDED_FILE).read_text()
        try:
            text = (self._dir / "start.log").read_text(errors="replace")
        except OSError:
            return ""
        if ended := RAY_EXIT.findall(text):
            return "; " + ", ".join(f"{server} ended with status {code}" for server, code in ended)
        lines = [line for line in text.splitlines() if line.strip()][-QUOTED_LINES:]
        return "; its last lines:\n" + "\n".join(lines) if lines else ""


class RayHead(RayNode):
    """The farm's Ray head: membership and addresses, no builds.

    `host` is where it listens; everything but 127.0.0.1 makes Ray listen on **all** interfaces of the machine, so a
    farm of several machines needs a private network around it. `port` 0 takes a free one. `tables` is a directory or a
    Redis for Ray's tables: with it, and with a port, a head that died is started again as the same head.
    """

    def __init__(
        self,
        *,
        token_file: Path,
        host: str = LOOPBACK,
        port: int = 0,
        health: NodeHealth | None = None,
        tables: Path | RedisStore | None = None,
        keep: Keep | None = None,
        base_dir: Path | None = None,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        super().__init__(
            what="the Ray head",
            token_file=token_file,
            host=host,
            base_dir=base_dir or default_base_dir(),
            start_deadline_s=start_deadline_s,
            keep=keep,
        )
        self._port = port
        self._health = health
        self._tables = tables

    @property
    def address(self) -> str:
        """`host:port` for nodes and drivers. Raises `RayNodeError` before the head is ready."""
        if not self._cluster:
            raise RayNodeError("the Ray head is not running")
        return self._cluster

    async def check(self) -> None:
        """Refuse a port that is taken, at which Ray would take 50 s to fail, and a Redis that cannot be used."""
        if isinstance(self._tables, RedisStore):
            await check_redis(self._tables)
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, self._port))
            except OSError as error:
                raise RayNodeError(
                    f"the Ray head cannot listen on {self._host}, port {self._port}: {error.strerror}"
                ) from None

    def prepare(self, directory: Path) -> None:
        """Leave Redis's password where the start hook finds it."""
        if isinstance(self._tables, RedisStore):
            self._tables.write_flags(directory)

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
        env = ray_env(self._token_file, base=base, loopback=is_loopback(self._host), health=self._health)
        if isinstance(self._tables, RedisStore):
            env |= self._tables.env()
        elif self._tables is not None:
            # Embedded RocksDB (REP-64); the nodes' patience is RAY_gcs_rpc_server_reconnect_timeout_s.
            env |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self._tables)}
        return env


class RayJoiningNode(RayNode):
    """A node without a worker, for a driver: the coordinator does not hang on the head's processes."""

    def __init__(
        self,
        *,
        head: str,
        token_file: Path,
        what: str = "the coordinator's Ray node",
        host: str = LOOPBACK,
        keep: Keep | None = None,
        base_dir: Path | None = None,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        if not CLUSTER_ADDRESS.fullmatch(head):
            raise RayNodeError(f"the address of the Ray head must be host:port, not {head!r}")
        super().__init__(
            what=what,
            token_file=token_file,
            host=host,
            base_dir=base_dir or default_base_dir(),
            start_deadline_s=start_deadline_s,
            keep=keep,
        )
        self._head = head

    async def check(self) -> None:
        """Wait for a head that may be starting too, at most HEAD_WITHIN_S."""
        told = False
        deadline = time.monotonic() + HEAD_WITHIN_S
        while True:
            try:
                await check_listens(self._head)
            except RayNodeError as error:
                if time.monotonic() > deadline:
                    raise
                if not told:
                    log.warning("%s; %s waits for it, at most %.0f s", error, self._what, HEAD_WITHIN_S)
                told = True
                await asyncio.sleep(HEAD_EVERY_S)
            else:
                return

    def argv(self, directory: Path) -> list[str]:
        """Return the command line of the node."""
        return [
            *_ray_start(directory),
            f"--address={self._head}",
            f"--node-ip-address={self._host}",
            # Nodes that share an address must not hand out the same fixed ports: let the system choose.
            "--min-worker-port=0",
            "--max-worker-port=0",
        ]

    def env(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return the node's environment."""
        loopback = is_loopback(self._host)
        env = ray_env(self._token_file, base=base, loopback=loopback) | {HEAD_VARIABLE: self._head}
        if loopback:
            # `ray start --address` insists on a multi-node system; the hook brings loopback back.
            env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
            env[LOOPBACK_VARIABLE] = "1"
        return env


class RayWorkerNode(RayJoiningNode):
    """A worker's Ray node; `workers.ray_transport.fleet` starts the agent on it once the label is seen.

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
        keep: Keep | None = None,
        base_dir: Path | None = None,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        if not WORKER_NAME.fullmatch(name):
            raise RayNodeError(
                f"the worker name {name!r} must be 1 to 63 letters, digits, '.', '_' or '-', and begin and end with a "
                "letter or digit"
            )
        super().__init__(
            what=f"the Ray node of worker {name}",
            head=head,
            token_file=token_file,
            host=host,
            keep=keep,
            base_dir=base_dir,
            start_deadline_s=start_deadline_s,
        )
        self._name = name
        self._settings_file = settings_file

    def reads(self) -> str:
        """Return the worker's settings."""
        try:
            return self._settings_file.read_text()
        except OSError:
            return ""

    def argv(self, directory: Path) -> list[str]:
        """Return the command line of the node; an operator's service may run it as it is, with `env`."""
        return [*super().argv(directory), f"--node-name={self._name}", f"--labels={WORKER_LABEL}={self._name}"]

    def env(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return the node's environment."""
        return super().env(base) | {SETTINGS_VARIABLE: str(self._settings_file)}


def _ray_start(directory: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        # Ray makes this directory writable for all; the one around it is closed.
        f"--temp-dir={ray_temp_dir(directory)}",
        # The agent asks for no CPU, and Ray then starts no idle processes in advance.
        "--num-cpus=0",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--include-log-monitor=false",
        "--disable-usage-stats",
    ]


def ray_temp_dir(directory: Path) -> Path:
    """Return Ray's own directory below a node's private one; the path is short because of the sockets in it."""
    return directory / "r"


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


def _read_cluster(path: Path) -> str:
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return text if CLUSTER_ADDRESS.fullmatch(text) else ""


async def _end_tree(leader: int, what: str) -> None:
    """SIGTERM to the leader, which ends its own; SIGKILL to what is left; then nothing of the tree may live."""
    tree = await asyncio.to_thread(process_tree, leader)
    signal_all([process for process in tree if process.pid == leader], signal.SIGTERM)
    await _all_gone([process for process in tree if process.pid == leader], STOP_GRACE_S)
    tree |= await asyncio.to_thread(process_tree, leader)
    left = await asyncio.to_thread(still_alive, tree)
    signal_all(left, signal.SIGKILL)
    if left := await _all_gone(left, KILL_GRACE_S):
        log.error("%s left processes behind: %s", what, sorted(process.pid for process in left))


async def _all_gone(processes: Iterable[Process], within_s: float) -> set[Process]:
    """Wait for the end of processes; return those that are still there."""
    left = set(processes)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while left := await asyncio.to_thread(still_alive, left):  # noqa: ASYNC110 - as in wait_failed
                await asyncio.sleep(LOOK_AGAIN_S)
    return left
