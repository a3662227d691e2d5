"""Fold of facts and of workers' measures into the timing of each attempt.

The rows of the read model call it as they fold facts, so live and replayed facts give the same timings, and agents'
reports complete them. All that changed since the last `take` waits for the store, oldest first, at most `MAX_CHANGED`
attempts: beyond it the oldest is dropped and counted. Rows may be stored again and again, in parts.

Rules:
1. No clock, no I/O. What facts do not hold (an older journal) stays None.
2. Agents' times come converted by `here`, and are then held between the lease and the arrival of the report, each
   before the one that follows it: no clock, however wrong, puts a stretch outside of its attempt or turns two round.
   Durations are the agent's own.
3. An attempt whose worker is lost ends with what it had sent until then, closed at that end.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from coordinator.readmodel.attempt_meter import AttemptMeter
from coordinator.stores.timings import MAX_WANTED_BY, MESSAGE_CHARACTERS, AttemptTiming, Measured, Outcome
from scheduler.model import Failure, FailureKind
from workers.wire.measures import MAX_PHASES, Measures
from workers.wire.messages import Report, Stage, StageChange, Succeeded

#: Changed attempts that wait for the store, some 0.5 KiB each: more than a replay brings (`compaction.SNAPSHOT_FACTS`).
MAX_CHANGED: Final = 50_000
#: Stages and phases that are kept of a running attempt, in case that its report never comes.
MAX_LIVE: Final = MAX_PHASES
#: Largest count that is believed, far below what SQLite's integers hold.
MOST: Final = 1 << 56

_ENDINGS: Final[dict[FailureKind, Outcome]] = {
    FailureKind.CANCELLED: "cancelled",
    FailureKind.RETURNED: "returned",
    FailureKind.INPUT_LOST: "returned",
    FailureKind.WORKER_LOST: "lost",
}
_SPANS: Final = {Stage.FETCHING: "inputs", Stage.BUILDING: "build", Stage.UPLOADING: "upload"}

#: Converts an instant of an agent's clock into the coordinator's.
Here = Callable[[float], float]
Key = tuple[str, int]


@dataclass(slots=True)
class _Live:
    """A running attempt, and what it has sent so far: (stage or "", phase or "", at) in the coordinator's time."""

    timing: AttemptTiming
    changes: list[tuple[str, str, float]] = field(default_factory=list)


