"""Opening a connection: to a daemon of our own, or to one that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from infra.daemon.bare_child import BareChild
from infra.daemon.channel import Channel
from infra.daemon.connection import DaemonConnection

if TYPE_CHECKING:
    from infra.daemon.confinement import Confinement
    from infra.daemon.control_groups import ControlGroups


async def open_stdio(
    command: Sequence[str],
    env: Mapping[str, str],
    confinement: Confinement | None = None,
    groups: ControlGroups | None = None,
) -> DaemonConnection:
    """Start a daemon of our own (`nix-daemon --stdio ...`, the whole command) and shake hands.

    Args:
        command: Program and arguments; `--store` and `--option` are understood by nix-daemon.
        env: The child's whole environment; nothing is inherited.
        confinement: Namespaces that the daemon and its builds live in; those of this process without one.
        groups: Where the daemon gets a control group of its own, which measures its builds.

    Raises:
        DaemonGone: The command cannot be started, or ended instead of answering.
        DaemonUnsupportedError: It speaks a protocol before 1.32.
        DaemonProtocolError: It does not speak the protocol.
    """
    # Slow to import, for what needs no more than `open_questions`.
    from infra.daemon.child import Child  # noqa: PLC0415
    from infra.daemon.confinement import UNCONFINED  # noqa: PLC0415

    child = await Child.start(command, env, confinement or UNCONFINED)
    connection = await DaemonConnection.over(Channel(child.reader, child.writer, child))
    if groups is not None:
        try:
            await child.enter_group(groups)
        except BaseException:
            await connection.close()
            raise
    return connection


async def open_questions(command: Sequence[str], env: Mapping[str, str]) -> DaemonConnection:
    """Start a daemon that builds nothing, so that it needs no owner, which takes as long to start, and shake hands.

    Raises: as open_stdio.
    """
    child = await BareChild.start(command, env)
    return await DaemonConnection.over(Channel(child.reader, child.writer, child))


async def open_socket(path: str) -> DaemonConnection:
    """Connect to a running daemon, usually at /nix/var/nix/daemon-socket/socket, and shake hands.

    Raises: as open_stdio.
    """
    return await DaemonConnection.over(await Channel.to_socket(path))
