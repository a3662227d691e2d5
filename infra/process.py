"""Children: run one to its end with a deadline and bounded output, or hold a longer-lived one.

Every child leads a process group of its own, so that ending it ends what it started. The pipes are made here rather
than by asyncio's subprocess support: asyncio may not report the end of a child while somebody still holds one of its
pipes, and a runaway grandchild is exactly when the end matters.
"""

import asyncio
import fcntl
import os
import signal
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Final, TypeVar

from infra.records import record

_T = TypeVar("_T")

#: Most bytes that wait between a pipe and its reader; twice as many at the moment of arrival.
PIPE_BUFFER_BYTES: Final = 256 * 1024


class ProcessError(Exception):
    """Root of every error that infra.process raises."""


class ProcessNotFound(ProcessError):  # noqa: N818 - named for what it says
    """The program, or the directory to run it in, does not exist or may not be used."""


class ProcessTimeout(ProcessError):  # noqa: N818 - named for what it says
    """The child did not end in time; its process group was killed."""


class ProcessOutputTooLarge(ProcessError):  # noqa: N818 - named for what it says
    """The child wrote more than it may; its process group was killed."""


@record(frozen=True, slots=True)
class Completed:
    """A child that ended by itself.

    Attributes:
        returncode: Its exit status, or the negative number of the signal that ended it.
        stdout: All of its standard output.
        stderr: All of its standard error.
    """

    returncode: int
    stdout: bytes
    stderr: bytes


class ChildProcess:
    """A running child with pipes on all three standard descriptors. Make it with `start`; end it with `kill`.

    Attributes:
        stdin: Writes to the child; `drain` waits until the pipe has taken everything.
        stdout: The child's standard output.
        stderr: The child's standard error.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        stdin: asyncio.StreamWriter,
        stdout: "_ReadEnd",
        stderr: "_ReadEnd",
    ) -> None:
        self.stdin = stdin
        self.stdout = stdout.reader
        self.stderr = stderr.reader
        #: Where standard output comes from; may be paused while all that came has been read.
        self.incoming = stdout.transport
        self._process = process
        self._stdout = stdout
        self._stderr = stderr

    @classmethod
    async def start(
        cls, argv: Sequence[str], *, env: Mapping[str, str], cwd: str | os.PathLike[str] | None = None
    ) -> "ChildProcess":
        """Start a program in a session, and so a process group, of its own.

        A task that is cancelled here ends when the child has, however often it is cancelled.

        Args:
            argv: Program (looked up on the PATH of `env`) and arguments; never a shell line.
            env: The whole environment of the child; nothing is inherited.
            cwd: Working directory; ours if None.

        Raises:
            ProcessNotFound: It cannot be started.
        """
        with ExitStack() as theirs, ExitStack() as undo:
            child_in, our_out = os.pipe()
            theirs.callback(os.close, child_in)
            stdin = await _open_write_end(our_out)
            undo.callback(stdin.transport.abort)
            our_in, child_out = os.pipe()
            theirs.callback(os.close, child_out)
            _widen(our_in)
            stdout = await _open_read_end(our_in)
            undo.callback(stdout.transport.close)
            our_err, child_err = os.pipe()
            theirs.callback(os.close, child_err)
            stderr = await _open_read_end(our_err)
            undo.callback(stderr.transport.close)
            starting = asyncio.create_subprocess_exec(
                *argv,
                stdin=child_in,
                stdout=child_out,
                stderr=child_err,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
            try:
                process, cancelled = await to_its_end(starting)
            except (OSError, ValueError) as error:
                raise ProcessNotFound(f"{argv[0]} cannot be started: {error}") from error
            undo.pop_all()
        child = cls(process, stdin, stdout, stderr)
        if cancelled is not None:
            await child.kill()
            raise cancelled
        return child

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the process group."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, the negative number of the signal that ended it, or None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait for the end of the child, even if its pipes are still open elsewhere, and return its exit status."""
        return await self._process.wait()

    def hang_up(self) -> None:
        """Close our ends of standard input and output at once, dropping what is unsent and unread. Idempotent."""
        if not self.stdin.transport.is_closing():  # asyncio fails on closing a pipe a second time
            self.stdin.transport.abort()
        if not self._stdout.transport.is_closing():
            self._stdout.transport.close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole process group, which may outlive its leader, or be gone."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def kill(self) -> None:
        """Kill what is left of the process group, close every pipe and wait for the child.

        To be called while the child runs or right after its end: the number of an empty group is given out again.
        A task that is cancelled here once more ends when the child has: nothing else would collect it.
        """
        self.signal(signal.SIGKILL)
        self.close_pipes()
        _, cancelled = await to_its_end(self._process.wait())
        if cancelled is not None:
            raise cancelled

    def close_pipes(self) -> None:
        """Close our ends of all pipes. Idempotent."""
        self.hang_up()
        if not self._stderr.transport.is_closing():
            self._stderr.transport.close()


