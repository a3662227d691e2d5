"""Limits of one build: what it may use, which limits hold for a step, and whether one was raised while the build ran.

A limit belongs to the root that it was set for and to nothing below it: whatever else a submission needs has the
farm's defaults, so a short limit on one package never ends a dependency that others share. Where several submissions
want one step, each field is the most generous of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from scheduler.model import FailureKind


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """Seconds and bytes. 0 means "not set" in what a submission sends, and "no limit" in what holds."""

    #: Wall time and silence.
    timeout_s: int = 0
    silence_s: int = 0
    #: Log that is kept, its head and its tail; a submission can only lower it.
    log_bytes: int = 0
    #: NARs of all outputs together.
    output_bytes: int = 0
    #: Memory that the build takes: no limit but a hint to builders, 0 in both.
    memory_bytes: int = 0

    def exceeds(self, kind: FailureKind, limit: int) -> bool:
        """Return whether these allow a build more than the `limit` at which it failed so; a limit of 0 is not known."""
        match kind:
            case FailureKind.TIMEOUT:
                holds = self.timeout_s
            case FailureKind.SILENCE:
                holds = self.silence_s
            case FailureKind.OUTPUT_SIZE:
                holds = self.output_bytes
            case _:
                return False
        return limit > 0 and (holds == 0 or holds > limit)


UNLIMITED = ResourceLimits()


def in_force(wanted: Iterable[ResourceLimits | None], default: ResourceLimits) -> ResourceLimits:
    """Return what holds for a step; `wanted` has an entry for each submission that wants it, None: it sets nothing."""
    wishes = [_completed(wish or ResourceLimits(), default) for wish in wanted] or [default]
    most = ResourceLimits(
        **{field.name: _most(getattr(wish, field.name) for wish in wishes) for field in fields(ResourceLimits)}
    )
    log_bytes = min(most.log_bytes or default.log_bytes, default.log_bytes) if default.log_bytes else most.log_bytes
    return ResourceLimits(
        most.timeout_s,
        most.silence_s,
        log_bytes,
        most.output_bytes,
        max((wish.memory_bytes for wish in wishes), default=0),
    )


def _completed(wish: ResourceLimits, default: ResourceLimits) -> ResourceLimits:
    return ResourceLimits(
        **{field.name: getattr(wish, field.name) or getattr(default, field.name) for field in fields(ResourceLimits)}
    )


def _most(values: Iterable[int]) -> int:
    wishes = list(values)
    return 0 if 0 in wishes else max(wishes)