class Timelines:
    """See the module's text."""

    def __init__(self, most: int = MAX_CHANGED) -> None:
        """Keep at most `most` changed attempts; 0 is for a read model whose timings go nowhere."""
        self._most = most
        #: Attempts that have not ended, by step: at most one lease each.
        self._open: dict[str, _Live] = {}
        self._changed: OrderedDict[Key, AttemptTiming] = OrderedDict()
        #: Set by each attempt that changes; cleared by what has stored all of them.
        self.changed = asyncio.Event()
        #: Attempts that were dropped since the start because the store did not take them in time.
        self.dropped = 0
        #: Counts what happens; who replays facts puts a new one here afterwards, because those are history.
        self.meter = AttemptMeter()

    @property
    def waiting(self) -> int:
        """Attempts that wait for the store."""
        return len(self._changed)

    def take(self, most: int) -> list[AttemptTiming]:
        """Return and forget the oldest changed attempts; who takes them changes them no more."""
        taken: list[AttemptTiming] = []
        while self._changed and len(taken) < most:
            taken.append(self._changed.popitem(last=False)[1])
        return taken

    def open_of(self, step: str) -> AttemptTiming | None:
        """Return the running attempt of a step."""
        live = self._open.get(step)
        return None if live is None else live.timing

    def so_far(self, step: str, attempt: int, now: float) -> Measured | None:
        """Return what a running attempt has sent until now."""
        live = self._open.get(step)
        return _cut(live.changes, now) if live is not None and live.timing.attempt == attempt else None

    # Facts.

    def leased(  # noqa: PLR0917 - the fields of what it makes
        self, step: str, attempt: int, recipe: int, worker: str, at: float, submitted_at: float, ready_at: float
    ) -> None:
        """A worker got the lease."""
        timing = AttemptTiming(
            step,
            attempt,
            recipe=recipe,
            worker=worker,
            submitted_at=_known(submitted_at),
            ready_at=_known(ready_at),
            leased_at=at,
        )
        self._open[step] = _Live(timing)
        if timing.ready_at is not None:
            self.meter.spent("wait", max(0.0, at - timing.ready_at))
        self._note(timing)

    def restored(self, step: str, attempt: int, recipe: int, worker: str) -> None:
        """A snapshot has an attempt that had not ended; the store has how it began."""
        self._open[step] = _Live(AttemptTiming(step, attempt, recipe=recipe, worker=worker or None))

    def built(self, step: str, attempt: int, at: float, isolation: str) -> None:
        """The report of a success was accepted."""
        live = self._open.get(step)
        if live is not None and live.timing.attempt == attempt:
            live.timing.built_at, live.timing.isolation = at, isolation or None
            self._note(live.timing)

    def done(self, step: str, at: float, wanted_by: Iterable[str] = ()) -> None:
        """The result is published; `wanted_by` are the submissions that wait for it, the oldest first."""
        self._end(step, at, "done", wanted_by)

    def failed(self, step: str, at: float, failure: Failure, wanted_by: Iterable[str] = ()) -> None:
        """The recipe in use failed for good."""
        self._end(step, at, "failed", wanted_by, failure)

    def revoked(
        self, step: str, at: float, failure: Failure, wanted_by: Iterable[str] = (), *, moved: bool = False
    ) -> None:
        """The lease ended without a verdict; `moved`: for one on a faster worker."""
        outcome = "moved" if moved else _ENDINGS.get(failure.kind, "retried")
        self._end(step, at, outcome, wanted_by, failure)

    # What workers send, and what publishing records.

    def reported(self, worker: str, report: Report, now: float, here: Here, *, isolation: str = "") -> None:
        """Complete the running attempt by its report; one of another attempt or worker changes nothing."""
        live = self._of(report.step, report.attempt, worker)
        if live is None:
            return
        live.timing.isolation = live.timing.isolation or isolation or None
        timing, lowest = live.timing, live.timing.leased_at or 0.0
        if report.building_at and report.built_at:
            timing.build_s = _seconds(report.built_at - report.building_at)
        if isinstance(report.result, Succeeded):
            timing.output_bytes = _bytes(sum(output.nar_size for output in report.result.outputs))
            timing.uploaded_bytes = _bytes(sum(output.file_size for output in report.result.outputs))
        if report.measures is not None:
            first = timing.measured is None
            _complete(timing, report.measures, lambda at, took: _within(here(at), took, lowest, now))
            if first:
                self._count(timing)
                self.meter.came_ahead(_bytes(report.measures.ahead_bytes) or 0)
        self._note(timing)

    def stage(self, worker: str, change: StageChange, now: float, here: Here, *, isolation: str = "") -> None:
        """Note where a running attempt is, and the class of isolation of the worker that it is on."""
        live = self._of(change.step, change.attempt, worker)
        if live is not None and isolation and isolation != live.timing.isolation:
            live.timing.isolation = isolation
            self._note(live.timing)
        if live is not None and len(live.changes) < MAX_LIVE:
            at, _ = _within(here(change.at), 0.0, live.timing.leased_at or 0.0, now)
            # A phase of uploading is why it waits.
            phase = change.phase if change.stage is Stage.BUILDING else ""
            live.changes.append((_SPANS.get(change.stage, ""), phase, at))

    def published(self, step: str, attempt: int, began: float, verified: float, ended: float) -> None:
        """Note how long outputs were verified, and made visible."""
        live = self._open.get(step)
        if live is not None and live.timing.attempt == attempt:
            timing = live.timing
            timing.verify_at, timing.verify_s = began, _seconds(verified - began)
            timing.publish_s = _seconds(ended - verified)
            self.meter.spent("verify", timing.verify_s or 0.0)
            self.meter.spent("publish", timing.publish_s or 0.0)
            self._note(timing)

    # The parts they share.

    def _of(self, step: str, attempt: int, worker: str) -> _Live | None:
        live = self._open.get(step)
        if live is None or live.timing.attempt != attempt or live.timing.worker not in {None, worker}:
            return None
        return live

    def _end(
        self, step: str, at: float, outcome: Outcome, wanted_by: Iterable[str], failure: Failure | None = None
    ) -> None:
        live = self._open.pop(step, None)
        if live is None:
            return
        timing = live.timing
        timing.outcome, timing.ended_at = outcome, _known(at)
        timing.wanted_by = ",".join(islice(wanted_by, MAX_WANTED_BY)) or None
        if failure is not None:
            timing.reason, timing.message = failure.kind.value, _storable(failure.message) or None
        if timing.measured is None and live.changes and timing.ended_at is not None:
            timing.measured = _cut(live.changes, timing.ended_at)
        self._note(timing)

    def _count(self, timing: AttemptTiming) -> None:
        """Count the stretches of an attempt, each once: an agent sends its report until that is acknowledged."""
        if timing.measured is not None:
            for name, _, took_s in timing.measured.spans:
                self.meter.spent(name, took_s)
            for name, _, took_s in timing.measured.phases:
                self.meter.built(name, took_s)

    def _note(self, timing: AttemptTiming) -> None:
        if not self._most:
            return
        self._changed[timing.step, timing.attempt] = timing
        self.changed.set()
        if len(self._changed) > self._most:
            self._changed.popitem(last=False)
            self.dropped += 1


