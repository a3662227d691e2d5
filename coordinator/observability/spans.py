"""Fold of timings into spans: one trace a submission, in it its steps, their attempts, and what each attempt did.

Pure: no clock, no I/O, no SDK. Ids are digests of what a span is of, so that nothing must be remembered between a
step's end and its submission's, a restart changes none, and a span that is sent twice is the same span. A step that
several submissions want has its attempts in the trace of the oldest; the others hold one span that links to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from coordinator.api.models import SubmissionState
from coordinator.api.trace_context import TraceContext, parse_traceparent
from coordinator.observability import trace_names as names
from coordinator.stores.timings import AttemptTiming
from infra.ended_span import EndedSpan
from scheduler.model import FailureKind

Value = str | int | float | bool
#: What a client did before it submitted: name (`evaluate`, `closure`, `upload`), begin and end.
ClientStages = Sequence[tuple[str, float, float]]

_TASK_RESULTS: Final[Mapping[str, str]] = {
    "done": "success",
    "failed": "failure",
    "retried": "error",
    "lost": "error",
    "returned": "cancellation",
    "moved": "cancellation",
    "cancelled": "cancellation",
}
_TIMEOUTS: Final = frozenset({FailureKind.TIMEOUT.value, FailureKind.SILENCE.value})
_EXIT_CODE: Final = re.compile(r"failed with exit code (\d{1,3})\b")
_PIPELINE_RESULTS: Final[Mapping[SubmissionState, str]] = {
    SubmissionState.SUCCEEDED: "success",
    SubmissionState.FAILED: "failure",
    SubmissionState.CANCELLED: "cancellation",
    SubmissionState.SUPERSEDED: "cancellation",
    SubmissionState.EXPIRED: "cancellation",
}


@dataclass(frozen=True, slots=True)
class Trace:
    """A submission as the root of a trace."""

    submission: str
    #: As the client sent it; empty, or no context: the submission begins a trace of its own.
    traceparent: str = ""

    @property
    def parent(self) -> TraceContext | None:
        """The span of another program in which the submission happens."""
        return parse_traceparent(self.traceparent)

    @property
    def root(self) -> TraceContext:
        """The submission's own span."""
        parent = self.parent
        trace_id = _digest(16, "trace", self.submission) if parent is None else parent.trace_id
        return TraceContext(trace_id, _digest(8, "submission", self.submission))

    def step(self, step: str) -> TraceContext:
        """Return the span of a step in this trace."""
        return TraceContext(self.root.trace_id, _digest(8, "step", self.submission, step))

    def attempt(self, step: str, attempt: int) -> TraceContext:
        """Return the span of an attempt of a step in this trace."""
        return TraceContext(self.root.trace_id, _digest(8, "attempt", self.submission, step, str(attempt)))


def submission_spans(  # noqa: PLR0917 - the fields of what it makes
    trace: Trace,
    label: str,
    state: SubmissionState,
    begin: float,
    end: float,
    counts: Mapping[names.Attribute, int],
    stages: ClientStages = (),
) -> Iterator[EndedSpan]:
    """Yield the spans of a submission that has ended, and of what its client did."""
    root, parent = trace.root, trace.parent
    begin = min((begin, *(began for _, began, _ in stages)))
    attributes: dict[str, Value] = {
        names.PIPELINE_RUN.name: trace.submission,
        names.PIPELINE_RESULT.name: _PIPELINE_RESULTS.get(state, "error"),
        **{attribute.name: count for attribute, count in counts.items()},
    }
    if label:
        attributes[names.PIPELINE_NAME.name] = label
    error = "a root failed" if state is SubmissionState.FAILED else ""
    yield _span(
        root,
        None if parent is None else parent.span_id,
        names.SUBMISSION.name,
        begin,
        max(begin, end),
        attributes,
        error,
    )
    for name, began, ended in stages:
        context = TraceContext(root.trace_id, _digest(8, "client", trace.submission, name))
        yield _span(context, root.span_id, f"{names.CLIENT_STAGE.name} {name}", began, ended)


def attempt_spans(
    timing: AttemptTiming, traces: Sequence[Trace], since: float = math.inf, *, followed: bool = False
) -> Iterator[EndedSpan]:
    """Yield the spans of an attempt that has ended; `traces` are of the submissions that want its step, oldest first.

    The step's own span comes with the attempt that ends the step, unless it is `followed` by one of another recipe. It
    begins at `since` where attempts of before had begun by then.
    """
    if not traces or timing.ended_at is None or timing.leased_at is None:
        return
    first = traces[0]
    step = first.step(timing.step)
    attempt = first.attempt(timing.step, timing.attempt)
    begin, end = timing.leased_at, max(timing.leased_at, timing.ended_at)
    attributes = _attributes(timing)
    error = "" if timing.outcome == "done" else timing.message or timing.reason or str(timing.outcome)
    ordered = parse_traceparent(timing.measured.traceparent) if timing.measured is not None else None
    # The submission that it was ordered for may be gone: the worker's log names the span that it was to be.
    links = () if ordered in {None, attempt} else (ordered,)
    yield _span(attempt, step.span_id, names.ATTEMPT.name, begin, end, attributes, error, links)
    yield from _stretches(timing, attempt)
    if (ready := ready_at(timing)) < begin:
        yield _child(step, names.WAIT.name, ready, begin, str(timing.attempt))
    if ends_step(timing) and not followed:
        about = {key: value for key, value in attributes.items() if key in _OF_STEPS}
        yield from _step_spans(timing, traces, min(since, ready), end, about, error)


def ends_step(timing: AttemptTiming) -> bool:
    """Return whether no attempt follows: there is a verdict, or no submission wants the step any more."""
    return timing.outcome in {"done", "failed", "cancelled"}


