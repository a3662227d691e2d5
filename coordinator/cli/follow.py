"""Following a submission on a screen: the part of the terminal that has a clock and writes.

On a terminal a live region stands below what scrolls, drawn again when something changed, at most `FRAMES_PER_S`
times a second, and once a second for the ages in it. Elsewhere there are plain lines, and a heartbeat where nothing
happens.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from coordinator.api.models import StepChanged, StepView, SubmissionView
from coordinator.cli.rendering import News, Progress, heartbeat_line, live_region, news_lines
from coordinator.cli.terminal_controls import harmless
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import ClientError
from coordinator.errors import CoordinatorError

FRAMES_PER_S = 10
HEARTBEAT_S = 30.0


class Screen:
    """Output for people: lines, and on a terminal a live region below them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal and not console.is_dumb_terminal

    @classmethod
    def choose(cls, *, as_json: bool) -> Screen:
        """Return standard output, or standard error where standard output is for JSON."""
        stream = sys.stderr if as_json else sys.stdout
        return cls(Console(file=stream, highlight=False, emoji=False, markup=False))

    def line(self, text: str, style: str = "") -> None:
        """Write one line as it stands: not wrapped, nothing in it means anything, to the terminal neither."""
        text = harmless(text)
        if self.live:
            self.console.print(Text(text, style), soft_wrap=True)
        else:
            # Not through the console: a pipe wants whole lines at once, whatever its encoding.
            file = self.console.file
            encoding = getattr(file, "encoding", None) or "utf-8"
            file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            file.flush()

    def status(self, text: str) -> None:
        """Write a line about the client's own doings."""
        self.line(text, "dim")


async def follow(
    client: ApiClient,
    submission: str,
    screen: Screen,
    failed: dict[str, StepView] | None = None,
    on_step: Callable[[StepView], None] = lambda _: None,
) -> SubmissionView:
    """Show a submission until it has ended and return its last state; `failed` is filled with its failed steps.

    `on_step` is called with each step that changes.

    Raises:
        ClientError: The coordinator refused, or has been away for too long.
    """
    progress = Progress()
    if failed is not None:
        progress.failed = failed
    dirty = asyncio.Event()
    live: Any = Live(console=screen.console, auto_refresh=False, transient=True) if screen.live else nullcontext()
    with live:
        painter = asyncio.create_task(
            _paint(live, screen, progress, dirty) if screen.live else _beat(screen, progress, dirty)
        )
        try:
            async for event in client.watch(submission, on_lost=lambda why: screen.status(f"{why}; trying again")):
                for news, step in progress.apply(event):
                    _tell(screen, news, step)
                if isinstance(event, StepChanged):
                    on_step(event.step)
                dirty.set()
        finally:
            painter.cancel()
            await asyncio.gather(painter, return_exceptions=True)
    if not painter.cancelled() and (error := painter.exception()) is not None:
        raise error if isinstance(error, CoordinatorError | OSError) else RuntimeError("drawing failed") from error
    if progress.submission is None:
        raise ClientError(f"the coordinator said nothing about {submission}")
    return progress.submission


def _tell(screen: Screen, news: News, step: StepView) -> None:
    if screen.live and news in {News.STARTED, News.STARTED_AGAIN}:
        return
    lines = news_lines(news, step)
    if screen.live and news is News.BUILT:
        screen.line(f"\u2714 {lines[0].removeprefix('built ')}", "green")
        return
    screen.line(lines[0], "bold red" if news is News.FAILED else "")
    for line in lines[1:]:
        screen.line(line)


async def _paint(live: Live, screen: Screen, progress: Progress, dirty: asyncio.Event) -> None:
    while True:
        live.update(live_region(progress, time.time(), screen.console.width, screen.console.height), refresh=True)
        await asyncio.sleep(1 / FRAMES_PER_S)
        try:
            async with asyncio.timeout(1.0):
                await dirty.wait()
        except TimeoutError:
            continue
        dirty.clear()


async def _beat(screen: Screen, progress: Progress, dirty: asyncio.Event) -> None:
    stuck: tuple[str, ...] = ()
    silent_since = time.monotonic()
    while True:
        try:
            async with asyncio.timeout(1.0):
                await dirty.wait()
            dirty.clear()
        except TimeoutError:
            pass
        if progress.stuck != stuck:
            for sentence in progress.stuck:
                if sentence not in stuck:
                    screen.line(f"! {sentence}")
            stuck = progress.stuck
        if time.monotonic() - silent_since >= HEARTBEAT_S:
            screen.line(heartbeat_line(progress, time.time()))
            silent_since = time.monotonic()
        await asyncio.sleep(1 / FRAMES_PER_S)
