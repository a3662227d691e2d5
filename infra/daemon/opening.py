"""Opening a connection: to a daemon of our own, or to one that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from infra.daemon.channel import Channel
from infra.daemon.child import Child
from infra.daemon.confinement import UNCONFINED, Confinement
from infra.daemon.connection import DaemonConnection
from infra.daemon.control_groups import ControlGroups


async def open_stdio(
    command: Sequence[str],
    env: Mapping[str, str],
    confinement: Confinement = UNCONFINED,
    groups: ControlGroups | None = None,
    *,
    builds: bool = True,
) -> DaemonConnection:
    """Start a daemon of our own (`nix-daemon --stdio ...`, the whole command) and shake hands.

    Args:
        command: Program and arguments; `--store` and `--option` are understood by nix-daemon.
        env: The child's whole environment; nothing is inherited.
        confinement: Namespaces that the daemon and its builds live in.
        groups: Where the daemon gets a control group of its own, which measures its builds.
        builds: Whether it may build; one that only answers questions needs no owner, which takes as long to start.

    Raises:
        DaemonGone: The command cannot be started, or ended instead of answering.
        DaemonUnsupportedError: It speaks a protocol before 1.32.
        DaemonProtocolError: It does not speak the protocol.
    """
    child = await Child.start(command, env, confinement, is_owned=builds)
    connection = await DaemonConnection.over(Channel(child.reader, child.writer, child))
    if groups is not None:
        try:
            await child.enter_group(groups)
        except BaseException:
            await connection.close()
            raise
    return connection


async def open_socket(path: str) -> DaemonConnection:
    """Connect to a running daemon, usually at /nix/var/nix/daemon-socket/socket, and shake hands.

    Raises: as open_stdio.
    """
    return await DaemonConnection.over(await Channel.to_socket(path))
