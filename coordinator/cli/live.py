"""Rendering of the live region below what scrolls: a pure function of progress, time and the size of the window.

From top to bottom: the forest of what runs and what waits for it, the workers, what no worker can take, what failed,
when all is built, the totals, on which the eye rests. No line is wider than the window, and the region leaves most of
the window to what scrolls. What is not known has no place, such as a time that steps usually take.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

from rich.cells import cell_len

from coordinator.api.models import StepStatus, StepView
from coordinator.cli import forest
from coordinator.cli.lines import Line, Piece, cell, cut, joined, plain, width_of
from coordinator.cli.printing import size
from coordinator.cli.progress import Progress, Tally
from coordinator.cli.rendering import doing, duration, eta_sentence, of_size, one_line, tally, who
from infra.records import record

#: Rows of the forest and of workers, as parts of the window's height, and at most.
FOREST_PART: Final = (2, 5)
WORKERS_PART: Final = 6
FOREST_ROWS: Final = 40
WORKER_ROWS: Final = 16
#: Windows that are lower have no table of workers.
LOWEST_FOR_WORKERS: Final = 14
#: Windows that are narrower do not name the worker of each step.
NARROW: Final = 60
#: Sentences about steps that no worker can take or has taken yet, and failed steps that are named.
STUCK_ROWS: Final = 3
FAILED_NAMED: Final = 5
#: Seconds below which it is not worth saying how long a step will still take.
SHORTEST_REST_S: Final = 5.0
#: Cells that one step of depth takes in the forest.
_INDENT: Final = 3
#: Stage -> sign and colour. A step that the worker has not begun is only queued there.
SIGNS: Final[dict[str, Piece]] = {
    "queued": ("\u00b7 ", "dim"),
    "fetching": ("\u2193 ", "cyan"),
    "building": ("\u23f5 ", "yellow"),
    "uploading": ("\u2191 ", "cyan"),
    "publishing": ("\u2191 ", "cyan"),
}
#: Heads of the table of workers where there is no room for words.
_SHORT_HEADS: Final = ("worker", "\u23f5", "\u2193", "\u2191", "\u2714", "\u2718")


@record(frozen=True, slots=True)
class Window:
    """The size of a terminal in cells."""

    width: int
    height: int


def live_lines(progress: Progress, now: float, window: Window) -> list[Line]:
    """Return the region, at most as wide and almost as high as the window."""
    running = progress.longest_first(now)
    lines = _forest_lines(progress, running, now, window)
    if window.height >= LOWEST_FOR_WORKERS:
        lines += _worker_lines(progress, running, min(WORKER_ROWS, window.height // WORKERS_PART), window.width)
    room = STUCK_ROWS if window.height >= LOWEST_FOR_WORKERS else 1
    lines += [[(f"! {one_line(sentence)}", "yellow")] for sentence in progress.stuck[:room]]
    lines += [[(one_line(sentence), "dim")] for sentence in progress.queued[: room - len(progress.stuck[:room])]]
    lines += _failed_lines(progress)
    lines += _eta_lines(progress, now)
    lines.append(_totals(progress, now, window.width))
    lines = lines[-max(1, window.height - 1) :]
    return [cut(line, window.width) for line in lines]


def stage_of(step: StepView) -> str:
    """Return the word for what is done with a step that runs."""
    return "publishing" if step.state is StepStatus.PUBLISHING else step.stage or "queued"


def _forest_lines(progress: Progress, running: Sequence[StepView], now: float, window: Window) -> list[Line]:
    room = max(1, min(FOREST_ROWS, window.height * FOREST_PART[0] // FOREST_PART[1]))
    above = {key: node.above for key, node in progress.tree.items()}
    places, hidden = forest.draw([step.key for step in running], above, room, window.width // 2 // _INDENT)
    drawn = [(place, progress.running.get(place.key)) for place in places]
    names = [cell_len(f"{place.branches}  {_name(progress, place.key)}") for place, _ in drawn]
    most = window.width * 2 // 5 if window.width >= NARROW else window.width - 20
    name_width = min(max(names, default=0), max(14, most))
    workers = [cell_len(who(step)) for _, step in drawn if step is not None]
    who_width = min(max(workers, default=0), max(8, window.width // 4)) if window.width >= NARROW else 0
    usual_width = max((cell_len(_usual(step)) for _, step in drawn if step is not None), default=0)
    lines: list[Line] = []
    if hidden:
        stages = Counter(stage_of(step) for step in running)
        counted = ", ".join(f"{stages[stage]} {stage}" for stage in SIGNS if stages[stage])
        more = "more run" if len(running) > hidden else "run"
        lines.append([(f"  and {hidden} {more}; in all {counted}", "dim")])
    for place, step in drawn:
        if step is None:
            node = progress.tree[place.key]
            lines.append(
                [
                    (place.branches, "dim"),
                    ("\u23f8 ", "blue"),
                    (one_line(node.name), "blue"),
                    (f"  waits for {node.pending}" if node.pending else "", "dim"),
                ]
            )
        else:
            lines.append(_running_line(place.branches, step, now, (name_width, who_width, usual_width)))
    return lines


def _name(progress: Progress, key: str) -> str:
    step = progress.running.get(key)
    return one_line(step.name if step is not None else progress.tree[key].name)


def _usual(step: StepView) -> str:
    return f"(\u2205 {duration(step.usual_s)})  " if step.usual_s is not None else ""


def _running_line(branches: str, step: StepView, now: float, widths: tuple[int, int, int]) -> Line:
    name_width, who_width, usual_width = widths
    stage = stage_of(step)
    sign, colour = SIGNS.get(stage, SIGNS["queued"])
    room = max(1, name_width - cell_len(branches) - 2)
    return [
        (branches, "dim"),
        (sign, colour),
        (cell(one_line(step.name), room), "bold"),
        (cell(f"  {who(step)}", who_width + 2) if who_width else "", "magenta" if step.emulated else "cyan"),
        (f"  {duration(now - (step.started_at or now)):>6}  ", ""),
        (cell(_usual(step), usual_width), "dim"),
        (doing(step), "dim"),
    ]


def _worker_lines(progress: Progress, running: Sequence[StepView], room: int, width: int) -> list[Line]:
    """Return the table of workers; with one worker there is nothing in it that the totals do not say."""
    if len(progress.workers) < 2:
        return []
    hands = {name: Counter(stage_of(step) for step in running if step.worker == name) for name in progress.workers}
    # Always the same ones: what is busiest changes with every frame.
    names = sorted(hands, key=_natural)
    if len(names) > room:
        del names[room - 1 :]
    built = "built" if progress.all_seen else "built since"
    cells = [_worker_cells(name, hands[name], progress.workers[name]) for name in names]
    heads = ("worker", "building", "fetching", "uploading", built, "failed")
    rows, widths = _with_heads(heads, cells)
    if sum(widths) + 2 * len(widths) > width:
        rows, widths = _with_heads(_SHORT_HEADS, cells)
    lines: list[Line] = []
    for row in rows:
        parts: list[Line] = [[(cell(plain(row[0]), widths[0]), row[0][0][1])]]
        parts += [[(plain(each).rjust(most), each[0][1])] for each, most in zip(row[1:], widths[1:], strict=True)]
        lines.append([("  ", ""), *joined(parts, ("  ", ""))])
    if len(hands) > len(names):
        others = sum(counted.total() for name, counted in hands.items() if name not in names)
        lines.append([(f"  and {len(hands) - len(names)} more workers with {others} steps", "dim")])
    return lines


def _with_heads(heads: Sequence[str], cells: Sequence[tuple[Line, ...]]) -> tuple[list[tuple[Line, ...]], list[int]]:
    """Return the rows of a table, and the cells that each of its columns takes."""
    rows: list[tuple[Line, ...]] = [tuple([(word, "dim")] for word in heads), *cells]
    return rows, [max(width_of(each) for each in column) for column in zip(*rows, strict=True)]


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts names by the numbers in them."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split("([0-9]{1,9})", name)]


def _worker_cells(name: str, hands: Counter[str], done: Tally) -> tuple[Line, ...]:
    def number(count: int, style: str) -> Line:
        return [(str(count) if count else "\u00b7", style if count else "dim")]

    return (
        [(one_line(name), "cyan")],
        number(hands["building"], "yellow"),
        number(hands["queued"] + hands["fetching"], "cyan"),
        number(hands["uploading"] + hands["publishing"], "cyan"),
        number(done.built, "green"),
        number(done.failed, "bold red"),
    )


def _failed_lines(progress: Progress) -> list[Line]:
    """Return what failed by itself; what stands on that is only counted."""
    if not progress.failed:
        return []
    names = [one_line(step.name) for step in progress.failed.values()]
    named = ", ".join(names[:FAILED_NAMED])
    count = max(progress.counts.failed, len(names))
    more = f" and {count - FAILED_NAMED} more" if count > FAILED_NAMED else ""
    doomed = f"; {progress.counts.doomed} cannot be built without" if progress.counts.doomed else ""
    return [[(f"\u2718 {named}{more} failed{doomed}", "red")]]


def _eta_lines(progress: Progress, now: float) -> list[Line]:
    """Return when all is built and what bounds that; nothing before the coordinator has said it."""
    if progress.eta is None:
        return []
    end, bound = eta_sentence(progress.eta, now).split(": ", 1)
    return [[(end, "bold"), (f": {bound}", "dim")]]


def _totals(progress: Progress, now: float, width: int) -> Line:
    """Return the last line; what matters least is left out first where it does not fit."""
    counts = progress.counts
    finished = counts.done + counts.held + counts.failed + counts.doomed + counts.abandoned
    bar_width = max(6, min(30, width // 6))
    filled = bar_width * finished // counts.total if counts.total else 0
    bar: Line = [
        ("\u2501" * filled, "red" if counts.failed else "green"),
        ("\u2500" * (bar_width - filled), "dim"),
        (f" {finished}/{counts.total}", ""),
    ]
    last = _last_one(progress, now) if progress.eta is None else ""
    parts: dict[str, Line] = {word: [(f"{number} {word}", style)] for word, number, style in tally(counts)}
    if progress.uploaded_bytes:
        parts["uploaded"] = [(f"\u2191 {size(progress.uploaded_bytes)}", "")]
    fetched = _fetched(progress)
    if fetched:
        parts["fetched"] = [(f"\u2193 {fetched}", "")]
    if progress.submission is not None and progress.submission.open:
        parts["evaluating"] = [(progress.evaluating or "evaluating", "cyan")]
    if progress.submission is not None:
        parts["age"] = [(duration(now - progress.submission.created_at), "")]
    if last:
        parts["last"] = [(last, "")]
    for word in ("fetched", "uploaded", "cached", "abandoned", "waiting", "ready", "done", "last", "doomed", "age"):
        if width_of(_total(bar, parts)) <= width:
            break
        parts.pop(word, None)
    return _total(bar, parts)


def _fetched(progress: Progress) -> str:
    """Return how far the inputs are that workers fetch now, "" where none do."""
    now = [step.transfer for step in progress.running.values() if step.transfer and step.transfer.direction == "fetch"]
    known = [each for each in now if each.size_bytes is not None]
    if not known:
        return ""
    return of_size(sum(each.done_bytes for each in known), sum(each.size_bytes or 0 for each in known))


def _last_one(progress: Progress, now: float) -> str:
    """Return how long what runs still takes, if it takes as long as usual; "" where that is not known.

    It stands there until the coordinator has said when all is built: it bounds that from below.
    """
    rests = [
        (step.usual_s - (now - step.started_at), one_line(step.name))
        for step in progress.running.values()
        if step.usual_s is not None and step.started_at
    ]
    rest, name = max(rests, default=(0.0, ""))
    return f"at least {duration(rest)} more ({name})" if rest >= SHORTEST_REST_S else ""


def _total(bar: Line, parts: dict[str, Line]) -> Line:
    return joined([bar, *parts.values()], (" \u00b7 ", "dim"))
