"""Following a submission on a screen: the part of the terminal that has a clock.

On a terminal a live region stands below what scrolls, drawn again when something changed, at most `FRAMES_PER_S`
times a second, and once a second for the ages in it. Elsewhere there are plain lines, and a heartbeat where nothing
happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from coordinator.api.models import Snapshot, StepChanged, StepView, SubmissionView, WatchEvent
from coordinator.cli.lines import cut
from coordinator.cli.live import live_lines
from coordinator.cli.progress import News, Progress
from coordinator.cli.rendering import built_line, heartbeat_line, news_lines, one_line
from coordinator.cli.screen import Screen, resizing
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import ClientError
from coordinator.errors import CoordinatorError

#: The coordinator sends changes five times a second; more frames would show nothing more.
FRAMES_PER_S = 5
#: Seconds between two lines about what was built, on a terminal.
BUILT_EVERY_S = 1.0
HEARTBEAT_S = 30.0


class Follower:
    """One submission on one screen."""

    def __init__(self, screen: Screen, progress: Progress) -> None:
        self._screen = screen
        self._progress = progress
        self._dirty = asyncio.Event()
        self._resized = asyncio.Event()
        #: Built since the last line about that; for terminals only.
        self._built: list[StepView] = []

    def changed(self) -> None:
        """Something of the progress changed."""
        self._dirty.set()

    def resized(self) -> None:
        """The size of the window changed: the next frame is drawn at once."""
        self._resized.set()
        self._dirty.set()

    def tell(self, news: News, step: StepView) -> None:
        """Say what is new: at once, but what was built together with what else was within a second."""
        screen = self._screen
        if screen.live and news in {News.STARTED, News.STARTED_AGAIN}:
            return
        if screen.live and news is News.BUILT:
            self._built.append(step)
            return
        first, *rest = news_lines(news, step)
        if news is News.FAILED:
            lines = [[(first, "bold red")], *([(line, "")] for line in rest)]
            screen.failure(step.key, one_line(step.name), lines)
        else:
            screen.line(first)

    async def show(self) -> None:
        """Show the progress until cancelled."""
        with resizing(self.resized):
            await (self._paint() if self._screen.live else self._beat())

    def end(self) -> None:
        """Say what is still to be said, and leave the terminal as it was."""
        self.tell_built()
        self._screen.undraw()

    async def _paint(self) -> None:
        clock = asyncio.get_running_loop().time
        told_at = clock()
        while True:
            if clock() - told_at >= BUILT_EVERY_S:
                told_at = clock()
                self.tell_built()
            self._resized.clear()
            self._screen.draw(live_lines(self._progress, time.time(), self._screen.window()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1 / FRAMES_PER_S):
                    await self._resized.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._dirty.wait()
            self._dirty.clear()

    def tell_built(self) -> None:
        """Say what was built since this was said last."""
        if self._built:
            width = self._screen.window().width
            self._screen.block([cut([(built_line(self._built, width), "green")], width)])
            self._built.clear()

    async def _beat(self) -> None:
        screen, progress = self._screen, self._progress
        stuck: tuple[str, ...] = ()
        silent_since = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._dirty.wait()
                self._dirty.clear()
            if progress.stuck != stuck:
                for sentence in progress.stuck:
                    if sentence not in stuck:
                        screen.line(f"! {sentence}")
                stuck = progress.stuck
            if time.monotonic() - silent_since >= HEARTBEAT_S:
                screen.line(heartbeat_line(progress, time.time()))
                silent_since = time.monotonic()
            await asyncio.sleep(1 / FRAMES_PER_S)


async def follow(
    client: ApiClient,
    submission: str,
    screen: Screen,
    failed: dict[str, StepView] | None = None,
    on_step: Callable[[StepView], None] = lambda _: None,
    *,
    progress: Progress | None = None,
) -> SubmissionView:
    """Show a submission until it has ended and return its last state; `failed` is filled with its failed steps.

    `on_step` is called with each step that runs, failed or changes; `progress` is empty and what others write to too.

    Raises:
        ClientError: The coordinator refused, or has been away for too long.
    """
    progress = Progress() if progress is None else progress
    if failed is not None:
        progress.failed = failed
    follower = Follower(screen, progress)
    painter = asyncio.create_task(follower.show())
    try:
        async for event in client.watch(submission, on_lost=lambda why: screen.status(f"{why}; trying again")):
            for news, step in progress.apply(event):
                follower.tell(news, step)
            for step in _steps_of(event):
                on_step(step)
            follower.changed()
    finally:
        painter.cancel()
        await asyncio.gather(painter, return_exceptions=True)
        follower.end()
    if not painter.cancelled() and (error := painter.exception()) is not None:
        raise error if isinstance(error, CoordinatorError | OSError) else RuntimeError("drawing failed") from error
    if progress.submission is None:
        raise ClientError(f"the coordinator said nothing about {submission}")
    return progress.submission


def _steps_of(event: WatchEvent) -> tuple[StepView, ...]:
    if isinstance(event, Snapshot):
        return event.steps
    return (event.step,) if isinstance(event, StepChanged) else ()
