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
from typing import Final

from infra.daemon import owner, usage
from infra.daemon.confinement import UNCONFINED, Confinement
from infra.daemon.control_groups import ControlGroup, ControlGroups, GroupAccount, read_whole
from infra.daemon.errors import DaemonGone
from infra.process import ChildProcess, ProcessNotFound

#: How much of the end of the child's standard error is kept for error messages.
STDERR_TAIL_BYTES: Final = 8 * 1024
#: How long a child may take to end after the hang-up: a cancelled build is gone within 2 s.
END_GRACE_S: Final = 1.0
#: How long the owner may take to kill what is left, after SIGTERM.
KILL_GRACE_S: Final = 5.0
#: How long an error message waits for the last words of a child that ended.
LAST_WORDS_S: Final = 0.5
#: Seconds between two looks at what the owner still has to kill, and until a build's leftovers are left to it.
LOOK_AGAIN_S: Final = 0.005
ORPHANS_END_S: Final = 5.0


def _children(pid: int) -> list[int]:
    """Return the children of a process's main thread, oldest first. Raises `OSError` where it is gone."""
    return [int(word) for word in read_whole(f"/proc/{pid}/task/{pid}/children").split()]


class Child:
    """A running `nix-daemon --stdio`. Make it with `Child.start`; it must be closed."""

    def __init__(self, process: ChildProcess) -> None:
        self.reader = process.stdout
        self.writer = process.stdin
        self.incoming = process.incoming
        self._process = process
        #: The owner's children before the first build; None until `keep_children`.
        self._kept: frozenset[int] | None = None
        #: The daemon, as far as /proc shows it, and its account of builders after the last build.
        self._daemon: int | None = None
        self._account: usage.Account | None = None
        #: The daemon's control group, where it has one, and its account after the last build.
        self._group: ControlGroup | None = None
        self._group_account: GroupAccount | None = None
        #: The end of standard error, never longer than STDERR_TAIL_BYTES.
        self._tail = bytearray()
        #: Ends when the child and all that inherited its standard error are gone, or when close() cancels it.
        self._drain = asyncio.create_task(self._keep_tail(), name="stderr of nix-daemon")

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        env: Mapping[str, str],
        confinement: Confinement = UNCONFINED,
        *,
        is_owned: bool = True,
    ) -> "Child":
        """Start the command with exactly this environment, in these namespaces.

        Without an owner it is in no namespaces, and must start nothing that outlives it.

        Raises:
            DaemonGone: It cannot be started.
        """
        try:
            # Isolated and without `site`: the owner starts in 20 ms and takes nothing from the environment.
            above = [sys.executable, "-I", "-S", owner.__file__, *confinement.words()] if is_owned else []
            return cls(await ChildProcess.start([*above, *command], env=env))
        except ProcessNotFound as error:
            raise DaemonGone(str(error)) from error

    @property
    def pid(self) -> int:
        """Process id of the owner, or of what has none, which is also the id of its session."""
        return self._process.pid

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

    def hang_up(self) -> None:
        """Close our ends of its standard input and output now, sending nothing more. The child ends by itself."""
        self._process.hang_up()

    async def last_words(self) -> str:
        """Return how the child ended and what it wrote last, waiting LAST_WORDS_S for either."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._process.wait()
                await asyncio.wait((self._drain,))
        code = self._process.returncode
        tail = self._tail.decode(errors="replace").strip()
        ending = "still running" if code is None else f"exit status {code}"
        return f"{ending}; standard error: {tail}" if tail else ending

    async def close(self) -> None:
        """Hang up, wait END_GRACE_S, have the owner kill what is left, and KILL_GRACE_S later kill it ourselves."""
        self.hang_up()
        try:
            if not await self._ended(END_GRACE_S):
                self._process.signal(signal.SIGTERM)
                await self._ended(KILL_GRACE_S)
        finally:
            # A group whose leader was collected long ago is not ours to signal: its number may be somebody else's now.
            if self._process.returncode is None:
                left = owner.descendants(self.pid, owner.parents())
                await self._process.kill()
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self._process.close_pipes()
            if self._group is not None:
                self._group.remove()
                self._group = None
            self._drain.cancel()
            await asyncio.gather(self._drain, return_exceptions=True)

    async def _ended(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    async def _keep_tail(self) -> None:
        while data := await self._process.stderr.read(STDERR_TAIL_BYTES):
            self._tail += data
            del self._tail[:-STDERR_TAIL_BYTES]
