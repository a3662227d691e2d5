"""Leases that have ended lately, each with the builder that had it: its log may still be on the way.

A builder that was silent for a while has lost its leases and still holds what their builds printed. Nothing here is
durable: a start from a snapshot knows none of before it.
"""

from __future__ import annotations

from typing import Final

from scheduler.model import BuilderId, Instant, LeaseId

#: Seconds after the end of a lease in which its builder may send what it holds of it.
LATE_S: Final = 3600.0
#: Leases that are remembered, some 0.3 KiB each; the longest ended are forgotten first.
MOST: Final = 8192


class EndedLeases:
    """Written by `FarmState.evolve` alone."""

    __slots__ = ("_by_lease",)

    def __init__(self) -> None:
        #: The builder, its incarnation where it had joined ("": known from the journal only), and the end.
        self._by_lease: dict[LeaseId, tuple[BuilderId, str, Instant]] = {}

    def add(self, lease: LeaseId, builder: BuilderId, incarnation: str, at: Instant) -> None:
        """Remember a lease that ends."""
        self._by_lease[lease] = builder, incarnation, at
        if len(self._by_lease) > MOST:
            del self._by_lease[next(iter(self._by_lease))]

    def had(self, lease: LeaseId, builder: BuilderId, incarnation: str, now: Instant) -> bool:
        """Return whether this incarnation of a builder had the lease until at most `LATE_S` ago."""
        by, life, at = self._by_lease.get(lease, (None, "", 0.0))
        return by == builder and life in {"", incarnation} and now - at <= LATE_S
