"""Child processes that verify derivations side by side, one for each processor.

They are started for the first long stream, and end once none was needed for `IDLE_S`: a farm that gets small pushes has
none. Until they are there, where one ends, and where one refuses a job, the coordinator verifies in a thread of its own
as ever, and finds the words for what is wrong. Each has one job at a time; who comes later waits for the next that is
free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import IO, Final

from coordinator.intake.verifier_jobs import read_answer, write_job
from coordinator.intake.verifier_waves import WaveMember
from coordinator.stores.derivation_records import Known, PackedDerivation
from infra.compiled.finder import SWITCH
from infra.nix.verify_quickly import is_native

#: Child processes at most; each takes some 30 MB, and what it remembers.
MAX_CHILDREN: Final = 16
#: The same where they verify natively: a second one is for a second stream.
MAX_NATIVE_CHILDREN: Final = 2
#: Derivations that a child remembers of the stream of its last job, some 700 bytes each; then it begins anew.
MAX_REMEMBERED: Final = 20_000
#: Seconds without a job after which they end.
IDLE_S: Final = 60.0
#: Seconds for one job, and for the start of a process: one that takes longer is ended.
JOB_S: Final = 60.0
#: Variables of the coordinator's environment that a child gets: none that holds a secret.
_ENVIRONMENT: Final = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", SWITCH)

#: What a process that has ended, hangs or answers something else looks like.
_BROKEN: Final = (OSError, EOFError, TimeoutError, ValueError)

_log = logging.getLogger(__name__)


class _Child:
    """One process."""

    def __init__(self, store_dir: str) -> None:
        command = [sys.executable, "-P", "-m", "coordinator.intake.verifier_child", store_dir]
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd="/", process_group=0
        )
        #: Stream of its last job, and the derivations of it that the process remembers.
        self._stream: object = None
        self._remembers: set[str] = set()

    def answer(self) -> list[PackedDerivation]:
        return read_answer(self._pipe(self._process.stdout))

    def verify(
        self, members: Sequence[WaveMember], known: Mapping[str, Known], stream: object
    ) -> list[PackedDerivation]:
        anew = stream is not self._stream or len(self._remembers) > MAX_REMEMBERED
        if anew:
            self._stream, self._remembers = stream, set()
        needs = {need for member in members for need in member.inputs}
        unknown = {need: known[need] for need in needs.difference(self._remembers) if need in known}
        write_job(self._pipe(self._process.stdin), [(each.name, each.data) for each in members], unknown, anew=anew)
        done = self.answer()
        if done:
            self._remembers.update(unknown, [member.name for member in members])
        else:
            self._stream = None
        return done

    def kill(self) -> None:
        """Let the thread that waits for an answer go on."""
        self._process.kill()

    def end(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                self._pipe(pipe).close()
        self._process.wait()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        if pipe is None:
            raise EOFError
        return pipe


class VerifierPool:
    """The processes of one coordinator; for the tasks of one event loop."""

    def __init__(self, store_dir: str, most: int | None = None) -> None:
        self._store_dir = store_dir
        #: Whether they verify natively: one of them keeps up with a stream then, and takes its batches whole.
        self.is_native = is_native()
        #: How many there are at most; none: all is verified in threads.
        self.most = (_native_processes() if self.is_native else _processes()) if most is None else most
        self._children: set[_Child] = set()
        #: The last one first, which remembers the most; None where one has ended, for those that wait.
        self._idle: asyncio.Queue[_Child | None] = asyncio.LifoQueue()
        self._starting: set[asyncio.Task[None]] = set()
        self._used_at = 0.0
        self._is_closed = False

    @property
    def size(self) -> int:
        """Processes that are there."""
        return len(self._children)

    def start(self) -> None:
        """Have the processes started that are not there, without waiting for them."""
        self._used_at = time.monotonic()
        while not self._is_closed and len(self._children) + len(self._starting) < self.most:
            task = asyncio.create_task(self._start())
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def started(self) -> None:
        """Wait for those that are being started."""
        while self._starting:
            await asyncio.gather(*self._starting, return_exceptions=True)

    async def _start(self) -> None:
        try:
            child = await asyncio.to_thread(_Child, self._store_dir)
        except OSError as error:
            _log.warning("a process that verifies derivations cannot be started: %s", error)
            return
        try:
            await _within(asyncio.to_thread(child.answer))
        except _BROKEN:
            _log.warning("a process that verifies derivations does not start")
            await asyncio.to_thread(child.end)
            return
        except BaseException:
            child.kill()
            await asyncio.shield(asyncio.to_thread(child.end))
            raise
        self._children.add(child)
        self._idle.put_nowait(child)

    async def verify(
        self, members: Sequence[WaveMember], known: Mapping[str, Known], stream: object
    ) -> list[PackedDerivation]:
        """Return the members as they are written; none where one is refused or there is no process.

        `known` has those of their inputs that stand in no member before them. It does not change meanwhile. A process
        is told of each once in one `stream`.
        """
        if not self._children:
            return []
        self._used_at = time.monotonic()
        child = await self._idle.get()
        while child is None:
            if not self._children:
                # For the others that wait.
                self._idle.put_nowait(None)
                return []
            child = await self._idle.get()
        try:
            done = await _within(asyncio.to_thread(child.verify, members, known, stream))
        except _BROKEN:
            _log.warning("a process that verifies derivations ended or does not answer; another way is taken")
            await self._end(child)
            return []
        except BaseException:
            # The stream is given up; the answer would be taken for that to the next job.
            await asyncio.shield(self._end(child))
            raise
        self._idle.put_nowait(child)
        return done

    async def run(self) -> None:
        """End the processes once they are not needed, and all of them when this is cancelled."""
        try:
            while True:
                await asyncio.sleep(IDLE_S / 4)
                await self.end_idle(IDLE_S)
        finally:
            await self.close()

    async def close(self) -> None:
        """End all processes; those that wait for one go on without."""
        self._is_closed = True
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for child in list(self._children):
            await self._end(child)

    async def end_idle(self, after_s: float) -> None:
        """End the processes that wait for a job, where none was needed for so long."""
        if time.monotonic() - self._used_at < after_s:
            return
        idle = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
        for child in idle:
            if child is not None:
                await self._end(child)

    async def _end(self, child: _Child) -> None:
        self._children.discard(child)
        child.kill()
        self._idle.put_nowait(None)
        await asyncio.to_thread(child.end)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes() -> int:
    """Return how many processes there should be at most; one processor alone gains nothing by any."""
    count = _processors()
    return min(MAX_CHILDREN, count) if count > 1 else 0


def _native_processes() -> int:
    """Return how many native processes there should be at most; one processor alone gains by one."""
    return min(MAX_NATIVE_CHILDREN, _processors())


async def _within(answer: Awaitable[list[PackedDerivation]]) -> list[PackedDerivation]:
    async with asyncio.timeout(JOB_S):
        return await answer
