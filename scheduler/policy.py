"""Policy, which may change between releases without rewriting history: order, placement, back-off, budgets.

`decide` calls a policy (the indexes of the state do for ranks); what follows from it is a fact. It sees
steps and builders read-only, holds no clock and no chance: the same question has the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from scheduler.model import BuilderId, StepKey
from scheduler.records import Builder, Step
from scheduler.resource_limits import UNLIMITED, ResourceLimits

#: Largest weight of an owner.
MAX_WEIGHT: Final = 1000


@dataclass(frozen=True, slots=True)
class Limits:
    """The budgets of the core."""

    #: Infrastructure failures of one recipe in a life of a step after which it is given up.
    attempts: int = 5
    #: Returned leases of one life that are granted again at once; from then on with back-off.
    returns_at_once: int = 3
    #: Returned leases of one life; every further one counts as an infrastructure failure.
    returns: int = 50
    #: Silence after which a builder is removed and its leases are revoked.
    lease_ttl_s: float = 120.0
    #: How long a builder may leave a lease unnamed in its heartbeats before the order to start is sent again.
    start_grace_s: float = 15.0
    #: How often the order is sent again before the lease is revoked.
    start_resends: int = 3
    #: How long a step that failed by its own fault is taken for known to fail; 0 is never.
    failure_ttl_s: float = 24 * 3600.0
    #: How long a ready step may wait while no builder that is known can take it, before it fails; 0 is for ever.
    give_up_s: float = 0.0
    #: Leases of one builder in a row that end by a fault of the farm, after which it is put in quarantine.
    quarantine_after: int = 3
    #: Failed attempts beyond the first of each step that one submission may cost at once, and again in each hour.
    #: Beyond it the next tries of its failing steps wait their turn. 0 is no limit.
    retries_per_hour: int = 200
    #: What a build may use where no submission that wants its step sets another limit.
    build: ResourceLimits = UNLIMITED


class Policy(Protocol):
    """The questions the core asks."""

    def rank(self, step: Step) -> int:
        """Return the step's importance among ready steps; higher goes first, ties by age."""

    def weight(self, owner: str) -> int:
        """Return an owner's weight, from 1 to `MAX_WEIGHT`: its share of grants beside those of others that wait."""

    def place(self, step: Step, builders: Sequence[Builder]) -> Builder:
        """Choose one of `builders`, which all can take the step now, in the order of their ids; never empty."""

    def back_off_s(self, step: StepKey, failures: int) -> float:
        """Return the seconds to wait after the given number (from 1) of failures in this life."""

    def quarantine_s(self, builder: BuilderId, level: int) -> float:
        """Return the seconds that a builder gets no leases, the `level`-th time (from 1) without a success between."""


@dataclass(frozen=True, slots=True)
class LongestPathFirst:
    """Rank by longest remaining time, place on the emptiest builder, back off exponentially with jitter."""

    back_off_first_s: float = 1.0
    back_off_most_s: float = 300.0
    quarantine_first_s: float = 30.0
    quarantine_most_s: float = 900.0
    #: Of owners that have another weight than 1.
    weights: Mapping[str, int] = field(default_factory=dict)

    def rank(self, step: Step) -> int:
        """Steps on the path that takes longest to a root go first: they bound when the submission can end."""
        return step.tail_ms

    def weight(self, owner: str) -> int:
        """Return the weight that is configured, else 1."""
        return self.weights.get(owner, 1)

    def place(self, step: Step, builders: Sequence[Builder]) -> Builder:  # noqa: ARG002  other policies look at it
        """Return the builder with most free capacity, the first by id among equals."""
        best, most = builders[0], builders[0].free
        for builder in builders:
            if builder.free > most:
                best, most = builder, builder.free
        return best

    def back_off_s(self, step: StepKey, failures: int) -> float:
        """Double from the first value up to the most, scaled by a jitter in [0.5, 1) that the key and count fix."""
        return _grown(self.back_off_first_s, self.back_off_most_s, step, failures)

    def quarantine_s(self, builder: BuilderId, level: int) -> float:
        """Grow as `back_off_s` does, from and to values of its own."""
        return _grown(self.quarantine_first_s, self.quarantine_most_s, builder, level)


def _grown(first_s: float, most_s: float, key: str, count: int) -> float:
    # The exponent is bounded so that a large count cannot overflow.
    whole = min(most_s, first_s * 2.0 ** min(count - 1, 32))
    return whole * (0.5 + _jitter(key, count) / 2)


def _jitter(key: str, salt: int) -> float:
    """Return a number in [0, 1) by FNV-1a: the built-in hash of a string differs between runs."""
    value = 0xCBF29CE484222325
    for byte in f"{key}#{salt}".encode():
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    # FNV-1a hardly spreads its last bytes, which hold the salt: one more multiplication between folds does.
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD & 0xFFFFFFFFFFFFFFFF
    return (value >> 11) / 2**53
