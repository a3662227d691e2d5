"""`drover eta`: when a submission ends, what bounds that, and what has bounded it so far."""

from __future__ import annotations

import time
from typing import Final

from coordinator.api.estimates import PathStepView, PathView, SubmissionEtaView, ThroughputView
from coordinator.api.models import StepStatus
from coordinator.cli import exit_status
from coordinator.cli.printing import print_json, print_lines
from coordinator.cli.rendering import counted, duration, eta_sentence, one_line
from coordinator.client.api_client import ApiClient

#: Minutes over which a rate is taken.
RATE_MINUTES: Final = 5


async def eta(client: ApiClient, submission: str, *, as_json: bool) -> int:
    """Show when a submission ends, what bounds that, and what has bounded it so far."""
    found = await client.eta(submission)
    if as_json:
        print_json(found)
    else:
        print_lines(eta_lines(found, time.time()))
    return exit_status.OK


def eta_lines(found: SubmissionEtaView, now: float) -> list[str]:
    """Return the answer: when, the work left for each kind of worker, the critical path so far and to come."""
    lines = [f"submission {found.submission}: {eta_sentence(found.eta, now) if found.eta else 'no end to foresee'}"]
    for load in found.loads:
        needs = f" with {', '.join(map(one_line, load.features))}" if load.features else ""
        others = f", {counted(load.others, 'other submission')} want them too" if load.others else ""
        work = f"{duration(load.work_s)} of work" if load.work_s else "work of unknown length"
        lines.append(
            f"  {one_line(load.system)}{needs}: {counted(load.steps, 'step')} left, {work} "
            f"on {counted(load.slots, 'slot')}{others}"
        )
    lines += _path_lines(
        "critical path so far", found.so_far, [_so_far(step) for step in found.so_far.steps], last=True
    )
    to_come = [_to_come(step, now) for step in found.to_come.steps]
    lines += _path_lines("critical path to come", found.to_come, to_come, last=False)
    return lines


def _path_lines(title: str, path: PathView, steps: list[str], *, last: bool) -> list[str]:
    if not path.count:
        return []
    took = f", {duration(path.seconds)}" if path.seconds else ""
    hidden = path.count - len(path.steps)
    more = [f"    and {hidden} {'before' if last else 'after'}"] if hidden > 0 else []
    return [f"  {title}: {counted(path.count, 'step')}{took}", *(more if last else []), *steps, *([] if last else more)]


def _so_far(step: PathStepView) -> str:
    where = f" on {one_line(step.worker)}" if step.worker else ""
    failed = " (failed)" if step.state is StepStatus.FAILED else ""
    waited = f" after {duration(step.waited_s)} of waiting" if step.waited_s >= 1 else ""
    return f"    {one_line(step.name)}{failed}: {duration(step.took_s)}{where}{waited}"


def _to_come(step: PathStepView, now: float) -> str:
    usual = f"usually {duration(step.takes_s)}" if step.takes_s is not None else "no history"
    since = f" for {duration(now - step.started_at)} on {one_line(step.worker)}" if step.started_at else ""
    return f"    {one_line(step.name)}: {step.state.value}{since}, {usual}"


def rate(throughput: ThroughputView) -> str:
    """Return builds a minute of the newest minutes, and what the last hour gave."""
    newest, hour = throughput.latest(RATE_MINUTES), throughput.total
    per_minute = (newest.finished + newest.failed) / RATE_MINUTES
    return (
        f"{per_minute:.1f} builds/min; last hour {hour.finished} finished, {hour.failed} failed, {hour.reused} reused"
    )
