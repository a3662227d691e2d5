"""A daemon that is our own child: `nix-daemon --stdio` in a process group of its own.

The pipes are made here rather than by asyncio's subprocess support, because they must be closable at any moment:
asyncio does not report the end of a child whose output nobody reads any more, and that is exactly the state of an
aborted build. Hanging up is also the polite way to stop: the daemon then kills its builder (within about 20 ms) and
exits, whereas a SIGKILL first would leave it no time to do so.
"""

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from infra.daemon.errors import DaemonGone

#: How much of the end of the child's standard error is kept for error messages.
STDERR_TAIL_BYTES: Final = 8 * 1024
#: How long a child may take to end after the hang-up, and again after SIGTERM.
END_GRACE_S: Final = 5.0
#: How long an error message waits for the last words of a child that ended.
LAST_WORDS_S: Final = 0.5
#: Most bytes that wait between the pipe and the parser; twice as many at the moment of arrival.
READ_BUFFER_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class _ReadEnd:
    """Our end of a pipe that the child writes to."""

    reader: asyncio.StreamReader
    transport: asyncio.BaseTransport


class Child:
    """A running `nix-daemon --stdio`. Make it with `Child.start`; it must be closed."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        writer: asyncio.StreamWriter,
        output: "_ReadEnd",
        errors: "_ReadEnd",
    ) -> None:
        self.reader = output.reader
        self.writer = writer
        self._process = process
        self._output = output
        self._errors = errors
        #: Whether our ends of the pipes are closed; closing a pipe transport twice is an error in asyncio.
        self._hung_up = False
        #: The end of standard error, never longer than STDERR_TAIL_BYTES.
        self._tail = bytearray()
        #: Ends when the child and all that inherited its standard error are gone, or when it is cancelled by close().
        self._drain = asyncio.create_task(self._keep_tail(errors.reader), name="stderr of nix-daemon")

    @classmethod
    async def start(cls, command: Sequence[str], env: Mapping[str, str]) -> "Child":
        """Start the command with exactly this environment.

        Raises:
            DaemonGone: It cannot be started.
        """
        loop = asyncio.get_running_loop()
        child_in, our_out = os.pipe()
        our_in, child_out = os.pipe()
        our_err, child_err = os.pipe()
        ours = (our_out, our_in, our_err)
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=child_in, stdout=child_out, stderr=child_err, env=env, start_new_session=True
            )
        except (OSError, ValueError) as error:
            _close_all(ours)
            raise DaemonGone(f"{command[0]} cannot be started: {error}") from error
        except BaseException:
            _close_all(ours)
            raise
        finally:
            _close_all((child_in, child_out, child_err))
        output = await _read_end(loop, our_in)
        errors = await _read_end(loop, our_err)
        # The protocol of a StreamReader is what asyncio offers publicly for flow control of a writer.
        protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
        write_transport, _ = await loop.connect_write_pipe(lambda: protocol, os.fdopen(our_out, "wb", buffering=0))
        writer = asyncio.StreamWriter(write_transport, protocol, None, loop)
        return cls(process, writer, output, errors)

    @property
    def pid(self) -> int:
        """Process id of the child, which is also the id of its group."""
        return self._process.pid

    def hang_up(self) -> None:
        """Close our ends of its standard input and output now, sending nothing more. The child ends by itself."""
        if self._hung_up:
            return
        self._hung_up = True
        self.writer.transport.abort()
        self._output.transport.close()

    async def last_words(self) -> str:
        """Say how the child ended and what it wrote last, waiting LAST_WORDS_S for either."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await asyncio.shield(self._drain)
                await self._process.wait()
        code = self._process.returncode
        tail = self._tail.decode(errors="replace").strip()
        ending = "still running" if code is None else f"exit status {code}"
        return f"{ending}; standard error: {tail}" if tail else ending

    async def close(self) -> None:
        """Hang up, wait END_GRACE_S, then end the process group by SIGTERM and, END_GRACE_S later, SIGKILL."""
        self.hang_up()
        try:
            if not await self._ended():
                self._signal(signal.SIGTERM)
                await self._ended()
        finally:
            if self._process.returncode is None:
                self._signal(signal.SIGKILL)
                await self._process.wait()
            self._errors.transport.close()
            self._drain.cancel()
            with suppress(asyncio.CancelledError):
                await self._drain

    async def _ended(self) -> bool:
        try:
            async with asyncio.timeout(END_GRACE_S):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    async def _keep_tail(self, stderr: asyncio.StreamReader) -> None:
        while data := await stderr.read(STDERR_TAIL_BYTES):
            self._tail += data
            del self._tail[:-STDERR_TAIL_BYTES]


async def _read_end(loop: asyncio.AbstractEventLoop, descriptor: int) -> _ReadEnd:
    reader = asyncio.StreamReader(limit=READ_BUFFER_BYTES)
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    return _ReadEnd(reader, transport)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
