"""Record of one attempt: when each of its stretches began and ended, what was fetched, what the build used.

The lease runner writes to it as it goes, so that an attempt that is stopped or fails is reported with all that
happened until then.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from workers.wire.measures import (
    MAX_FETCHES,
    MAX_PHASES,
    BuildPhase,
    FetchSource,
    InputFetch,
    Measures,
    Span,
    SpanName,
)


@dataclass(frozen=True, slots=True, order=True)
class Fetched:
    """One path that a transfer added to the store; ordered by size."""

    nar_bytes: int
    path: str
    source: FetchSource
    at: float
    took_s: float


def _unnoticed() -> None:
    """Drop the notice."""


@dataclass(slots=True)
class Moving:
    """NAR bytes of some paths on their way, so far and in all. `notify` is called with each piece."""

    source: FetchSource = "cache"
    size_bytes: int = 0
    notify: Callable[[], None] = _unnoticed
    done_bytes: int = 0
    #: The path whose bytes moved last; "" before the first.
    path: str = ""

    def add(self, path: str, size: int) -> None:
        """Count bytes of a path."""
        self.done_bytes += size
        self.path = path
        self.notify()

    async def counted(self, chunks: AsyncIterable[bytes], path: str) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of a path and count them; what breaks off counts for nothing."""
        whole, counted = False, 0
        try:
            async for chunk in chunks:
                counted += len(chunk)
                self.add(path, len(chunk))
                yield chunk
            whole = True
        finally:
            if not whole:
                self.done_bytes -= counted


@dataclass(slots=True)
class FetchLog:
    """Fetches of one transfer: the MAX_FETCHES largest, the others counted and summed; and what is on its way."""

    moving: Moving = field(default_factory=Moving)
    largest: list[Fetched] = field(default_factory=list)
    more: int = 0
    more_bytes: int = 0

    def add(self, fetched: Fetched) -> None:
        """Count one more fetch."""
        if len(self.largest) < MAX_FETCHES:
            heapq.heappush(self.largest, fetched)
            return
        smallest = heapq.heappushpop(self.largest, fetched)
        self.more += 1
        self.more_bytes += smallest.nar_bytes


@dataclass(slots=True)
class BuildUse:
    """Use of the machine by one build; None is not known."""

    cpu_s: float | None = None
    peak_memory_bytes: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None

    def saw_memory(self, now_bytes: int | None) -> None:
        """Take one look at the memory of a running build."""
        if now_bytes is not None:
            self.peak_memory_bytes = max(self.peak_memory_bytes or 0, now_bytes)


class AttemptRecord:
    """See the module's text. `now` gives the agent's time."""

    def __init__(self, now: Callable[[], float], traceparent: str = "") -> None:
        self._now = now
        self._traceparent = traceparent
        self.use = BuildUse()
        self._spans: list[Span] = []
        #: Bytes that the attempt waits for or sends now, and which way they go.
        self._moving: tuple[Moving, ...] = ()
        self._direction: Literal["fetch", "upload"] = "fetch"
        self._phases: list[BuildPhase] = []
        self._more_phases = 0
        self._more_phases_s = 0.0
        #: The phase that runs, since when, and its first line.
        self._phase: tuple[str, float, int] | None = None
        self._fetches: list[InputFetch] = []
        self._more_fetches = 0
        self._more_fetches_bytes = 0
        #: Bytes of inputs that had come ahead of the lease.
        self.ahead_bytes = 0

    @property
    def in_trace(self) -> str:
        """The words of a log line about the trace: by it both are found, each from the other."""
        return f" (trace {self._traceparent})" if self._traceparent else ""

    @contextmanager
    def span(self, name: SpanName) -> Iterator[None]:
        """Record a stretch, however it ends."""
        began = self._now()
        try:
            yield
        finally:
            self._end_phase(self._now())
            self._spans.append(Span(name=name, at=began, took_s=_rounded(self._now() - began)))

    @contextmanager
    def delivery(self) -> Iterator[Callable[[float], None]]:
        """Record the upload of outputs; takes the seconds of each NAR that went into packing."""
        began, packing_s = self._now(), 0.0

        def packed(seconds: float) -> None:
            nonlocal packing_s
            packing_s += seconds

        try:
            yield packed
        finally:
            took_s = self._now() - began
            # Several outputs may be packed at one time.
            pack_s = min(packing_s, took_s)
            self._spans.append(Span(name="pack", at=began, took_s=_rounded(pack_s)))
            self._spans.append(Span(name="upload", at=began + pack_s, took_s=_rounded(took_s - pack_s)))

    def phase(self, name: str, line: int = 0) -> None:
        """Note that the builder entered a phase, and the line of the log that it begins with."""
        now = self._now()
        self._end_phase(now)
        self._phase = (name, now, line)

    @contextmanager
    def transfer(self, direction: Literal["fetch", "upload"], moving: Iterable[Moving]) -> Iterator[None]:
        """Let `on_its_way` say how far these have come, while the block runs."""
        self._direction, self._moving = direction, tuple(moving)
        try:
            yield
        finally:
            self._moving = ()

    def on_its_way(self) -> dict[str, Any] | None:
        """Return the fields of a `Transfer` that are not the lease's; None while nothing moves."""
        begun = [moving for moving in self._moving if moving.path]
        if not begun:
            return None
        return {
            "direction": self._direction,
            "path": begun[-1].path,
            "source": begun[-1].source,
            "done_bytes": sum(moving.done_bytes for moving in begun),
            "size_bytes": sum(moving.size_bytes for moving in self._moving) or None,
        }

    def fetched(self, log: FetchLog, *, shared: bool) -> None:
        """Note what a transfer fetched that the attempt waited for."""
        self._fetches += [
            InputFetch(
                path=one.path,
                source=one.source,
                nar_bytes=one.nar_bytes,
                at=one.at,
                took_s=_rounded(one.took_s),
                shared=shared,
            )
            for one in log.largest
        ]
        self._fetches.sort(key=lambda one: one.nar_bytes, reverse=True)
        beyond = self._fetches[MAX_FETCHES:]
        del self._fetches[MAX_FETCHES:]
        self._more_fetches += log.more + len(beyond)
        self._more_fetches_bytes += log.more_bytes + sum(one.nar_bytes for one in beyond)

    def measures(self) -> Measures:
        """Return all that is recorded."""
        return Measures(
            spans=tuple(self._spans),
            phases=tuple(self._phases),
            more_phases=self._more_phases,
            more_phases_s=_rounded(self._more_phases_s),
            fetches=tuple(self._fetches),
            more_fetches=self._more_fetches,
            more_fetches_bytes=self._more_fetches_bytes,
            ahead_bytes=self.ahead_bytes,
            cpu_s=self.use.cpu_s,
            peak_memory_bytes=self.use.peak_memory_bytes,
            read_bytes=self.use.read_bytes,
            written_bytes=self.use.written_bytes,
            traceparent=self._traceparent,
        )

    def _end_phase(self, now: float) -> None:
        if self._phase is None:
            return
        name, began, line = self._phase
        self._phase = None
        took_s = now - began
        if len(self._phases) < MAX_PHASES:
            self._phases.append(BuildPhase(name=name, at=began, took_s=_rounded(took_s), line=line))
        else:
            self._more_phases += 1
            self._more_phases_s += took_s


def _rounded(seconds: float) -> float:
    """Microseconds are enough, and shorter on the wire."""
    return round(seconds, 6)
