"""Offsets between workers' clocks and the coordinator's, from the times of their polls.

A poll leaves at t0 and its answer arrives at t3, by the coordinator's clock; the agent got it at t1 and answered at t2,
by its own. As in NTP the offset is ((t0 - t1) + (t3 - t2)) / 2, wrong by at most half the round trip that remains when
the agent's own time is left out, so the poll with the smallest round trip wins. A clock may jump: a poll whose interval
of possible offsets does not meet that of the best one begins a new era. Times of before the jump keep the old offset.

Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

#: Polls of an era that are looked at for the smallest round trip: some ten minutes of an idle worker.
SAMPLES: Final = 64
#: Eras that are remembered; times before the oldest one take its offset.
ERAS: Final = 8
#: What two clocks may drift apart, seconds a second, and what is never called a jump, seconds.
DRIFT: Final = 2e-4
SLACK_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Sample:
    """One poll: when its answer left the agent, by the agent's clock; the offset to add to that clock; round trip."""

    at: float
    offset_s: float
    trip_s: float


@dataclass(slots=True)
class _Era:
    """A stretch without a jump, which began at `since` by the agent's clock."""

    since: float
    samples: deque[Sample]
    #: The sample with the shortest trip: kept, because each report of a build asks for it several times.
    best: Sample

    def add(self, sample: Sample) -> None:
        is_full = len(self.samples) == self.samples.maxlen
        lost = self.samples[0] if is_full else None
        self.samples.append(sample)
        if lost is self.best:
            self.best = min(self.samples, key=lambda each: each.trip_s)
        elif sample.trip_s < self.best.trip_s:
            self.best = sample


def sample_of(sent: float, arrived: float, received: float, answered: float) -> Sample:
    """Return what one poll shows: `sent` and `arrived` by the coordinator's clock, the others by the agent's."""
    trip_s = max(0.0, (arrived - sent) - (answered - received))
    return Sample(answered, ((sent - received) + (arrived - answered)) / 2, trip_s)


class ClockOffset:
    """The clock of one agent's life against the coordinator's."""

    def __init__(self) -> None:
        self._eras: deque[_Era] = deque(maxlen=ERAS)

    def add(self, sample: Sample) -> None:
        """Take one poll in."""
        if self._eras:
            best = self._eras[-1].best
            margin_s = (best.trip_s + sample.trip_s) / 2 + SLACK_S + DRIFT * abs(sample.at - best.at)
            if abs(best.offset_s - sample.offset_s) <= margin_s:
                self._eras[-1].add(sample)
                return
        self._eras.append(_Era(sample.at, deque((sample,), maxlen=SAMPLES), sample))

    @property
    def known(self) -> bool:
        """True once a poll was taken in."""
        return bool(self._eras)

    @property
    def offset_s(self) -> float:
        """Return what to add to the agent's time now; 0 where nothing is known."""
        return self._eras[-1].best.offset_s if self._eras else 0.0

    def here(self, at: float) -> float:
        """Return an instant of the agent's clock by the coordinator's."""
        for era in reversed(self._eras):
            if era.since <= at:
                return at + era.best.offset_s
        return at + (self._eras[0].best.offset_s if self._eras else 0.0)
