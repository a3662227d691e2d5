"""View of a log's page: some lines at a time, links to each, search, and what comes while the attempt runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson
from aiohttp import web
from markupsafe import Markup

from coordinator.api.models import StepStatus
from coordinator.errors import BadRequestError, NotFoundError
from coordinator.http.web.guards import VISITOR, html
from coordinator.http.web.lines import StepLine, step_line
from coordinator.http.web.live import END, LiveStreams
from coordinator.http.web.log_html import line_html, lines_html
from coordinator.http.web.rendering import PageRenderer
from coordinator.readmodel.explain import attempts, no_log
from coordinator.readmodel.rows import StepRow
from coordinator.readmodel.views import Views
from coordinator.stores.log_lines import LineIndex, LineIndexes, LogLines, NumberedLine, find_text, lines_from
from coordinator.stores.logs import LogStore
from coordinator.stores.timings import TimingsError, TimingStore
from scheduler.model import StepKey

#: Lines of one page, of what is found, and of one message of a running log.
LINES_SHOWN: Final = 1_000
FOUND_SHOWN: Final = 50
TAIL_LINES: Final = 200
#: Bytes that a reader of a running log may be behind; what is more is passed over, and counted.
TAIL_BEHIND_BYTES: Final = 256 * 1024
#: Seconds between two messages.
TAIL_PAUSE_S: Final = 0.5
#: Characters of a text that is looked for, and digits of a number.
MAX_FIND: Final = 200
_DIGITS: Final = 9
#: The log of an attempt that printed nothing.
_NOTHING: Final = Path(os.devnull)
#: What builders of nixpkgs print where a phase begins.
_PHASE: Final = b"Running phase: "


@dataclass(frozen=True, slots=True)
class FoundLine:
    """A line that has what is looked for, or where a phase begins."""

    number: int
    text: str


@dataclass(frozen=True, slots=True)
class LogData:
    """The whole page."""

    step: StepLine
    attempt: int
    attempts: int
    total: int
    first: int
    #: The last line on the page; 0 where there is none.
    last: int
    items: Markup
    phases: tuple[FoundLine, ...]
    find: str
    found: tuple[FoundLine, ...]
    found_more: bool
    #: Whether lines come yet, and this page is where they come.
    follows: bool
    #: The step whose failure is why this attempt, which was to follow it, never began.
    cause: StepLine | None

    @property
    def before(self) -> int:
        """First line of the page before; 0 where there is none."""
        return max(1, self.first - LINES_SHOWN) if self.first > 1 else 0


class LogPage:
    """The page at `/steps/KEY/log`."""

    def __init__(
        self, views: Views, logs: LogStore, timings: TimingStore, renderer: PageRenderer, streams: LiveStreams
    ) -> None:
        self._views = views
        self._logs = logs
        self._timings = timings
        self._renderer = renderer
        self._streams = streams
        self._indexes = LineIndexes()

    async def show(self, request: web.Request) -> web.Response:
        """Show the end of a log, or the lines that are asked for."""
        row = self._views.step(request.match_info["key"])
        attempt = _attempt_of(request, row)
        path = await self._file(row, attempt)
        runs = _runs(row, attempt)
        index = await asyncio.to_thread(self._indexes.of, path)
        total = await asyncio.to_thread(index.count)
        asked = _number_of(request, "line")
        first = max(1, min(asked or total - LINES_SHOWN + 1, total))
        read = await asyncio.to_thread(index.lines, first, LINES_SHOWN)
        items, shown = await asyncio.to_thread(lines_html, read.lines)
        find = request.query.get("find", "")[:MAX_FIND]
        found, more = await asyncio.to_thread(_find, index, find) if find else ((), False)
        phases = await self._landmarks(row, attempt, index, total)
        last = first + shown - 1 if shown else 0
        data = LogData(
            step=step_line(self._views, row),
            attempt=attempt,
            attempts=row.life.attempt,
            total=total,
            first=first,
            last=last,
            items=items,
            phases=phases,
            find=find,
            found=found,
            found_more=more,
            follows=runs and last >= total,
            cause=self._cause(row, attempt) if path is _NOTHING else None,
        )
        return html(await self._renderer.page("log.html", visitor=request[VISITOR], page=data))

    async def live(self, request: web.Request) -> web.StreamResponse:
        """Stream what is printed from `?after=` lines on, until the attempt ends."""
        row = self._views.step(request.match_info["key"])
        attempt = _attempt_of(request, row)
        after = _number_of(request, "after")
        return await self._streams.serve_frames(request, self._tail(row, attempt, after))

    async def _tail(self, row: StepRow, attempt: int, after: int) -> AsyncGenerator[bytes, None]:
        path = await self._file(row, attempt)
        index = await asyncio.to_thread(self._indexes.of, path)
        begun = await asyncio.to_thread(index.lines, after + 1, 0)
        offset, number = begun.end, after + 1
        while True:
            # Asked before reading: what came in between is then read by the next round.
            runs = _runs(row, attempt)
            if path is _NOTHING:
                path = await self._file(row, attempt)
            skipped, read = await asyncio.to_thread(_newest, path, offset, number, whole=runs)
            offset, number = read.end or offset, number + skipped + len(read.lines)
            if read.lines:
                items, _ = await asyncio.to_thread(lines_html, read.lines)
                yield b"event: lines\ndata: " + orjson.dumps({"html": items, "skipped": skipped}) + b"\n\n"
            elif not runs:
                yield END
                return
            else:
                yield b""
            if not read.following:
                await asyncio.sleep(TAIL_PAUSE_S)

    async def _landmarks(self, row: StepRow, attempt: int, index: LineIndex, total: int) -> tuple[FoundLine, ...]:
        """Return where phases begin: as the worker has reported, else where builders of nixpkgs say so themselves."""
        try:
            timings = await self._timings.of_steps([row.key])
        except TimingsError:
            timings = []
        measured = next((timing.measured for timing in timings if timing.attempt == attempt), None)
        if measured is not None and measured.landmarks:
            return tuple(FoundLine(line, name) for line, name in measured.landmarks if line <= total)
        found, _ = await asyncio.to_thread(_find, index, _PHASE.decode())
        return tuple(FoundLine(line.number, line.text.replace(_PHASE.decode(), "")) for line in found)

    def _cause(self, row: StepRow, attempt: int) -> StepLine | None:
        """Return what doomed a step, where its last attempt is the one that is asked for."""
        if row.state is not StepStatus.DOOMED or attempt != row.life.attempt:
            return None
        cause = self._views.row_of(StepKey(row.life.cause))
        return step_line(self._views, cause) if cause is not None else None

    async def _file(self, row: StepRow, attempt: int) -> Path:
        """Return the file of a log, brought back from the archive where it lies there. Raises `LogError`."""
        return await self._logs.file(row.key, attempt) or _NOTHING


def _newest(path: Path, offset: int, number: int, *, whole: bool) -> tuple[int, LogLines]:
    """Return lines from `offset` on, and how many were passed over because the reader is too far behind.

    With `whole` a line that has no end yet is left for later.
    """
    skipped = 0
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return 0, LogLines()
    if size - offset > TAIL_BEHIND_BYTES:
        far = LogLines(following=number, end=offset)
        while far.following and size - far.end > TAIL_BEHIND_BYTES // 2:
            far = lines_from(path, far.end, far.following, LINES_SHOWN)
            skipped += len(far.lines)
        offset = far.end
    read = lines_from(path, offset, number + skipped, TAIL_LINES)
    if whole and read.lines and not _ends_with_newline(path, read.end):
        kept = read.lines[:-1]
        at = read.end - len(read.lines[-1].data) - read.lines[-1].cut
        read = LogLines(kept, 0, read.size, at)
    return skipped, read


def _ends_with_newline(path: Path, end: int) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, end - 1))
        return file.read(1) == b"\n"


def _find(index: LineIndex, text: str) -> tuple[tuple[FoundLine, ...], bool]:
    """Return the lines that have a text, each without its colours."""
    numbers, more = find_text(index.path, text.encode("utf-8", "surrogateescape"), FOUND_SHOWN)
    lines = [line for number in numbers for line in index.lines(number, 1).lines]
    return tuple(FoundLine(line.number, _plain(line)) for line in lines), more


def _plain(line: NumberedLine) -> str:
    return line_html(NumberedLine(line.number, line.data[:MAX_FIND])).striptags().removeprefix(str(line.number)).strip()


def _runs(row: StepRow, attempt: int) -> bool:
    return row.state is StepStatus.RUNNING and row.life.attempt == attempt


def _attempt_of(request: web.Request, row: StepRow) -> int:
    latest = row.life.attempt
    if not latest:
        raise NotFoundError(no_log(row))
    attempt = _number_of(request, "attempt") or latest
    if attempt > latest:
        raise NotFoundError(f"step {row.key} had {attempts(row)}; there is no attempt {attempt}.")
    return attempt


def _number_of(request: web.Request, name: str) -> int:
    """Return a number of the address, 0 where there is none."""
    digits = request.query.get(name, "") or "0"
    if not digits.isascii() or not digits.isdigit() or len(digits) > _DIGITS:
        raise BadRequestError(f"`{name}` is a number.")
    return int(digits)
