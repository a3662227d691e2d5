"""Counts of durations in buckets: plain numbers, which `infra.telemetry` shows as a histogram.

A value costs half a microsecond; the SDK's own instrument takes some thirty, too much for every stretch of every build.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

#: Bounds for what takes milliseconds, in seconds.
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
#: Bounds for what takes milliseconds as well as hours, in seconds.
LONG: Final = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0)


class Histogram:
    """Durations in seconds. `bounds` are the upper ends of the buckets, ascending; a last bucket takes the rest."""

    def __init__(self, bounds: Sequence[float] = LONG) -> None:
        self.bounds = tuple(bounds)
        self.sum_s = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def add(self, seconds: float) -> None:
        """Count one duration, which is finite and not negative."""
        self._counts[bisect_left(self.bounds, seconds)] += 1
        self.sum_s += seconds

    @property
    def count(self) -> int:
        """Durations in all."""
        return sum(self._counts)

    def up_to(self) -> list[tuple[str, float]]:
        """Return for each bound, as Prometheus writes it, how many durations are not longer."""
        ends = [*map(str, self.bounds), "+Inf"]
        return list(zip(ends, map(float, accumulate(self._counts)), strict=True))
