"""Rendering of a submission for people: a live region on a terminal, plain lines elsewhere.

`Progress` folds watch events and says what is new; everything below it is a pure function from it to text. Build logs,
names and messages are somebody else's bytes: whatever of them is shown has passed `sanitise`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

from coordinator.api.models import (
    Counts,
    CountsChanged,
    Ended,
    RootFailureView,
    Snapshot,
    StepChanged,
    StepStatus,
    StepView,
    SubmissionState,
    SubmissionView,
    WatchEvent,
    WorkerView,
)
from coordinator.cli.terminal_controls import ControlFilter

if TYPE_CHECKING:
    from rich.text import Text

#: Lines of a failed step's log that are shown with the verdict, and the longest of them.
TAIL_LINES = 25
LINE_CHARS = 500
#: Rows of running steps in the live region, at most; a third of the window if that is less.
LIVE_ROWS = 16
#: Output paths, failed steps and sentences listed at the end; `--json` has all of them.
LISTED = 20

_LOG_IN_MESSAGE = re.compile(r"[;.]? *[Ll]ast \d+ log lines?:.*", re.DOTALL)


def sanitise(text: str, most: int | None = LINE_CHARS) -> str:
    """Return log text without terminal escapes and control characters, lines cut at `most` characters.

    Of a line that was overwritten (carriage returns) the last state is kept.
    """
    shown = ControlFilter(colours=False, carriage="\r")
    lines = []
    for line in (shown.feed(text) + shown.finish()).split("\n"):
        last = line.rstrip("\r").rpartition("\r")[2]
        lines.append(last.expandtabs()[:most])
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return a length of time as `3s`, `1m02s` or `2h05m`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def size(count: int) -> str:
    """Return a number of bytes as `512 B`, `1.5 KiB`, ..."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


class News(Enum):
    """Kinds of news that a follower may print as a line."""

    STARTED = "started"
    STARTED_AGAIN = "started again"
    BUILT = "built"
    FAILED = "failed"


@dataclass(slots=True)
class Progress:
    """The watched submission, folded from its events."""

    submission: SubmissionView | None = None
    counts: Counts = field(default_factory=Counts)
    uploaded_bytes: int = 0
    stuck: tuple[str, ...] = ()
    #: Steps in a worker's hands, by key.
    running: dict[str, StepView] = field(default_factory=dict)
    #: Steps whose failure has been told, in the order in which it was.
    failed: dict[str, StepView] = field(default_factory=dict)
    #: The latest attempt of each step that was announced. Their numbers go on from earlier lives of a step.
    _started: dict[str, int] = field(default_factory=dict)
    _built: set[str] = field(default_factory=set)

    def apply(self, event: WatchEvent) -> list[tuple[News, StepView]]:
        """Take an event in and return what is new, each thing once even where the stream begins again."""
        match event:
            case Snapshot():
                self._settle(event.submission)
                self.running = {}
                return [news for step in event.steps for news in self._step(step)]
            case StepChanged():
                return self._step(event.step)
            case CountsChanged():
                self.counts = event.counts
                self.uploaded_bytes = event.uploaded_bytes
                self.stuck = event.stuck
                return []
            case Ended():
                self._settle(event.submission)
                self.running = {}
                return []

    def _settle(self, submission: SubmissionView) -> None:
        self.submission = submission
        self.counts = submission.counts
        self.uploaded_bytes = submission.uploaded_bytes
        self.stuck = submission.stuck

    def _step(self, step: StepView) -> list[tuple[News, StepView]]:
        active = step.state in {StepStatus.RUNNING, StepStatus.PUBLISHING}
        if active:
            self.running[step.key] = step
        else:
            self.running.pop(step.key, None)
        announced = self._started.get(step.key)
        if active and (announced is None or step.attempt > announced):
            self._started[step.key] = step.attempt
            return [(News.STARTED if announced is None else News.STARTED_AGAIN, step)]
        if step.state is StepStatus.DONE and step.attempt and step.key not in self._built:
            self._built.add(step.key)
            return [(News.BUILT, step)]
        if step.state is StepStatus.FAILED and step.key not in self.failed:
            self.failed[step.key] = step
            return [(News.FAILED, step)]
        return []

    @property
    def ended(self) -> bool:
        """True if nothing more will come."""
        return self.submission is not None and self.submission.state is not SubmissionState.RUNNING


def who(step: StepView) -> str:
    """Return the worker, whether it only pretends to be the step's system, and whether its isolation is weak."""
    told = [f"emulated {sanitise(step.system)}"] if step.emulated else []
    told += ["isolation class C"] if step.isolation == "C" else []
    worker = sanitise(step.worker)
    return f"{worker} ({', '.join(told)})" if told else worker


