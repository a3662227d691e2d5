"""`drover plan`: what a wish list could be fetched from or would be built as; nothing is built, stored or queued."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from coordinator.api.limits import MAX_PLANNED
from coordinator.api.plan_models import PlanView
from coordinator.api.requests import PlannedDerivation, PlanQuery
from coordinator.cli import exit_status
from coordinator.cli.ci import defused
from coordinator.cli.evaluation import show_messages
from coordinator.cli.lines import plain, written
from coordinator.cli.plan_text import PlanText, plan_lines, plan_markdown
from coordinator.cli.printing import print_json, print_lines
from coordinator.cli.screen import is_capable, wants_colours
from coordinator.cli.status import write_report
from coordinator.cli.wish_reading import WishRequest, present_paths, this_system, wishes_of
from coordinator.client.api_client import ApiClient
from coordinator.client.bodies import MembersBody
from coordinator.client.closure import ClosureError, LocalStore, local_store
from coordinator.client.closure_walk import ClosureWalk
from coordinator.wishes.document import document_of
from coordinator.wishes.model import WishedPaths, WishList
from infra.nix.store_path import base_name_of
from infra.records import record

#: Cells of an output that is no terminal.
WIDTH: Final = 80


@record(frozen=True, slots=True)
class PlanRequest:
    """Arguments of the command."""

    wishes: WishRequest
    every: bool = False
    as_json: bool = False
    markdown: Path | None = None
    #: MiB that this machine fetches in a second, where that is known.
    rate: float | None = None


async def plan(client: ApiClient, request: PlanRequest) -> int:
    """Read, ask and show; returns the exit status."""
    wishes = await wishes_of(request.wishes, show_messages)
    present = await asyncio.to_thread(present_paths, wishes, local_store(request.wishes.store))
    document = await asyncio.to_thread(document_of, wishes)
    query = PlanQuery.model_construct(wishes=document, present=present, graph=())
    view = await client.plan(query)
    graph = await _graph(client, wishes, view, local_store(request.wishes.store))
    if graph:
        view = await client.plan(query.model_copy(update={"graph": graph}))
    text = PlanText(view, this_system(), _when, request.every, request.rate or 0.0)
    if request.as_json:
        print_json(view)
    else:
        _show(text)
    if request.markdown is not None:
        await asyncio.to_thread(write_report, request.markdown, plan_markdown(text))
    return exit_status.OK


async def _graph(
    client: ApiClient, wishes: WishList, view: PlanView, store: LocalStore
) -> tuple[PlannedDerivation, ...]:
    """Return the derivations of this machine that the farm does not have and would build, inputs first."""
    systems: dict[str, str] = {}
    for wish, each in zip(wishes.wishes, view.wishes, strict=True):
        drv = wish.target.derivation if isinstance(wish.target, WishedPaths) else None
        if drv and each.state in {"buildable", "no_worker"} and not each.steps and store.has(drv):
            systems[drv] = wish.system
    if not systems:
        return ()
    walk = ClosureWalk(store, list(systems))
    try:
        while walk.questions:
            if walk.asked > MAX_PLANNED:
                return ()
            names = {base_name_of(drv): drv for drv in walk.questions}
            # Sources are not named, so that nothing is had from an upstream.
            answer = await client.missing(MembersBody(store_dir=store.store_dir, derivations=tuple(names), sources=()))
            await asyncio.to_thread(walk.learn, [names[name] for name in answer.derivations])
        return await asyncio.to_thread(_derivations, walk, systems)
    except ClosureError:
        # A part of the closure is collected: what the farm knows has to do.
        return ()


def _derivations(walk: ClosureWalk, systems: Mapping[str, str]) -> tuple[PlannedDerivation, ...]:
    order = walk.closure().derivations
    if any("" in walk.head(drv).outputs for drv in order):
        # Some paths are known after the build alone: a farm does not take those.
        return ()
    places = {drv: place for place, drv in enumerate(order)}
    # What one stands on is for its system, nearly always.
    system_of = dict(systems)
    for drv in reversed(order):
        for need in walk.head(drv).input_drvs:
            system_of.setdefault(need, system_of[drv])
    return tuple(
        PlannedDerivation.model_construct(
            drv=base_name_of(drv),
            outputs=walk.head(drv).outputs,
            system=system_of[drv],
            needs=tuple(places[need] for need in walk.head(drv).input_drvs if need in places),
            known=tuple(base_name_of(need) for need in walk.head(drv).input_drvs if need not in places),
        )
        for drv in order
    )


def _show(text: PlanText) -> None:
    if not is_capable(sys.stdout, os.environ):
        print_lines([plain(line).rstrip() for line in plan_lines(text, WIDTH)])
        return
    colours = wants_colours(os.environ)
    lines = plan_lines(text, shutil.get_terminal_size((WIDTH, 24)).columns)
    sys.stdout.write("".join([f"{defused(written(line, colours=colours))}\n" for line in lines]))


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
