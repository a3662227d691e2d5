"""Snapshots of the journal, made by a process of its own so that the engine never stops for them.

The child reads the newest snapshot and the frames behind it, replays them into a core and a read model, stores what
these write themselves as the next snapshot, and ends. The engine gives nothing and waits for nothing: what is written
follows from what is durable alone, and a snapshot that was made proves that the journal can be replayed. The price is
that for some seconds the farm's state is in memory twice, on another core.

The child reads database and epoch from standard input (a database's address may hold a password) and ends when that is
closed, so that it does not outlive its coordinator; where it does for a moment, the epoch fences it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from coordinator.api.models import WaitingView
from coordinator.engine.replay import replay
from coordinator.errors import CoordinatorError
from coordinator.journal.errors import JournalError
from coordinator.journal.journal import Journal
from coordinator.readmodel.timeline import Timelines
from coordinator.readmodel.views import Views
from infra.database import open_engine
from infra.process import ChildProcess, ProcessError
from infra.retry import Backoff
from scheduler.farm import Farm
from scheduler.model import Requirements, StepKey

#: Facts behind the newest snapshot, beside one for each step, that make another one worth while. A snapshot has a fact
#: for each step too, so it would shorten no start while steps only wait; one that ends makes three or four.
SNAPSHOT_FACTS: Final = 100_000
#: First and longest pause after a failure, in seconds; the first while the journal cannot be written too.
FIRST_PAUSE_S: Final = 4.0
LONGEST_PAUSE_S: Final = 300.0
#: A child that takes longer than this hangs.
SNAPSHOT_WITHIN_S: Final = 600.0
#: Most bytes of what a child prints about its failure.
_SAID_BYTES: Final = 16 * 1024
#: Lower than the engine's: a snapshot is never urgent.
_NICE: Final = 10

_log = logging.getLogger(__name__)


class _Silence:
    """Explainer of views that no client reads: explains nothing."""

    def waiting(self, step: StepKey, name_of: Callable[[StepKey], str]) -> tuple[str, WaitingView | None]:  # noqa: ARG002
        return "", None

    def unschedulable(self, ready: Mapping[Requirements, int]) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def log_tail(self, step: StepKey, attempt: int) -> str:  # noqa: ARG002
        return ""

    def queued(self, ready: Mapping[Requirements, int]) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def unmet(self, step: StepKey) -> int:  # noqa: ARG002
        return 0

    def above(self, step: StepKey) -> Sequence[StepKey]:  # noqa: ARG002
        return ()


async def compact(journal: Journal) -> int:
    """Store a snapshot of all that `journal` holds; returns its last frame. Raises `JournalError`."""
    farm, views = Farm(), Views(_Silence(), Timelines(most=0))
    await replay(journal, farm, views)
    await journal.snapshots.save(journal.seq, farm.snapshot(), views.records())
    return journal.seq


class Compactor:
    """Has snapshots made while the coordinator runs; `steps` returns how many steps one would hold."""

    def __init__(
        self, url: str, journal: Journal, *, steps: Callable[[], int] = lambda: 0, every: int = SNAPSHOT_FACTS
    ) -> None:
        self._url = url
        self._journal = journal
        self._steps = steps
        self._every = every

    async def run(self) -> None:
        """Serve until cancelled. A snapshot that fails is logged and tried again later."""
        backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        while True:
            await self.due()
            try:
                await self.snapshot()
            except CoordinatorError as error:
                pause_s = backoff.next_s()
                _log.warning("no snapshot was made; the next try is in %d s: %s", pause_s, error)
                await asyncio.sleep(pause_s)
            else:
                backoff.reset()

    async def due(self) -> None:
        """Wait until a snapshot is worth while, and the journal can be written."""
        while self._journal.tail < (worth := self._every + self._steps()):
            await self._journal.tail_reaches(worth)
        while self._journal.trouble:  # noqa: ASYNC110 - a database that is back sends no event
            await asyncio.sleep(FIRST_PAUSE_S)

    async def snapshot(self) -> None:
        """Have one made now. Raises `JournalError`."""
        behind = self._journal.tail
        try:
            child = await ChildProcess.start([sys.executable, "-m", __name__], env=dict(os.environ))
        except ProcessError as error:
            raise JournalError(f"the process for a snapshot of the journal cannot be started: {error}.") from None
        try:
            child.stdin.write(json.dumps({"url": self._url, "epoch": self._journal.epoch}).encode() + b"\n")
            async with asyncio.timeout(SNAPSHOT_WITHIN_S):
                errors = await child.stderr.read(_SAID_BYTES)
                status = await child.wait()
        except TimeoutError:
            raise JournalError(f"a snapshot of the journal took more than {SNAPSHOT_WITHIN_S:.0f} s.") from None
        finally:
            await child.kill()
        if status != 0:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise JournalError(last or f"the process for a snapshot of the journal ended with status {status}.")
        self._journal.snapshot_taken(behind)


def main() -> None:
    """Run the process that makes one snapshot."""
    os.nice(_NICE)
    # Objects are made that all stay: the collector would walk them again and again.
    gc.disable()
    task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    async def run() -> None:
        engine = open_engine(task["url"])
        try:
            await compact(Journal(engine, epoch=task["epoch"]))
        finally:
            await engine.dispose()

    try:
        asyncio.run(run())
    except CoordinatorError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(1)
    # Nothing is left to tidy up, and freeing millions of objects one by one takes seconds.
    os._exit(0)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
