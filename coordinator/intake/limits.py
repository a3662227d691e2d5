"""Bounds of one request to intake."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.config import LimitSettings
from coordinator.intake.errors import TooLargeError


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Bounds of one request; an error names the limit and the count."""

    #: Of one submission's closure, and of one stream.
    max_derivations: int = 200_000
    max_sources: int = 200_000
    max_derivation_bytes: int = 64 * 1024 * 1024
    #: Of an inflated derivations stream.
    max_derivations_bytes: int = 2 * 1024 * 1024 * 1024
    #: NAR size of one source, and of all in one stream.
    max_source_bytes: int = 64 * 1024 * 1024 * 1024
    max_sources_bytes: int = 256 * 1024 * 1024 * 1024
    #: Streams of derivations and of sources that are taken at one time; each has some MiB in memory.
    max_streams: int = 32
    #: Memory for verifying derivations of more than `framing.LARGE_BYTES`, of all clients together.
    verifying_bytes: int = 512 * 1024 * 1024
    #: Members that are kept as recipes of one fixed-output step.
    max_recipes: int = 8

    @classmethod
    def of(cls, limits: LimitSettings) -> IntakeLimits:
        """Return the bounds that follow from the farm's limits."""
        return cls(max_derivations=limits.graph_size, max_sources=limits.graph_size)


def require_within(count: int, limit: int, subject: str) -> None:
    """Raise `TooLargeError` for a graph with more than `limit` members of a kind."""
    if count > limit:
        raise TooLargeError(f"the graph has {count} {subject}; this farm takes at most {limit} in one submission")
