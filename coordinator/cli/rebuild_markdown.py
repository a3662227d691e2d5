"""A rebuild's report as Markdown: for a comment on a pull request, or the summary of a job. Pure functions.

What builds and evaluations say is written by strangers. All of it stands in `code` or `pre` elements, where neither
mentions nor references nor links are made, with every character that Markdown or HTML could take for its own written
as an entity. The whole has at most MAX_BYTES, which is what a comment holds: sections follow by weight, and where one
no longer fits, a sentence says what is left out.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Final

from coordinator.api.rebuild_models import ForecastView
from coordinator.cli.rebuild_text import (
    cause_phrase,
    counted,
    delta_phrase,
    difference_phrase,
    failure_phrase,
    forecast_lines,
    growth,
    tail_of,
    verdict_phrase,
)
from coordinator.cli.rendering import one_line
from coordinator.rebuild.model import AttrReport, RebuildReport, RebuildVerdict, RootCause, SetChange

#: A comment of GitHub has 65,536 characters.
MAX_BYTES: Final = 65_000
#: Bytes up to which root causes are added, so that something is left for the rest.
FAILURES_BYTES: Final = 40_000
#: Room for the sentence about what is left out.
_RESERVED: Final = 400
#: Rows of one list.
ROWS: Final = 100
ATTRS_NAMED: Final = 30
#: Bytes of the tail of one log.
TAIL_BYTES: Final = 4_000
_FOREIGN: Final = re.compile(r"[^A-Za-z0-9 ,+=/→…±()-]")
#: Invisible, and kept by no renderer: begins no word of its own.
_TITLE: Final = "## drover rebuild"


def markdown(report: RebuildReport) -> str:
    """Return the report, at most MAX_BYTES long in UTF-8."""
    page = _Page(_head(report))
    if report.is_built:
        _add_failures(page, report)
    _add_evaluation(page, report)
    _add_causes(page, report)
    if report.is_built:
        _add_content(page, report)
    _add_sets(page, report)
    _add_forecast(page, report)
    return page.text()


def code(text: str) -> str:
    """Return a stranger's text on one line as `code` in which nothing is obeyed."""
    shown = _FOREIGN.sub(lambda found: f"&#{ord(found[0])};", one_line(text))
    return f"<code>{shown}</code>" if shown.strip() else ""


def block(lines: Sequence[str]) -> str:
    """Return a stranger's lines as `pre`, the last TAIL_BYTES of them."""
    kept: list[str] = []
    size = 0
    for line in reversed(lines):
        escaped = html.escape(line, quote=True)
        size += len(escaped.encode()) + 1
        if size > TAIL_BYTES:
            kept.append("…")
            break
        kept.append(escaped)
    return "<pre>\n" + "\n".join(reversed(kept)) + "\n</pre>"


class _Page:
    """A document that does not grow beyond its bound."""

    def __init__(self, head: str) -> None:
        self._parts = [head]
        self._size = len(head.encode())
        self._left_out: list[str] = []

    def add(self, title: str, part: str, room: int = MAX_BYTES) -> bool:
        """Add a section where the document has room for all of it, or would have with `room`; returns whether."""
        size = len(part.encode()) + 2
        if self._size + size > min(room, MAX_BYTES) - _RESERVED:
            self._left_out.append(title)
            return False
        self._parts.append(part)
        self._size += size
        return True

    def text(self) -> str:
        """Return all of it."""
        parts = list(self._parts)
        if self._left_out:
            names = list(dict.fromkeys(self._left_out))
            parts.append(f"Left out, because a comment has no room for it: {', '.join(names)}. `--json` has all of it.")
        return "\n\n".join(parts) + "\n"


def _head(report: RebuildReport) -> str:
    lines = [_TITLE, "", f"{code(report.base.name)} → {code(report.head.name)}: {difference_phrase(report)}."]
    if report.is_built:
        mark = "❌" if report.fails_newly else "✅"
        lines += ["", f"{mark} **{verdict_phrase(report)}**"]
    if report.is_incomplete:
        lines += ["", "⚠️ The evaluation is incomplete: some attributes evaluate on one side only."]
    lines += [f"\n> {code(note)}" for note in report.notes[:10]]
    systems = list(report.systems.items())[:20]
    if systems:
        lines += ["", "| system | changed | added | removed |", "|---|---:|---:|---:|"]
        lines += [
            f"| {code(system)} | {its[SetChange.CHANGED]} | {its[SetChange.ADDED]} | {its[SetChange.REMOVED]} |"
            for system, its in systems
        ]
    return "\n".join(lines)


def _details(summary: str, body: str, *, is_open: bool = False) -> str:
    # Markdown begins again after a blank line.
    return f"<details{' open' if is_open else ''}>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"


