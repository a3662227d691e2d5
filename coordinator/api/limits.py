"""Limits of a build as an evaluation finds them; `scheduler.resource_limits` says which of them hold."""

from __future__ import annotations

from dataclasses import dataclass

#: Largest limit that a submission may name.
MAX_LIMIT = 1 << 53
#: Seconds that a submission can say it waits for a worker, short of for ever: a hundred years.
MAX_WAIT_S = 100 * 365 * 24 * 3600


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Seconds and bytes; 0 is "not said". Fields are as in `api.models.RootLimits`."""

    #: Wall time and silence.
    timeout_s: int = 0
    silence_s: int = 0
    #: Log that is kept, its head and its tail; a submission can only lower it.
    log_bytes: int = 0
    #: NARs of all outputs together.
    output_bytes: int = 0
    #: Memory that the build takes: no limit but a hint to workers, 0 in both.
    memory_bytes: int = 0
