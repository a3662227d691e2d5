"""A daemon that only answers questions: `nix-daemon --stdio` in a session of its own, which builds nothing.

What builds has an owner above it (`infra.daemon.child`), which takes as long to start as such a daemon.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from infra.daemon.errors import DaemonGone
from infra.process import ChildProcess, ProcessNotFound

if TYPE_CHECKING:
    from infra.daemon.usage import BuildersUse

#: How much of the end of the child's standard error is kept for error messages.
STDERR_TAIL_BYTES: Final = 8 * 1024
#: How long a child may take to end after the hang-up: a cancelled build is gone within 2 s.
END_GRACE_S: Final = 1.0
#: How long the owner may take to kill what is left, after SIGTERM.
KILL_GRACE_S: Final = 5.0
#: How long an error message waits for the last words of a child that ended.
LAST_WORDS_S: Final = 0.5


class BareChild:
    """A running `nix-daemon --stdio` that starts nothing. Make it with `start`; it must be closed."""

    def __init__(self, process: ChildProcess) -> None:
        self.reader = process.stdout
        self.writer = process.stdin
        self.incoming = process.incoming
        self._process = process
        #: The end of standard error, never longer than STDERR_TAIL_BYTES.
        self._tail = bytearray()
        #: Ends when the child and all that inherited its standard error are gone, or when close() cancels it.
        self._drain = asyncio.create_task(self._keep_tail(), name="stderr of nix-daemon")

    @classmethod
    async def start(cls, command: Sequence[str], env: Mapping[str, str]) -> Self:
        """Start the command with exactly this environment; it must start nothing that outlives it.

        Raises:
            DaemonGone: It cannot be started.
        """
        try:
            return cls(await ChildProcess.start(command, env=env))
        except ProcessNotFound as error:
            raise DaemonGone(str(error)) from error

    @property
    def pid(self) -> int:
        """Process id of what was started, which is also the id of its session."""
        return self._process.pid

    def memory_of_building(self) -> int:
        """Resident bytes of the daemon while it has children: it has none."""
        return 0

    def memory_of_builders(self) -> int | None:
        """Bytes that all processes below the daemon have for themselves: it has none."""
        return None

    def builders_use(self) -> BuildersUse | None:
        """Return what builders used since the last call: none ran."""
        return None

    def keep_children(self) -> None:
        """Take the children of this moment for its own: it has none."""

    async def end_orphans(self) -> None:
        """Have what an ended build left behind killed: nothing is."""

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
        """Hang up, wait END_GRACE_S, signal it to end, and KILL_GRACE_S later kill it."""
        self.hang_up()
        try:
            if not await self._ended(END_GRACE_S):
                self._process.signal(signal.SIGTERM)
                await self._ended(KILL_GRACE_S)
        finally:
            # A group whose leader was collected long ago is not ours to signal: its number may be somebody else's now.
            if self._process.returncode is None:
                await self._kill()
            self._process.close_pipes()
            self._drain.cancel()
            await asyncio.gather(self._drain, return_exceptions=True)

    async def _kill(self) -> None:
        await self._process.kill()

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
