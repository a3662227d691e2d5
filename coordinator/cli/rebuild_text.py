"""A rebuild's report as lines of text, and the phrases that all of its renderings share. Pure functions."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Final

from coordinator.api.difference_models import ChangeView
from coordinator.api.rebuild_models import ForecastView, RebuildCauseView
from coordinator.cli.printing import size
from coordinator.cli.rendering import TAIL_LINES, duration, one_line, sanitise
from coordinator.rebuild.model import AttrReport, RebuildReport, RebuildVerdict, RootCause, SetChange, Sizes

#: Attributes that one line names, and lines of one list; `--json` has all of them.
NAMED: Final = 8
LISTED: Final = 20
CAUSES_LISTED: Final = 15
#: Characters of each side of a change.
VALUE_CHARS: Final = 60
#: Characters of the tail of a log that are looked at.
TAIL_CHARS: Final = 8_192


def report_lines(report: RebuildReport) -> list[str]:
    """Return the report for people at a terminal."""
    return difference_lines(report) + (result_lines(report) if report.is_built else [])


def difference_lines(report: RebuildReport) -> list[str]:
    """Return what differs, why, and how large it is to build."""
    lines = ["", f"{one_line(report.base.name)} → {one_line(report.head.name)}: {difference_phrase(report)}"]
    lines += [f"  {system}: {_counts(its)}" for system, its in report.systems.items()]
    lines += [f"! {one_line(note)}" for note in report.notes]
    lines += _cause_lines(report)
    lines += _evaluation_lines(report)
    if report.forecast is not None:
        lines += ["", *forecast_lines(report.forecast, "to build")]
        if report.base_forecast is not None:
            lines += forecast_lines(report.base_forecast, "of the base to build")
    return lines


def difference_phrase(report: RebuildReport) -> str:
    """Return how many attributes differ."""
    parts = [
        f"{len(report.of_change(change))} {change.value}"
        for change in SetChange
        if change in {SetChange.CHANGED, SetChange.ADDED, SetChange.REMOVED} or report.of_change(change)
    ]
    left_out = f" ({report.left_out} that differ are left out)" if report.left_out else ""
    if not report.attributes and not report.left_out:
        return f"no difference in {counted(report.unchanged, 'attribute')}; nothing is to be built"
    return f"{', '.join(parts)}, {report.unchanged} unchanged{left_out}"


def verdict_phrase(report: RebuildReport) -> str:
    """Return the results in one clause."""
    counts = [(len(report.of_verdict(verdict)), verdict.value) for verdict in RebuildVerdict if verdict.value]
    shown = [f"{count} {word}" for count, word in counts if count or word in {"newly failing", "fixed"}]
    return ", ".join([*shown, f"{counted(len(report.no_ops), 'no-op rebuild')}"])


def cause_phrase(cause: RebuildCauseView) -> str:
    """Return what changed, in one line."""
    names = ", ".join(map(one_line, cause.names[:3]))
    # One name may be that of several derivations, as of two systems.
    more = f" and others ({counted(cause.count, 'derivation')})" if len(cause.names) > 3 else ""
    if cause.uncompared:
        return f"{names}{more}: not compared ({cause.uncompared})"
    changes = "; ".join(change_phrase(change) for change in cause.changes[:2])
    rest = f"; {counted(cause.change_count - 2, 'more change')}" if cause.change_count > 2 else ""
    return f"{names}{more}: {changes}{rest}"


def change_phrase(change: ChangeView) -> str:
    """Return one change of a derivation."""
    what = " ".join(filter(None, (change.field, one_line(change.name))))
    before, after = (_value(side) for side in (change.before, change.after))
    if before is None:
        return f"{what} {after} is new"
    if after is None:
        return f"{what} {before} is gone"
    return f"{what} {before} → {after}"


def _value(text: str | None) -> str | None:
    if text is None:
        return None
    shown = one_line(text)
    return f'"{shown[:VALUE_CHARS]}{"…" if len(shown) > VALUE_CHARS else ""}"'


def forecast_lines(view: ForecastView, what: str) -> list[str]:
    """Return the size of a submission."""
    known = (
        f"{view.failed} known to fail, {view.running} wanted by others already" if view.failed or view.running else ""
    )
    steps = f"{counted(view.steps, 'step')} {what}" + (f" ({known})" if known else "")
    lines = [f"{steps}; {counted(view.cached, 'step')} below them in the cache"]
    if not view.steps:
        return lines
    lines.append(f"  inputs from the cache: {counted(view.inputs, 'output')}, {size(view.input_bytes)}")
    hours = f"{_hours(view.build_s)} of builds" if view.unknown < view.steps else "builds of unknown length"
    unknown = f"; {counted(view.unknown, 'step')} without history" if 0 < view.unknown < view.steps else ""
    processors = f", {_hours(view.cpu_s)} of processors" if view.cpu_unknown < view.steps else ", processors unknown"
    lines.append(f"  work: {hours}{processors}{unknown}")
    lines += [
        f"  {one_line(each.system)}: {counted(each.steps, 'step')}, "
        f"{counted(each.slots, 'slot')}{'' if each.slots else ' (nothing builds it now)'}"
        for each in view.systems
    ]
    return [*lines, f"  time: {_end(view)}"]


def _end(view: ForecastView) -> str:
    match view.bound:
        case "no_worker":
            return f"unknown: no worker builds {one_line(view.bound_system)} now"
        case "unknown":
            return "unknown: no step has a history"
        case _:
            later = "" if view.later_s is None else f" to {duration(view.later_s)}"
            return f"{duration(view.sooner_s)}{later}, if the farm does nothing else"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else duration(seconds)


def counted(count: int, word: str) -> str:
    """Return a number with its noun."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def named(attrs: Sequence[str], most: int = NAMED) -> str:
    """Return the first of some names, with how many more there are."""
    more = f" and {len(attrs) - most} more" if len(attrs) > most else ""
    return ", ".join(map(one_line, attrs[:most])) + more


