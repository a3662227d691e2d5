"""`drover why` and `drover diff`: why a step waits, failed or ran, and what differs from the last build of its name."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from typing import Final

from coordinator.api.difference_models import CauseView, ChangeView, ComparedView, DifferenceView
from coordinator.api.models import StepStatus, StepView
from coordinator.api.questions import CandidateView, CostView, EstimateSource, PlacingView, StepReasonsView, WantedView
from coordinator.cli import exit_status
from coordinator.cli.printing import print_json, print_lines, size
from coordinator.cli.progress import ACTIVE
from coordinator.cli.rendering import doing, duration, failure_lines, flake_lines, one_line, who
from coordinator.client.api_client import ApiClient

#: Steps of a way that are named, its ends if there are more.
WAY_NAMED: Final = 6
#: Causes and changes of each that `drover why` names; `drover diff` has all.
CAUSES_NAMED: Final = 3
CHANGES_NAMED: Final = 2
_ARROW: Final = " \u2192 "


async def why(client: ApiClient, step: str, *, as_json: bool) -> int:
    """Show why a step waits, failed or ran, and who wants it."""
    reasons = await client.why(step)
    if as_json:
        print_json(reasons)
    else:
        print_lines(why_lines(reasons, time.time()))
    return exit_status.OK


async def diff(client: ApiClient, step: str, other: str, *, as_json: bool) -> int:
    """Show what differs between a step and the last build of its name, or another one."""
    difference = await client.difference(step, other)
    if as_json:
        print_json(difference)
    else:
        print_lines(difference_lines(difference, time.time()))
    return exit_status.OK


def why_lines(reasons: StepReasonsView, now: float) -> list[str]:
    """Return why a step waits, failed or ran: what it stands on that is not done, who wants it, and what changed."""
    step = reasons.step
    lines = [f"{step.state.value}: {one_line(step.name)} ({one_line(step.system)})"]
    if step.state in ACTIVE:
        lines.append(f"  runs       {_run(step, now)}")
    if step.waiting_for and reasons.cause is None:
        lines.append(f"  why        {one_line(step.waiting_for)}")
    lines += flake_lines(step)
    if reasons.cause is not None:
        lines.append(f"  why        {one_line(reasons.cause.name)}, which it stands on, failed")
        lines += [f"  {line}" for line in failure_lines(reasons.cause)]
    if step.state is StepStatus.FAILED:
        lines += [f"  {line}" for line in failure_lines(step)]
    for number, each in enumerate(reasons.below):
        activity = _run(each, now) if each.state in ACTIVE else one_line(each.waiting_for or each.state.value)
        lines.append(f"  {'in the end' if not number else '          '} {one_line(each.name)}: {activity}")
    if reasons.placing is not None:
        lines += placing_lines(reasons.placing, now)
    lines += wanted_lines(reasons)
    if step.state is StepStatus.DONE and not step.attempt:
        lines.append("  ran        never here: the cache had its outputs")
    for number, run in enumerate(reasons.ran):
        lines.append(f"  {'' if number else 'ran':<10} attempt {run.attempt}: {one_line(run.reason)}")
    if reasons.difference is not None:
        lines += _changed_lines(reasons.difference, now)
    return lines


def placing_lines(placing: PlacingView, now: float) -> Iterator[str]:
    """Yield the rank of a step, what it should take and how that is known, and the workers that were looked at."""
    yield f"  rank       {duration(placing.rank_s)} from its start to the end of what stands on it"
    yield f"  takes      {duration(placing.takes_s)} on a usual worker: {_known_by(placing.source, placing.builds)}"
    for number, (costs, origin) in enumerate(_costs(placing)):
        yield f"  {'' if number else 'expects':<10} {costs}: {origin}"
    for number, each in enumerate(placing.candidates):
        waits = ", for which it waits" if each.worker == placing.waits_for else ""
        yield f"  {'' if number else 'workers':<10} {one_line(each.worker)}: {_candidate(each, now)}{waits}"
    if placing.count > len(placing.candidates):
        yield f"             and {placing.count - len(placing.candidates)} more"


def _costs(placing: PlacingView) -> Iterator[tuple[str, str]]:
    """Yield what is expected of a build beside its time, those together that are known alike."""
    if placing.memory_bytes:
        yield f"{size(placing.memory_bytes)} of memory", "what it asks for"
    alike: dict[str, list[str]] = {}
    for each in placing.costs:
        alike.setdefault(_known_by(each.source, each.builds), []).append(_cost(each))
    for origin, costs in alike.items():
        yield ", ".join(costs), origin


def _cost(each: CostView) -> str:
    match each.cost:
        case "fetch_s":
            return f"inputs in {duration(each.value)}"
        case "upload_s":
            return f"outputs sent in {duration(each.value)}"
        case "cpu_s":
            return f"{duration(each.value)} of processors"
        case "cores":
            return f"{each.value:.1f} at one time"
        case "output_bytes":
            return f"{size(round(each.value))} of outputs"


def _known_by(source: EstimateSource, count: int) -> str:
    builds = f"{count} build{'' if count == 1 else 's'}"
    match source:
        case "derivation":
            return f"by {builds} of the same derivation"
        case "package":
            return f"by {builds} of its package"
        case "other_system":
            return f"by {builds} of its package on another system"
        case "features":
            return "as others that ask for the same features, because none of its package is known"
        case "kind":
            return "as others of its kind, because none of its package is known"
        case "nothing":
            return "a guess, because nothing like it was built yet"


def _candidate(each: CandidateView, now: float) -> str:
    speed = "" if each.speed == 1 else f", speed {each.speed:.2g}"
    if each.missing_bytes or each.here_bytes:
        speed += f", has {size(each.here_bytes)} of its inputs"
    if each.missing_bytes:
        speed += f" and fetches {size(each.missing_bytes)} in {duration(each.fetch_s)}"
    busy = f"{each.leases} of {each.capacity} taken"
    match each.state:
        case "holds":
            return f"has it, should have built it in {duration(max(0.0, each.ends_at - now))}{speed}"
        case "free" | "avoided":
            word = "free" if each.state == "free" else "free, comes last because it gave the step back"
            built = f", would have built it in {duration(max(0.0, each.ends_at - now))}" if each.ends_at else ""
            return f"{word} ({busy}){built}{speed}"
        case "full" | "probation" if each.ends_at:
            word = "full" if each.state == "full" else "one build at a time after its failures"
            room, ends = duration(max(0.0, each.room_at - now)), duration(max(0.0, each.ends_at - now))
            return f"{word} ({busy}), room in {room}, would have built it in {ends}{speed}"
        case _:
            return f"{each.state} ({busy}){speed}"


def wanted_lines(reasons: StepReasonsView) -> Iterator[str]:
    """Yield the submissions that want a step, or that it was built for."""
    word = "built for" if reasons.step.ended_at else "wanted by"
    for number, wanted in enumerate(reasons.wanted_by):
        yield f"  {'' if number else word:<10} {_wanted(wanted)}"
    if reasons.wanted_count > len(reasons.wanted_by):
        yield f"             and {reasons.wanted_count - len(reasons.wanted_by)} more submissions"
    if not reasons.wanted_count:
        yield "  wanted by  no submission that runs"


def _wanted(wanted: WantedView) -> str:
    label = f" ({one_line(wanted.label)})" if wanted.label else ""
    way = ": ".join(filter(None, (one_line(wanted.attr), _way(wanted.path))))
    return f"submission {wanted.submission}{label}, {way}".rstrip(", ")


def _way(names: Sequence[str]) -> str:
    shown = [*names[:2], "\u2026", *names[-2:]] if len(names) > WAY_NAMED else names
    return _ARROW.join(map(one_line, shown))


def _changed_lines(difference: DifferenceView, now: float) -> Iterator[str]:
    """Yield what changed, in few lines."""
    if difference.other is None:
        yield f"  changed    {one_line(difference.note)}"
        return
    yield f"  changed    since {_build(difference.other, now)}"
    for cause in difference.causes[:CAUSES_NAMED]:
        yield f"             {_because(cause)}"
        for change in cause.changes[:CHANGES_NAMED]:
            for line in _change_lines(change):
                yield f"               {line}"
    if difference.note:
        yield f"             {one_line(difference.note)}"
    yield f"             all of it: drover diff {shlex.quote(difference.step.step)}"


def difference_lines(difference: DifferenceView, now: float) -> list[str]:
    """Return a whole difference."""
    step, other = difference.step, difference.other
    lines = [f"{one_line(step.name or step.step)} ({one_line(step.system)})", f"  derivation {one_line(step.drv)}"]
    if other is not None:
        lines += [f"against {_build(other, now)}", f"  derivation {one_line(other.drv)}"]
    for cause in difference.causes:
        lines += ["", _because(cause)]
        lines += [f"  {line}" for change in cause.changes for line in _change_lines(change)]
        if cause.change_count > len(cause.changes):
            lines.append(f"  and {cause.change_count - len(cause.changes)} more changes")
    rest = []
    if difference.cause_count > len(difference.causes):
        rest.append(f"and {difference.cause_count - len(difference.causes)} more derivations that differ by themselves")
    if difference.unfollowed:
        rest.append(f"{difference.unfollowed} more inputs differ and were not looked at")
    if difference.note:
        rest.append(one_line(difference.note))
    return [*lines, *([""] if rest else []), *rest]


def _build(build: ComparedView, now: float) -> str:
    ended = (
        f", {build.outcome} {duration(now - build.ended_at)} ago"
        if build.ended_at
        else ", of which no ended attempt is remembered"
    )
    return f"{one_line(build.name or build.step)}{ended} (step {one_line(build.step)})"


def _because(cause: CauseView) -> str:
    renamed = f" (was {one_line(cause.previous_name)})" if cause.previous_name != cause.name else ""
    alike = f", and {cause.alike} more of it alike" if cause.alike else ""
    subject = f"because of {_way(cause.way)}{renamed}{alike}" if cause.way else f"by itself{renamed}"
    match cause.uncompared:
        case "unknown":
            return f"{subject}: the farm no longer has the derivation of one of them"
        case "too large":
            return f"{subject}: the derivations are too large to compare"
        case _:
            return subject


def _change_lines(change: ChangeView) -> Iterator[str]:
    """Yield a change: what it is of, and both sides."""
    yield f"{change.field} {one_line(change.name)}".rstrip()
    if change.before is not None:
        yield f"  - {one_line(change.before)}".rstrip()
    if change.after is not None:
        yield f"  + {one_line(change.after)}".rstrip()


def _run(step: StepView, now: float) -> str:
    since = f" since {duration(now - step.started_at)}" if step.started_at else ""
    return f"on {who(step)}{since}, {doing(step)}"
