"""Throughput of the farm: what ended in each minute of the last hour, and in each hour of the last day.

Attempts come from the store of timings, which outlives the coordinator; what submissions found in the cache from the
read model. Both are read at most once in a while for all who look. A store that fails costs nothing but the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import dataclass, replace
from typing import Final

from coordinator.api.estimates import ThroughputBar, ThroughputView
from coordinator.errors import CoordinatorError
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from infra.clock import Clock
from infra.slices import in_slices

#: Submissions looked at between two pauses.
_LOOKED_AT: Final = 1_000
#: (since, until, seconds of a stretch) -> (stretch, outcome, attempts); may raise a `CoordinatorError`.
Ended = Callable[[float, float, float], Awaitable[list[tuple[int, str, int]]]]


@dataclass(frozen=True, slots=True)
class ShownSpan:
    """A span of time that is shown, in stretches, and the seconds for which an answer is kept."""

    name: str
    stretches: int
    every_s: float
    kept_s: float


HOUR: Final = ShownSpan("hour", 60, 60.0, 10.0)
DAY: Final = ShownSpan("day", 24, 3600.0, 300.0)
SPANS: Final = (HOUR, DAY)


class Throughput:
    """Counts of what has ended, by time."""

    def __init__(self, views: Views, ended: Ended, clock: Clock) -> None:
        self._views = views
        self._ended = ended
        self._clock = clock
        self._known: dict[str, ThroughputView] = {}
        self._locks = {span.name: asyncio.Lock() for span in SPANS}
        self._read_at = dict.fromkeys(self._locks, float("-inf"))

    async def of(self, span: ShownSpan) -> ThroughputView:
        """Return what ended in a span; as it was known last while the store fails."""
        async with self._locks[span.name]:
            now = self._clock.now()
            if not 0 <= now - self._read_at[span.name] < span.kept_s:
                # Whole stretches, so that what is over does not change any more; the last one is under way.
                until = (now // span.every_s + 1) * span.every_s
                since = until - span.stretches * span.every_s
                ended: list[tuple[int, str, int]] | None
                try:
                    ended = await self._ended(since, until, span.every_s)
                except CoordinatorError:
                    ended = None
                self._read_at[span.name] = now
                if ended is not None or span.name not in self._known:
                    work = counting(span, until, ended or (), self._views.submission_rows())
                    self._known[span.name] = await in_slices(work)
            return self._known[span.name]


def counting(
    span: ShownSpan, until: float, ended: Iterable[tuple[int, str, int]], rows: Iterable[SubmissionRow]
) -> Generator[None, None, ThroughputView]:
    """Return the bars of a span that ends at `until`, with pauses."""
    bars = [ThroughputBar()] * span.stretches
    for stretch, outcome, count in ended:
        if 0 <= stretch < span.stretches and outcome in {"done", "failed"}:
            field = "finished" if outcome == "done" else "failed"
            bars[stretch] = replace(bars[stretch], **{field: getattr(bars[stretch], field) + count})
    yield
    since = until - span.stretches * span.every_s
    for number, row in enumerate(rows, 1):
        stretch = int((row.created_at - since) // span.every_s)
        if 0 <= stretch < span.stretches:
            bars[stretch] = replace(bars[stretch], reused=bars[stretch].reused + row.held)
        if not number % _LOOKED_AT:
            yield
    return ThroughputView(until=until, every_s=span.every_s, bars=tuple(bars))
