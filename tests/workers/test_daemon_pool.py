"""Sessions with a Nix daemon: one connection serves many users, as long as it has what its opener gives by now."""

from __future__ import annotations

from pathlib import Path

from infra.daemon import Confinement
from infra.daemon.confinement import Network
from workers.agent.daemon_pool import DaemonOpener, DaemonSession


async def test_a_connection_that_reaches_what_is_denied_since_has_no_further_user(tmp_path: Path) -> None:
    argv = ["nix-daemon", "--stdio", "--store", str(tmp_path / "store"), "--option", "build-users-group", ""]
    opener = DaemonOpener(argv, "/nix/store", confinement=Confinement(network=Network((), "10.213.254.0/24")))
    session = DaemonSession(opener)
    try:
        async with session.use() as first:
            opener.deny(["10.1.2.3"])
            assert not session.broken, "a user that holds it keeps it"
        async with session.use() as second:
            assert second is not first
        opener.deny(["10.1.2.3"])
        async with session.use() as third:
            assert third is second, "what was denied before is no news"
        assert session.generation == 2
    finally:
        await session.close()
