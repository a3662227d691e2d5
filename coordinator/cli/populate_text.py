"""The report of `drover populate` as lines, as Markdown and as one JSON object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from coordinator.cli import exit_status
from coordinator.cli.proof import ProofMeans
from coordinator.cli.rebuild_markdown import code
from coordinator.cli.rendering import LISTED, duration, one_line
from coordinator.populate.model import PopulatedWish, PopulateOutcome, ProofState
from infra.records import record

#: Wishes of one table in Markdown.
MAX_ROWS: Final = 300
_BY: Final = {
    ProofMeans.NIX: "a plain Nix client that trusts the farm's key alone fetched each closure into an empty store",
    ProofMeans.OWN: "signatures and NAR hashes of each closure were verified by drover itself, without Nix",
    ProofMeans.NONE: "nothing was proven, as it was asked",
}


@record(frozen=True, slots=True)
class PopulateReport:
    """Result of one run."""

    place: str
    systems: tuple[str, ...]
    wishes: tuple[PopulatedWish, ...]
    #: Wishes of the new list that the old one has too.
    unchanged: int = 0
    notes: tuple[str, ...] = ()
    submissions: tuple[str, ...] = ()
    proof: ProofMeans = ProofMeans.NONE
    proof_s: float = 0.0
    seconds: float = 0.0

    @property
    def status(self) -> int:
        """The exit status of the command."""
        outcomes = {each.outcome for each in self.wishes if not each.is_good}
        if PopulateOutcome.FAILED in outcomes:
            return exit_status.BUILD_FAILED
        if PopulateOutcome.DRIFT in outcomes:
            return exit_status.DRIFTED
        if outcomes == {PopulateOutcome.UNEVALUATED}:
            return exit_status.EVALUATION_FAILED
        return exit_status.NOT_WHOLE if outcomes else exit_status.OK

    def counts(self, system: str) -> Counter[PopulateOutcome]:
        """Return how many wishes of a system came out how."""
        return Counter(each.outcome for each in self.wishes if each.system == system)

    def document(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {
            "place": self.place,
            "status": self.status,
            "systems": {
                system: {outcome.value: count for outcome, count in self.counts(system).items()}
                for system in self.systems
            },
            "unchanged": self.unchanged,
            "proof": {"means": self.proof.value, "by": _BY.get(self.proof, ""), "seconds": round(self.proof_s, 3)},
            "submissions": self.submissions,
            "wishes": self.wishes,
            "notes": self.notes,
            "seconds": round(self.seconds, 3),
        }


def populate_lines(report: PopulateReport) -> list[str]:
    """Return the report for a terminal or a log."""
    lines = [f"{one_line(system)}: {_counted(report, system)}" for system in report.systems]
    if report.unchanged:
        lines.append(f"{report.unchanged} more are as the old list has them")
    bad = [each for each in report.wishes if not each.is_good]
    for each in bad[:LISTED]:
        lines += _bad_lines(each)
    if len(bad) > LISTED:
        lines.append(f"and {len(bad) - LISTED} more; --json and --markdown list all")
    lines += [f"! {one_line(note)}" for note in report.notes[:LISTED]]
    proven = sum(each.proof.state is ProofState.PROVEN for each in report.wishes)
    recorded = sum(each.proof.state is ProofState.UPSTREAM for each in report.wishes)
    if report.proof is not ProofMeans.NONE:
        lines.append(f"proven: {proven} of {len(report.wishes)} in {duration(report.proof_s)}: {_BY[report.proof]}")
    if recorded:
        lines.append(f"recorded: {recorded} lie with an upstream, whose signature was verified")
    return lines


def _counted(report: PopulateReport, system: str) -> str:
    counts = report.counts(system)
    return (
        ", ".join(f"{counts[outcome]} {outcome.value}" for outcome in PopulateOutcome if counts[outcome]) or "nothing"
    )


def _bad_lines(wish: PopulatedWish) -> list[str]:
    head = f"  {one_line(wish.name)} ({one_line(wish.system)}): "
    if wish.drift is not None:
        drift = wish.drift
        return [
            f"{head}drift of {one_line(drift.output)}",
            f"      listed {one_line(drift.listed)}",
            f"      made   {one_line(drift.made)}",
            f"      {one_line(drift.difference)}",
        ]
    reason = wish.proof.reason if wish.outcome.is_had else wish.reason
    word = "not proven" if wish.outcome.is_had else wish.outcome.value
    lines = [head + ": ".join(filter(None, (word, one_line(reason))))]
    if wish.step and not wish.outcome.is_had:
        lines.append(f"      drover log {one_line(wish.step)}")
    return lines


def populate_markdown(report: PopulateReport) -> str:
    """Return the report as Markdown, in which no text of a stranger is obeyed."""
    lines = [f"## drover populate {code(report.place)}", "", "| system | outcome |", "| --- | --- |"]
    lines += [f"| {code(system)} | {_counted(report, system)} |" for system in report.systems]
    bad = [each for each in report.wishes if not each.is_good]
    if bad:
        lines += ["", "| package | system | outcome | why |", "| --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(_cells(each))} |" for each in bad[:MAX_ROWS]]
        if len(bad) > MAX_ROWS:
            lines += ["", f"and {len(bad) - MAX_ROWS} more"]
    proven = sum(each.proof.state is ProofState.PROVEN for each in report.wishes)
    lines += ["", f"{proven} of {len(report.wishes)} proven: {_BY.get(report.proof, '')}."]
    return "\n".join(lines) + "\n"


def _cells(wish: PopulatedWish) -> Sequence[str]:
    outcome = "not proven" if wish.outcome.is_had else wish.outcome.value
    why = wish.proof.reason if wish.outcome.is_had else wish.reason
    cell = code(why)
    if wish.drift is not None:
        drift = wish.drift
        cell = f"listed {code(drift.listed)}, made {code(drift.made)}: {code(drift.difference)}"
    return code(wish.name), code(wish.system), outcome, cell
