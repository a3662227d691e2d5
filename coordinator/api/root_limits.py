"""Limits on the build of one root, as a client says them, an evaluation finds them and the coordinator takes them."""

from __future__ import annotations

from typing import Annotated, Final

from coordinator.api.limits import MAX_LIMIT
from infra.field_bounds import FieldBounds
from infra.records import record

_LIMIT: Final = FieldBounds(ge=0, le=MAX_LIMIT)


@record(frozen=True, slots=True)
class RootLimits:
    """Limits on the build of a root itself; 0: the farm's default. Its dependencies have the defaults."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic's name for it

    #: Seconds of wall time and of silence (`meta.timeout`, `meta.maxSilent`).
    timeout_s: Annotated[int, _LIMIT] = 0
    silence_s: Annotated[int, _LIMIT] = 0
    #: Bytes of log that are kept, at most the farm's own limit, and of all outputs together (`meta.drover`).
    log_bytes: Annotated[int, _LIMIT] = 0
    output_bytes: Annotated[int, _LIMIT] = 0
    #: Memory that the build takes: workers run builds side by side only as far as theirs goes.
    memory_bytes: Annotated[int, _LIMIT] = 0


NO_LIMITS: Final = RootLimits()
