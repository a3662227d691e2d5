"""Rendering of submissions, steps and workers as lines of text: pure functions of what the coordinator says.

Build logs, names and messages are somebody else's bytes: whatever of them is shown has passed `sanitise`.
`coordinator.cli.live` renders the live region of a terminal.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from rich.cells import cell_len, set_cell_size

from coordinator.api.flakes import failure_sentence, flake_sentence
from coordinator.api.models import (
    Counts,
    EtaView,
    RootFailureView,
    RootView,
    StepStatus,
    StepView,
    SubmissionState,
    SubmissionView,
    TransferView,
)
from coordinator.api.origin import origin_words
from coordinator.cli.printing import size
from coordinator.cli.progress import News, Progress
from coordinator.terminal_controls import ControlFilter

#: Lines of a failed step's log that are shown with the verdict, and the longest of them.
TAIL_LINES = 25
LINE_CHARS = 500
#: Sentences about what waits that a heartbeat has.
WAITS_NAMED = 3
#: Steps that one line about what was built names.
BUILT_NAMED = 4
#: Output paths, failed steps and sentences listed at the end; `--json` has all of them.
LISTED = 20
#: Why roots are not built of a submission that ended before them.
_WITHDRAWN = {
    SubmissionState.CANCELLED: "the submission was cancelled",
    SubmissionState.SUPERSEDED: "the submission was superseded",
    SubmissionState.EXPIRED: "the submission's deadline passed",
}
#: Two ends that are closer than this part of the later one are said as one.
ETA_ONE = 0.1

#: How Nix names the derivation again that the line is about.
_BUILDER_FOR = re.compile(r"^(?:the builder failed: )?builder for '[^']*' failed (?:with|due to) ")
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


def one_line(text: str) -> str:
    """Return text as `sanitise` does, in one line."""
    return sanitise(text).replace("\n", " ")


def duration(seconds: float) -> str:
    """Return a length of time as `3s`, `1m02s` or `2h05m`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def who(step: StepView) -> str:
    """Return the worker, whether it only pretends to be the step's system, and whether its isolation is weak."""
    remarks = [f"emulated {one_line(step.system)}"] if step.emulated else []
    remarks += ["isolation class C"] if step.isolation == "C" else []
    worker = one_line(step.worker)
    return f"{worker} ({', '.join(remarks)})" if remarks else worker


def failure_lines(step: StepView) -> list[str]:
    """Return a failed step as one block: verdict, the last lines of its log, the command that shows the rest."""
    message = _BUILDER_FOR.sub("", one_line(step.failure.message)) if step.failure else "failed"
    if step.log_tail:
        # Nix ends its message with a copy of what stands below in full.
        message = _LOG_IN_MESSAGE.sub("", message)
    where = f" on {who(step)}" if step.worker else ""
    took = f" after {duration(step.ended_at - step.started_at)}" if step.started_at and step.ended_at else ""
    phase = f" in {one_line(step.failed_in)}" if step.failed_in else ""
    lines = [f"\u2718 {one_line(step.name)} failed{where}{took}{phase}: {message}"]
    tail = sanitise(step.log_tail).rstrip("\n")
    if tail:
        lines += [f"  \u2502 {line}" for line in tail.split("\n")[-TAIL_LINES:]]
    lines += [f"  {note}" for note in [failure_sentence(step.record)] if note]
    lines.append(f"  {'the whole log' if step.attempt else 'more'}: {_read_on(step.key, has_log=step.attempt > 0)}")
    return lines


def _read_on(key: str, *, has_log: bool) -> str:
    """Return the command that says more of a failed step: one that never ran has no log."""
    return f"drover {'log' if has_log else 'why'} {shlex.quote(key)}"


def news_lines(news: News, step: StepView) -> list[str]:
    """Return what a plain (not a terminal) output says about a step."""
    match news:
        case News.STARTED:
            return [f"started {one_line(step.name)} on {who(step)}"]
        case News.STARTED_AGAIN:
            return [f"started {one_line(step.name)} again on {who(step)}"]
        case News.BUILT:
            took = f" in {duration(step.ended_at - step.started_at)}" if step.started_at and step.ended_at else ""
            return [f"built {one_line(step.name)} on {who(step)}{took}"]
        case News.FAILED:
            return failure_lines(step)


