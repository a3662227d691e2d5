"""Exporter of traces: takes what has ended, makes spans of it and sends them in batches, beside everything else.

A collector that is away or slow costs a counted drop and nothing else: up to MAX_WAITING ended attempts and submissions
wait, the newest are dropped beyond it, and a batch that the sender could not deliver is dropped too. Their spans are
made in the thread that sends them, because one attempt may have a hundred. Only what ended in this process's time is
sent, because a replay takes in again what its predecessor has sent.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final

from coordinator.api.models import StepStatus
from coordinator.observability import trace_names as names
from coordinator.observability.spans import (
    Trace,
    attempt_spans,
    ends_step,
    ready_at,
    submission_spans,
    unended_step_spans,
)
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from coordinator.stores.timings import AttemptTiming
from infra.clock import Clock
from infra.ended_span import EndedSpan
from scheduler.model import StepKey

#: Seconds between two looks at what has ended.
LOOK_EVERY_S: Final = 1.0
#: Seconds that a submission has ended before its own span is made: its last attempts come in meanwhile.
SETTLE_S: Final = 2.0
#: Spans of one request.
BATCH_SPANS: Final = 512
#: Ended attempts and submissions that wait for their spans to be made, up to 20 KiB each.
MAX_WAITING: Final = 5_000
#: Steps that are remembered between two attempts of theirs. Beyond it the span of a step begins with its last one.
MAX_UNENDED: Final = 10_000
#: Seconds that the last spans get when the coordinator stops.
LAST_SENDS_S: Final = 3.0

_GOES_ON: Final = frozenset({StepStatus.WAITING, StepStatus.READY, StepStatus.RUNNING, StepStatus.PUBLISHING})

#: Sends a batch and waits for the answer, in a thread; False where it was not taken.
Send = Callable[[Sequence[EndedSpan]], bool]

_log = logging.getLogger(__name__)


def otlp_wanted(endpoint: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether spans go anywhere: a setting or the standard variables name a place and none forbids it."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    variables = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return bool(endpoint) or any(environ.get(name) for name in variables)


class TraceExporter:
    """Sends the traces of one farm."""

    def __init__(self, send: Send, views: Views, clock: Clock) -> None:
        self._send = send
        self._views = views
        self._clock = clock
        self._since = clock.now()
        #: Spans that are not made yet, of one attempt or submission each; and the rest of the one that was begun.
        self._waiting: deque[Iterator[EndedSpan]] = deque()
        self._begun: Iterator[EndedSpan] = iter(())
        self._making = threading.Lock()
        #: Submissions that had not ended at the last look, and the newest one of it.
        self._open: dict[str, SubmissionRow] = {}
        self._newest = ""
        #: The newest attempt of each step that goes on after it, and since when the step was ready.
        self._unended: dict[str, tuple[AttemptTiming, float]] = {}
        #: The same steps by the submission whose trace the attempt is in.
        self._unended_in: dict[str, set[str]] = {}
        #: Spans that the collector took; spans that it did not take, and attempts and submissions that did not wait.
        self.sent = self.dropped = 0
        self._away = False

    def attempts_ended(self, timings: Iterable[AttemptTiming]) -> None:
        """Let those attempts wait for their spans that have ended since the coordinator began."""
        for timing in timings:
            if timing.outcome is not None and timing.ended_at is not None and timing.ended_at >= self._since:
                known = self._wanting(timing)
                # One that ended before may run again.
                self._open.update((row.id, row) for row in known)
                _, since = self._unended.pop(timing.step, (timing, math.inf))
                followed = not ends_step(timing) or (timing.outcome == "failed" and self._goes_on(timing))
                if followed and known and len(self._unended) < MAX_UNENDED:
                    self._unended[timing.step] = timing, min(since, ready_at(timing))
                    self._unended_in.setdefault(known[0].id, set()).add(timing.step)
                self._add(attempt_spans(timing, [self._trace(row) for row in known], since, followed=followed))

    async def run(self) -> None:
        """Serve until cancelled, then send what waits, for at most LAST_SENDS_S."""
        try:
            while True:
                self._look(self._clock.now() - SETTLE_S)
                await self._deliver()
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            try:
                async with asyncio.timeout(LAST_SENDS_S):
                    self._look(self._clock.now())
                    await self._deliver()
            except TimeoutError:
                self.dropped += len(self._waiting)

    def _look(self, before: float) -> None:
        """Let the submissions wait for their spans that ended before this moment and after the last look."""
        rows = self._views.submission_rows()
        for row in reversed(rows):
            if row.id == self._newest:
                break
            if not (row.ended or row.withdrawn) or row.touched_at >= self._since:
                self._open[row.id] = row
        self._newest = rows[-1].id if rows else ""
        for row in list(self._open.values()):
            if not (row.ended or row.withdrawn) or row.touched_at > before:
                continue
            del self._open[row.id]
            note = self._views.note(row.id)
            counts = {
                names.STEPS: len(row.members),
                names.CACHED: row.held,
                names.FAILED: row.counts[StepStatus.FAILED],
            }
            self._add(
                submission_spans(
                    self._trace(row), note.label, row.state, row.created_at, row.touched_at, counts, note.stages
                )
            )
            self._end_steps(row)

    def _end_steps(self, row: SubmissionRow) -> None:
        """Let the steps of an ended submission wait for their spans whose last attempt in its trace was no end."""
        for step in self._unended_in.pop(row.id, ()):
            timing, since = self._unended.get(step, (None, 0.0))
            if timing is not None and self._wanting(timing)[:1] == [row]:
                del self._unended[step]
                self._add(unended_step_spans(timing, self._trace(row), since, row.touched_at))

    def _wanting(self, timing: AttemptTiming) -> list[SubmissionRow]:
        """Return the submissions that wanted a step when its attempt ended, the oldest first."""
        rows = [self._views.find(each) for each in (timing.wanted_by or "").split(",")]
        return [row for row in rows if row is not None]

    def _goes_on(self, timing: AttemptTiming) -> bool:
        """Return whether another recipe of a step is tried after one that failed for good."""
        row = self._views.row_of(StepKey(timing.step))
        return row is not None and row.state in _GOES_ON

    async def _deliver(self) -> None:
        while count := await asyncio.to_thread(self._send_batch):
            if count > 0:
                self.sent += count
                self._away = False
                continue
            self.dropped -= count
            if not self._away:
                _log.warning("the collector of traces does not take spans; they are dropped until it does")
            self._away = True

    def _send_batch(self) -> int:
        """Make and send one batch, in a thread; returns its spans, as a negative number where it was not taken."""
        with self._making:
            batch: list[EndedSpan] = []
            while len(batch) < BATCH_SPANS:
                more = list(islice(self._begun, BATCH_SPANS - len(batch)))
                batch += more
                if not more:
                    try:
                        self._begun = self._waiting.popleft()
                    except IndexError:
                        break
        if not batch:
            return 0
        return len(batch) if self._send(batch) else -len(batch)

    def _trace(self, row: SubmissionRow) -> Trace:
        return Trace(row.id, self._views.note(row.id).traceparent)

    def _add(self, spans: Iterator[EndedSpan]) -> None:
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(spans)
        else:
            self.dropped += 1
