"""Leases that have ended lately, each with the builder that had it: its log may still be on the way.

A builder that was silent for a while has lost its leases and still holds what their builds printed. Nothing here is
durable: a start from a snapshot knows none of before it.
"""

from __future__ import annotations

from typing import Final

from scheduler.model import BuilderId, Instant, LeaseId, StepKey

#: Seconds after the end of a lease in which its builder may send what it holds of it.
LATE_S: Final = 3600.0
#: Leases that are remembered at least, and half of those that are at most, some 0.3 KiB each.
LEAST: Final = 8192

#: The builder, its incarnation where it had joined ("": known from the journal only), and the end.
_End = tuple[BuilderId, str, Instant]


class EndedLeases:
    """Written by `FarmState.evolve` alone.

    The longest ended are forgotten many at a time: to find the first of a dictionary whose front is gone costs as much
    as that front.
    """

    __slots__ = ("_earlier", "_latest")

    def __init__(self) -> None:
        self._latest: dict[tuple[StepKey, int], _End] = {}
        #: Those before these.
        self._earlier: dict[tuple[StepKey, int], _End] = {}

    def add(self, step: StepKey, attempt: int, builder: BuilderId, incarnation: str, at: Instant) -> None:
        """Remember a lease that ends."""
        latest = self._latest
        if len(latest) >= LEAST:
            self._earlier, self._latest = latest, {}
            latest = self._latest
        latest[step, attempt] = builder, incarnation, at

    def had(self, lease: LeaseId, builder: BuilderId, incarnation: str, now: Instant) -> bool:
        """Return whether this incarnation of a builder had the lease until at most `LATE_S` ago."""
        key = lease.step, lease.attempt
        end = self._latest.get(key) or self._earlier.get(key)
        return end is not None and end[0] == builder and end[1] in {"", incarnation} and now - end[2] <= LATE_S
