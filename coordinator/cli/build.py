"""`drover build` and `drover watch`: evaluate, send what is missing, submit, follow, fetch."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import click

from coordinator.api.models import FarmView, StepStatus, StepView, SubmissionState, SubmissionView
from coordinator.api.requests import ClientStage, IntakeQuery, RootRequest, SubmitRequest
from coordinator.api.streams import SourceHeader, encode_derivations, encode_sources, in_thread
from coordinator.api.trace_context import MAX_TRACEPARENT
from coordinator.cli import exit_status
from coordinator.cli.ci import Ci
from coordinator.cli.evaluation import EvaluationRequest, evaluate, show_messages, status_of
from coordinator.cli.follow import follow
from coordinator.cli.rendering import size, summary_lines
from coordinator.cli.screen import Screen
from coordinator.cli.status import print_json
from coordinator.client.api_client import ApiClient
from coordinator.client.closure import (
    Closure,
    LocalStore,
    describe_sources,
    find_maker,
    local_store,
    read_closure,
    refuse_lost_references,
)
from coordinator.client.errors import ClientError
from coordinator.errors import CoordinatorError
from coordinator.evaluation.model import EvaluatedRoot, Evaluation
from infra.nix.store_path import base_name_of
from infra.process import ProcessError, run

#: Seconds after the client has sent what the farm lost before it looks again: each look sends the whole graph.
SEND_AGAIN_EVERY_S = 10.0
#: Seconds for one `nix-store -r`, and how many paths it is given.
FETCH_S = 24 * 3600.0
FETCH_AT_ONCE = 500
MAX_FETCH_OUTPUT_BYTES = 16 * 1024 * 1024


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
        # First of all whether a coordinator answers: an evaluation can take minutes.
        farm = await client.farm()
        stages = _Stages()
        evaluation = await evaluate(options.evaluation, options.settings, options.store)
        stages.ended("evaluate")
        wanted, submitted.evaluation = evaluation.wanted, evaluation
        store = local_store(options.store, wanted[0].drv)
        makers = await _send(client, store, wanted, screen, stages)
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
        async with _sending_again(lambda: _send(client, store, wanted, screen, _Stages()), screen) as on_step:
            view = await follow(client, view.id, screen, submitted.failed, on_step)
        view = await client.whole(view)
        if options.fetch and view.state is SubmissionState.SUCCEEDED:
            await _fetch(farm, view, options, store, screen)
        return _finish(view, submitted, screen, as_json=options.as_json)


class _Stages:
    """Times of what the client does before it submits, one after the other, for the submission's trace."""

    def __init__(self) -> None:
        self.taken: tuple[ClientStage, ...] = ()
        self._since = time.time()

    def ended(self, name: Literal["evaluate", "closure", "upload"]) -> None:
        """Note a stage that began when the one before it ended."""
        begin, self._since = self._since, time.time()
        self.taken = (*self.taken, ClientStage(name=name, begin=begin, end=max(begin, self._since)))


async def _send(
    client: ApiClient, store: LocalStore, wanted: Sequence[EvaluatedRoot], screen: Screen, stages: _Stages
) -> tuple[str, ...]:
    """Send what the coordinator lacks of the closure, in one stream each.

    Returns the derivations of built paths among the sources that the farm must build first.
    """
    makers: dict[str, None] = {}
    while True:
        closure: Closure = await asyncio.to_thread(read_closure, store, [*(each.drv for each in wanted), *makers])
        found = await describe_sources(store, closure.sources)
        headers = found.headers
        built = tuple(map(base_name_of, found.built))
        query = IntakeQuery(
            store_dir=store.store_dir,
            derivations=tuple(base_name_of(drv) for drv in closure.derivations),
            sources=(*(header.path for header in headers), *built),
            built=built,
        )
        missing = await client.missing(query)
        absent = set(missing.sources)
        sent = [header for header in headers if header.path in absent]
        refuse_lost_references(store, sent, absent.intersection(built), missing.trouble)
        unbuilt = [path for path in found.built if base_name_of(path) in absent and path not in closure.outputs]
        if not unbuilt:
            break
        # Each goes into the next closure, so that this ends.
        for path in unbuilt:
            makers[await asyncio.to_thread(find_maker, store, path, found.built[path], missing.trouble)] = None
    stages.ended("closure")
    if missing.derivations or missing.sources:
        lacking = set(missing.sources)
        sources = [header for header in headers if header.path in lacking]
        sized = f" ({size(sum(header.nar_size for header in sources))})" if sources else ""
        screen.status(
            f"sending {len(missing.derivations)} of {len(query.derivations)} derivations and "
            f"{len(sources)} of {len(headers)} sources{sized}"
        )
        if missing.derivations:
            names = set(missing.derivations)
            members = (
                (base_name_of(drv), store.read(drv)) for drv in closure.derivations if base_name_of(drv) in names
            )
            await client.send_derivations(in_thread(encode_derivations(members)))
        if sources:
            nars = ((header, _nar(store, header)) for header in sources)
            await client.send_sources(in_thread(encode_sources(nars)))
    stages.ended("upload")
    return tuple(makers)


@asynccontextmanager
async def _sending_again(
    send: Callable[[], Awaitable[object]], screen: Screen
) -> AsyncIterator[Callable[[StepView], None]]:
    """Send what the farm lacks again whenever a step waits for a lost input, as long as the block runs.

    Gives what takes each step that changes. Where what is lost cannot be sent, its step waits as before.
    """
    lost = asyncio.Event()

    def on_step(step: StepView) -> None:
        if step.lost_input:
            lost.set()

    async def run() -> None:
        while True:
            await lost.wait()
            lost.clear()
            try:
                await send()
            except (CoordinatorError, OSError) as error:
                screen.status(f"the farm lost an input, which could not be sent again: {error}")
            await asyncio.sleep(SEND_AGAIN_EVERY_S)

    sender = asyncio.create_task(run())
    try:
        yield on_step
    finally:
        sender.cancel()
        with suppress(asyncio.CancelledError):
            await sender


def _nar(store: LocalStore, header: SourceHeader) -> Callable[[], Any]:
    return lambda: store.dump(f"{store.store_dir}/{header.path}")


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
    """Realise the root outputs in the local store with the farm's cache as the only substituter."""
    paths = sorted({path for root in view.roots if root.state is StepStatus.DONE for path in root.outputs.values()})
    screen.status(f"fetching {len(paths)} outputs from {farm.cache_url}")
    settings = {
        "substituters": farm.cache_url,
        "trusted-public-keys": " ".join(farm.public_keys),
        "require-sigs": "true",
        "narinfo-cache-negative-ttl": "0",
        "max-jobs": "0",
    }
    words = [word for name, value in settings.items() for word in ("--option", name, value)]
    for start in range(0, len(paths), FETCH_AT_ONCE):
        command = ["nix-store", "-r", *paths[start : start + FETCH_AT_ONCE], *store.flags, *options.settings, *words]
        try:
            done = await run(command, env=os.environ, timeout_s=FETCH_S, max_output_bytes=MAX_FETCH_OUTPUT_BYTES)
        except ProcessError as error:
            raise ClientError(f"the outputs are built but could not be fetched: {error}") from None
        if done.returncode != 0:
            messages = done.stderr.decode(errors="replace").strip()
            show_messages(messages)
            raise ClientError(
                f"the outputs are built but could not be fetched from {farm.cache_url} (Nix's messages are above); "
                "if this machine's Nix daemon does not trust you, add the cache to its nix.conf"
            )
