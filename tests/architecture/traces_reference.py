"""Reference of traces, printed from the table of names: `./run docs` writes infra/docs/traces.md."""

from __future__ import annotations

from pathlib import Path

from coordinator.observability.trace_names import ATTRIBUTES, SPANS

FILE = Path(__file__).resolve().parents[2] / "infra" / "docs" / "traces.md"
PREFACE = """\
# Traces

<!-- Printed from coordinator/observability/trace_names.py by `./run docs`; a test compares. Change it there. -->

Each submission is one trace. The coordinator sends it by OTLP over HTTP to `otlp_endpoint` of its settings, or where
the standard `OTEL_EXPORTER_OTLP_…` variables say; `OTEL_TRACES_EXPORTER=none` turns it off. A client whose environment
has `TRACEPARENT`, as CI runs with tracing give it, makes the submission a part of that trace.

A collector that is away costs nothing but spans, which are counted (`drover_spans_dropped_total`). Attempts of a step
that several submissions want are in the trace of the oldest; the others hold the step as one span with a link to it.
Spans are sent when what they are of has ended.

"""


def reference() -> str:
    """Return the whole page."""
    spans = [f"| `{each.name}` | {each.meaning} |" for each in SPANS]
    attributes = [f"| `{each.name}` | {each.meaning} |" for each in ATTRIBUTES]
    return (
        PREFACE
        + "| span | what it is |\n| --- | --- |\n"
        + "\n".join(spans)
        + "\n\nWhat is not known is absent, never 0.\n\n| attribute | meaning |\n| --- | --- |\n"
        + "\n".join(attributes)
        + "\n"
    )
