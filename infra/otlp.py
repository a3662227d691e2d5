"""Sender of ended spans by OTLP over HTTP: OpenTelemetry's exporter behind one small class.

The only module that imports the SDK's tracing. Spans come with their ids, because a farm learns of a span when it has
ended, often from another machine. The exporter reads the standard variables (`OTEL_EXPORTER_OTLP_…`: endpoint, headers,
certificates, timeout, compression; `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags

from infra.ended_span import EndedSpan

_NS = 1_000_000_000
_EXPORTER_LOG = logging.getLogger(OTLPSpanExporter.__module__)


class OncePerOutage(logging.Filter):
    """Lets the first record of an outage through: the exporter logs one for each try of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self._is_out = False

    def filter(self, _record: logging.LogRecord) -> bool:
        """Return whether a record is the first since the last `over`."""
        first, self._is_out = not self._is_out, True
        return first

    def over(self) -> None:
        """Let the next record through."""
        self._is_out = False


class OtlpSender:
    """Connection to one collector. `endpoint` is its base address, "" the one of the standard variables."""

    def __init__(self, endpoint: str, service: str, version: str) -> None:
        address = f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None
        self._exporter = OTLPSpanExporter(endpoint=address)
        self._quiet = OncePerOutage()
        _EXPORTER_LOG.addFilter(self._quiet)
        own = Resource({SERVICE_NAME: service, SERVICE_VERSION: version})
        self._resource = own.merge(OTELResourceDetector().detect())
        self._scope = InstrumentationScope(service, version)

    def send(self, spans: Sequence[EndedSpan]) -> bool:
        """Send spans and wait for the answer, for use in a thread; False where the collector did not take them."""
        taken = self._exporter.export([self._readable(span) for span in spans]) is SpanExportResult.SUCCESS
        if taken:
            self._quiet.over()
        return taken

    def close(self) -> None:
        """Close the connection."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
        _EXPORTER_LOG.removeFilter(self._quiet)

    def _readable(self, span: EndedSpan) -> ReadableSpan:
        parent = None if span.parent_id is None else _context(span.trace_id, span.parent_id)
        return ReadableSpan(
            name=span.name,
            context=_context(span.trace_id, span.span_id),
            parent=parent,
            resource=self._resource,
            attributes=dict(span.attributes),
            links=[Link(_context(*link)) for link in span.links],
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
            start_time=int(span.begin * _NS),
            end_time=int(span.end * _NS),
            instrumentation_scope=self._scope,
        )


def _context(trace_id: int, span_id: int) -> SpanContext:
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
