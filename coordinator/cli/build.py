"""`drover build` and `drover watch`: evaluate, send what is missing, submit, follow, fetch."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.api.evaluations import EVALUATION_PREFIX
from coordinator.api.models import FarmView, StepStatus, StepView, SubmissionState, SubmissionView
from coordinator.api.trace_context import MAX_TRACEPARENT
from coordinator.cli import exit_status
from coordinator.cli.ci import Ci, defused
from coordinator.cli.ci_summary import append_summary, summary_of
from coordinator.cli.evaluation import EvaluationRequest, evaluate, evaluated_from, inputs_of, status_of
from coordinator.cli.fetching import realise
from coordinator.cli.follow import follow
from coordinator.cli.import_builds import FarmImports
from coordinator.cli.printing import print_json
from coordinator.cli.rendering import summary_lines
from coordinator.cli.screen import Screen
from coordinator.cli.sending import ClientStages, send_closure, taken_after_sending
from coordinator.cli.streaming import StreamedBuild
from coordinator.cli.submission_options import SubmissionWords
from coordinator.client.api_client import ApiClient
from coordinator.client.bodies import RootBody, SubmitBody
from coordinator.client.closure import (
    LocalStore,
    local_store,
)
from coordinator.client.errors import RefusedError
from coordinator.errors import CoordinatorError, OtherWishError
from coordinator.evaluation.model import Evaluation
from coordinator.terminal_controls import harmless
from infra.records import record

if TYPE_CHECKING:
    from coordinator.cli.remote import RemoteSource


@record(frozen=True, slots=True)
class BuildRequest:
    """Arguments of the command."""

    evaluation: EvaluationRequest
    #: `--option NAME VALUE` words, for every Nix command of this machine.
    settings: tuple[str, ...] = ()
    store: str | None = None
    #: What the submission says of itself.
    words: SubmissionWords = field(default_factory=SubmissionWords)
    retry: bool = False
    #: As in `SubmitBody`.
    wait_s: int | None = None
    detach: bool = False
    as_json: bool = False
    fetch: bool = False
    #: The runner whose sections are used; None: the one that runs this program.
    ci: Ci | None = None
    #: File that a summary in Markdown is added to.
    summary: Path | None = None
    #: Evaluation at the coordinator, of these files; None: on this machine.
    remote: RemoteSource | None = None
    #: `--arg` and `--argstr` pairs, for an evaluation at the coordinator.
    args: tuple[tuple[str, str], ...] = ()
    argstrs: tuple[tuple[str, str], ...] = ()


@record(slots=True)
class _Submitted:
    """State of a followed submission that the handler of an interruption reads."""

    id: str = ""
    #: Name of a remote evaluation that goes on.
    remote_evaluation: str = ""
    failed: dict[str, StepView] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(()))
    #: It was sealed before all had come.
    cut_short: bool = False
    moments: dict[str, float] = field(default_factory=dict)
    summary: Path | None = None


def build(connect: Callable[[], ApiClient], options: BuildRequest) -> int:
    """Run `drover build`; returns the exit status."""
    submitted = _Submitted(summary=options.summary)
    return _interruptible(_build(connect, options, submitted), submitted)


def watch(
    connect: Callable[[], ApiClient],
    submission: str,
    *,
    as_json: bool,
    ci: Ci | None = None,
    summary: Path | None = None,
) -> int:
    """Run `drover watch`; returns the exit status."""
    submitted = _Submitted(submission, summary=summary)

    async def run_watch() -> int:
        async with connect() as client:
            screen = Screen.choose(as_json=as_json, ci=ci)
            name = submission
            if submission.startswith(EVALUATION_PREFIX):
                from coordinator.cli.remote import watch_evaluation  # noqa: PLC0415 - for this alone

                submitted.id, submitted.remote_evaluation = "", submission
                name, submitted.evaluation = await watch_evaluation(client, submission, screen)
                submitted.id = name
            view = await client.whole(await follow(client, name, screen, submitted.failed))
            return _finish(view, submitted, screen, as_json=as_json)

    return _interruptible(run_watch(), submitted)


def _interruptible(work: Any, submitted: _Submitted) -> int:
    try:
        status: int = asyncio.run(work)
    except KeyboardInterrupt:
        if not submitted.id and submitted.remote_evaluation:
            click.echo(
                "\ndrover: interrupted; the coordinator goes on evaluating, and builds what it finds. "
                f"Watch it again: drover watch {submitted.remote_evaluation}\n"
                f"drover: end it: drover cancel {submitted.remote_evaluation}",
                err=True,
            )
            return exit_status.INTERRUPTED
        if not submitted.id:
            raise
        what = "what was evaluated so far is built" if submitted.cut_short else "the build goes on"
        click.echo(
            f"\ndrover: interrupted; {what}. Watch it again: drover watch {submitted.id}\n"
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
        if options.remote is not None:
            return await _build_remotely(client, options, submitted, screen, farm)
        if options.detach:
            view = await _submit(client, options, submitted, screen, farm)
            return _detached(await client.whole(view), submitted, as_json=options.as_json)
        view = await client.whole(await _stream(client, options, submitted, screen, farm))
        order = {(each.attr, each.drv): place for place, each in enumerate(submitted.evaluation.wanted)}
        roots = sorted(view.roots, key=lambda root: order.get((root.attr, root.drv), len(order)))
        view = replace(view, roots=tuple(roots))
        if options.fetch and view.state is SubmissionState.SUCCEEDED:
            store = local_store(options.store, submitted.evaluation.wanted[0].drv)
            await _fetch(farm, view, options, store, screen)
        return _finish(view, submitted, screen, as_json=options.as_json)


async def _build_remotely(
    client: ApiClient, options: BuildRequest, submitted: _Submitted, screen: Screen, farm: FarmView
) -> int:
    """Have the coordinator evaluate, and follow what it submits; returns the exit status."""
    from coordinator.api.requests import RemoteEvaluationRequest  # noqa: PLC0415 - pydantic, for this alone
    from coordinator.cli.remote import RemoteSource, evaluate_remotely  # noqa: PLC0415

    asked = options.evaluation
    # Not checked yet: its files have no source before it is sent.
    wanted = RemoteEvaluationRequest.model_construct(
        file=asked.files[0] if asked.files else "",
        expression=asked.expression,
        attrs=asked.attrs,
        systems=asked.systems,
        args=options.args,
        argstrs=options.argstrs,
        timeout_s=asked.timeout_s,
        **options.words.fields(),
        retry_failed=options.retry,
        wait_s=options.wait_s,
        traceparent=os.environ.get("TRACEPARENT", "")[:MAX_TRACEPARENT],
    )

    def begun(name: str) -> None:
        submitted.remote_evaluation = name

    source = options.remote or RemoteSource()
    submitted.id, submitted.evaluation = await evaluate_remotely(client, wanted, source, screen, begun)
    if options.detach:
        return _detached(await client.whole(await client.submission(submitted.id)), submitted, as_json=options.as_json)
    view = await client.whole(await follow(client, submitted.id, screen, submitted.failed))
    if options.fetch and view.state is SubmissionState.SUCCEEDED:
        await _fetch(farm, view, options, local_store(options.store), screen)
    return _finish(view, submitted, screen, as_json=options.as_json)


def _opening(options: BuildRequest) -> SubmitBody:
    """Return all that is said of a submission but its roots."""
    return SubmitBody(
        roots=(),
        open=True,
        evaluates=evaluated_from(options.evaluation),
        **options.words.fields(),
        retry_failed=options.retry,
        wait_s=options.wait_s,
        traceparent=os.environ.get("TRACEPARENT", "")[:MAX_TRACEPARENT],
    )


async def _stream(
    client: ApiClient, options: BuildRequest, submitted: _Submitted, screen: Screen, farm: FarmView
) -> SubmissionView:
    """Evaluate, submit what is found meanwhile, and follow to the end."""

    def line(text: str) -> None:
        if screen.live and streamed.id:
            screen.line(text)
        else:
            click.echo(defused(harmless(text)), err=True)

    def show(text: str) -> None:
        streamed.show_messages(text)

    made = FarmImports(client, farm, screen, options.settings, options.store, wait_s=options.wait_s)
    inputs, means = inputs_of(options.evaluation, options.settings, options.store, show, made)
    streamed = StreamedBuild(client, screen, inputs, lambda drv: local_store(options.store, drv), _opening(options))
    try:
        async with made:
            return await streamed.run(means, submitted.failed, line)
    except CoordinatorError as error:
        is_other = isinstance(error, RefusedError) and error.reason == OtherWishError.code
        if streamed.id and not is_other:
            line(f"drover: what came before goes on building: drover watch {streamed.id}; drover cancel {streamed.id}")
        raise
    finally:
        submitted.id, submitted.evaluation = streamed.id, streamed.evaluation
        submitted.moments = streamed.moments
        submitted.cut_short = streamed.cut_short


async def _submit(
    client: ApiClient, options: BuildRequest, submitted: _Submitted, screen: Screen, farm: FarmView
) -> SubmissionView:
    """Evaluate all that is asked for, and submit it."""
    stages = ClientStages()
    made = FarmImports(client, farm, screen, options.settings, options.store, wait_s=options.wait_s)
    async with made as imports:
        evaluation = await evaluate(options.evaluation, options.settings, options.store, imports)
    stages.ended("evaluate")
    wanted, submitted.evaluation = evaluation.wanted, evaluation
    store = local_store(options.store, wanted[0].drv)
    drvs = [each.drv for each in wanted]
    roots = tuple(RootBody(attr=each.attr, drv=each.drv, outputs=each.outputs, limits=each.limits) for each in wanted)

    async def send(whole: bool) -> tuple[str, ...]:
        return await send_closure(client, store, drvs, screen, stages, whole=whole)

    async def take(makers: tuple[str, ...]) -> SubmissionView:
        whole = replace(_opening(options), roots=roots, open=False, evaluates="", makers=makers, stages=stages.taken)
        return await client.submit(whole)

    view = await taken_after_sending(send, take)
    submitted.id = view.id
    return view


def _detached(view: SubmissionView, submitted: _Submitted, *, as_json: bool) -> int:
    click.echo(
        f"submitted {view.id}: {view.counts.total} steps, {view.counts.held} already in the cache\n"
        f"  watch it: drover watch {view.id}\n  end it:   drover cancel {view.id}",
        err=as_json,
    )
    if as_json:
        _print_json(view, [], submitted)
    return status_of(submitted.evaluation, lambda text: click.echo(f"drover: {text}", err=True))


def _finish(view: SubmissionView, submitted: _Submitted, screen: Screen, *, as_json: bool) -> int:
    failed = list(submitted.failed.values())
    for line in summary_lines(view, failed, time.time()):
        screen.line(line)
    if as_json:
        _print_json(view, failed, submitted)
    if submitted.summary is not None:
        append_summary(submitted.summary, summary_of(view, failed, submitted.evaluation, time.time()))
    status = status_of(submitted.evaluation, screen.line)
    if view.state is not SubmissionState.SUCCEEDED:
        return exit_status.ended_status(view.state)
    return exit_status.EVALUATION_FAILED if view.incomplete or view.unevaluated else status


def _print_json(view: SubmissionView, failed: Sequence[StepView], submitted: _Submitted) -> None:
    evaluation = submitted.evaluation
    document = {
        **{field.name: getattr(view, field.name) for field in fields(view)},
        "failed_steps": failed,
        "left_out": [each.attr for each in evaluation.left_out],
        "not_evaluated": evaluation.failed or view.not_evaluated,
        "moments": submitted.moments,
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
