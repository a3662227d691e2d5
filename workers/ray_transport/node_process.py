"""Start and stop Ray nodes as supervised child processes, closed to strangers.

A node is one program (`workers.ray_transport.node_start`) in a session of its own, with a private directory (mode 0700)
around everything that Ray writes, because Ray makes its session directory and sockets accessible to all. Rules:

* A node's settings of token and time limits come from `workers.ray_transport.access`.
* On loopback nothing listens on another interface.
* Leaving the context ends the whole process tree: SIGTERM, a named grace, SIGKILL, then a look at what is left. When
  this process is killed instead, a node with a record goes on for a while and is taken over by the next start
  (`workers.ray_transport.node_records`); any other is ended by its leader.
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
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from infra.process import to_its_end
from infra.process_tree import Process, identity, is_alive, process_tree, signal_all, still_alive
from workers.ray_transport.access import LOOPBACK, RayNodeError, check_token_file, is_loopback
from workers.ray_transport.node_leader import DIRECTORY_VARIABLE, ENDED_FILE, PARENT_VARIABLE
from workers.ray_transport.node_records import (
    CLUSTER_FILE,
    KILL_GRACE_S,
    LOOK_AGAIN_S,
    STOP_GRACE_S,
    NodeRecord,
    own_identity,
    private_directory,
    sweep_stale,
    take_over,
)

_log = logging.getLogger(__name__)

#: Ray itself gives a node 30 s, without a switch (node.py); an overloaded machine gets this many tries.
START_TRIES = 3
RAY_TOO_SLOW = "timed out during startup"
#: Between two looks at a process that is no child of ours, seconds, on systems that do not report its end.
LOOK_FOR_STRANGER_S = 1.0
#: Lines of Ray's output that an error quotes.
QUOTED_LINES = 8
CLUSTER_ADDRESS = re.compile(r"\S+:[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Handover:
    """Makes a node go on when its owner is killed: where the next owner finds it, how long it goes on alone."""

    record: Path
    outlive_s: float


class RayNode(ABC):
    """One child that leads Ray's servers, and its private directory; see the module for the rules."""

    def __init__(
        self,
        *,
        description: str,
        token_file: Path,
        host: str,
        base_dir: Path,
        start_deadline_s: float,
        keep: Handover | None,
    ) -> None:
        _check_host(host)
        check_token_file(token_file)
        self._keep = keep
        self._description = description
        self._token_file = token_file
        self._host = host
        self._base_dir = base_dir
        self._start_deadline_s = start_deadline_s
        #: The leader's process id and start time, while there is one; its handle where it is our child.
        self._leader: tuple[int, str] | None = None
        self._child: asyncio.subprocess.Process | None = None
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
            raise RayNodeError(f"{self._description} is not running")
        return self._leader[0]

    @property
    def directory(self) -> Path:
        """The node's private directory. Raises `RayNodeError` before it has started."""
        if self._dir is None:
            raise RayNodeError(f"{self._description} is not running")
        return self._dir

    @abstractmethod
    def argv(self, directory: Path) -> list[str]:
        """Return the command line that runs this node with its files below `directory`."""

    @abstractmethod
    def env(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of this node, made of `base`."""

    def _fingerprint(self) -> str:
        """Return a digest of the settings that a running node must share to be taken over."""
        nowhere = Path("/")
        env = {name: value for name, value in self.env({}).items() if name.startswith(("RAY_", "DROVER_"))}
        fields = [self.argv(nowhere), sorted(env.items()), self.reads()]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

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
            except BaseException as error:
                _, cancelled = await to_its_end(self.stop())
                if cancelled is not None:
                    raise cancelled from None
                if isinstance(error, RayNodeError) and RAY_TOO_SLOW in str(error) and tries:
                    _log.warning("%s did not start within Ray's own 30 s; once more", self._description)
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

    def detach(self) -> None:
        """Let the node go on without us: `stop`, and leaving the context, do nothing after it."""
        self._stopping = True
        self._leader = self._child = self._dir = None

    async def wait_failed(self) -> str:
        """Return the reason, in one sentence, when the node ends without a request to stop; otherwise never."""
        if self._leader is None:
            raise RayNodeError(f"{self._description} is not running")
        child = self._child
        if child is None:
            await _ended(*self._leader)
        status = f" with status {await child.wait()}" if child is not None else ""
        if self._stopping:
            await asyncio.get_running_loop().create_future()
        return f"{self._description} ended unexpectedly{status}{self._last_words()}"

    async def stop(self) -> None:
        """End the node's whole process tree and remove its directory. Idempotent; at most about 15 s."""
        self._stopping = True
        leader, directory, child = self._leader, self._dir, self._child
        if leader is not None:
            await _end_tree(leader[0], self._description)
        if child is not None:
            await child.wait()
        self._leader = self._child = None
        if directory is not None:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        self._dir = None

    @abstractmethod
    async def check(self) -> None:
        """Look for what would make the start fail late or obscurely. Raises `RayNodeError`."""

    def prepare(self, directory: Path) -> None:  # noqa: B027  most nodes need nothing there
        """Put what the node reads into its private directory."""

    async def _start(self, directory: Path) -> None:
        self.prepare(directory)
        base = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
        env = self.env(base) | {PARENT_VARIABLE: str(os.getpid()), DIRECTORY_VARIABLE: str(directory)}
        with (directory / "start.log").open("wb") as output:
            starting = asyncio.create_subprocess_exec(
                *self.argv(directory),
                env=env,
                # Python puts the working directory first on the path of everything Ray starts: let it be ours.
                cwd=directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            child, cancelled = await to_its_end(starting)
        self._child = child
        self._leader = identity(child.pid)
        if cancelled is not None:
            raise cancelled
        outlive_s = self._keep.outlive_s if self._keep else 0.0
        NodeRecord(own_identity(), self._leader, outlive_s, self._fingerprint()).write(directory)
        if self._keep is not None:
            self._keep.record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._keep.record.write_text(f"{directory}\n")

    async def _wait_ready(self, directory: Path) -> None:
        child = self._child
        if child is None:
            raise RayNodeError(f"{self._description} is not running")
        try:
            async with asyncio.timeout(self._start_deadline_s):
                # The leader writes this file as the last step of a start.
                while not (address := _read_cluster(directory / CLUSTER_FILE)):
                    if child.returncode is not None:
                        raise RayNodeError(
                            f"{self._description} did not start (status {child.returncode}){self._last_words()}"
                        )
                    await asyncio.sleep(LOOK_AGAIN_S)
        except TimeoutError:
            raise RayNodeError(
                f"{self._description} was not ready within {self._start_deadline_s:.0f} s{self._last_words()}"
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
        lines = [line for line in text.splitlines() if line.strip()][-QUOTED_LINES:]
        return "; its last lines:\n" + "\n".join(lines) if lines else ""


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


async def _ended(pid: int, started: str) -> None:
    """Return once a process has ended that is no child of ours."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):
        # Not on this system, or gone already.
        while is_alive(pid, started):  # noqa: ASYNC110 - no event there
            await asyncio.sleep(LOOK_FOR_STRANGER_S)
        return
    loop.add_reader(descriptor, ended.set)
    try:
        # The number may be another's by now.
        if is_alive(pid, started):
            await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def _end_tree(leader: int, description: str) -> None:
    """SIGTERM to the leader, which ends its own; SIGKILL to what is left; then nothing of the tree may live."""
    tree = await asyncio.to_thread(process_tree, leader)
    signal_all([process for process in tree if process.pid == leader], signal.SIGTERM)
    await _all_gone([process for process in tree if process.pid == leader], STOP_GRACE_S)
    tree |= await asyncio.to_thread(process_tree, leader)
    left = await asyncio.to_thread(still_alive, tree)
    signal_all(left, signal.SIGKILL)
    if left := await _all_gone(left, KILL_GRACE_S):
        _log.error("%s left processes behind: %s", description, sorted(process.pid for process in left))


async def _all_gone(processes: Iterable[Process], within_s: float) -> set[Process]:
    """Wait for the end of processes; return those that are still there."""
    left = set(processes)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while left := await asyncio.to_thread(still_alive, left):  # noqa: ASYNC110 - as in wait_failed
                await asyncio.sleep(LOOK_AGAIN_S)
    return left
