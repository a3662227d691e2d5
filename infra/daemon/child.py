"""A daemon that is our own child: `nix-daemon --stdio` below an owner (`infra.daemon.owner`) in a session of its own.

Hanging up is the way to stop it: the daemon then kills its builder (within about 20 ms) and exits, and the owner ends
what left the builder's process group. A daemon that does not react is killed by its owner together with all that
descends from it. The child has ended when nothing of it is left.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

from infra.daemon import owner, usage
from infra.daemon.bare_child import BareChild
from infra.daemon.confinement import UNCONFINED, Confinement
from infra.daemon.control_groups import ControlGroup, ControlGroups, GroupAccount, read_whole
from infra.process import ChildProcess

#: Seconds between two looks at what the owner still has to kill, and until a build's leftovers are left to it.
LOOK_AGAIN_S: Final = 0.005
ORPHANS_END_S: Final = 5.0


def _children(pid: int) -> list[int]:
    """Return the children of a process's main thread, oldest first. Raises `OSError` where it is gone."""
    return [int(word) for word in read_whole(f"/proc/{pid}/task/{pid}/children").split()]


class Child(BareChild):
    """A running `nix-daemon --stdio` below its owner. Make it with `Child.start`; it must be closed."""

    def __init__(self, process: ChildProcess) -> None:
        super().__init__(process)
        #: The owner's children before the first build; None until `keep_children`.
        self._kept: frozenset[int] | None = None
        #: The daemon, as far as /proc shows it, and its account of builders after the last build.
        self._daemon: int | None = None
        self._account: usage.Account | None = None
        #: The daemon's control group, where it has one, and its account after the last build.
        self._group: ControlGroup | None = None
        self._group_account: GroupAccount | None = None

    @classmethod
    async def start(cls, command: Sequence[str], env: Mapping[str, str], confinement: Confinement = UNCONFINED) -> Self:
        """Start the command with exactly this environment, in these namespaces.

        Raises:
            DaemonGone: It cannot be started.
        """
        # Isolated and without `site`: the owner starts in 20 ms and takes nothing from the environment.
        above = [sys.executable, "-I", "-S", owner.__file__, *confinement.words()]
        return await super().start([*above, *command], env)

    def memory_of_building(self) -> int:
        """Resident bytes of the daemon while it has children; 0 while it has none, and where /proc does not show it."""
        try:
            daemon = _children(self.pid)[0]
            if not _children(daemon):
                return 0
            pages = int(Path(f"/proc/{daemon}/statm").read_bytes().split()[1])
        except (OSError, IndexError, ValueError):
            return 0
        return pages * usage.PAGE_BYTES

    def memory_of_builders(self) -> int | None:
        """Bytes that all processes below the daemon have for themselves now; None while it has none."""
        return None if self._daemon is None else usage.memory_below(self._daemon)

    def builders_use(self) -> usage.BuildersUse | None:
        """Return what builders used since the last call; None where /proc does not show it, or none ran."""
        before, group_before, daemon = self._account, self._group_account, self._daemon
        self._account = None if daemon is None else usage.read_account(daemon)
        used = usage.used_between(before, self._account)
        if self._group is None or group_before is None or before is None or self._account is None:
            return used
        self._group_account = self._group.account()
        daemon_s = self._account.own_cpu_s - before.own_cpu_s
        peak = self._group.peak()
        self._group.begin_peak()
        used = usage.used_by_group(group_before, self._group_account, daemon_s, used)
        return used if used is None else replace(used, peak_memory_bytes=peak)

    async def enter_group(self, groups: ControlGroups) -> None:
        """Put the daemon, and with it all its builders, into a control group; where that fails, /proc has to do."""
        if self._daemon is None:
            return
        group = self._group = groups.make()
        if group is None:
            return
        try:
            await asyncio.to_thread(group.take, self._daemon)
        except OSError:
            self._group = None
            group.remove()
            return
        self._group_account = group.account()
        group.begin_peak()

    def keep_children(self) -> None:
        """Take the owner's children of this moment, the daemon first, for its own: no build has begun."""
        with suppress(OSError, ValueError):
            children = _children(self.pid)
            self._kept = frozenset(children)
            self._daemon = children[0] if children else None
            self._account = None if self._daemon is None else usage.read_account(self._daemon)

    async def end_orphans(self) -> None:
        """Have the owner kill what the build that has ended left behind, and wait for it, at most ORPHANS_END_S.

        Does nothing where /proc does not list children, and on systems without subreapers.
        """
        signalled = False
        with suppress(OSError, ValueError, TimeoutError):
            async with asyncio.timeout(ORPHANS_END_S):
                while self._kept is not None and not self._kept.issuperset(_children(self.pid)):
                    if not signalled:
                        os.kill(self.pid, signal.SIGUSR1)
                        signalled = True
                    await asyncio.sleep(LOOK_AGAIN_S)

    async def close(self) -> None:
        """Hang up, wait END_GRACE_S, have the owner kill what is left, and KILL_GRACE_S later kill it ourselves."""
        try:
            await super().close()
        finally:
            if self._group is not None:
                self._group.remove()
                self._group = None

    async def _kill(self) -> None:
        left = owner.descendants(self.pid, owner.parents())
        await super()._kill()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
