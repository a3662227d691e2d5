"""View of a timeline: what ran on each worker in a window of time, of a submission or of the whole farm.

Up to `BOXES` attempts are drawn one by one, with their stages and phases; of more the database counts how many ran at a
time in each bucket, so that no attempt is left out at any zoom. The window is in the address: `from` and `to` in Unix
seconds; without `to` it ends now and moves on. `width` is that of the drawing in pixels.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from aiohttp import web
from markupsafe import Markup

from coordinator.errors import BadRequestError
from coordinator.http.web.attempts import STRETCHES, attempt_lines
from coordinator.http.web.guards import VISITOR, html
from coordinator.http.web.lines import SubmissionLine, submission_line
from coordinator.http.web.live import LiveStreams
from coordinator.http.web.rendering import PageRenderer
from coordinator.http.web.waterfall import (
    KIND_TEXTS,
    STAGED_WIDTH,
    Box,
    DrawnWorker,
    Stretch,
    TimeWindow,
    about_worker,
    draw,
)
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from coordinator.readmodel.waterfall import RUNNING, UNKNOWN, Occupancy, assign_tracks, occupancies
from coordinator.stores.timing_windows import OTHER, Edges, TimingWindows
from coordinator.stores.timings import AttemptTiming, TimingStore
from infra.clock import Clock
from infra.slices import in_slices
from scheduler.model import StepKey

#: Attempts that are drawn one by one; those that are looked at to put them on the tracks where they were before.
BOXES: Final = 500
PLACED: Final = 4 * BOXES
#: Boxes whose stages and phases are drawn, the widest, and phases of each, the longest: closer, all are.
STAGED: Final = 120
PHASES: Final = 12
#: Attempts of a window beyond which the database is not asked to count them, and running ones that are looked at.
MOST_COUNTED: Final = 400_000
MOST_RUNNING: Final = 10_000
#: Workers with a row of their own; all others share one.
WORKERS_DRAWN: Final = 80
#: Pixels of a bucket, and of the whole drawing: least, usual, most.
BUCKET_WIDTH: Final = 6
LEAST_WIDTH, USUAL_WIDTH, MOST_WIDTH = 240, 1_100, 1_400
#: Least span that one can zoom into, and the span of the farm's own timeline, usual and longest.
LEAST_S: Final = 1.0
FARM_S: Final = 3600.0
FARM_LONGEST_S: Final = 7 * 86400.0
#: A window that moves ends at multiples of this share of its span, so that it is not drawn anew all the time.
MOVES: Final = 200
#: A live timeline is made anew after so many times what that took, and not before this many seconds.
REST_FACTOR: Final = 10.0
REST_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose timeline it is; times in Unix seconds."""

    #: None: the farm's.
    row: SubmissionRow | None
    line: SubmissionLine | None
    #: The whole span that can be looked at.
    first: float
    last: float
    #: It goes on.
    moves: bool


@dataclass(frozen=True, slots=True)
class WorkerSums:
    """Numbers of the attempts of one worker."""

    name: str
    slots: int
    attempts: int
    busy_s: float
    #: Attempts by kind.
    kinds: Mapping[str, int]

    def count(self, *kinds: str) -> int:
        """Return how many attempts are of some kinds."""
        return sum(self.kinds.get(kind, 0) for kind in kinds)


@dataclass(frozen=True, slots=True)
class TimelineData:
    """The whole page."""

    subject: Subject
    window: TimeWindow
    #: The address has no end: the window moves on.
    follows: bool
    drawing: Markup | None
    #: All attempts of the window, and those of the submission.
    total: int
    own: int
    workers: tuple[WorkerSums, ...]
    #: Attempts that are drawn one by one, by begin; with their workers. Empty where there are too many.
    boxes: tuple[tuple[str, Box], ...]
    #: Why nothing is drawn.
    refusal: str = ""
    #: Why the newest attempts may be missing, "" while none are.
    trouble: str = ""

    @property
    def live(self) -> bool:
        """True while the window may change."""
        return self.subject.moves and self.window.until >= self.subject.last - self.window.span_s / MOVES

    def span(self, factor: float, shift: float) -> str:
        """Return the address of the window that is wider by a factor and moved by a share of its width."""
        now, subject = self.window, self.subject
        width = min(max(LEAST_S, now.span_s * factor), max(LEAST_S, subject.last - subject.first))
        middle = (now.since + now.until) / 2 + now.span_s * shift
        since = max(subject.first, min(middle - width / 2, subject.last - width))
        return TimeWindow(since, since + width, now.width).address()

    @property
    def stages(self) -> Sequence[str]:
        """Stages of an attempt, in their order."""
        return STRETCHES[1:]

    def kind_text(self, kind: str) -> str:
        """Return a kind in words."""
        return KIND_TEXTS[kind]


