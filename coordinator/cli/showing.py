"""`drover status`, `cancel`, `log` and `workers`: one question, one answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import click
import orjson

from coordinator import cli
from coordinator.client import ApiClient
from coordinator.schema import Model, StepStatus, SubmissionState
from coordinator.terminal import sanitise, status_lines, submission_rows, table_lines, worker_rows

#: Submissions that `drover status` lists, newest first.
LISTED = 20


async def status(client: ApiClient, submission: str | None, *, as_json: bool) -> int:
    """Show the farm and its submissions, or one submission."""
    if submission is not None:
        view = await client.submission(submission)
        if as_json:
            _print_json(view)
            return cli.OK
        steps = await client.steps(submission, (StepStatus.RUNNING, StepStatus.PUBLISHING, StepStatus.FAILED))
        _print(status_lines(view, steps, time.time()))
        return cli.OK
    farm = await client.farm()
    submissions = await client.submissions()
    if as_json:
        _print_json({"farm": farm, "submissions": submissions})
        return cli.OK
    running = sum(1 for each in submissions if each.state is SubmissionState.RUNNING)
    _print(
        [
            f"drover {farm.version} at {client.url}",
            f"cache        {farm.cache_url}",
            *(f"public key   {key}" for key in farm.public_keys),
            f"submissions  {len(submissions)}, of which {running} run",
        ]
    )
    if submissions:
        _print(["", *table_lines(submission_rows(submissions[:LISTED], time.time()))])
    return cli.OK


async def cancel(client: ApiClient, submission: str) -> int:
    """Withdraw a submission."""
    view = await client.cancel(submission)
    if view.state is SubmissionState.CANCELLED:
        _print([f"cancelled {view.id}; builds that another submission wants go on"])
    else:
        _print([f"{view.id} had already {view.state.value}"])
    return cli.OK


async def log(client: ApiClient, step: str, *, follow: bool) -> int:
    """Print a log: the very bytes, except on a terminal, which escapes in them could take over."""
    out = sys.stdout.buffer
    tidy = sys.stdout.isatty()
    rest = b""
    silent = True
    async for chunk in client.log(step, follow=follow):
        silent = False
        if not tidy:
            out.write(chunk)
            out.flush()
            continue
        whole, newline, rest = (rest + chunk).rpartition(b"\n")
        if newline:
            click.echo(sanitise(whole.decode(errors="replace"), None))
    if rest:
        click.echo(sanitise(rest.decode(errors="replace"), None))
    if silent:
        click.echo("drover: the build printed nothing", err=True)
    return cli.OK


async def workers(client: ApiClient, *, as_json: bool) -> int:
    """Show the workers."""
    found = await client.workers()
    if as_json:
        _print_json({"workers": found})
    elif found:
        _print(table_lines(worker_rows(found, time.time())))
    else:
        _print(["no worker has joined; start one with `drover up` or `drover worker`"])
    return cli.OK


def _print(lines: Sequence[str]) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        sys.stdout.write(line.encode(encoding, "replace").decode(encoding) + "\n")


def _print_json(document: Model | dict[str, Any]) -> None:
    sys.stdout.write(orjson.dumps(document, default=_plain).decode() + "\n")


def _plain(value: object) -> Any:
    if isinstance(value, Model):
        return value.model_dump(mode="json")
    raise TypeError(type(value).__name__)