def _list(items: Sequence[str]) -> str:
    shown = [f"- {item}" for item in items[:ROWS]]
    return "\n".join([*shown, *([f"- and {len(items) - ROWS} more"] if len(items) > ROWS else [])])


def _names(attrs: Sequence[str]) -> str:
    more = f" and {len(attrs) - ATTRS_NAMED} more" if len(attrs) > ATTRS_NAMED else ""
    return ", ".join(map(code, attrs[:ATTRS_NAMED])) + more


def _add_failures(page: _Page, report: RebuildReport) -> None:
    verdicts = {each.attr: each.verdict for each in report.attributes}
    for verdict, title in (
        (RebuildVerdict.NEWLY_FAILING, "Newly failing"),
        (RebuildVerdict.FAILING, "Failing, and the base's result is not known"),
        (RebuildVerdict.STILL_FAILING, "Still failing"),
    ):
        its = [(cause, [attr for attr in cause.attrs if verdicts.get(attr) is verdict]) for cause in report.failures]
        its = [(cause, attrs) for cause, attrs in its if attrs]
        if its:
            count = sum(len(attrs) for _, attrs in its)
            page.add(title, f"### {title}: {counted(count, 'attribute')}, {counted(len(its), 'root cause')}")
        for cause, attrs in its:
            if not page.add(f"root causes of what is {verdict.value}", _failure(cause, attrs, verdict), FAILURES_BYTES):
                break
    not_built = report.of_verdict(RebuildVerdict.NOT_BUILT)
    if not_built:
        page.add("what was not built", f"### Not built\n\n{_names([each.attr for each in not_built])}")


def _failure(cause: RootCause, attrs: Sequence[str], verdict: RebuildVerdict) -> str:
    tail = tail_of(cause)
    body = _names(attrs) + (f"\n\n{block(tail)}" if tail else "")
    summary = f"{code(failure_phrase(cause))} fails {counted(len(attrs), 'attribute')}"
    return _details(summary, body, is_open=verdict is RebuildVerdict.NEWLY_FAILING)


def _add_evaluation(page: _Page, report: RebuildReport) -> None:
    for change in (SetChange.NO_LONGER_EVALUATES, SetChange.EVALUATES_AGAIN, SetChange.NEVER_EVALUATES):
        its = report.of_change(change)
        if its:
            rows = _list([f"{code(each.attr)} {code(each.error)}".rstrip() for each in its])
            summary = f"{change.value.capitalize()}: {counted(len(its), 'attribute')}"
            page.add(f"what {change.value}", _details(summary, rows, is_open=change is SetChange.NO_LONGER_EVALUATES))


def _add_causes(page: _Page, report: RebuildReport) -> None:
    causes = [cause for cause in report.causes.causes if cause.reach]
    if causes:
        rows = _list([f"{counted(cause.reach, 'attribute')}: {code(cause_phrase(cause))}" for cause in causes])
        page.add("why they changed", _details(f"Why they changed: {counted(report.causes.cause_count, 'cause')}", rows))


def _add_content(page: _Page, report: RebuildReport) -> None:
    for title, its in (("Fixed", report.of_verdict(RebuildVerdict.FIXED)), ("No-op rebuilds", report.no_ops)):
        if its:
            body = _names([each.attr for each in its])
            page.add(title.lower(), _details(f"{title}: {counted(len(its), 'attribute')}", body))
    changed = sorted(report.really_changed, key=growth, reverse=True)
    if changed:
        rows = ["| attribute | output | closure |", "|---|---:|---:|", *map(_size_row, changed[:ROWS])]
        more = f"\n\nand {len(changed) - ROWS} more" if len(changed) > ROWS else ""
        summary = f"Outputs really changed: {counted(len(changed), 'attribute')}"
        page.add("outputs that really changed", _details(summary, "\n".join(rows) + more))


def _size_row(report: AttrReport) -> str:
    return f"| {code(report.attr)} | {delta_phrase(report.nar)} | {delta_phrase(report.closure)} |"


def _add_sets(page: _Page, report: RebuildReport) -> None:
    for change in (SetChange.ADDED, SetChange.REMOVED):
        its = report.of_change(change)
        if its:
            summary = f"{change.value.capitalize()}: {counted(len(its), 'attribute')}"
            page.add(f"what was {change.value}", _details(summary, _names([each.attr for each in its])))


def _add_forecast(page: _Page, report: RebuildReport) -> None:
    def lines(view: ForecastView | None, what: str) -> list[str]:
        return [] if view is None else forecast_lines(view, what)

    rows = [*lines(report.forecast, "to build"), *lines(report.base_forecast, "of the base to build")]
    if rows:
        page.add("its size", _details("Size as it was foreseen", block(rows), is_open=not report.is_built))