class TimelinePage:
    """The pages at `/timeline` and `/submissions/ID/timeline`."""

    def __init__(
        self, views: Views, timings: TimingStore, renderer: PageRenderer, streams: LiveStreams, clock: Clock
    ) -> None:
        self._views = views
        self._timings = timings
        self._windows = TimingWindows(timings)
        self._renderer = renderer
        self._streams = streams
        self._clock = clock

    async def show(self, request: web.Request) -> web.Response:
        """Show what ran in a window."""
        data = await self._data(request)
        return html(await self._renderer.page("timeline.html", visitor=request[VISITOR], page=data))

    async def live(self, request: web.Request) -> web.StreamResponse:
        """Stream what changes of it until it has ended."""
        loop = asyncio.get_running_loop()
        last: tuple[Mapping[str, str], bool] = {}, False
        rests_until = float("-inf")

        async def parts() -> tuple[Mapping[str, str], bool]:
            nonlocal last, rests_until
            begin = loop.time()
            if begin >= rests_until:
                data = await self._data(request)
                last = await self._renderer.parts("timeline.html", page=data), not data.live
                rests_until = loop.time() + max(REST_S, REST_FACTOR * (loop.time() - begin))
            return last

        return await self._streams.serve(request, parts)

    def _subject(self, request: web.Request) -> Subject:
        now = self._clock.now()
        if "id" not in request.match_info:
            return Subject(None, None, now - FARM_LONGEST_S, now, moves=True)
        row = self._views.submission(request.match_info["id"])
        over = row.ended or row.withdrawn
        last = max(row.created_at + LEAST_S, row.touched_at if over else now)
        return Subject(row, submission_line(self._views, row), row.created_at, last, moves=not over)

    async def _data(self, request: web.Request) -> TimelineData:
        subject = self._subject(request)
        window, follows = _window(request, subject)
        since, until = window.since, window.until
        running = await self._windows.running(until, MOST_RUNNING)
        ended = await self._windows.count(since, until, MOST_COUNTED)
        data = TimelineData(subject, window, follows, None, ended + len(running), 0, (), (), "", self._timings.trouble)
        if ended > MOST_COUNTED:
            return replace(data, refusal=f"More than {MOST_COUNTED:,} attempts ran then. Choose a shorter span.")
        if data.total > BOXES:
            submission = None if subject.row is None else subject.row.id
            edges = await self._windows.edges(since, until, window.width // BUCKET_WIDTH, submission)
            return await in_slices(self.counted(data, running, *edges))
        # From a moment that stays the same while one pans: the tracks of what is seen do too.
        block_s = 4 * 2.0 ** math.ceil(math.log2(window.span_s))
        before = await self._windows.attempts(since - since % block_s, until, PLACED + 1)
        if len(before) > PLACED:
            before = await self._windows.attempts(since, until, PLACED)
        drawn = await in_slices(self.single(data, sorted([*before, *running], key=_begin)))
        wide = ((window.x(box.end) - window.x(box.begin), box.step, box.attempt) for _, box in drawn.boxes)
        widest = sorted((each for each in wide if each[0] >= STAGED_WIDTH), reverse=True)[:STAGED]
        wanted = {(step, attempt) for _, step, attempt in widest}
        kept = await self._timings.of_steps(sorted({step for step, _ in wanted}))
        details = {(each.step, each.attempt): each for each in kept if (each.step, each.attempt) in wanted}
        return await in_slices(self.detailed(drawn, details))

    # One by one.

    def single(self, data: TimelineData, attempts: Sequence[AttemptTiming]) -> Generator[None, None, TimelineData]:
        """Put attempts on their tracks, by worker."""
        window = data.window
        row = data.subject.row
        wanted = {StepKey(each.step) for each in attempts}
        own = wanted if row is None else wanted.intersection(row.members)
        yield
        by_worker: dict[str, list[AttemptTiming]] = {}
        for each in attempts:
            by_worker.setdefault(each.worker or "unknown", []).append(each)
        boxes: list[tuple[str, Box]] = []
        for worker, its in sorted(by_worker.items()):
            spans = [(_begin(each), self._end(each, window.until)) for each in its]
            for each, (begin, end), track in zip(its, spans, assign_tracks(spans), strict=True):
                yield
                if end >= window.since:
                    kind = self._kind(each) if each.step in own else OTHER
                    boxes.append(
                        (worker, Box(each.step, each.name or each.step, each.attempt, kind, begin, end, track))
                    )
        return replace(data, boxes=tuple(boxes), total=len(boxes), own=sum(box.kind != OTHER for _, box in boxes))

    def detailed(
        self, data: TimelineData, details: Mapping[tuple[str, int], AttemptTiming]
    ) -> Generator[None, None, TimelineData]:
        """Add stages and phases of what is wide enough to show them, and draw."""
        by_worker: dict[str, list[Box]] = {}
        for worker, box in data.boxes:
            yield
            by_worker.setdefault(worker, []).append(self._with_stretches(box, details.get((box.step, box.attempt))))
        slots = self._slots()
        rows, sums = [], []
        for worker in sorted({*by_worker, *slots}):
            boxes = by_worker.get(worker, [])
            rows.append(DrawnWorker(worker, about_worker(slots.get(worker, 0), len(boxes)), boxes=boxes))
            busy_s = sum(_within_s(data.window, box) for box in boxes)
            kinds = Counter(box.kind for box in boxes)
            sums.append(WorkerSums(worker, slots.get(worker, 0), len(boxes), busy_s, kinds))
        drawing = yield from draw(rows, data.window)
        ordered = tuple(sorted(data.boxes, key=lambda each: each[1].begin))
        return replace(data, drawing=drawing, workers=tuple(sums), boxes=ordered)

    def _with_stretches(self, box: Box, timing: AttemptTiming | None) -> Box:
        if timing is None:
            return box
        if timing.measured is None and box.kind == RUNNING:
            timing.measured = self._views.timelines.so_far(timing.step, timing.attempt, box.end)
        [line] = attempt_lines([timing.attempt], [timing])
        stages = [Stretch(each.name, each.at, each.took_s) for each in line.stretches if each.name != "waiting"]
        longest = sorted(line.phases, key=lambda each: -each.took_s)[:PHASES]
        phases = [Stretch(each.name, each.at, each.took_s) for each in longest]
        return replace(box, stages=tuple(stages), phases=tuple(phases))

    # Counted.

    def counted(
        self, data: TimelineData, running: Sequence[AttemptTiming], begins: Sequence[Edges], ends: Sequence[Edges]
    ) -> Generator[None, None, TimelineData]:
        """Draw how many ran at a time."""
        window = data.window
        buckets = window.width // BUCKET_WIDTH
        bucket_s = window.span_s / buckets
        more_begins, more_ends = [], []
        for each in running:
            yield
            kind = self._kind(each)
            if kind == RUNNING and data.subject.row is not None and each.step not in data.subject.row.active:
                kind = OTHER
            begin, end = (max(0.0, at - window.since) for at in (_begin(each), self._end(each, window.until)))
            more_begins.append(Edges(int(begin / bucket_s), each.worker or "", kind, 1, begin))
            if end < window.span_s:
                more_ends.append(Edges(int(end / bucket_s), each.worker or "", kind, 1, end))
        found = yield from occupancies([*begins, *more_begins], [*ends, *more_ends], buckets, bucket_s)
        slots = self._slots()
        rows, sums = [], []
        for worker in slots:
            found.setdefault(worker, {})
        for worker in sorted(found):
            yield
            kinds = {kind: its.attempts for kind, its in found[worker].items()}
            busy_s = sum(sum(its.busy_s) for its in found[worker].values())
            sums.append(WorkerSums(worker or "unknown", slots.get(worker, 0), sum(kinds.values()), busy_s, kinds))
        for worker in sorted(found)[:WORKERS_DRAWN]:
            yield
            rows.append(_occupied(worker, found[worker], slots.get(worker, 0), bucket_s))
        rest = sorted(found)[WORKERS_DRAWN:]
        if rest:
            merged = yield from _merged([found[worker] for worker in rest], buckets)
            rows.append(
                _occupied(f"{len(rest)} more workers", merged, sum(slots.get(each, 0) for each in rest), bucket_s)
            )
        drawing = yield from draw(rows, window)
        own = sum(each.attempts - each.count(OTHER) for each in sums)
        return replace(data, drawing=drawing, own=own, workers=tuple(sums), total=sum(each.attempts for each in sums))

    # The parts they share.

    def _kind(self, attempt: AttemptTiming) -> str:
        """Return what became of an attempt; one that the farm does not know to run has lost its end."""
        if attempt.outcome is not None and attempt.ended_at is not None:
            return attempt.outcome
        live = self._views.timelines.open_of(attempt.step)
        return RUNNING if live is not None and live.attempt == attempt.attempt else UNKNOWN

    def _end(self, attempt: AttemptTiming, until: float) -> float:
        if attempt.ended_at is not None:
            return attempt.ended_at
        return min(until, self._clock.now()) if self._kind(attempt) == RUNNING else _begin(attempt)

    def _slots(self) -> dict[str, int]:
        """Return the slots of the workers that are there; where nothing ran one sees that they were idle."""
        return {worker.name: worker.slots for worker in self._views.workforce.views() if worker.state != "gone"}


def _window(request: web.Request, subject: Subject) -> tuple[TimeWindow, bool]:
    """Return the window of an address, and whether it moves on. Raises `BadRequestError`."""
    width = int(min(max(LEAST_WIDTH, _number(request, "width", USUAL_WIDTH)), MOST_WIDTH))
    usual = subject.first if subject.row is not None else subject.last - FARM_S
    since = min(max(subject.first, _number(request, "from", usual)), subject.last - LEAST_S)
    follows = subject.moves and "to" not in request.query
    until = _number(request, "to", subject.last)
    if follows:
        step_s = max(LEAST_S, 2.0 ** math.ceil(math.log2(max(until - since, LEAST_S) / MOVES)))
        until = math.ceil(until / step_s) * step_s
        # The farm's moves on at both ends.
        since = since if "from" in request.query or subject.row is not None else until - FARM_S
    until = max(until if follows else min(until, subject.last), since + LEAST_S)
    return TimeWindow(since, until, width), follows


def _number(request: web.Request, name: str, default: float) -> float:
    """Return a number of the address. Raises `BadRequestError`."""
    try:
        found = float(request.query.get(name, default))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise BadRequestError(f"`{name}` is a number: a moment in Unix seconds, or a width in pixels.")
    return found


def _begin(attempt: AttemptTiming) -> float:
    return attempt.leased_at or 0.0


def _within_s(window: TimeWindow, box: Box) -> float:
    return max(0.0, min(box.end, window.until) - max(box.begin, window.since))


def _occupied(worker: str, kinds: Mapping[str, Occupancy], slots: int, bucket_s: float) -> DrawnWorker:
    """Return the row of a worker whose attempts are counted; it is full where all slots were busy."""
    at_a_time = max(map(sum, zip(*(its.busy_s for its in kinds.values()), strict=True)), default=0.0) / bucket_s
    attempts = sum(its.attempts for its in kinds.values())
    return DrawnWorker(
        worker or "unknown",
        about_worker(slots, attempts),
        occupancy=kinds,
        capacity=max(slots, math.ceil(round(at_a_time, 3)), 1),
    )


def _merged(many: Sequence[Mapping[str, Occupancy]], buckets: int) -> Generator[None, None, dict[str, Occupancy]]:
    """Add up workers that share a row."""
    merged: dict[str, Occupancy] = {}
    for kinds in many:
        for kind, its in kinds.items():
            yield
            into = merged.setdefault(kind, Occupancy([0.0] * buckets, [0] * buckets))
            into.busy_s = [one + other for one, other in zip(into.busy_s, its.busy_s, strict=True)]
            into.ended = [one + other for one, other in zip(into.ended, its.ended, strict=True)]
            into.attempts += its.attempts
    return merged
