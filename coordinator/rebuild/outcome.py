"""Results of a rebuild: what was built on both sides, by attribute and by root cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from coordinator.api.rebuild_models import ComparedOutputView
from coordinator.rebuild.difference import AttrPair
from coordinator.rebuild.model import AttrReport, OutputChange, RebuildVerdict, RootCause, Sizes


class SideState(StrEnum):
    """Result of one side's derivation."""

    BUILT = "built"
    FAILED = "failed"
    #: Not asked for, cancelled, or forgotten.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class SideResult:
    """Result of a derivation; `cause` is the step whose own failure is the root cause."""

    state: SideState
    cause: str = ""


UNKNOWN = SideResult(SideState.UNKNOWN)


def judge(pair: AttrPair, base: SideResult, head: SideResult) -> AttrReport:
    """Return what a report says of an attribute of which both sides have a result, or may have."""
    report = pair.report()
    if pair.after is None:
        return report
    if head.state is SideState.UNKNOWN:
        return replace(report, verdict=RebuildVerdict.NOT_BUILT)
    if head.state is SideState.BUILT:
        return replace(report, verdict=RebuildVerdict.FIXED if base.state is SideState.FAILED else RebuildVerdict.BUILT)
    verdict = RebuildVerdict.NEWLY_FAILING
    if pair.before is not None and base.state is not SideState.BUILT:
        verdict = RebuildVerdict.STILL_FAILING if base.state is SideState.FAILED else RebuildVerdict.FAILING
    return replace(report, verdict=verdict, root_cause=head.cause)


def with_content(report: AttrReport, outputs: Sequence[ComparedOutputView]) -> AttrReport:
    """Add how its outputs differ; `outputs` are all that both sides have."""
    if not outputs:
        return report
    names = {each.likeness for each in outputs}
    content = OutputChange.UNKNOWN
    if "different" in names:
        content = OutputChange.DIFFERENT
    elif names <= {"same", "no-op"}:
        content = OutputChange.NO_OP
    return replace(
        report,
        content=content,
        nar=Sizes(_sum([each.nar_before for each in outputs]), _sum([each.nar_after for each in outputs])),
        closure=Sizes(
            _most([each.closure_before for each in outputs]), _most([each.closure_after for each in outputs])
        ),
    )


def _sum(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _most(sizes: Sequence[int | None]) -> int | None:
    """Return the largest closure: those of the outputs of one package have most in common."""
    known = [size for size in sizes if size is not None]
    return max(known) if len(known) == len(sizes) else None


def by_root_cause(reports: Sequence[AttrReport], causes: Mapping[str, RootCause]) -> tuple[RootCause, ...]:
    """Return the root causes of failures, those with most attributes that fail newly first.

    `causes` has what is known of each step.
    """
    attrs: dict[str, list[AttrReport]] = {}
    for report in reports:
        if report.root_cause:
            attrs.setdefault(report.root_cause, []).append(report)
    new = {
        step: sum(each.verdict in {RebuildVerdict.NEWLY_FAILING, RebuildVerdict.FAILING} for each in its)
        for step, its in attrs.items()
    }
    order = sorted(attrs, key=lambda step: (-new[step], -len(attrs[step]), step))
    known = {step: causes.get(step) or RootCause(step, step, "", "", "", ()) for step in order}
    return tuple(replace(known[step], attrs=tuple(each.attr for each in attrs[step])) for step in order)
