"""What one build may use: the farm's defaults, what a submission says of its roots, and which of it holds.

A limit belongs to the root that it was said of and to nothing below it: whatever else a submission needs has the
defaults, so a short limit on one package never ends a dependency that others share. Where several submissions want one
step, each field is the most generous of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

#: Largest limit that a submission may name.
MAX_LIMIT = 1 << 53
#: Seconds that a submission can say it waits for a worker, short of for ever: a hundred years.
MAX_WAIT_S = 100 * 365 * 24 * 3600


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Seconds and bytes. 0 is "not said" in what a submission says, and "no limit" in what holds."""

    #: Wall time and silence.
    timeout_s: int = 0
    silence_s: int = 0
    #: Log that is kept, its head and its tail; a submission can only lower it.
    log_bytes: int = 0
    #: NARs of all outputs together.
    output_bytes: int = 0
    #: Memory that the build takes: no limit but a hint to workers, 0 in both.
    memory_bytes: int = 0


def in_force(told: Iterable[StepLimits | None], default: StepLimits) -> StepLimits:
    """Return what holds for a step; `told` has an entry for each submission that wants it, None: says nothing."""
    wishes = [_completed(wish or StepLimits(), default) for wish in told] or [default]
    most = StepLimits(
        **{field.name: _most(getattr(wish, field.name) for wish in wishes) for field in fields(StepLimits)}
    )
    log_bytes = min(most.log_bytes or default.log_bytes, default.log_bytes) if default.log_bytes else most.log_bytes
    return StepLimits(
        most.timeout_s,
        most.silence_s,
        log_bytes,
        most.output_bytes,
        max((wish.memory_bytes for wish in wishes), default=0),
    )


def _completed(wish: StepLimits, default: StepLimits) -> StepLimits:
    return StepLimits(
        **{field.name: getattr(wish, field.name) or getattr(default, field.name) for field in fields(StepLimits)}
    )


def _most(values: Iterable[int]) -> int:
    told = list(values)
    return 0 if 0 in told else max(told)
