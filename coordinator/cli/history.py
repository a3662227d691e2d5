"""`drover story` and `drover history`: what happened to a step in order, and how builds of a package went over time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from coordinator.api.flakes import RecipeRecordView, failure_sentence, flake_sentence
from coordinator.api.models import StepStatus, StepView
from coordinator.api.questions import StepReasonsView
from coordinator.api.timeline_models import (
    AttemptView,
    FetchView,
    HistoryView,
    StretchView,
    SystemHistoryView,
    WorkerTriesView,
)
from coordinator.cli import exit_status
from coordinator.cli.printing import print_json, print_lines, size
from coordinator.cli.reasons import wanted_lines
from coordinator.cli.rendering import duration, one_line, table_lines
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import RefusedError

#: Inputs that a story names of each attempt, the largest.
FETCHES_NAMED = 3
_SOURCES = {"objects": "the object store", "cache": "the coordinator's cache"}
_PAST = {"upload": "uploaded", "verify": "verified", "publish": "published"}
_ENDINGS = {
    "done": "done",
    "failed": "failed for good",
    "retried": "failed; it is tried again",
    "lost": "the worker was lost",
    "returned": "handed back",
    "moved": "stopped, because a faster worker has it now",
    "cancelled": "stopped, because it is no longer wanted",
}


async def story(client: ApiClient, name: str, *, as_json: bool) -> int:
    """Tell everything that happened to a step, in order."""
    attempts = await client.timeline(name)
    try:
        reasons: StepReasonsView | None = await client.why(name)
    except RefusedError as error:
        # Its submissions are forgotten; the timings are kept longer.
        if error.reason != "not_found" or not attempts:
            raise
        reasons = None
    step = None if reasons is None else reasons.step
    if as_json:
        print_json({"step": step, "attempts": attempts})
    else:
        print_lines(story_lines(step, attempts, reasons))
    return exit_status.OK


async def history(client: ApiClient, name: str, system: str, *, as_json: bool) -> int:
    """Show durations, memory, sizes and failures of a package's builds."""
    view = await client.history(name, system)
    if as_json:
        print_json(view)
    else:
        print_lines(history_lines(view))
    return exit_status.OK


def story_lines(
    step: StepView | None, attempts: Sequence[AttemptView], reasons: StepReasonsView | None = None
) -> list[str]:
    """Render a story: one sentence a line, each with its time, an attempt below the other; `reasons` where known."""
    made = {} if reasons is None else {run.attempt: f": {one_line(run.reason)}" for run in reasons.ran}
    first = attempts[0] if attempts else None
    name, system = (step.name, step.system) if step else (first.name, first.system) if first else ("", "")
    key = step.key if step else first.step if first else ""
    lines = [f"{one_line(name or key)}  {one_line(system)}".rstrip(), f"step {one_line(key)}"]
    if reasons is not None:
        lines += wanted_lines(reasons)
    if first is not None:
        beginnings = ((first.submitted_at, "submitted"), (first.ready_at, "ready: all that it needs is built"))
        lines += ["", *_sentences((at, sentence) for at, sentence in beginnings if at is not None)]
    for attempt in attempts:
        lines += ["", f"attempt {attempt.attempt}{made.get(attempt.attempt, '')}"]
        lines += _attempt_lines(attempt, again=attempt is not first)
    if step is not None and (last := _standing(step, attempts)):
        lines += ["", last]
    if step is not None and (note := _recipe(step)):
        lines += ["", note]
    return lines


def _standing(step: StepView, attempts: Sequence[AttemptView]) -> str:
    """Say how the step stands where no attempt's end says it."""
    if step.waiting_for:
        return f"it is {step.state.value}: {one_line(step.waiting_for)}"
    if not attempts and step.state is StepStatus.DONE:
        return "never built here: the cache had it"
    if step.state is StepStatus.DOOMED:
        return f"it cannot be built, because {one_line(step.cause)} failed"
    return "" if attempts else f"it is {step.state.value}"


