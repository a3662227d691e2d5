"""`drover submissions`, `bump` and `wait`: which there are, which goes first, and how they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final

import click

from coordinator.api.models import StepView, SubmissionState, SubmissionView
from coordinator.cli import exit_status
from coordinator.cli.printing import print_json, print_lines
from coordinator.cli.progress import News, Progress
from coordinator.cli.rendering import duration, news_lines, one_line, submission_rows, table_lines
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import ClientError
from coordinator.defaults import OPERATOR

#: Seconds between two lines about submissions that go on.
HEARTBEAT_S: Final = 30.0
#: Exit statuses, the one that counts first where several submissions end.
_WORST: Final = (
    exit_status.BUILD_FAILED,
    exit_status.EVALUATION_FAILED,
    exit_status.EXPIRED,
    exit_status.SUPERSEDED,
    exit_status.CANCELLED,
)


async def submissions(client: ApiClient, filters: Mapping[str, str], newest: int, *, as_json: bool) -> int:
    """List the submissions that the filters let through, the newest first."""
    found = await client.submissions(newest, filters)
    if as_json:
        print_json(found)
    elif found:
        print_lines(table_lines(submission_rows(found, time.time())))
    else:
        print_lines(["no submission is like that; `drover submissions` lists all"])
    return exit_status.OK


async def bump(client: ApiClient, submission: str, priority: int | None) -> int:
    """Give a submission another priority, by default one above all that wait of its owner."""
    view = await client.bump(submission, priority)
    if view.state is SubmissionState.RUNNING:
        owner = one_line(view.owner) or OPERATOR
        print_lines([f"{view.id} has priority {view.priority} among the submissions of {owner}"])
    else:
        print_lines([f"{view.id} has already {view.state.value}"])
    return exit_status.OK


async def wait(client: ApiClient, names: Sequence[str], timeout_s: int, *, as_json: bool) -> int:
    """Wait until all submissions have ended; returns the exit status of the worst end."""
    # One that is not there is said before anything is waited for.
    for name in names:
        await client.submission(name)
    lines = _WaitLines()
    tasks = {name: asyncio.create_task(_until_end(client, name, lines)) for name in dict.fromkeys(names)}
    beat = asyncio.create_task(lines.beat())
    try:
        async with asyncio.timeout(timeout_s or None):
            views = await asyncio.gather(*tasks.values())
    except TimeoutError:
        left = " ".join(name for name, task in tasks.items() if not task.done() or task.cancelled())
        click.echo(
            f"drover: not ended after {duration(timeout_s)}: {left}; builds go on. Wait again: drover wait {left}",
            err=True,
        )
        return exit_status.INFRASTRUCTURE
    finally:
        beat.cancel()
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(beat, *tasks.values(), return_exceptions=True)
    if as_json:
        print_json(views)
    ends = {_status_of(view) for view in views}
    return next((status for status in _WORST if status in ends), exit_status.OK)


def _status_of(view: SubmissionView) -> int:
    if view.state is not SubmissionState.SUCCEEDED:
        return exit_status.ended_status(view.state)
    return exit_status.EVALUATION_FAILED if view.incomplete or view.unevaluated else exit_status.OK


class _WaitLines:
    """Lines on standard error: failures at once, ends, and now and then that it goes on."""

    def __init__(self) -> None:
        self._running: dict[str, Progress] = {}

    def begin(self, name: str, progress: Progress) -> None:
        self._running[name] = progress

    def failed(self, name: str, step: StepView) -> None:
        click.echo(f"{name}: {news_lines(News.FAILED, step)[0]}", err=True)

    def ended(self, view: SubmissionView) -> None:
        del self._running[view.id]
        done = view.counts.done + view.counts.held
        click.echo(f"{view.id}: {view.state.value}, {_counts_text(done, view)}", err=True)

    async def beat(self) -> None:
        """Say again and again how far those that run are."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for name, progress in self._running.items():
                if progress.submission is not None:
                    done = progress.counts.done + progress.counts.held
                    click.echo(f"{name}: {_counts_text(done, progress.submission)}", err=True)


def _counts_text(done: int, view: SubmissionView) -> str:
    label = f" ({one_line(view.label)})" if view.label else ""
    return f"{done} of {view.counts.total} steps done{label}"


async def _until_end(client: ApiClient, name: str, lines: _WaitLines) -> SubmissionView:
    progress = Progress()
    lines.begin(name, progress)
    async for event in client.watch(name, on_lost=lambda why: click.echo(f"drover: {why}; trying again", err=True)):
        for news, step in progress.apply(event):
            if news is News.FAILED:
                lines.failed(name, step)
    view = progress.submission
    if view is None:
        raise ClientError(f"the coordinator sent nothing about {name}")
    lines.ended(view)
    return view