def failure_lines(step: StepView) -> list[str]:
    """Return a failed step as one block: verdict, the last lines of its log, the command that shows the rest."""
    message = sanitise(step.failure.message).replace("\n", " ") if step.failure else "failed"
    if step.log_tail:
        # Nix ends its message with a copy of what stands below in full.
        message = _LOG_IN_MESSAGE.sub("", message)
    where = f" on {who(step)}" if step.worker else ""
    took = f" after {duration(step.ended_at - step.started_at)}" if step.started_at and step.ended_at else ""
    lines = [f"\u2718 {step.name} failed{where}{took}: {message}"]
    tail = sanitise(step.log_tail).rstrip("\n")
    if tail:
        lines += [f"  \u2502 {line}" for line in tail.split("\n")[-TAIL_LINES:]]
    lines.append(f"  the whole log: drover log {shlex.quote(step.key)}")
    return lines


def news_lines(news: News, step: StepView) -> list[str]:
    """Return what a plain (not a terminal) output says about a step."""
    match news:
        case News.STARTED:
            return [f"started {step.name} on {who(step)}"]
        case News.STARTED_AGAIN:
            return [f"started {step.name} again on {who(step)}"]
        case News.BUILT:
            took = f" in {duration(step.ended_at - step.started_at)}" if step.started_at and step.ended_at else ""
            return [f"built {step.name} on {who(step)}{took}"]
        case News.FAILED:
            return failure_lines(step)


def tally(counts: Counts) -> list[tuple[str, int, str]]:
    """Return (word, number, style) of what is worth showing; done counts what is held too."""
    running = counts.running + counts.publishing
    parts = [
        ("done", counts.done + counts.held, "green"),
        ("held", counts.held, "dim"),
        ("running", running, "yellow"),
        ("ready", counts.ready, "blue"),
        ("waiting", counts.waiting, "blue"),
        ("failed", counts.failed, "bold red"),
        ("doomed", counts.doomed, "red"),
        ("abandoned", counts.abandoned, "dim"),
    ]
    return [part for part in parts if part[1] or part[0] == "done"]


def heartbeat_line(progress: Progress, now: float) -> str:
    """Return one line that says that things go on, for an output where nothing else moves."""
    counts = progress.counts
    words = ", ".join(f"{number} {word}" for word, number, _ in tally(counts))
    rows = sorted(progress.running.values(), key=lambda step: step.started_at or now)
    running = ", ".join(
        f"{step.name} ({', '.join(filter(None, (duration(now - (step.started_at or now)), _doing(step))))})"
        for step in rows[:5]
    )
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"{words} of {counts.total}" + (f"; running: {running}{more}" if running else "")


