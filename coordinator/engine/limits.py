"""Limits of builds that ended at one: whether another submission has raised it since."""

from __future__ import annotations

from coordinator.api.limits import StepLimits
from scheduler.model import FailureKind


def limit_was_raised(kind: FailureKind, limit: int, now: StepLimits) -> bool:
    """Whether a build that ended at `limit` may use more by now; a limit of 0 was not told."""
    match kind:
        case FailureKind.TIMEOUT:
            holds = now.timeout_s
        case FailureKind.SILENCE:
            holds = now.silence_s
        case FailureKind.OUTPUT_SIZE:
            holds = now.output_bytes
        case _:
            return False
    return limit > 0 and (holds == 0 or holds > limit)
