"""A rebuild's report as JUnit XML: a test case for each attribute of the head, a suite for each system. Pure.

A failure is what fails newly, or fails where the base's result is not known; what fails on both sides is skipped, so
that a pipeline shows what the change did. An attribute that evaluates on one side only is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from coordinator.cli.rebuild_text import failure_phrase, tail_of
from coordinator.cli.rendering import one_line
from coordinator.rebuild.model import AttrReport, OutputChange, RebuildReport, RebuildVerdict, RootCause, SetChange

#: Characters of an error that a case has.
MESSAGE_CHARS: Final = 2_000
#: Characters that XML 1.0 cannot hold.
_NO_XML: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_FAILURES: Final = frozenset({RebuildVerdict.NEWLY_FAILING, RebuildVerdict.FAILING})
_ERRORS: Final = frozenset({SetChange.NO_LONGER_EVALUATES, SetChange.NEVER_EVALUATES})


def junit(report: RebuildReport) -> str:
    """Return the report as an XML document."""
    causes = {cause.step: cause for cause in report.failures}
    suites: dict[str, list[AttrReport]] = {}
    for each in report.attributes:
        if each.change is not SetChange.REMOVED:
            suites.setdefault(each.system or "not evaluated", []).append(each)
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<testsuites name="drover rebuild"{_totals(report.attributes)}>',
    ]
    for system, its in sorted(suites.items()):
        lines.append(f"  <testsuite name={_quoted(system)}{_totals(its)}>")
        for each in its:
            lines += _case(each, causes)
        lines.append("  </testsuite>")
    return "\n".join([*lines, "</testsuites>"]) + "\n"


def _totals(reports: list[AttrReport] | tuple[AttrReport, ...]) -> str:
    its = [each for each in reports if each.change is not SetChange.REMOVED]
    failures = sum(each.verdict in _FAILURES for each in its)
    errors = sum(each.change in _ERRORS for each in its)
    skipped = sum(bool(_skipped(each)) for each in its)
    return f' tests="{len(its)}" failures="{failures}" errors="{errors}" skipped="{skipped}"'


def _skipped(report: AttrReport) -> str:
    if report.change in _ERRORS:
        return ""
    if report.verdict is RebuildVerdict.STILL_FAILING:
        return "fails at the base too"
    return "not built" if report.verdict in {RebuildVerdict.NOT_BUILT, RebuildVerdict.NOTHING} else ""


def _case(report: AttrReport, causes: Mapping[str, RootCause]) -> list[str]:
    head = f"    <testcase classname={_quoted(report.system or 'not evaluated')} name={_quoted(report.attr)}"
    body: list[str] = []
    cause = causes.get(report.root_cause)
    if report.change in _ERRORS:
        body.append(f"      <error message={_quoted(report.error or report.change.value)}/>")
    elif report.verdict in _FAILURES:
        phrase = report.verdict.value if cause is None else failure_phrase(cause)
        text = "" if cause is None else "\n".join(tail_of(cause))
        body.append(
            f"      <failure type={_quoted(report.verdict.value)} message={_quoted(phrase)}>{_text(text)}</failure>"
        )
    elif skipped := _skipped(report):
        body.append(f"      <skipped message={_quoted(skipped)}/>")
    elif report.content is OutputChange.NO_OP:
        body.append("      <system-out>a no-op rebuild: equal but for store-path hashes</system-out>")
    return [f"{head}>", *body, "    </testcase>"] if body else [f"{head}/>"]


def _quoted(text: str) -> str:
    return quoteattr(_NO_XML.sub("�", one_line(text)[:MESSAGE_CHARS]))


def _text(text: str) -> str:
    return escape(_NO_XML.sub("�", text))