def delta_phrase(sizes: Sizes) -> str:
    """Return a size and its growth; "" where either is not known."""
    if sizes.after is None or sizes.delta is None:
        return ""
    sign = "+" if sizes.delta > 0 else "-" if sizes.delta < 0 else "±"
    return f"{size(sizes.after)} ({sign}{size(abs(sizes.delta))})"


def failure_phrase(cause: RootCause) -> str:
    """Return why a root cause failed."""
    where = f" ({one_line(cause.system)})" if cause.system else ""
    return f"{one_line(cause.name)}{where}: {one_line(cause.message) or 'failed'}"


def tail_of(cause: RootCause) -> list[str]:
    """Return the last lines of its log."""
    tail = cause.log_tail[-TAIL_CHARS:]
    return sanitise(tail).rstrip("\n").split("\n")[-TAIL_LINES:] if tail.strip() else []


def _counts(its: dict[SetChange, int]) -> str:
    return ", ".join(f"{count} {change.value}" for change, count in its.items())


def _cause_lines(report: RebuildReport) -> list[str]:
    causes = report.causes.causes
    if not causes:
        return []
    lines = ["", "why they changed:"]
    lines += [
        f"  {counted(cause.reach, 'attribute')}  {cause_phrase(cause)}"
        for cause in causes[:CAUSES_LISTED]
        if cause.reach
    ]
    beyond = report.causes.cause_count - min(len(causes), CAUSES_LISTED)
    lines += [f"  and {counted(beyond, 'more cause')}"] if beyond > 0 else []
    unfollowed = report.causes.unfollowed
    return lines + ([f"  {counted(unfollowed, 'pair')} of derivations not compared"] if unfollowed else [])


def _evaluation_lines(report: RebuildReport) -> list[str]:
    lines: list[str] = []
    for change in (SetChange.NO_LONGER_EVALUATES, SetChange.EVALUATES_AGAIN, SetChange.NEVER_EVALUATES):
        its = report.of_change(change)
        lines += ["", f"{change.value}:"] if its else []
        lines += _list(f"{one_line(each.attr)}: {one_line(each.error)}" if each.error else each.attr for each in its)
    for change in (SetChange.ADDED, SetChange.REMOVED):
        its = report.of_change(change)
        lines += ["", f"{change.value}: {named([each.attr for each in its], LISTED)}"] if its else []
    return lines


def _list(items: Iterable[str]) -> list[str]:
    rows = [f"  {one_line(item)}" for item in items]
    return rows[:LISTED] + ([f"  and {len(rows) - LISTED} more"] if len(rows) > LISTED else [])


def result_lines(report: RebuildReport) -> list[str]:
    """Return what was built, and what became of it."""
    lines = ["", verdict_phrase(report)]
    verdicts = {each.attr: each.verdict for each in report.attributes}
    for cause in report.failures[:LISTED]:
        words = dict.fromkeys(verdicts[attr].value for attr in cause.attrs)
        lines += ["", f"✘ {'/'.join(words)}: {named(cause.attrs)}", f"  because of {failure_phrase(cause)}"]
        lines += [f"  │ {line}" for line in tail_of(cause)]
        lines.append(f"  more: drover {'log' if cause.has_log else 'why'} {shlex.quote(cause.step)}")
    if len(report.failures) > LISTED:
        lines += ["", f"and {counted(len(report.failures) - LISTED, 'more root cause')}"]
    for title, its in (("fixed", report.of_verdict(RebuildVerdict.FIXED)), ("no-op rebuilds", report.no_ops)):
        lines += ["", f"{title}: {named([each.attr for each in its], LISTED)}"] if its else []
    changed = sorted(report.really_changed, key=growth, reverse=True)
    lines += ["", f"outputs really changed: {len(changed)}"] if changed else []
    return lines + _list(size_phrase(each) for each in changed)


def growth(report: AttrReport) -> tuple[int, str]:
    """Return by how much an attribute changed in size, for sorting."""
    return abs(report.nar.delta or 0) + abs(report.closure.delta or 0), report.attr


def size_phrase(report: AttrReport) -> str:
    """Return an attribute with its sizes."""
    closure = delta_phrase(report.closure)
    return f"{one_line(report.attr)}  {delta_phrase(report.nar)}" + (f", closure {closure}" if closure else "")