def built_line(steps: Sequence[StepView], width: int) -> str:
    """Return one line about steps that were built in the same moment: as many as fit, what took longest first."""

    def took(step: StepView) -> float:
        return step.ended_at - step.started_at if step.started_at and step.ended_at else 0.0

    longest = sorted(steps, key=lambda step: (-took(step), step.key))
    named = [f"{one_line(step.name)} on {who(step)} in {duration(took(step))}" for step in longest[:BUILT_NAMED]]
    while True:
        more = [f"{len(steps) - len(named)} more"] if len(steps) > len(named) else []
        line = "\u2714 " + ", ".join(named + more)
        if len(named) <= 1 or cell_len(line) <= width:
            return line
        named.pop()


def tally(counts: Counts) -> list[tuple[str, int, str]]:
    """Return (word, number, style) of what is worth showing; done counts cached steps too."""
    running = counts.running + counts.publishing
    parts = [
        ("done", counts.done + counts.held, "green"),
        ("cached", counts.held, "dim"),
        ("running", running, "yellow"),
        ("ready", counts.ready, "blue"),
        ("waiting", counts.waiting, "blue"),
        ("failed", counts.failed, "bold red"),
        ("doomed", counts.doomed, "red"),
        ("abandoned", counts.abandoned, "dim"),
    ]
    return [part for part in parts if part[1] or part[0] == "done"]


def heartbeat_line(progress: Progress, now: float) -> str:
    """Return one line that says what runs and what the rest waits for, for an output where nothing else moves."""
    counts = progress.counts
    words = ", ".join(f"{number} {word}" for word, number, _ in tally(counts))
    rows = progress.longest_first(now)
    running = ", ".join(
        f"{one_line(step.name)} ({', '.join(filter(None, (duration(now - (step.started_at or now)), doing(step))))})"
        for step in rows[:5]
    )
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    waits = [*progress.stuck, *progress.queued][:WAITS_NAMED]
    why = "; ".join(map(one_line, waits))
    parts = [f"{words} of {counts.total}"]
    if progress.submission is not None and progress.submission.open:
        parts.append(progress.evaluating or "evaluating")
    if running:
        parts.append(f"running: {running}{more}")
    if why:
        parts.append(why)
    if progress.eta is not None:
        # What bounds the end may have been said already.
        said = progress.eta.bound == "no_worker" and any(progress.eta.because in each for each in waits)
        parts.append(eta_when(progress.eta, now) if said else eta_sentence(progress.eta, now))
    return "; ".join(parts)


def eta_when(found: EtaView, now: float) -> str:
    """Return when it ends: `ends in 12m00s to 18m00s`, or that this is not known."""
    if not found.later_at:
        if found.bound == "no_worker":
            return "no end in sight"
        return "end unknown"
    later_s, sooner_s = found.later_at - now, max(0.0, found.sooner_at - now)
    if later_s <= 0:
        return "ends later than foreseen"
    if later_s - sooner_s <= ETA_ONE * later_s or duration(sooner_s) == duration(later_s):
        return f"ends in about {duration(later_s)}"
    return (
        f"ends in {duration(sooner_s)} to {duration(later_s)}" if sooner_s >= 1 else f"ends within {duration(later_s)}"
    )


def eta_sentence(found: EtaView, now: float) -> str:
    """Return when it ends, what bounds that, and what is not known of it."""
    remarks = []
    if found.unknown and found.bound != "unknown":
        remarks.append(f"{found.unknown} of {counted(found.steps, 'step')} left without history")
    if found.overdue:
        remarks.append(f"{found.overdue} running longer than usual")
    if found.bound == "unknown":
        because = f"none of {counted(found.steps, 'step')} left has a history, bounded by {one_line(found.because)}"
    else:
        because = one_line(found.because) if found.bound == "no_worker" else f"bounded by {one_line(found.because)}"
    return f"{eta_when(found, now)}: {because}" + (f" ({', '.join(remarks)})" if remarks else "")


