"""Long-lived connections to the Nix daemon, each with one owner at a time and reopened where it broke.

A `DaemonSession` is one connection's place: a slot, the roots, a transfer. Its user holds it alone; when the connection
was aborted or broke, the next user gets a new one. Opening costs some 25 ms, a request on an open session 0.1 ms.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from infra.daemon import (
    UNCONFINED,
    BasicDerivation,
    BuildEvent,
    BuildInOneGo,
    Confinement,
    ControlGroups,
    DaemonConnection,
    DaemonError,
    Options,
    open_stdio,
)
from infra.daemon.connection import ROOTS_AT_ONCE
from workers.errors import WorkerError

#: What the daemon's process is given of this process's environment: enough to find Nix and its configuration, and
#: nothing that builds must not see (tokens, credentials).
PASSED_ENVIRONMENT = (
    "HOME",
    "LANG",
    "LOGNAME",
    "NIX_CONF_DIR",
    "NIX_DAEMON_SOCKET_PATH",
    "NIX_REMOTE",
    "NIX_SSL_CERT_FILE",
    "NIX_STATE_DIR",
    "NIX_STORE_DIR",
    "NIX_USER_CONF_FILES",
    "PATH",
    "TMPDIR",
    "USER",
)
#: Paths remembered as kept by one connection; beyond it they are kept anew.
MAX_REMEMBERED = 200_000
#: Openings of daemon connections at one time; each starts a process.
MAX_OPENING = 4


class DaemonUnreachableError(WorkerError):
    """No connection to the Nix daemon can be opened."""


class DaemonOpener:
    """Opens connections by one command, whose processes have the namespaces and the variables that are given here."""

    def __init__(
        self,
        argv: Sequence[str],
        store_dir: str,
        environment: Mapping[str, str] | None = None,
        confinement: Confinement = UNCONFINED,
        groups: ControlGroups | None = None,
    ) -> None:
        self._argv = tuple(argv)
        self._confinement = confinement
        self._groups = groups
        self._turns = asyncio.Semaphore(MAX_OPENING)
        passed = {name: os.environ[name] for name in PASSED_ENVIRONMENT if name in os.environ}
        self._environment = passed | {"NIX_STORE_DIR": store_dir} | dict(environment or {})
        #: Counts changes of what processes get: a connection of an earlier one is not used again.
        self.edition = 0

    def deny(self, addresses: Iterable[str]) -> None:
        """Keep builds from IPv4 addresses; those that run on a connection of before go on."""
        network = self._confinement.network
        new = sorted(set(addresses) - set(network.deny)) if network is not None else []
        if network is not None and new:
            self._confinement = self._confinement._replace(network=network._replace(deny=(*network.deny, *new)))
            self.edition += 1

    async def open(self) -> DaemonConnection:
        """Open one more connection. Raises `DaemonUnreachableError` with one sentence."""
        try:
            async with self._turns:
                return await open_stdio(self._argv, self._environment, self._confinement, self._groups)
        except DaemonError as error:
            raise DaemonUnreachableError(f"`{self._argv[0]}` gives no connection: {error}") from error


@dataclass(slots=True)
class _Open:
    connection: DaemonConnection
    #: Of the opener, when it was opened.
    edition: int
    #: The options in force on the connection; None before the first `set_options`.
    options: Options | None = None
    #: What the connection keeps from collection on request.
    rooted: set[str] = field(default_factory=set)


class DaemonSession:
    """One long-lived connection; see the module's text. Must be closed."""

    def __init__(self, opener: DaemonOpener) -> None:
        self._opener = opener
        self._turn = asyncio.Lock()
        self._open: _Open | None = None
        #: Connections that are ending; they are waited for by `close`.
        self._ending: set[asyncio.Task[None]] = set()
        #: Counts openings: what was true of an earlier connection (temporary roots) is gone with it.
        self.generation = 0

    @property
    def busy(self) -> bool:
        """True if a caller holds the session."""
        return self._turn.locked()

    @property
    def broken(self) -> bool:
        """True if the connection is known to have ended, and with it what it kept from collection."""
        return self._open is not None and self._open.connection.unusable_reason is not None

    @asynccontextmanager
    async def use(self) -> AsyncIterator[DaemonConnection]:
        """Hold the session. Raises `DaemonUnreachableError` where it must be reopened and cannot."""
        async with self._turn:
            self._retire_broken()
            if self._open is not None and self._open.edition != self._opener.edition:
                self._retire()
            if self._open is None:
                edition = self._opener.edition
                self._open = _Open(await self._opener.open(), edition)
                self.generation += 1
            try:
                yield self._open.connection
            finally:
                self._retire_broken()

    async def set_options(self, options: Options) -> None:
        """Put options in force, without a request where they are. Only while the session is held."""
        if self._open is None:
            raise RuntimeError("options are set on a session that is held")
        if self._open.options != options:
            await self._open.connection.set_options(options)
            self._open.options = options

    async def build(
        self,
        drv_path: str,
        derivation: BasicDerivation,
        on_event: Callable[[BuildEvent], Awaitable[object] | None],
        options: Options,
    ) -> BuildInOneGo:
        """Build with these options in force and the inputs kept from collection. Only while the session is held."""
        if self._open is None:
            raise RuntimeError("builds run over a session that is held")
        held, connection = self._open, self._open.connection
        new = self._unkept(derivation.inputs)
        if len(new) > ROOTS_AT_ONCE:
            await self.keep(new)
            new = []
        built = await connection.build_in_one_go(
            drv_path, derivation, on_event, options=None if held.options == options else options, roots=new
        )
        held.options = options
        held.rooted.update(new)
        held.rooted.difference_update(built.refused)
        # They were kept by another connection meanwhile, which may die before this one.
        await self.keep(built.refused)
        return built

    async def keep(self, paths: Iterable[str]) -> None:
        """Keep paths from collection for as long as the connection lives. Only while the session is held."""
        new = self._unkept(paths)
        if self._open is not None and new:
            await self._open.connection.add_temp_roots(new)
            self._open.rooted.update(new)

    def _unkept(self, paths: Iterable[str]) -> list[str]:
        if self._open is None:
            raise RuntimeError("paths are kept by a session that is held")
        if len(self._open.rooted) > MAX_REMEMBERED:
            self._open.rooted.clear()
        return sorted(set(paths) - self._open.rooted)

    async def hang_up(self) -> None:
        """Let the next user have a new connection: what the old one kept from collection is free. Waits its turn."""
        async with self._turn:
            await self.close()

    async def close(self) -> None:
        """Hang up, also while a user holds the session, and wait for the end of its process."""
        self._retire()
        while self._ending:
            await asyncio.wait(self._ending)

    def _retire_broken(self) -> None:
        if self.broken:
            self._retire()

    def _retire(self) -> None:
        """Let a broken connection end beside the next one: waiting for its process would hold up the slot."""
        if self._open is None:
            return
        task = asyncio.create_task(self._open.connection.close(), name="end of a daemon connection")
        self._open = None
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


class SessionPool:
    """A few sessions, given out in the order of requests."""

    def __init__(self, sessions: Sequence[DaemonSession]) -> None:
        self._sessions = tuple(sessions)
        self._free = list(sessions)
        self._turns = asyncio.Semaphore(len(sessions))

    @asynccontextmanager
    async def use(self) -> AsyncIterator[DaemonConnection]:
        """Hold any one session. Raises `DaemonUnreachableError` as `DaemonSession.use`."""
        async with self._turns:
            session = self._free.pop()
            try:
                async with session.use() as connection:
                    yield connection
            finally:
                self._free.append(session)

    async def close(self) -> None:
        """Close all sessions."""
        for session in self._sessions:
            await session.close()
