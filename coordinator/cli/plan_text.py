"""A plan as lines and as Markdown: a table of packages by systems, sums for each system, reasons. Pure functions."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Final

from coordinator.api.plan_models import PlanState, PlanView, SystemPlan, WishPlan
from coordinator.cli.lines import Line, cell
from coordinator.cli.printing import size
from coordinator.cli.rebuild_markdown import code
from coordinator.cli.rendering import LISTED, duration, one_line
from infra.records import record

#: State -> word of a cell, and its style.
WORDS: Final[dict[PlanState, tuple[str, str]]] = {
    "here": ("here", "green"),
    "upstream": ("upstream", "cyan"),
    "building": ("building", "yellow"),
    "buildable": ("build", "blue"),
    "failed": ("fails", "bold red"),
    "no_worker": ("no worker", "red"),
    "unfree": ("unfree", "magenta"),
    "insecure": ("insecure", "magenta"),
    "broken": ("broken", "magenta"),
    "unsupported": ("unsupported", "magenta"),
    "gone": ("gone", "red"),
    "unevaluated": ("unevaluated", "red"),
    "unknown": ("unknown", "dim"),
}
#: A package that has no wish for a system.
ABSENT: Final = ("no package", "dim")
PRESENT: Final = ("installed", "green")
_FETCHED: Final = frozenset({"here", "upstream"})
#: Cells of the column of names, at least; of a cell without a system's name above it.
MIN_NAME: Final = 12
MIN_CELL: Final = 12
#: Rows of the table; `--json` has all.
MAX_ROWS: Final = 200
_MIB: Final = 1024 * 1024


@record(frozen=True, slots=True)
class PlanText:
    """A plan on its way to a reader."""

    view: PlanView
    #: System of the reader's machine.
    system: str
    #: Renders a moment.
    when: Callable[[float], str]
    #: Also packages that can be fetched on every system.
    every: bool = False
    #: MiB that the reader's machine fetches in a second; 0.0 where that is not known.
    rate_mib: float = 0.0

    def rows(self) -> tuple[list[tuple[str, dict[str, WishPlan]]], int]:
        """Return the packages that the table has, each with its wishes by system, and how many it leaves out."""
        by_name: dict[str, dict[str, WishPlan]] = {}
        for wish in self.view.wishes:
            by_name.setdefault(wish.name, {})[wish.system] = wish
        rows = [
            (name, wishes)
            for name, wishes in by_name.items()
            if self.every or not all(self._is_had(wishes.get(each.system)) for each in self.view.systems)
        ]
        return rows, len(by_name) - len(rows)

    @staticmethod
    def _is_had(wish: WishPlan | None) -> bool:
        return wish is not None and (wish.present or wish.state in _FETCHED)


def word_of(wish: WishPlan | None) -> tuple[str, str]:
    """Return the word of a cell and its style."""
    if wish is None:
        return ABSENT
    if wish.present:
        return PRESENT
    word, style = WORDS[wish.state]
    return (f"{word} {hours(wish.build_s, wish.unknown)}" if wish.state == "buildable" else word), style


def hours(build_s: float, unknown: int) -> str:
    """Return seconds of builds, with a sign where more of unknown time belongs to them."""
    if not build_s:
        return "?" if unknown else "0s"
    return duration(build_s) + "+" * bool(unknown)


def plan_lines(text: PlanText, width: int) -> list[Line]:
    """Return the whole plan for a terminal of `width` cells."""
    lines = [*_table(text, width), [("", "")]]
    for each in text.view.systems:
        lines += _system(each, text.rate_mib, is_own=each.system == text.system)
    lines += [[(sentence, "")] for sentence in sentences(text)]
    return lines


def _table(text: PlanText, width: int) -> list[Line]:
    rows, left_out = text.rows()
    systems = [each.system for each in text.view.systems]
    widths = [max(MIN_CELL, len(system)) for system in systems]
    longest = max((len(one_line(name)) for name, _ in rows), default=MIN_NAME)
    room = max(MIN_NAME, min(longest, width - sum(widths) - 2 * len(widths)))
    lines: list[Line] = []
    if rows:
        head = [cell("PACKAGE", room), *(cell(system, size_) for system, size_ in zip(systems, widths, strict=True))]
        lines.append([("  ".join(head).rstrip(), "bold")])
    for name, wishes in rows[:MAX_ROWS]:
        line: Line = [(cell(one_line(name), room), "")]
        for system, size_ in zip(systems, widths, strict=True):
            word, style = word_of(wishes.get(system))
            line += [("  ", ""), (cell(word, size_), style)]
        lines.append(line)
    if len(rows) > MAX_ROWS:
        lines.append([(f"and {len(rows) - MAX_ROWS} more; --json has all", "dim")])
    if left_out:
        more = " more" if rows else ""
        lines.append([(f"{left_out}{more} can be fetched on every system", "green")])
    return lines


def _system(plan: SystemPlan, rate_mib: float, *, is_own: bool) -> list[Line]:
    whose = " (this machine)" if is_own else ""
    lines: list[Line] = [[(f"{plan.system}{whose}: ", "bold"), (counts_phrase(plan), "")]]
    lines.append([(f"  Nix would fetch {fetch_phrase(plan, rate_mib)}", "")])
    lines += [[(f"  and build {build_phrase(plan)}", "")]] if plan.steps else []
    return lines


def counts_phrase(plan: SystemPlan) -> str:
    """Return how many packages are in which state."""
    order = list(WORDS)
    counts = sorted(plan.counts.items(), key=lambda each: order.index(each[0]))
    words = [f"{count} {WORDS[state][0]}" for state, count in counts]
    if plan.present:
        words.insert(0, f"{plan.present} installed")
    return ", ".join(words) or "nothing"


def fetch_phrase(plan: SystemPlan, rate_mib: float) -> str:
    """Return how much Nix would fetch from where, and for how long at a rate; 0.0 where none is known."""
    total = plan.here_paths + plan.upstream_paths
    if not total:
        return "nothing"
    parts = []
    if plan.here_paths:
        parts.append(f"{plan.here_paths} paths from the farm ({size(plan.here_bytes)})")
    if plan.upstream_paths:
        parts.append(f"{plan.upstream_paths} from upstream ({size(plan.upstream_bytes)})")
    takes = ""
    if rate_mib:
        fetch_s = (plan.here_bytes + plan.upstream_bytes) / rate_mib / _MIB
        takes = f", in about {duration(max(1.0, fetch_s))} at {rate_mib:g} MiB/s"
    return f"{' and '.join(parts)}, {size(plan.unpacked_bytes)} unpacked{takes}"


def build_phrase(plan: SystemPlan) -> str:
    """Return how much Nix would build, and for how long by the farm's history."""
    known = plan.steps - plan.unknown
    words = f"{plan.steps} derivation{'s' * (plan.steps != 1)} here"
    if known:
        words += f", for about {duration(plan.build_s)} as the farm's workers took"
    if plan.unknown:
        words += f"{' and' if known else ', for'} an unknown time{f' for {plan.unknown} of them' if known else ''}"
    if plan.ungraphed:
        words += f"; {plan.ungraphed} of them with what they stand on, which the farm does not have"
    return words


