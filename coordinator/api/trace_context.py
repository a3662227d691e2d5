"""W3C trace context as a plain field: `traceparent`, by which a trace of another program holds the farm's spans.

Format: `00-<32 hex: trace>-<16 hex: parent span>-<2 hex: flags>` (W3C Trace Context, 3.2). A version that is not known
is read by its first four fields, as 4.2 of it asks; all zeros, and version `ff`, are invalid.
"""

from __future__ import annotations

import re
from typing import Final

from infra.records import record

_FORM: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-[!-~]*)?")
#: Characters of a `traceparent` that are looked at.
MAX_TRACEPARENT: Final = 256


@record(frozen=True, slots=True)
class TraceContext:
    """A trace, and the span in it that is the parent."""

    trace_id: int
    span_id: int

    def __str__(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"


def parse_traceparent(text: str) -> TraceContext | None:
    """Return the context; None for text that is none, which is not an error: a trace begins anew then."""
    found = _FORM.fullmatch(text) if len(text) <= MAX_TRACEPARENT else None
    if found is None or found[1] == "ff" or (found[1] == "00" and len(text) != 55):
        return None
    context = TraceContext(int(found[2], 16), int(found[3], 16))
    return context if context.trace_id and context.span_id else None