@record(frozen=True, slots=True)
class _ReadEnd:
    """Our end of a pipe that a child writes to."""

    reader: asyncio.StreamReader
    transport: asyncio.ReadTransport


async def to_its_end(work: Coroutine[Any, Any, _T]) -> tuple[_T, asyncio.CancelledError | None]:
    """Wait for work that must not be left in the middle; return its result, and the last cancellation meanwhile.

    Raises what the work raises, or the cancellation where there was one.
    """
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None and task.exception() is not None:
        raise cancelled
    return task.result(), cancelled


def _widen(descriptor: int) -> None:
    """Let a pipe hold more, where the system can: a child that writes much then runs on while it is not read."""
    with suppress(AttributeError, OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BUFFER_BYTES)


async def _open_read_end(descriptor: int) -> _ReadEnd:
    reader = asyncio.StreamReader(limit=PIPE_BUFFER_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    return _ReadEnd(reader, transport)


async def _open_write_end(descriptor: int) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    # The protocol of a StreamReader is what asyncio offers publicly for the flow control of a writer.
    protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
    transport, _ = await loop.connect_write_pipe(lambda: protocol, os.fdopen(descriptor, "wb", buffering=0))
    transport.set_write_buffer_limits(0)
    return asyncio.StreamWriter(transport, protocol, None, loop)


async def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    timeout_s: float,
    max_output_bytes: int,
    input: bytes = b"",  # noqa: A002 - the name that subprocess uses
    cwd: str | os.PathLike[str] | None = None,
) -> Completed:
    """Run a program until it has ended and closed its output.

    Args:
        argv: Program (looked up on the PATH of `env`) and arguments; never a shell line.
        env: The whole environment of the child; nothing is inherited.
        timeout_s: Seconds until the process group is killed.
        max_output_bytes: Most bytes of standard output, and as many of standard error.
        input: Standard input; a child that does not read it all is no error.
        cwd: Working directory; ours if None.

    Raises:
        ProcessNotFound: It cannot be started.
        ProcessTimeout: It ran too long.
        ProcessOutputTooLarge: It wrote too much.
    """
    child = await ChildProcess.start(argv, env=env, cwd=cwd)
    try:
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as tasks:
            tasks.create_task(_feed(child.stdin, input))
            stdout = tasks.create_task(_collect(child.stdout, max_output_bytes))
            stderr = tasks.create_task(_collect(child.stderr, max_output_bytes))
            ending = tasks.create_task(child.wait())
    except TimeoutError as error:
        await child.kill()
        raise ProcessTimeout(f"{argv[0]} did not end within {timeout_s:g} s") from error
    except BaseExceptionGroup as group:
        await child.kill()
        if group.split(_OutputLimit)[1] is None:
            raise ProcessOutputTooLarge(f"{argv[0]} wrote more than {max_output_bytes} bytes") from None
        raise
    except BaseException:
        await child.kill()
        raise
    child.close_pipes()
    return Completed(ending.result(), stdout.result(), stderr.result())


class _OutputLimit(Exception):  # noqa: N818 - never leaves this module
    """A stream of the child is longer than it may be."""


async def _feed(stdin: asyncio.StreamWriter, data: bytes) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        stdin.write(data)
        await stdin.drain()
    stdin.close()


async def _collect(stream: asyncio.StreamReader, limit: int) -> bytes:
    collected = bytearray()
    while data := await stream.read(PIPE_BUFFER_BYTES):
        collected += data
        if len(collected) > limit:
            raise _OutputLimit
    return bytes(collected)