def _complete(timing: AttemptTiming, measures: Measures, within: Callable[[float, float], tuple[float, float]]) -> None:
    """Take over what an agent measured; a stretch whose times are no numbers is left out."""

    def stretches(items: Iterable[tuple[str, float, float]], end: float = math.inf) -> list[tuple[str, float, float]]:
        known = [(name, *within(at, took)) for name, at, took in items if math.isfinite(at) and math.isfinite(took)]
        return _in_order(known, lowest, end)

    lowest, _ = within(float(-MOST), 0.0)
    spans = stretches((span.name, span.at, span.took_s) for span in measures.spans)
    built = next((at + took for name, at, took in spans if name == "build"), math.inf)
    timing.measured = Measured(
        spans=spans,
        phases=stretches(((phase.name, phase.at, phase.took_s) for phase in measures.phases), built),
        landmarks=_landmarks(measures),
        more_phases=_bytes(measures.more_phases) or 0,
        more_phases_s=_seconds(measures.more_phases_s) or 0.0,
        fetches=[
            (fetch.path, fetch.source, _bytes(fetch.nar_bytes) or 0, *within(fetch.at, fetch.took_s), fetch.shared)
            for fetch in measures.fetches
            if math.isfinite(fetch.at) and math.isfinite(fetch.took_s)
        ],
        more_fetches=_bytes(measures.more_fetches) or 0,
        more_fetches_bytes=_bytes(measures.more_fetches_bytes) or 0,
        traceparent=_storable(measures.traceparent),
    )
    timing.fetched_bytes = timing.measured.more_fetches_bytes + sum(
        fetch[2] for fetch in timing.measured.fetches if not fetch[5]
    )
    timing.inputs_s, timing.upload_s = _sum_of(spans, "inputs"), _sum_of(spans, "pack", "upload")
    timing.cpu_s = _seconds(measures.cpu_s)
    timing.peak_memory_bytes = _bytes(measures.peak_memory_bytes)
    timing.read_bytes, timing.written_bytes = _bytes(measures.read_bytes), _bytes(measures.written_bytes)
    # Also of a build that failed, which has no time in the report's own fields.
    timing.build_s = next((_seconds(span.took_s) for span in measures.spans if span.name == "build"), timing.build_s)


def _sum_of(spans: Iterable[tuple[str, float, float]], *names: str) -> float | None:
    """Return the seconds of some stretches together; None where there is none of them."""
    found = [took_s for name, _, took_s in spans if name in names]
    return _seconds(sum(found)) if found else None


def _landmarks(measures: Measures) -> list[tuple[int, str]]:
    """Return the lines of the log where phases begin; an agent's lines that do not rise are left out."""
    found: list[tuple[int, str]] = []
    for phase in measures.phases:
        line = _bytes(phase.line) or 0
        if line > (found[-1][0] if found else 0):
            found.append((line, phase.name))
    return found


def _cut(changes: list[tuple[str, str, float]], end: float) -> Measured:
    """Return the stretches of an attempt that was cut off: each lasts until the next, the last until the end."""
    measured = Measured(cut=True)
    for number, (span, phase, at) in enumerate(changes):
        following = next((later for name, _, later in changes[number + 1 :] if name != span), end)
        if span and (not measured.spans or measured.spans[-1][0] != span):
            measured.spans.append((span, at, max(0.0, following - at)))
        if phase:
            until = changes[number + 1][2] if number + 1 < len(changes) else end
            measured.phases.append((phase, at, max(0.0, until - at)))
    return measured


def _in_order(stretches: list[tuple[str, float, float]], lowest: float, end: float) -> list[tuple[str, float, float]]:
    """Move each stretch so far ahead that it ends when the next one begins, the last one at `end`.

    They are the agent's in this order, and the latest are placed by the newest poll: only those of before the clock
    jumped can be too late.
    """
    ordered = []
    for name, at, took_s in reversed(stretches):
        begin = max(lowest, min(at, end - took_s))
        ordered.append((name, begin, took_s))
        end = begin
    return ordered[::-1]


def _within(at: float, took_s: float, lowest: float, highest: float) -> tuple[float, float]:
    """Move a stretch between two instants, and cut it where it is longer than they are apart."""
    if not math.isfinite(at):
        return highest, 0.0
    took_s = min(max(0.0, took_s), max(0.0, highest - lowest))
    return min(max(at, lowest), max(lowest, highest - took_s)), took_s


def _storable(text: str) -> str:
    """Bound a message, and leave out what PostgreSQL keeps in no text."""
    return text[:MESSAGE_CHARACTERS].replace("\0", "")


def _known(at: float) -> float | None:
    return at or None


def _bytes(value: int | None) -> int | None:
    """Return a count that a database can hold; None for one that is none."""
    return value if value is not None and 0 <= value <= MOST else None


def _seconds(value: float | None) -> float | None:
    return round(max(0.0, value), 6) if value is not None and math.isfinite(value) else None
