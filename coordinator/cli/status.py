"""`drover status`, `cancel`, `retry`, `workers` and `drain`: one question, one answer."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import click

from coordinator.api.evaluations import EVALUATION_PREFIX, EvaluationState
from coordinator.api.mirroring import MIRROR_PREFIX, MirrorState
from coordinator.api.models import StepStatus, SubmissionState
from coordinator.cli import exit_status
from coordinator.cli.printing import print_json, print_lines
from coordinator.cli.rendering import (
    sanitise,
    status_lines,
    step_lines,
    submission_rows,
    table_lines,
)
from coordinator.cli.worker_text import worker_lines
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import RefusedError

#: Submissions that `drover status` lists, newest first.
LISTED = 20
#: Seconds between two looks at a worker that is drained.
DRAIN_LOOK_S = 0.5


async def status(client: ApiClient, submission: str | None, *, as_json: bool) -> int:
    """Show the farm and its submissions, or one submission, or one step."""
    if submission is not None:
        try:
            view = await client.whole(await client.submission(submission))
        except RefusedError as error:
            if error.reason != "not_found":
                raise
            return await _step_status(client, submission, error, as_json=as_json)
        if as_json:
            print_json(view)
            return exit_status.OK
        steps = await client.steps(submission, (StepStatus.RUNNING, StepStatus.PUBLISHING, StepStatus.FAILED))
        print_lines(status_lines(view, steps, time.time()))
        return exit_status.OK
    farm = await client.farm()
    submissions = await client.submissions(None if as_json else LISTED + 1)
    if as_json:
        print_json({"farm": farm, "submissions": submissions})
        return exit_status.OK
    many = f"the newest {LISTED} (`drover status --json` has all)" if len(submissions) > LISTED else len(submissions)
    submissions = submissions[:LISTED]
    running = sum(1 for each in submissions if each.state is SubmissionState.RUNNING)
    print_lines(
        [
            f"drover {farm.version} at {client.url}",
            f"cache        {farm.cache_url}",
            *(f"public key   {key}" for key in farm.public_keys),
            *(f"trouble      {sanitise(trouble)}" for trouble in farm.troubles),
            f"submissions  {many}, of which {running} run",
        ]
    )
    if submissions:
        print_lines(["", *table_lines(submission_rows(submissions, time.time()))])
    return exit_status.OK


async def _step_status(client: ApiClient, name: str, unknown: RefusedError, *, as_json: bool) -> int:
    """Show the step that is called so; raises `unknown` where there is none either."""
    try:
        step = await client.step(name)
    except RefusedError as error:
        # Several steps match: that is worth saying. None does: then it was meant for a submission.
        raise (unknown if error.reason == "not_found" and "there is no step" in str(error) else error) from None
    if as_json:
        print_json(step)
    else:
        print_lines(step_lines(step, time.time()))
    return exit_status.OK


async def cancel(client: ApiClient, submission: str) -> int:
    """Withdraw a submission, or end a remote evaluation, or a run that has paths from upstreams."""
    if submission.startswith(EVALUATION_PREFIX):
        evaluation = await client.cancel_evaluation(submission)
        if evaluation.state is EvaluationState.CANCELLED:
            what = "nothing of it is submitted"
            if evaluation.submission:
                what = f"what it found is built: drover cancel {evaluation.submission} ends that too"
            print_lines([f"cancelled {evaluation.id}; {what}"])
        elif evaluation.submission:
            print_lines([f"{evaluation.id} had already ended; its builds: drover cancel {evaluation.submission}"])
        else:
            print_lines([f"{evaluation.id} had already {evaluation.state.value}"])
        return exit_status.OK
    if submission.startswith(MIRROR_PREFIX):
        run = await client.cancel_mirroring(submission)
        word = "cancelled" if run.state is MirrorState.CANCELLED else "had already ended:"
        print_lines([f"{word} {run.id}; {run.taken} paths that it took stay"])
        return exit_status.OK
    view = await client.cancel(submission)
    if view.state is SubmissionState.CANCELLED:
        print_lines([f"cancelled {view.id}; builds that another submission wants go on"])
    else:
        print_lines([f"{view.id} had already {view.state.value}"])
    return exit_status.OK


async def retry(client: ApiClient, name: str) -> int:
    """Let a submission run again, or all those that one step made fail."""
    try:
        view = await client.retry(name)
    except RefusedError as error:
        if error.reason != "not_found":
            raise
        return await _retry_step(client, name)
    if view.state is SubmissionState.RUNNING:
        print_lines([f"{view.id} runs again", f"  watch it: drover watch {view.id}"])
    else:
        print_lines([f"{view.id} has {view.state.value}: nothing of it can be retried"])
    return exit_status.OK


async def _retry_step(client: ApiClient, name: str) -> int:
    outcome = await client.retry_step(name)
    if outcome.submissions:
        print_lines(
            [
                f"{outcome.step.key} is built again",
                *(f"  watch it: drover watch {each}" for each in outcome.submissions),
            ]
        )
    elif outcome.step.state is StepStatus.WAITING:
        print_lines(
            [f"{outcome.step.key} is no longer taken for known to fail; the next submission that wants it builds it"]
        )
    else:
        print_lines([f"{outcome.step.key} is {outcome.step.state.value}: there is nothing to retry"])
    return exit_status.OK


async def workers(client: ApiClient, *, as_json: bool) -> int:
    """Show the workers."""
    found = await client.workers()
    if as_json:
        print_json({"workers": found})
    elif found:
        print_lines(worker_lines(found, time.time()))
    else:
        print_lines(["no worker has joined; start one with `drover up` or `drover worker`"])
    return exit_status.OK


async def drain(client: ApiClient, worker: str, *, on: bool, wait: bool) -> int:
    """Drain a worker or end that; with `wait`, return once it holds no lease."""
    await client.drain(worker, on=on)
    if not on:
        print_lines([f"{worker} gets new builds again"])
        return exit_status.OK
    while held := [len(each.leases) for each in await client.workers() if each.name == worker and each.leases]:
        if not wait:
            print_lines([f"{worker} gets no new builds; {held[0]} still run there"])
            return exit_status.OK
        await asyncio.sleep(DRAIN_LOOK_S)
    print_lines([f"{worker} gets no new builds and has none"])
    return exit_status.OK


def write_report(path: Path, text: str, mode: str = "w") -> None:
    """Write a report to a file; ends the command with one sentence where that cannot be."""
    try:
        with path.open(mode, encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None
