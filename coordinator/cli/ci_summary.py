"""Summary of a submission for a page of a forge: Markdown of bounded size.

Names, messages and logs are written by strangers; all that Markdown or HTML could read in them is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from coordinator.api.models import RootView, StepView, SubmissionState, SubmissionView
from coordinator.cli.rendering import TAIL_LINES, duration, one_line, sanitise
from coordinator.client.errors import ClientError
from coordinator.evaluation.model import Evaluation

#: Failures, roots below each, and attributes that are named; a forge takes a megabyte.
MAX_FAILURES: Final = 50
MAX_NAMED: Final = 20
_SENTENCE_CHARS: Final = 1000
_ENTITIES: Final = {ord(each): f"&#{ord(each)};" for each in "<>&\"'`*_[]()~|@#\\:!"}
_TITLES: Final = {
    SubmissionState.SUCCEEDED: "everything is built",
    SubmissionState.FAILED: "not everything is built",
    SubmissionState.CANCELLED: "the submission was cancelled",
}


def summary_of(view: SubmissionView, failed: Sequence[StepView], evaluation: Evaluation, now: float) -> str:
    """Return the summary of a submission that has ended."""
    counts = view.counts
    took = duration((view.ended_at or now) - view.created_at)
    title = _TITLES.get(view.state, view.state.value)
    lines = [
        f"### drover: {title}",
        "",
        "| built | from the cache | failed | cannot run | attributes not evaluated | took |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| {counts.done} | {counts.held} | {counts.failed} | {counts.doomed} | {len(evaluation.failed)} | {took} |",
        "",
    ]
    below = _roots_by_cause(view.roots)
    for step in failed[:MAX_FAILURES]:
        lines += _failure(step, below.get(step.key, []))
    if len(failed) > MAX_FAILURES:
        lines += [f"and {len(failed) - MAX_FAILURES} more failures", ""]
    for each in evaluation.failed[:MAX_FAILURES]:
        where = f" (at {_code(each.position)})" if each.position else ""
        lines += [f"- {_code(each.attr or 'the file')} cannot be evaluated: {_code(each.error)}{where}"]
    if len(evaluation.failed) > MAX_FAILURES:
        lines += [f"- and {len(evaluation.failed) - MAX_FAILURES} more"]
    return "\n".join([*lines, f"Submission {_code(view.id)}", ""])


def append_summary(path: Path, text: str) -> None:
    """Write a summary behind what other steps have written there.

    Raises:
        ClientError: The file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as error:
        raise ClientError(f"the summary {path} cannot be written: {error.strerror}") from None


def _roots_by_cause(roots: Sequence[RootView]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for root in roots:
        if root.failure is not None:
            found.setdefault(root.failure.step, []).append(root.attr)
    return found


def _failure(step: StepView, attrs: Sequence[str]) -> list[str]:
    message = step.failure.message.partition("\n")[0].rstrip(";") if step.failure else "failed"
    named = ", ".join(map(_code, attrs[:MAX_NAMED]))
    more = f" and {len(attrs) - MAX_NAMED} more" if len(attrs) > MAX_NAMED else ""
    lines = [f"- {_code(step.name)} ({_code(step.system)}): {_code(message)}"]
    if named:
        lines.append(f"  <br>attributes that need it: {named}{more}")
    tail = sanitise(step.log_tail).rstrip("\n").split("\n")[-TAIL_LINES:]
    if any(tail):
        # An empty line would end the block.
        log = "\n".join(_escaped(line) or "&#8203;" for line in tail)
        lines += [f"  <details><summary>the end of its log</summary><pre>{log}</pre></details>"]
    return [*lines, f"  <br>{_code(f'drover log {step.key}')}", ""]


def _code(text: str) -> str:
    """Return text that is shown as it stands, as code."""
    return f"<code>{_escaped(one_line(text)[:_SENTENCE_CHARS])}</code>"


def _escaped(text: str) -> str:
    """Return text into which neither HTML nor Markdown reads anything."""
    return text.translate(_ENTITIES)
