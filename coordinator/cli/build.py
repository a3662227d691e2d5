"""`drover build` and `drover watch`: evaluate, send what is missing, submit, follow, fetch."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import click

from coordinator.api.models import FarmView, StepStatus, StepView, SubmissionState, SubmissionView
from coordinator.api.requests import RootRequest, SubmitRequest
from coordinator.api.trace_context import MAX_TRACEPARENT
from coordinator.cli import exit_status
from coordinator.cli.ci import Ci
from coordinator.cli.evaluation import EvaluationRequest, evaluate, status_of
from coordinator.cli.fetching import realise
from coordinator.cli.follow import follow
from coordinator.cli.import_builds import FarmImports
from coordinator.cli.rendering import summary_lines
from coordinator.cli.screen import Screen
from coordinator.cli.sending import ClientStages, send_closure, sending_again
from coordinator.cli.status import print_json
from coordinator.client.api_client import ApiClient
from coordinator.client.closure import (
    LocalStore,
    local_store,
)
from coordinator.evaluation.model import Evaluation


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """Arguments of the command."""

    evaluation: EvaluationRequest
    #: `--option NAME VALUE` words, for every Nix command of this machine.
    settings: tuple[str, ...] = ()
    store: str | None = None
    label: str = ""
    retry: bool = False
    #: As in `SubmitRequest`.
    wait_s: int | None = None
    detach: bool = False
    as_json: bool = False
    fetch: bool = False
    #: The runner whose sections are used; None: the one that runs this program.
    ci: Ci | None = None


@dataclass(slots=True)
class _Submitted:
    """State of a followed submission that the handler of an interruption reads."""

    id: str = ""
    failed: dict[str, StepView] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(()))


def build(connect: Callable[[], ApiClient], options: BuildRequest) -> int:
    """Run `drover build`; returns the exit status."""
    submitted = _Submitted()
    return _interruptible(_build(connect, options, submitted), submitted)


def watch(connect: Callable[[], ApiClient], submission: str, *, as_json: bool, ci: Ci | None = None) -> int:
    """Run `drover watch`; returns the exit status."""
    submitted = _Submitted(submission)

    async def run_watch() -> int:
        async with connect() as client:
            screen = Screen.choose(as_json=as_json, ci=ci)
            view = await client.whole(await follow(client, submission, screen, submitted.failed))
            return _finish(view, submitted, screen, as_json=as_json)

    return _interruptible(run_watch(), submitted)


def _interruptible(work: Any, submitted: _Submitted) -> int:
    try:
        status: int = asyncio.run(work)
    except KeyboardInterrupt:
        if not submitted.id:
            raise
        click.echo(
            f"\ndrover: interrupted; the build goes on. Watch it again: drover watch {submitted.id}\n"
            f"drover: end it: drover cancel {submitted.id}",
            err=True,
        )
        return exit_status.INTERRUPTED
    return status


async def _build(connect: Callable[[], ApiClient], options: BuildRequest, submitted: _Submitted) -> int:
    screen = Screen.choose(as_json=options.as_json, ci=options.ci)
    async with connect() as client:
        client.on_lost = lambda why: screen.status(f"{why}; trying again")
        # First of all whether a coordinator answers: an evaluation can take minutes.
        farm = await client.farm()
        stages = ClientStages()
        made = FarmImports(client, farm, screen, options.settings, options.store, wait_s=options.wait_s)
        async with made as imports:
            evaluation = await evaluate(options.evaluation, options.settings, options.store, imports)
        stages.ended("evaluate")
        wanted, submitted.evaluation = evaluation.wanted, evaluation
        store = local_store(options.store, wanted[0].drv)
        drvs = [each.drv for each in wanted]
        makers = await send_closure(client, store, drvs, screen, stages)
        roots = tuple(
            RootRequest(
                attr=each.attr,
                drv=each.drv,
                outputs=each.outputs,
                limits=each.limits,
            )
            for each in wanted
        )
        request = SubmitRequest(
            roots=roots,
            label=options.label,
            retry_failed=options.retry,
            makers=makers,
            wait_s=options.wait_s,
            traceparent=os.environ.get("TRACEPARENT", "")[:MAX_TRACEPARENT],
            stages=stages.taken,
        )
        view = await client.submit(request)
        submitted.id = view.id
        if options.detach:
            return _detached(await client.whole(view), submitted, as_json=options.as_json)
        async with sending_again(lambda: send_closure(client, store, drvs, screen, ClientStages()), screen) as on_step:
            view = await follow(client, view.id, screen, submitted.failed, on_step)
        view = await client.whole(view)
        if options.fetch and view.state is SubmissionState.SUCCEEDED:
            await _fetch(farm, view, options, store, screen)
        return _finish(view, submitted, screen, as_json=options.as_json)


def _detached(view: SubmissionView, submitted: _Submitted, *, as_json: bool) -> int:
    click.echo(
        f"submitted {view.id}: {view.counts.total} steps, {view.counts.held} already in the cache\n"
        f"  watch it: drover watch {view.id}\n  end it:   drover cancel {view.id}",
        err=as_json,
    )
    if as_json:
        _print_json(view, [], submitted.evaluation)
    return status_of(submitted.evaluation, lambda text: click.echo(f"drover: {text}", err=True))


def _finish(view: SubmissionView, submitted: _Submitted, screen: Screen, *, as_json: bool) -> int:
    failed = list(submitted.failed.values())
    for line in summary_lines(view, failed, time.time()):
        screen.line(line)
    if as_json:
        _print_json(view, failed, submitted.evaluation)
    status = status_of(submitted.evaluation, screen.line)
    return status if view.state is SubmissionState.SUCCEEDED else exit_status.BUILD_FAILED


def _print_json(view: SubmissionView, failed: Sequence[StepView], evaluation: Evaluation) -> None:
    document = {
        **{field.name: getattr(view, field.name) for field in fields(view)},
        "failed_steps": failed,
        "left_out": [each.attr for each in evaluation.left_out],
        "not_evaluated": evaluation.failed,
    }
    print_json(document)
    sys.stdout.flush()


async def _fetch(
    farm: FarmView, view: SubmissionView, options: BuildRequest, store: LocalStore, screen: Screen
) -> None:
    """Realise the root outputs in the local store."""
    paths = sorted({path for root in view.roots if root.state is StepStatus.DONE for path in root.outputs.values()})
    screen.status(f"fetching {len(paths)} outputs from {farm.cache_url}")
    await realise(farm, paths, store, options.settings)