def live_region(progress: Progress, now: float, width: int, height: int) -> Text:
    """Return the lines below the scrolling output: who does what, what is stuck, how far it is.

    The totals stand last, where the eye rests; running steps longest first; nothing is wider than the window.
    """
    from rich.text import Text  # noqa: PLC0415 - slow to import

    lines: list[Text] = []
    rows = sorted(progress.running.values(), key=lambda step: (step.started_at or now, step.key))
    room = max(1, min(LIVE_ROWS, height // 3))
    shown = rows[:room]
    name_width = min(max((cell_len(sanitise(step.name)) for step in shown), default=0), max(12, width // 3))
    who_width = min(max((cell_len(who(step)) for step in shown), default=0), max(8, width // 4))
    for step in shown:
        line = Text(no_wrap=True)
        line.append("\u23f5 ", "yellow")
        line.append(_cell(sanitise(step.name), name_width), "bold")
        line.append("  ")
        line.append(_cell(who(step), who_width), "magenta" if step.emulated else "cyan")
        line.append(f"  {duration(now - (step.started_at or now)):>6}  ")
        line.append(_doing(step), "dim")
        lines.append(line)
    if len(rows) > len(shown):
        lines.append(Text(f"  and {len(rows) - len(shown)} more running", "dim"))
    lines.extend(Text(f"! {sanitise(sentence)}", "yellow", no_wrap=True) for sentence in progress.stuck[:3])
    lines.append(_totals(progress, now, width))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Text("\n", no_wrap=True).join(lines)


def _totals(progress: Progress, now: float, width: int) -> Text:
    from rich.text import Text  # noqa: PLC0415 - slow to import

    counts = progress.counts
    finished = counts.done + counts.held + counts.failed + counts.doomed + counts.abandoned
    bar_width = max(6, min(30, width // 6))
    filled = bar_width * finished // counts.total if counts.total else 0
    line = Text(no_wrap=True)
    line.append("\u2501" * filled, "green" if not counts.failed else "red")
    line.append("\u2500" * (bar_width - filled), "dim")
    line.append(f" {finished}/{counts.total}")
    for word, number, style in tally(counts):
        line.append(" \u00b7 ", "dim")
        line.append(f"{number} {word}", style)
    if progress.submission is not None:
        line.append(" \u00b7 ", "dim")
        line.append(duration(now - progress.submission.created_at))
    return line


def _doing(step: StepView) -> str:
    stage = "publishing" if step.state is StepStatus.PUBLISHING else step.stage
    stage = sanitise(stage)
    if not step.phase:
        return stage
    # What a builder calls its phase, or what an upload waits for.
    return sanitise(step.phase) if stage in {"", "building"} else f"{stage}: {sanitise(step.phase)}"


def _cell(text: str, width: int) -> str:
    if cell_len(text) > width:
        return set_cell_size(text, width - 1) + "\u2026"
    return set_cell_size(text, width)


def summary_lines(submission: SubmissionView, failed: Sequence[StepView], now: float) -> list[str]:
    """Return the end of the story: verdict, what was built, shared and uploaded, where the results are."""
    counts = submission.counts
    took = duration((submission.ended_at or now) - submission.created_at)
    lines = [f"{submission.state.value}: submission {submission.id} after {took}"]
    built = [f"{counts.done} built"]
    if counts.held:
        built.append(f"{counts.held} already in the cache")
    if counts.joined:
        built.append(f"{counts.joined} shared with other submissions")
    for word, number in (("failed", counts.failed), ("doomed", counts.doomed), ("abandoned", counts.abandoned)):
        if number:
            built.append(f"{number} {word}")
    lines.append(f"  steps         {', '.join(built)}; {counts.total} in all")
    if submission.derivations > counts.total:
        same = submission.derivations - counts.total
        lines.append(f"  deduplicated  {same} of {submission.derivations} derivations make what another one makes")
    lines.append(f"  uploaded      {size(submission.uploaded_bytes)}")
    results = [
        f"{root.attr}{'' if name == 'out' else f'.{name}'}  {path}"
        for root in submission.roots
        if root.state is StepStatus.DONE
        for name, path in sorted(root.outputs.items())
    ]
    lines += _listed("  ", results, "more; `--json` lists all")
    lines += _unbuilt_lines(submission)
    known = [step for step in failed if step.ended_at and step.ended_at < submission.created_at]
    lines += _listed(
        "  known to fail  ",
        [
            f"{step.name}, since {duration(now - step.ended_at)}; build it again: drover retry {shlex.quote(step.key)}"
            for step in known
        ],
        "more steps that are known to fail",
    )
    named = {root.failure.step for root in submission.roots if root.failure is not None}
    lines += _listed(
        "  \u2718 ",
        [f"{sanitise(step.name)}: drover log {shlex.quote(step.key)}" for step in failed if step.key not in named],
        "more failed steps",
    )
    return lines


def _unbuilt_lines(submission: SubmissionView) -> list[str]:
    """Return a line for each root that did not succeed: the root cause and the way to its log."""
    unbuilt = []
    for root in submission.roots:
        if root.failure is not None:
            unbuilt.append(f"{sanitise(root.attr)}  {_because(root.failure, doomed=root.state is StepStatus.DOOMED)}")
        elif root.state is not StepStatus.DONE and submission.state is not SubmissionState.RUNNING:
            why = "the submission was cancelled" if submission.state is SubmissionState.CANCELLED else root.state.value
            unbuilt.append(f"{sanitise(root.attr)}  not built: {why}")
    return _listed("  \u2718 ", unbuilt, "more roots that are not built; `--json` lists all")


def _because(failure: RootFailureView, *, doomed: bool) -> str:
    message = _LOG_IN_MESSAGE.sub("", sanitise(failure.message).replace("\n", " ")) or failure.kind
    what = f"not built because {sanitise(failure.name)} failed" if doomed else "failed"
    return f"{what}: {message}; the log: drover log {shlex.quote(failure.step)}"


def _listed(prefix: str, items: Sequence[str], rest: str) -> list[str]:
    lines = [f"{prefix}{item}" for item in items[:LISTED]]
    if len(items) > LISTED:
        lines.append(f"{prefix}and {len(items) - LISTED} {rest}")
    return lines


def status_lines(submission: SubmissionView, steps: Sequence[StepView], now: float) -> list[str]:
    """Return one submission: counts, what runs, what failed, and why nothing happens where nothing does."""
    if submission.state is not SubmissionState.RUNNING:
        return summary_lines(submission, [step for step in steps if step.state is StepStatus.FAILED], now)
    label = f" ({sanitise(submission.label)})" if submission.label else ""
    words = ", ".join(f"{number} {word}" for word, number, _ in tally(submission.counts))
    lines = [
        f"running: submission {submission.id}{label} since {duration(now - submission.created_at)}",
        f"  {words} of {submission.counts.total}",
    ]
    active = [step for step in steps if step.state in {StepStatus.RUNNING, StepStatus.PUBLISHING}]
    rows = [
        f"{step.name} on {who(step)} {duration(now - (step.started_at or now))} {_doing(step)}".rstrip()
        for step in active
    ]
    lines += _listed("  ", rows, "more running")
    lines += _listed("  ! ", [sanitise(sentence) for sentence in submission.stuck], "more")
    lines += _unbuilt_lines(submission)
    for step in (step for step in steps if step.state is StepStatus.FAILED):
        lines += [f"  {line}" for line in failure_lines(step)]
    return lines


def submission_rows(submissions: Sequence[SubmissionView], now: float) -> list[tuple[str, ...]]:
    """Return a table of submissions, its head first."""
    rows: list[tuple[str, ...]] = [("SUBMISSION", "STATE", "AGE", "DONE", "FAILED", "WANTED")]
    for submission in submissions:
        counts = submission.counts
        attrs = ", ".join(root.attr for root in submission.roots[:3])
        count = max(submission.root_count, len(submission.roots))
        more = f" and {count - 3} more" if count > 3 else ""
        rows.append(
            (
                submission.id,
                submission.state.value,
                duration(now - submission.created_at),
                f"{counts.done + counts.held}/{counts.total}",
                str(counts.failed + counts.doomed),
                sanitise(submission.label) or f"{sanitise(attrs)}{more}",
            )
        )
    return rows


def worker_lines(workers: Sequence[WorkerView], now: float) -> list[str]:
    """Return a table of workers, and below it why those that get no work get none."""
    rows: list[tuple[str, ...]] = [("WORKER", "STATE", "SYSTEMS", "FEATURES", "CLASS", "BUSY", "BUILT", "SEEN", "NIX")]
    for worker in workers:
        systems = [
            f"{system} (emulated)" if system in worker.emulated else system
            for system in dict.fromkeys((*worker.systems, *worker.emulated))
        ]
        rows.append(
            (
                worker.name,
                worker.state,
                ", ".join(systems),
                ", ".join(worker.features) or "-",
                worker.isolation,
                f"{len(worker.leases)}/{worker.slots}",
                str(worker.built),
                f"{duration(now - worker.last_seen)} ago" if worker.last_seen else "-",
                worker.nix_version or "-",
            )
        )
    reasons = [
        f"{worker.name} is {worker.state}{_until(worker, now)}: {sanitise(worker.reason)}"
        for worker in workers
        if worker.reason
    ]
    reasons += [
        f"{worker.name} is of isolation class {worker.isolation}: {sanitise('; '.join(worker.isolation_reasons))}"
        for worker in workers
        if worker.isolation_reasons
    ]
    return [*table_lines(rows), *([""] if reasons else []), *reasons]


def step_lines(step: StepView, now: float) -> list[str]:
    """Return what is known of one step."""
    lines = [f"{step.state.value}: {step.name} ({step.system})", f"  step       {step.key}", f"  derivation {step.drv}"]
    lines += [f"  output     {name}  {path}" for name, path in sorted(step.outputs.items())]
    if step.worker:
        lines.append(f"  worker     {who(step)}, attempt {step.attempt}")
    if step.isolation:
        lines.append(f"  isolation  class {step.isolation}")
    if step.started_at:
        ended = step.ended_at if step.ended_at >= step.started_at else now
        lines.append(f"  time       {duration(ended - step.started_at)}")
    if step.waiting_for:
        lines.append(f"  waits      {sanitise(step.waiting_for)}")
    if step.state is StepStatus.FAILED:
        lines += [f"  {line}" for line in failure_lines(step)]
    return lines


def _until(worker: WorkerView, now: float) -> str:
    return f" for {duration(max(0.0, worker.until - now))}" if worker.until else ""


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as aligned columns, two spaces apart."""
    shown = [[sanitise(cell) for cell in row] for row in rows]
    widths = [max(cell_len(cell) for cell in column) for column in zip(*shown, strict=True)]
    return [
        "  ".join(set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    ]
