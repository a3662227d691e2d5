"""Actions of a worker on one of its leases, as `lease_machine` decides them."""

from __future__ import annotations

from dataclasses import dataclass

#: (step, attempt)
LeaseKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Fetch:
    """Make the lease's inputs valid; ends in `fetched` or `report`."""

    key: LeaseKey


@dataclass(frozen=True, slots=True)
class Build:
    """Build in this slot; ends in `built` or `report`."""

    key: LeaseKey
    slot: int


@dataclass(frozen=True, slots=True)
class HandBack:
    """Stop preparing this lease and report it as returned; ends in `report`."""

    key: LeaseKey


Action = Fetch | Build | HandBack
