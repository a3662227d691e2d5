"""View of a submission's timeline: its attempts by worker over time, the longest drawn one by one."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from aiohttp import web
from markupsafe import Markup

from coordinator.errors import BadRequestError
from coordinator.http.web.guards import VISITOR, html
from coordinator.http.web.lines import SubmissionLine, submission_line
from coordinator.http.web.rendering import PageRenderer
from coordinator.http.web.texts import seconds_text
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from coordinator.stores.timings import AttemptTiming, TimingStore
from infra.clock import Clock
from infra.slices import in_slices
from scheduler.model import StepKey

#: Attempts that are drawn: the longest of the span that is shown.
ATTEMPTS_DRAWN: Final = 1_500
#: Rows of one worker that are drawn: attempts beside each other.
LANES: Final = 64
#: Measures in pixels.
WIDTH: Final = 1_100
LANE_HEIGHT: Final = 14
HEAD_HEIGHT: Final = 20
#: Least span that one can zoom into.
LEAST_S: Final = 1.0
_SVG: Final = Markup(
    '<svg class="waterfall" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="group" '
    'aria-label="{label}">{body}</svg>'
)
_NAME: Final = Markup('<text class="more" x="0" y="{}">{}</text>')
_ATTEMPT: Final = Markup(
    '<a href="/steps/{}" aria-label="{}"><title>{}</title>'
    '<rect class="run is-{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="2"/></a>'
)


@dataclass(frozen=True, slots=True)
class TimelineData:
    """The whole page; times in Unix seconds."""

    line: SubmissionLine
    since: float
    until: float
    #: The whole span of the submission.
    first: float
    last: float
    drawing: Markup | None
    drawn: int
    #: Attempts of all submissions in the span.
    total: int
    #: Why the newest attempts may be missing, "" while none are.
    trouble: str

    def span(self, factor: float, shift: float) -> tuple[float, float]:
        """Return the span that is wider by a factor and moved by a share of its width, within the submission's."""
        width = max(LEAST_S, (self.until - self.since) * factor)
        middle = (self.since + self.until) / 2 + (self.until - self.since) * shift
        since = max(self.first, min(middle - width / 2, self.last - width))
        return since, min(self.last, since + width)


class TimelinePage:
    """The page at `/submissions/ID/timeline`."""

    def __init__(self, views: Views, timings: TimingStore, renderer: PageRenderer, clock: Clock) -> None:
        self._views = views
        self._timings = timings
        self._renderer = renderer
        self._clock = clock

    async def show(self, request: web.Request) -> web.Response:
        """Show the attempts of a span of time."""
        row = self._views.submission(request.match_info["id"])
        line = submission_line(self._views, row)
        first = row.created_at
        last = max(first + LEAST_S, (row.touched_at if row.ended else self._clock.now()))
        since, until = _instant(request, "from", first), _instant(request, "to", last)
        if not first - LEAST_S <= since < until <= last + LEAST_S:
            since, until = first, last
        attempts, total = await self._timings.longest_between(since, until, ATTEMPTS_DRAWN)
        own = await in_slices(self._own(row, attempts))
        drawing = await in_slices(draw(own, since, until)) if own else None
        data = TimelineData(line, since, until, first, last, drawing, len(own), total, self._timings.trouble)
        return html(await self._renderer.page("timeline.html", visitor=request[VISITOR], page=data))

    def _own(self, row: SubmissionRow, attempts: Sequence[AttemptTiming]) -> Generator[None, None, list[AttemptTiming]]:
        """Return the attempts of steps that a submission has, or had while it ran."""
        wanted = {StepKey(attempt.step) for attempt in attempts}
        members = wanted.intersection(row.members)
        yield
        return [attempt for attempt in attempts if attempt.step in members]


def draw(attempts: Sequence[AttemptTiming], since: float, until: float) -> Generator[None, None, Markup]:
    """Return the drawing of attempts between two instants, with pauses."""
    scale = WIDTH / max(until - since, LEAST_S)
    by_worker: dict[str, list[AttemptTiming]] = {}
    for attempt in sorted(attempts, key=lambda each: each.leased_at or 0.0):
        by_worker.setdefault(attempt.worker or "", []).append(attempt)
    body: list[Markup] = []
    top = 0
    for worker, its in sorted(by_worker.items()):
        body.append(_NAME.format(top + HEAD_HEIGHT - 6, worker or "unknown"))
        top += HEAD_HEIGHT
        ends: list[float] = []
        for attempt in its:
            yield
            begin = attempt.leased_at or since
            end = attempt.ended_at or until
            lane = next((index for index, free_at in enumerate(ends) if free_at <= begin), len(ends))
            if lane == len(ends):
                ends.append(end)
            ends[lane] = end
            box = max(0.0, (begin - since) * scale), top + min(lane, LANES) * LANE_HEIGHT, (end - begin) * scale
            body.append(_attempt(attempt, end - begin, box))
        top += min(len(ends), LANES + 1) * LANE_HEIGHT
    label = "Attempts by worker over time"
    return _SVG.format(w=WIDTH, h=top, label=label, body=Markup("").join(body))


def _attempt(attempt: AttemptTiming, took_s: float, box: tuple[float, int, float]) -> Markup:
    """Return an attempt as a link, at x, y and of a width."""
    x, y, width = box
    words = f"{attempt.name or attempt.step}, {attempt.outcome or 'running'}, {seconds_text(took_s)}"
    outcome = attempt.outcome or "running"
    shown = max(1.5, min(WIDTH - x, width))
    return _ATTEMPT.format(quote(attempt.step, safe=""), words, words, outcome, x, y, shown, LANE_HEIGHT - 2)


def _instant(request: web.Request, name: str, default: float) -> float:
    """Return a moment of the address. Raises `BadRequestError`."""
    try:
        found = float(request.query.get(name, default))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise BadRequestError(f"`{name}` is a moment in Unix seconds.")
    return found