def _recipe(step: StepView) -> str:
    """Say whether its recipe is flaky, or failed here alone."""
    return failure_sentence(step.record) if step.state is StepStatus.FAILED else flake_sentence(step.record)


def _attempt_lines(attempt: AttemptView, *, again: bool) -> list[str]:
    on = f"leased to {one_line(attempt.worker) or 'a worker'}"
    if attempt.isolation:
        on += f" (isolation {attempt.isolation})"
    moments: list[tuple[float | None, str]] = [(attempt.leased_at, on)]
    if again and attempt.ready_at is not None:
        moments.insert(0, (attempt.ready_at, "ready again"))
    for span in attempt.spans:
        moments += _span_sentences(attempt, span)
    moments.append((attempt.ended_at, _ending(attempt)))
    return _sentences(moments)


def _span_sentences(attempt: AttemptView, span: StretchView) -> list[tuple[float | None, str]]:
    took, end = _lasted(span.took_s), span.at + span.took_s
    match span.name:
        case "inputs":
            return [(span.at, sentence) for sentence in _fetch_sentences(attempt, span.took_s)]
        case "build":
            moments: list[tuple[float | None, str]] = [(span.at, "the build began")]
            moments += [(phase.at, f"  {one_line(phase.name)}  {_lasted(phase.took_s)}") for phase in attempt.phases]
            if attempt.more_phases:
                moments.append((None, f"  {attempt.more_phases} more phases  {_lasted(attempt.more_phases_s)}"))
            if attempt.outcome != "running":
                ended = f"it had built for {took} when the last was received of it" if attempt.cut else ""
                moments.append((end, ended or f"the builder ended after {took}{_use(attempt)}"))
            return moments
        case "pack":
            return [(span.at, f"outputs packed in {took}{_packed(attempt)}")]
        case name:
            return [(span.at, f"{_PAST.get(name, one_line(name))} in {took}")]


def _fetch_sentences(attempt: AttemptView, took_s: float) -> Iterator[str]:
    count = len(attempt.fetches) + attempt.more_fetches
    if not count:
        yield f"inputs checked in {_lasted(took_s)}; all were there"
        return
    total = attempt.more_fetches_bytes + sum(fetch.nar_bytes for fetch in attempt.fetches)
    sources = " and ".join(sorted({_SOURCES.get(fetch.source, one_line(fetch.source)) for fetch in attempt.fetches}))
    shared = sum(fetch.shared for fetch in attempt.fetches)
    also = f"; {shared} of them begun by another build" if shared else ""
    yield f"{_count(count, 'input')} fetched in {_lasted(took_s)}: {size(total)} from {sources}{also}"
    for fetch in attempt.fetches[:FETCHES_NAMED]:
        yield _fetch(fetch)
    if count > FETCHES_NAMED:
        yield f"  and {count - FETCHES_NAMED} smaller"


def _fetch(fetch: FetchView) -> str:
    return f"  {one_line(fetch.path)}  {size(fetch.nar_bytes)}  {_lasted(fetch.took_s)}"


def _use(attempt: AttemptView) -> str:
    uses = [
        f"{_lasted(attempt.cpu_s)} of processor time" if attempt.cpu_s is not None else "",
        f"{size(attempt.peak_memory_bytes)} of memory at most" if attempt.peak_memory_bytes is not None else "",
        f"{size(attempt.read_bytes)} read" if attempt.read_bytes is not None else "",
        f"{size(attempt.written_bytes)} written" if attempt.written_bytes is not None else "",
    ]
    known = ", ".join(each for each in uses if each)
    return f": {known}" if known else ""


def _packed(attempt: AttemptView) -> str:
    if attempt.output_bytes is None or attempt.uploaded_bytes is None:
        return ""
    return f": {size(attempt.output_bytes)}, sent as {size(attempt.uploaded_bytes)}"


