"""A daemon that is our own child: `nix-daemon --stdio` in a process group of its own.

Hanging up is the way to stop it: the daemon then kills its builder (within about 20 ms) and exits. SIGKILL comes last,
because a builder leads a session of its own and survives a daemon that dies without warning (seen with Nix 2.8, sandbox
on); where the system tells who the daemon's children are (Linux), they are killed with it.
"""

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from infra.daemon.errors import DaemonGone
from infra.process import ChildProcess, ProcessNotFound

#: How much of the end of the child's standard error is kept for error messages.
STDERR_TAIL_BYTES: Final = 8 * 1024
#: How long a child may take to end after the hang-up, and again after SIGTERM.
END_GRACE_S: Final = 5.0
#: How long an error message waits for the last words of a child that ended.
LAST_WORDS_S: Final = 0.5


class Child:
    """A running `nix-daemon --stdio`. Make it with `Child.start`; it must be closed."""

    def __init__(self, process: ChildProcess) -> None:
        self.reader = process.stdout
        self.writer = process.stdin
        self._process = process
        #: The end of standard error, never longer than STDERR_TAIL_BYTES.
        self._tail = bytearray()
        #: Ends when the child and all that inherited its standard error are gone, or when close() cancels it.
        self._drain = asyncio.create_task(self._keep_tail(), name="stderr of nix-daemon")

    @classmethod
    async def start(cls, command: Sequence[str], env: Mapping[str, str]) -> "Child":
        """Start the command with exactly this environment.

        Raises:
            DaemonGone: It cannot be started.
        """
        try:
            return cls(await ChildProcess.start(command, env=env))
        except ProcessNotFound as error:
            raise DaemonGone(str(error)) from error

    @property
    def pid(self) -> int:
        """Process id of the child, which is also the id of its group."""
        return self._process.pid

    def hang_up(self) -> None:
        """Close our ends of its standard input and output now, sending nothing more. The child ends by itself."""
        self._process.hang_up()

    async def last_words(self) -> str:
        """Say how the child ended and what it wrote last, waiting LAST_WORDS_S for either."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._process.wait()
                await asyncio.wait((self._drain,))
        code = self._process.returncode
        tail = self._tail.decode(errors="replace").strip()
        ending = "still running" if code is None else f"exit status {code}"
        return f"{ending}; standard error: {tail}" if tail else ending

    async def close(self) -> None:
        """Hang up, wait END_GRACE_S, then end the process group by SIGTERM and, END_GRACE_S later, SIGKILL."""
        self.hang_up()
        try:
            if not await self._ended():
                self._process.signal(signal.SIGTERM)
                await self._ended()
        finally:
            # A group whose leader was collected long ago is not ours to signal: its number may be somebody else's now.
            if self._process.returncode is None:
                builders = _children(self.pid)
                await self._process.kill()
                for builder in builders:
                    with suppress(ProcessLookupError):
                        os.killpg(builder, signal.SIGKILL)
            self._process.close_pipes()
            self._drain.cancel()
            await asyncio.gather(self._drain, return_exceptions=True)

    async def _ended(self) -> bool:
        try:
            async with asyncio.timeout(END_GRACE_S):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    async def _keep_tail(self) -> None:
        while data := await self._process.stderr.read(STDERR_TAIL_BYTES):
            self._tail += data
            del self._tail[:-STDERR_TAIL_BYTES]


def _children(parent: int) -> list[int]:
    """Return the ids of a process's children that lead process groups; none where there is no /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state ppid pgrp ...; the name may hold anything, parentheses and blanks included.
            _, ppid, group, *_ = stat.read_text(errors="replace").rpartition(")")[2].split()
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if int(ppid) == parent and group == stat.parent.name:
            found.append(int(group))
    return found
