"""One program in a sandbox, from its start to its end, within time, memory and output; a stranger from outside."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

from coordinator.remote_evaluation.errors import RemoteFailedError
from coordinator.remote_evaluation.frames import FrameKind, frame, read_frame
from coordinator.remote_evaluation.sandboxes import ENVIRONMENT
from infra.daemon.usage import memory_below
from infra.process import ChildProcess, ProcessError

#: Seconds between two looks at the memory of its processes.
LOOK_EVERY_S: Final = 0.2
#: Bytes of its standard error that are kept for a sentence, and after which it is ended.
TAIL_BYTES: Final = 2048
MAX_STDERR_BYTES: Final = 64 * 1024 * 1024
_READ_BYTES: Final = 64 * 1024


class SandboxedRun:
    """The frames of a running program."""

    def __init__(self, child: ChildProcess) -> None:
        self._child = child
        self._tail = bytearray()
        #: Why it was ended; empty while it was not.
        self._ended = ""

    async def send(self, kind: FrameKind, data: bytes = b"") -> None:
        """Send it a frame. What it does not read any more is not missed: its end shows why."""
        with suppress(OSError):
            self._child.stdin.write(frame(kind, data))
            await self._child.stdin.drain()

    async def receive(self) -> tuple[FrameKind, bytes]:
        """Return its next frame.

        Raises:
            RemoteFailedError: It ended, or was ended.
            BadFrameError: It sent what is none.
        """
        found = await read_frame(self._child.stdout)
        if found is None:
            raise RemoteFailedError(await self._why())
        return found

    async def _why(self) -> str:
        status = await self._child.wait()
        # What it wrote last is read by then.
        await asyncio.sleep(0)
        if self._ended:
            return self._ended
        lines = self._tail.decode(errors="replace").strip().splitlines()
        said = f": {lines[-1][:300]}" if lines else ""
        return f"the evaluator ended with status {status}{said}; a smaller evaluation may succeed"

    def end(self, why: str) -> None:
        """Kill it and all that it started; `why` is what `receive` raises then."""
        if not self._ended:
            self._ended = why
            self._child.signal(signal.SIGKILL)

    async def watch_memory(self, most_bytes: int) -> None:
        """End it where its processes have more memory together than they may."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            used = await asyncio.to_thread(memory_below, self._child.pid)
            if used is not None and used > most_bytes:
                self.end(
                    f"the evaluation wants more than {most_bytes // 2**20} MiB of memory, the limit of this farm "
                    "(remote_evaluation.memory_mib); evaluate less of it at a time with -A"
                )

    async def read_errors(self) -> None:
        """Keep the end of its standard error, and end it where that has no end."""
        size = 0
        while data := await self._child.stderr.read(_READ_BYTES):
            size += len(data)
            self._tail += data
            del self._tail[:-TAIL_BYTES]
            if size > MAX_STDERR_BYTES:
                self.end(f"the evaluation printed more than {MAX_STDERR_BYTES // 2**20} MiB; take its traces out")


@asynccontextmanager
async def running(command: Sequence[str], memory_bytes: int, timeout_s: float) -> AsyncIterator[SandboxedRun]:
    """Run a command of `Sandboxes.command` for as long as the block does; nothing of it is left then.

    Raises:
        RemoteFailedError: It cannot be started, or took longer than `timeout_s`.
    """
    try:
        child = await ChildProcess.start(command, env=ENVIRONMENT, cwd="/")
    except ProcessError as error:
        raise RemoteFailedError(f"the evaluator cannot be started: {error}") from None
    started = SandboxedRun(child)
    tasks = [
        asyncio.create_task(started.watch_memory(memory_bytes), name="memory of an evaluation"),
        asyncio.create_task(started.read_errors(), name="stderr of an evaluation"),
    ]
    try:
        async with asyncio.timeout(timeout_s):
            yield started
    except TimeoutError:
        raise RemoteFailedError(
            f"the evaluation took longer than {timeout_s:g} s, the limit of this farm (remote_evaluation.timeout_s); "
            "evaluate less of it at a time with -A"
        ) from None
    finally:
        for task in tasks:
            task.cancel()
        await child.kill()
        await asyncio.gather(*tasks, return_exceptions=True)