def counted(count: int, word: str) -> str:
    """Return `1 step`, `2 steps`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def doing(step: StepView) -> str:
    """Return where a step is: its stage, or the phase that its builder announced."""
    stage = "publishing" if step.state is StepStatus.PUBLISHING else step.stage
    stage = one_line(stage)
    if step.transfer is not None and stage in {"fetching", "uploading"}:
        waits = f", {one_line(step.phase)}" if step.phase else ""
        return f"{stage} {moved(step.transfer)}{waits}"
    if not step.phase:
        return stage
    # What a builder calls its phase, or what an upload waits for.
    return one_line(step.phase) if stage in {"", "building"} else f"{stage}: {one_line(step.phase)}"


def moved(transfer: TransferView) -> str:
    """Return how far a transfer is, and the name of what moves."""
    return f"{of_size(transfer.done_bytes, transfer.size_bytes)}, {_name_of(transfer.path)}"


def of_size(done_bytes: int, size_bytes: int | None) -> str:
    """Return bytes that moved, of how many where that is known."""
    return size(done_bytes) if size_bytes is None else f"{size(done_bytes)} of {size(size_bytes)}"


def _name_of(path: str) -> str:
    """Return the name in a store path, without the hash before it."""
    base = path.rpartition("/")[2]
    return one_line(base[33:] if base[32:33] == "-" else base)


def summary_lines(submission: SubmissionView, failed: Sequence[StepView], now: float) -> list[str]:
    """Return the end of the story: verdict, what was built, shared and uploaded, where the results are."""
    counts = submission.counts
    took = duration((submission.ended_at or now) - submission.created_at)
    by = f" by {one_line(submission.superseded_by)}" if submission.superseded_by else ""
    lines = [f"{submission.state.value}{by}: submission {submission.id} after {took}", *origin_lines(submission)]
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
    lines += growth_lines(submission)
    results = [
        f"{root.attr}{'' if name == 'out' else f'.{name}'}  {path}"
        for root in submission.roots
        if root.state is StepStatus.DONE
        for name, path in sorted(root.outputs.items())
    ]
    lines += _listed("  ", results, "more; `--json` lists all")
    lines += _unbuilt_lines(submission, failed)
    known = [step for step in failed if step.ended_at and step.ended_at < submission.created_at]
    lines += _listed(
        "  known to fail  ",
        [
            f"{one_line(step.name)}, since {duration(now - step.ended_at)}; "
            f"build it again: drover retry {shlex.quote(step.key)}"
            for step in known
        ],
        "more steps that are known to fail",
    )
    named = {root.failure.step for root in submission.roots if root.failure is not None}
    lines += _listed(
        "  \u2718 ",
        [
            f"{one_line(step.name)}: {f'{note}; ' if (note := failure_sentence(step.record)) else ''}"
            f"drover log {shlex.quote(step.key)}"
            for step in failed
            if step.key not in named
        ],
        "more failed steps",
    )
    return lines


def origin_lines(submission: SubmissionView) -> list[str]:
    """Return whose a submission is and whence it comes, as far as that is known."""
    words = [f"{one_line(word)} {one_line(value)}" for word, value in origin_words(submission)]
    return [f"  from          {', '.join(words)}"] if words else []


def _unbuilt_lines(submission: SubmissionView, failed: Sequence[StepView] = ()) -> list[str]:
    """Return a line for each root that did not succeed: the root cause and the way to its log."""
    notes = {step.key: failure_sentence(step.record) for step in failed}
    unbuilt = []
    for root in submission.roots:
        if root.failure is not None:
            unbuilt.append(f"{one_line(root.attr)}  {_because(root, root.failure, notes)}")
        elif root.state is not StepStatus.DONE and submission.state is not SubmissionState.RUNNING:
            why = _WITHDRAWN.get(submission.state, root.state.value)
            unbuilt.append(f"{one_line(root.attr)}  not built: {why}")
    return _listed("  \u2718 ", unbuilt, "more roots that are not built; `--json` lists all")


def _because(root: RootView, failure: RootFailureView, notes: Mapping[str, str]) -> str:
    message = _BUILDER_FOR.sub("", _LOG_IN_MESSAGE.sub("", one_line(failure.message))) or failure.kind
    doomed = root.state is StepStatus.DOOMED
    outcome = f"not built because {one_line(failure.name)} failed" if doomed else "failed"
    note = notes.get(failure.step, "")
    more = f"{'the log' if failure.has_log else 'more'}: {_read_on(failure.step, has_log=failure.has_log)}"
    return f"{outcome}: {'; '.join(filter(None, (message, note, more)))}"


def _listed(prefix: str, items: Sequence[str], rest: str) -> list[str]:
    lines = [f"{prefix}{item}" for item in items[:LISTED]]
    if len(items) > LISTED:
        lines.append(f"{prefix}and {len(items) - LISTED} {rest}")
    return lines


def growth_lines(submission: SubmissionView) -> list[str]:
    """Return what is missing of a submission that its client still evaluates, or did not evaluate as a whole."""
    lines = ["  evaluating    its client still looks for more to build"] if submission.open else []
    if submission.incomplete:
        lines.append(f"  incomplete    {one_line(submission.incomplete)}: what came before that is all there is")
    if submission.unevaluated:
        names = [one_line(each.attr) or "all" for each in submission.not_evaluated]
        more = submission.unevaluated - len(names[:LISTED])
        rest = f" and {more} more" if more > 0 else ""
        lines.append(f"  not evaluated {', '.join(names[:LISTED])}{rest}")
    return lines


def status_lines(submission: SubmissionView, steps: Sequence[StepView], now: float) -> list[str]:
    """Return one submission: counts, what runs, what failed, and why nothing happens where nothing does."""
    if submission.state is not SubmissionState.RUNNING:
        return summary_lines(submission, [step for step in steps if step.state is StepStatus.FAILED], now)
    label = f" ({one_line(submission.label)})" if submission.label else ""
    words = ", ".join(f"{number} {word}" for word, number, _ in tally(submission.counts))
    lines = [
        f"running: submission {submission.id}{label} since {duration(now - submission.created_at)}",
        *origin_lines(submission),
        f"  {words} of {submission.counts.total}",
        *growth_lines(submission),
    ]
    active = [step for step in steps if step.state in {StepStatus.RUNNING, StepStatus.PUBLISHING}]
    rows = [
        f"{one_line(step.name)} on {who(step)} {duration(now - (step.started_at or now))} {doing(step)}".rstrip()
        for step in active
    ]
    lines += _listed("  ", rows, "more running")
    lines += _listed("  ! ", [one_line(sentence) for sentence in submission.stuck], "more")
    lines += _unbuilt_lines(submission, steps)
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
                "evaluating" if submission.open else submission.state.value,
                duration(now - submission.created_at),
                f"{counts.done + counts.held}/{counts.total}",
                str(counts.failed + counts.doomed),
                one_line(submission.label) or f"{one_line(attrs)}{more}",
            )
        )
    return rows


def step_lines(step: StepView, now: float) -> list[str]:
    """Return what is known of one step."""
    lines = [
        f"{step.state.value}: {one_line(step.name)} ({step.system})",
        f"  step       {step.key}",
        f"  derivation {step.drv}",
    ]
    lines += [f"  output     {name}  {path}" for name, path in sorted(step.outputs.items())]
    if step.worker:
        lines.append(f"  worker     {who(step)}, attempt {step.attempt}")
    if step.isolation:
        lines.append(f"  isolation  class {step.isolation}")
    if step.started_at:
        ended = step.ended_at if step.ended_at >= step.started_at else now
        lines.append(f"  time       {duration(ended - step.started_at)}")
    if step.waiting_for:
        lines.append(f"  waits      {one_line(step.waiting_for)}")
    lines += flake_lines(step)
    if step.state is StepStatus.FAILED:
        lines += [f"  {line}" for line in failure_lines(step)]
    return lines


def flake_lines(step: StepView) -> list[str]:
    """Return a line about a step whose recipe is flaky; the lines of a failure say it themselves."""
    note = "" if step.state is StepStatus.FAILED else flake_sentence(step.record)
    return [f"  record     {note}"] if note else []


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as aligned columns, two spaces apart."""
    shown = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(cell_len(cell) for cell in column) for column in zip(*shown, strict=True)]
    return [
        "  ".join(set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    ]