def _ending(attempt: AttemptView) -> str:
    if attempt.outcome == "running":
        return "it still runs"
    ending = _ENDINGS.get(attempt.outcome, one_line(attempt.outcome))
    if attempt.outcome != "done" and attempt.message:
        ending += f" ({one_line(attempt.reason)}): {one_line(attempt.message)}"
    if attempt.ended_at is not None and attempt.leased_at is not None:
        ending += f"; {_lasted(attempt.ended_at - attempt.leased_at)} after the lease"
    return ending


def history_lines(view: HistoryView) -> list[str]:
    """Render a history: for each system a summary and the newest attempts."""
    lines: list[str] = []
    for each in view.systems:
        lines += ["", *_system_lines(view.name, each)] if lines else _system_lines(view.name, each)
    return lines


def _system_lines(name: str, of: SystemHistoryView) -> list[str]:
    usual = [
        f"usually {_lasted(of.usual_s)}" if of.usual_s is not None else "no usual duration yet",
        f"{size(of.usual_memory_bytes)} of memory" if of.usual_memory_bytes is not None else "",
        f"{size(of.usual_output_bytes)} of output" if of.usual_output_bytes is not None else "",
    ]
    rate = f", {of.flaky * 100 / of.recipes:.0f} %" if of.recipes else ""
    flaky = f"; {of.flaky} of {of.recipes} failed and later succeeded{rate}: flaky" if of.flaky else ""
    rows: list[tuple[str, ...]] = [("when", "took", "processor", "memory", "output", "worker", "outcome", "name")]
    rows += [_row(attempt) for attempt in of.recent]
    return [
        f"{one_line(name)} on {one_line(of.system) or 'a system that is not known'}: " + ", ".join(filter(None, usual)),
        f"{of.done} built, {of.failed} failed, {of.lost} lost or tried again{flaky}",
        *(f"  flaky: {one_line(each.name)}, {_rate(each.record)}: {one_line(each.step)}" for each in of.flaky_steps),
        *_worker_lines(of.workers),
        *(f"  {line}" for line in table_lines(rows)),
    ]


def _rate(record: RecipeRecordView) -> str:
    return f"failed {record.failed} of {record.attempts} times ({record.failed * 100 / record.attempts:.0f} %)"


def _worker_lines(workers: Sequence[WorkerTriesView]) -> list[str]:
    """Return a line about the workers on which attempts failed; with one worker there is nothing to compare."""
    if len(workers) < 2 or not any(each.failed for each in workers):
        return []
    return ["  failed on " + ", ".join(f"{one_line(each.worker)} {each.failed}/{each.attempts}" for each in workers)]


def _row(attempt: AttemptView) -> tuple[str, ...]:
    def known(value: int | None) -> str:
        return "-" if value is None else size(value)

    return (
        "-" if attempt.ended_at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(attempt.ended_at)),
        "-" if attempt.build_s is None else _lasted(attempt.build_s),
        "-" if attempt.cpu_s is None else _lasted(attempt.cpu_s),
        known(attempt.peak_memory_bytes),
        known(attempt.output_bytes),
        one_line(attempt.worker) or "-",
        attempt.outcome + (f" ({one_line(attempt.reason)})" if attempt.reason else ""),
        one_line(attempt.name),
    )


def _sentences(moments: Iterable[tuple[float | None, str]]) -> list[str]:
    """Put each sentence behind its time; a day's first one names the day."""
    lines, day = [], ""
    for at, sentence in moments:
        if at is None:
            lines.append(f"{'':19}  {sentence}")
            continue
        today, moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)).split()
        lines.append(f"{today if today != day else '':10} {moment}  {sentence}")
        day = today
    return lines


def _lasted(seconds: float) -> str:
    """Return a length of time, short ones exactly: `12ms`, `3.4s`, `1m02s`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    return f"{seconds:.1f}s" if seconds < 60 else duration(seconds)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
