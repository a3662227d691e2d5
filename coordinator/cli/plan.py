"""`drover plan`: what a wish list could be fetched from or would be built as; nothing is built, stored or queued."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coordinator.api.requests import PlanQuery
from coordinator.cli import exit_status
from coordinator.cli.ci import defused
from coordinator.cli.evaluation import show_messages
from coordinator.cli.lines import plain, written
from coordinator.cli.plan_text import PlanText, plan_lines, plan_markdown
from coordinator.cli.screen import is_capable, wants_colours
from coordinator.cli.status import print_json, print_lines
from coordinator.cli.wish_reading import WishRequest, present_paths, this_system, wishes_of
from coordinator.client.api_client import ApiClient
from coordinator.client.closure import local_store
from coordinator.wishes.document import document_of

#: Cells of an output that is no terminal.
WIDTH: Final = 80


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Arguments of the command."""

    wishes: WishRequest
    every: bool = False
    as_json: bool = False
    markdown: Path | None = None


async def plan(client: ApiClient, request: PlanRequest) -> int:
    """Read, ask and show; returns the exit status."""
    wishes = await wishes_of(request.wishes, show_messages)
    present = await asyncio.to_thread(present_paths, wishes, local_store(request.wishes.store))
    document = await asyncio.to_thread(document_of, wishes)
    view = await client.plan(PlanQuery.model_construct(wishes=document, present=present))
    text = PlanText(view, this_system(), _when, request.every)
    if request.markdown is not None:
        await asyncio.to_thread(request.markdown.write_text, plan_markdown(text), encoding="utf-8")
    if request.as_json:
        print_json(view)
        return exit_status.OK
    _show(text)
    return exit_status.OK


def _show(text: PlanText) -> None:
    if not is_capable(sys.stdout, os.environ):
        print_lines([plain(line).rstrip() for line in plan_lines(text, WIDTH)])
        return
    colours = wants_colours(os.environ)
    lines = plan_lines(text, shutil.get_terminal_size((WIDTH, 24)).columns)
    sys.stdout.write("".join([f"{defused(written(line, colours=colours))}\n" for line in lines]))


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
