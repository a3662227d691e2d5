"""Record of an ended span of a trace, as a sender takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EndedSpan:
    """One ended span. `trace_id` has 128 bits, span ids have 64; times are Unix seconds."""

    trace_id: int
    span_id: int
    parent_id: int | None
    name: str
    begin: float
    end: float
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    #: What went wrong; "" is a span without an error.
    error: str = ""
    #: (trace id, span id) of spans elsewhere that this one is about.
    links: Sequence[tuple[int, int]] = ()