def ready_at(timing: AttemptTiming) -> float:
    """Return when the step of a leased attempt was ready for it, as far as it is known."""
    leased = timing.leased_at or 0.0
    return leased if timing.ready_at is None else min(timing.ready_at, leased)


def unended_step_spans(timing: AttemptTiming, trace: Trace, since: float, end: float) -> Iterator[EndedSpan]:
    """Yield the span of a step whose last attempt, this one, ended without a verdict before its submission did."""
    about: dict[str, Value] = {key: value for key, value in _attributes(timing).items() if key in _OF_STEPS}
    about[names.TASK_RESULT.name] = "cancellation"
    yield from _step_spans(timing, [trace], min(since, ready_at(timing)), end, about, "no attempt followed")


def _step_spans(  # noqa: PLR0917 - the fields of what it makes
    timing: AttemptTiming,
    traces: Sequence[Trace],
    begin: float,
    end: float,
    about: Mapping[str, Value],
    error: str,
) -> Iterator[EndedSpan]:
    first, *others = traces
    step, name = first.step(timing.step), f"{names.STEP.name} {timing.name or timing.step}"
    end = max(begin, end)
    yield _span(step, first.root.span_id, name, begin, end, about, error)
    for other in others:
        context = other.step(timing.step)
        yield _span(context, other.root.span_id, name, begin, end, about, error, links=(step,))


_OF_STEPS: Final = frozenset(
    {names.TASK_NAME.name, names.TASK_RESULT.name, names.SYSTEM.name, names.WORKER_NAME.name, names.ERROR_TYPE.name}
)


def _attributes(timing: AttemptTiming) -> dict[str, Value]:
    """Return the attributes of an attempt; what is not known is absent."""
    late = timing.outcome == "failed" and timing.reason in _TIMEOUTS
    known: dict[names.Attribute, Value | None] = {
        names.TASK_NAME: timing.name,
        names.TASK_RUN: f"{timing.step}#{timing.attempt}",
        names.TASK_RESULT: "timeout" if late else _TASK_RESULTS.get(timing.outcome or ""),
        names.WORKER_NAME: timing.worker,
        names.ERROR_TYPE: timing.reason,
        names.EXIT_CODE: _exit_code(timing),
        names.SYSTEM: timing.system,
        names.ISOLATION: timing.isolation,
        names.CPU_SECONDS: timing.cpu_s,
        names.PEAK_MEMORY: timing.peak_memory_bytes,
        names.READ_BYTES: timing.read_bytes,
        names.WRITTEN_BYTES: timing.written_bytes,
        names.FETCHED_BYTES: timing.fetched_bytes,
        names.OUTPUT_BYTES: timing.output_bytes,
        names.UPLOADED_BYTES: timing.uploaded_bytes,
    }
    if timing.measured is not None and timing.measured.cut:
        known[names.CUT] = True
    return {attribute.name: value for attribute, value in known.items() if value is not None}


def _exit_code(timing: AttemptTiming) -> int | None:
    """Return the exit code that Nix says of a builder; the lines of its log that follow say nothing of it."""
    if timing.reason != FailureKind.PERMANENT or timing.message is None:
        return None
    found = _EXIT_CODE.search(timing.message.partition("log lines:")[0])
    return None if found is None else int(found[1])


def _stretches(timing: AttemptTiming, attempt: TraceContext) -> Iterator[EndedSpan]:
    measured = timing.measured
    if measured is not None:
        parents: dict[str, TraceContext] = {}
        for number, (name, at, took_s) in enumerate(measured.spans):
            span = _child(attempt, name, at, at + took_s, str(number))
            parents.setdefault(name, TraceContext(span.trace_id, span.span_id))
            yield span
        build, inputs = parents.get("build", attempt), parents.get("inputs", attempt)
        for number, (name, at, took_s) in enumerate(measured.phases):
            yield _child(build, f"{names.PHASE.name} {name}", at, at + took_s, str(number))
        for number, (path, source, size, at, took_s, _shared) in enumerate(measured.fetches):
            about: dict[str, Value] = {
                names.STORE_PATH.name: path,
                names.SOURCE.name: source,
                names.NAR_BYTES.name: size,
            }
            yield _child(inputs, names.FETCH.name, at, at + took_s, str(number), about)
    if timing.verify_at is not None:
        verified = timing.verify_at + (timing.verify_s or 0.0)
        yield _child(attempt, names.VERIFY.name, timing.verify_at, verified, "")
        if timing.publish_s is not None:
            yield _child(attempt, names.PUBLISH.name, verified, verified + timing.publish_s, "")


def _child(  # noqa: PLR0917 - the fields of what it makes
    parent: TraceContext, name: str, begin: float, end: float, which: str, attributes: Mapping[str, Value] | None = None
) -> EndedSpan:
    context = TraceContext(parent.trace_id, _digest(8, f"{parent.span_id:x}", name, which))
    return _span(context, parent.span_id, name, begin, end, attributes or {})


def _span(  # noqa: PLR0917 - the fields of what it makes
    context: TraceContext,
    parent: int | None,
    name: str,
    begin: float,
    end: float,
    attributes: Mapping[str, Value] | None = None,
    error: str = "",
    links: Sequence[TraceContext] = (),
) -> EndedSpan:
    return EndedSpan(
        trace_id=context.trace_id,
        span_id=context.span_id,
        parent_id=parent,
        name=name,
        begin=begin,
        end=end,
        attributes=attributes or {},
        error=error,
        links=[(link.trace_id, link.span_id) for link in links],
    )


def _digest(size: int, *parts: str) -> int:
    """Return an id that is not 0, which means none."""
    return int.from_bytes(blake2b("\0".join(parts).encode(), digest_size=size).digest(), "big") or 1
