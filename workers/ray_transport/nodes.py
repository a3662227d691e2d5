"""The kinds of Ray node of a farm: its head, a driver's node, a worker's node; command line and environment of each.

`workers.ray_transport.node_process` starts and ends them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from workers.agent.settings import SETTINGS_VARIABLE, SettingsError, load_settings
from workers.ray_transport import node_start
from workers.ray_transport.access import LOOPBACK, NodeHealth, RayNodeError, is_loopback, ray_env
from workers.ray_transport.head_port import check_listens
from workers.ray_transport.node_process import CLUSTER_ADDRESS, Handover, RayNode, default_base_dir, ray_temp_dir
from workers.ray_transport.offers import SLOT, node_offer
from workers.ray_transport.redis import RedisStore, check_redis

_log = logging.getLogger(__name__)

#: Node label that names a drover worker; its value is the worker's name.
WORKER_LABEL = "drover.worker"
#: Seconds until a starting node must be ready: 2 s on idle cores, over a minute where 15 programs share two.
START_DEADLINE_S = 240.0
#: Seconds that a head is waited for by a node that joins, and seconds between two looks.
HEAD_WITHIN_S = 60.0
HEAD_EVERY_S = 0.5
#: Syntax of a label value (Kubernetes'); Ray refuses others.
WORKER_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")


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
        keep: Handover | None = None,
        base_dir: Path | None = None,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        super().__init__(
            description="the Ray head",
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
        """Leave Redis's password where the node's program finds it."""
        if isinstance(self._tables, RedisStore):
            self._tables.write_flags(directory)

    def argv(self, directory: Path) -> list[str]:
        """Return the command line of the head."""
        return [*_node_start(directory, self._host), f"--port={self._port}"]

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
        description: str = "the coordinator's Ray node",
        host: str = LOOPBACK,
        keep: Handover | None = None,
        base_dir: Path | None = None,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        if not CLUSTER_ADDRESS.fullmatch(head):
            raise RayNodeError(f"the address of the Ray head must be host:port, not {head!r}")
        super().__init__(
            description=description,
            token_file=token_file,
            host=host,
            base_dir=base_dir or default_base_dir(),
            start_deadline_s=start_deadline_s,
            keep=keep,
        )
        self._head = head

    async def check(self) -> None:
        """Wait for a head that may be starting too, at most HEAD_WITHIN_S."""
        logged = False
        deadline = time.monotonic() + HEAD_WITHIN_S
        while True:
            try:
                await check_listens(self._head)
            except RayNodeError as error:
                if time.monotonic() > deadline:
                    raise
                if not logged:
                    _log.warning("%s; %s waits for it, at most %.0f s", error, self._description, HEAD_WITHIN_S)
                logged = True
                await asyncio.sleep(HEAD_EVERY_S)
            else:
                return

    def argv(self, directory: Path) -> list[str]:
        """Return the command line of the node."""
        return [*_node_start(directory, self._host), f"--head={self._head}"]

    def env(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return the node's environment."""
        return ray_env(self._token_file, base=base, loopback=is_loopback(self._host))


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
        keep: Handover | None = None,
        base_dir: Path | None = None,
        start_deadline_s: float = START_DEADLINE_S,
    ) -> None:
        if not WORKER_NAME.fullmatch(name):
            raise RayNodeError(
                f"the worker name {name!r} must be 1 to 63 letters, digits, '.', '_' or '-', and begin and end with a "
                "letter or digit"
            )
        super().__init__(
            description=f"the Ray node of worker {name}",
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
        words = [*super().argv(directory), f"--name={self._name}", f"--label={WORKER_LABEL}={self._name}"]
        try:
            offered = node_offer(load_settings(self._settings_file))
        except SettingsError:
            # The agent says what is wrong with them.
            return words
        return [
            *words,
            f"--resource={SLOT}={offered.slots}",
            *(f"--label={key}={value}" for key, value in offered.labels.items()),
        ]

    def env(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return the node's environment."""
        return super().env(base) | {SETTINGS_VARIABLE: str(self._settings_file)}


def _node_start(directory: Path, host: str) -> list[str]:
    # Ray makes its directory writable for all; the one around it is closed.
    return [
        *(sys.executable, "-m", node_start.__name__),
        *(f"--temp-dir={ray_temp_dir(directory)}", f"--host={host}"),
    ]