def sentences(text: PlanText) -> list[str]:
    """Return what the table cannot say: failures, reasons, upstreams, notes."""
    view = text.view
    failed = [wish for wish in view.wishes if wish.state == "failed" and not wish.present]
    found = []
    for wish in failed[:LISTED]:
        cause = f" because of {one_line(wish.cause_name)}" if wish.cause != wish.step else ""
        since = f" since {text.when(wish.since)}" if wish.since else ""
        why = f"drover why {shlex.quote(one_line(wish.cause))}"
        found.append(f"{one_line(wish.name)} fails on {wish.system}{cause}{since}: {why}")
    found += [f"and {len(failed) - LISTED} more fail"] if len(failed) > LISTED else []
    found += _reasons(view.wishes)
    for each in view.upstreams:
        if each.state != "answered":
            how = "did not answer in time" if each.state == "slow" else "does not answer"
            found.append(f"{one_line(each.url)} {how}: it counts as having nothing")
    if not text.rate_mib and any(each.here_paths or each.upstream_paths for each in view.systems):
        found.append("how long fetching takes is unknown; --rate says how fast this machine fetches")
    if view.unfollowed:
        found.append(f"{view.unfollowed} paths were not looked up in time; the same plan finds more in a moment")
    found += [one_line(note) for note in view.notes[:LISTED]]
    return found + ([f"and {len(view.notes) - LISTED} more notes"] if len(view.notes) > LISTED else [])


def _reasons(wishes: Sequence[WishPlan]) -> list[str]:
    """Return sentences of wishes, each once with how many have it."""
    named: dict[str, list[str]] = {}
    for wish in wishes:
        if wish.because and not wish.present:
            named.setdefault(wish.because, []).append(wish.name)
    found = []
    for sentence, names in list(named.items())[:LISTED]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        found.append(f"{one_line(names[0])}{more}: {one_line(sentence)}")
    return found


def plan_markdown(text: PlanText) -> str:
    """Return the plan as Markdown."""
    rows, left_out = text.rows()
    systems = [each.system for each in text.view.systems]
    lines = ["## drover plan", ""]
    for plan in text.view.systems:
        build = f", build {build_phrase(plan)}" if plan.steps else ""
        lines.append(
            f"- **{plan.system}**: {counts_phrase(plan)}; Nix would fetch {fetch_phrase(plan, text.rate_mib)}{build}"
        )
    if rows:
        lines += ["", f"| package | {' | '.join(systems)} |", f"|---|{'---|' * len(systems)}"]
    for name, wishes in rows[:MAX_ROWS]:
        cells = " | ".join(word_of(wishes.get(system))[0] for system in systems)
        lines.append(f"| {code(name)} | {cells} |")
    more = [f"{len(rows) - MAX_ROWS} more are in `--json`."] if len(rows) > MAX_ROWS else []
    more += [f"{left_out} packages can be fetched on every system."] if left_out else []
    lines += ["", *more] if more else []
    found = sentences(text)
    lines += ["", *(f"- {code(sentence)}" for sentence in found)] if found else []
    return "\n".join(lines) + "\n"
