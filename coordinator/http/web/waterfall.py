"""Drawing of a waterfall: a row of workers over time, with one box an attempt or, where many ran, how many at a time.

The drawing is for eyes and the mouse alone (`aria-hidden`, nothing in it takes the focus): beside it stands a table
with the same in words and links.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote

from markupsafe import Markup

from coordinator.http.web.attempts import class_of
from coordinator.http.web.texts import number_text, seconds_text
from coordinator.readmodel.waterfall import KINDS, Occupancy, nice_step_s

#: Measures in pixels: the axis, a worker's name, an attempt, a worker's occupancy.
AXIS_HEIGHT: Final = 22
NAME_HEIGHT: Final = 20
TRACK_HEIGHT: Final = 20
BOX_HEIGHT: Final = 17
BAND_HEIGHT: Final = 36
#: Part of the occupancy's height above the bars, for marks.
MARKS_HEIGHT: Final = 6
GAP: Final = 6
#: Of a box with a name in it, and of its letters.
NAMED_WIDTH: Final = 44
LETTER_WIDTH: Final = 6.7
#: Of a box whose stages and phases are drawn.
STAGED_WIDTH: Final = 24
TICK_WIDTH: Final = 110
#: Height of stages, below the name, and of the marks of what went wrong in a bucket.
STAGE_HEIGHT: Final = 4
MARK_HEIGHT: Final = 4
#: Kinds that get a mark: how many failed is not seen in how long that took.
MARKED: Final = ("retried", "lost", "failed")
_DAY_S: Final = 86400.0
_MINUTE_S: Final = 60.0

_SVG: Final = Markup(
    '<svg class="waterfall" viewBox="0 0 {w} {h}" width="{w}" height="{h}" aria-hidden="true" focusable="false">'
    '{axis}<g id="plot">{body}</g>{names}</svg>'
)
_NAME: Final = Markup('<text class="lane" x="0" y="{}">{}<tspan class="more" dx="8">{}</tspan></text>')
_TICK: Final = Markup(
    '<a href="{}" tabindex="-1"><title>{}</title><rect class="tick" x="{:.1f}" y="0" width="{:.1f}" height="{}"/>'
    '<text class="more" x="{:.1f}" y="13">{}</text></a>'
)
_LINE: Final = Markup('<path class="grid" d="{}"/>')
_BOX: Final = Markup(
    '<a href="{}" tabindex="-1" class="run is-{}{}"><title>{}</title>'
    '<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="2"/>{}</a>'
)
_LABEL: Final = Markup('<text x="{:.1f}" y="{}">{}</text>')
_STAGE: Final = Markup('<rect class="span-{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>')
_PHASE: Final = Markup('<rect class="phase" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>')
_AREA: Final = Markup('<path class="area is-{}" d="{}"/>')


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """A window of time (Unix seconds) and the pixels that it is drawn on."""

    since: float
    until: float
    width: int

    @property
    def span_s(self) -> float:
        """Its length."""
        return self.until - self.since

    def x(self, at: float) -> float:
        """Return where an instant is, within the drawing."""
        return (min(max(at, self.since), self.until) - self.since) / self.span_s * self.width

    def address(self) -> str:
        """Return the query of the page that shows it."""
        return f"?from={self.since:.3f}&to={self.until:.3f}"


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stage or a phase of an attempt."""

    name: str
    at: float
    took_s: float


@dataclass(frozen=True, slots=True)
class Box:
    """An attempt on its track; `kind` is of `coordinator.readmodel.waterfall.KINDS`."""

    step: str
    name: str
    attempt: int
    kind: str
    begin: float
    end: float
    track: int
    stages: tuple[Stretch, ...] = ()
    phases: tuple[Stretch, ...] = ()

    @property
    def words(self) -> str:
        """Sentence that says the same as the box."""
        took = seconds_text(self.end - self.begin)
        again = f", attempt {self.attempt}" if self.attempt > 1 else ""
        return f"{self.name}{again}: {KIND_TEXTS[self.kind]}, {took}"


#: Kinds in words.
KIND_TEXTS: Final[Mapping[str, str]] = {
    "other": "of another submission",
    "done": "done",
    "running": "runs",
    "returned": "handed back",
    "moved": "moved to a faster worker",
    "cancelled": "cancelled",
    "retried": "failed, tried again",
    "lost": "lost with its worker",
    "failed": "failed",
    "unknown": "its end was not kept",
}


@dataclass(frozen=True, slots=True)
class DrawnWorker:
    """A worker with its attempts, or with their occupancy by kind."""

    name: str
    #: Beside the name: slots, attempts.
    about: str
    boxes: Sequence[Box] = ()
    occupancy: Mapping[str, Occupancy] | None = None
    #: Attempts at a time that fill the row.
    capacity: float = 1.0


def draw(rows: Sequence[DrawnWorker], window: TimeWindow) -> Generator[None, None, Markup]:
    """Return the drawing, with pauses."""
    body: list[Markup] = []
    names: list[Markup] = []
    top = AXIS_HEIGHT
    # One worker's row at least, so that there is something to take hold of where nothing ran.
    least = AXIS_HEIGHT + NAME_HEIGHT + TRACK_HEIGHT
    for row in rows:
        yield
        names.append(_NAME.format(top + NAME_HEIGHT - 6, row.name, row.about))
        top += NAME_HEIGHT
        if row.occupancy is not None:
            body += yield from _areas(row, window, top)
            top += BAND_HEIGHT
        else:
            for box in row.boxes:
                yield
                body.append(_box(box, window, top + box.track * TRACK_HEIGHT))
            top += (1 + max((box.track for box in row.boxes), default=0)) * TRACK_HEIGHT
        top += GAP
    height = max(top, least)
    axis = _axis(window, height)
    return _SVG.format(w=window.width, h=height, axis=axis, body=Markup("").join(body), names=Markup("").join(names))


def _box(box: Box, window: TimeWindow, top: int) -> Markup:
    left = window.x(box.begin)
    width = max(1.5, window.x(box.end) - left)
    inner: list[Markup] = []
    if width >= NAMED_WIDTH:
        text = box.name[: int((width - 8) / LETTER_WIDTH)]
        inner.append(_LABEL.format(left + 4, top + 11, text))
    if width >= STAGED_WIDTH:
        inner += _stretches(box, window, top)
    wide = " wide" if width >= STAGED_WIDTH else ""
    address = f"/steps/{quote(box.step, safe='')}"
    shape = left, top, width, BOX_HEIGHT
    return _BOX.format(address, box.kind, wide, box.words, *shape, Markup("").join(inner))


def _stretches(box: Box, window: TimeWindow, top: int) -> list[Markup]:
    """Return the stages below the name, and the phases as parts of the build's stage."""
    found = []
    for shape, stretches in ((_STAGE, box.stages), (_PHASE, box.phases)):
        for stretch in stretches:
            left, right = window.x(stretch.at), window.x(stretch.at + stretch.took_s)
            if right - left < 1:
                continue
            place = left, top + BOX_HEIGHT - STAGE_HEIGHT, right - left, STAGE_HEIGHT
            words = f"{stretch.name} {seconds_text(stretch.took_s)}"
            found.append(
                _STAGE.format(class_of(stretch.name), *place, words)
                if shape is _STAGE
                else _PHASE.format(*place, words)
            )
    return found


def _areas(row: DrawnWorker, window: TimeWindow, top: int) -> Generator[None, None, list[Markup]]:
    """Return how many attempts ran at a time, piled up by kind, and marks where some went wrong."""
    occupancy = row.occupancy or {}
    if not occupancy:
        return []
    buckets = len(next(iter(occupancy.values())).busy_s)
    bucket_s = window.span_s / buckets
    most = BAND_HEIGHT - MARKS_HEIGHT
    scale = most / (row.capacity * bucket_s)
    step = window.width / buckets
    base = top + BAND_HEIGHT
    lower = [0.0] * buckets
    found: list[Markup] = []
    for kind in KINDS:
        its = occupancy.get(kind)
        if its is None:
            continue
        yield
        upper = [below + busy_s for below, busy_s in zip(lower, its.busy_s, strict=True)]
        outline = _outline([base - min(most, round(each * scale, 1)) for each in upper], step)
        floor = _outline([base - min(most, round(each * scale, 1)) for each in lower], step, back=True)
        found.append(_AREA.format(kind, f"{outline}{floor}Z"))
        lower = upper
        if kind in MARKED:
            marks = [
                f"M{place * step:.1f} {top}h{max(2.0, step):.1f}v{MARK_HEIGHT}h{-max(2.0, step):.1f}z"
                for place, count in enumerate(its.ended)
                if count
            ]
            found.append(_AREA.format(f"{kind} mark", "".join(marks)))
    return found


def _outline(heights: Sequence[float], step: float, *, back: bool = False) -> str:
    """Return steps from the left to the right, or back, with one corner where the height changes."""
    places = range(len(heights) - 1, -1, -1) if back else range(len(heights))
    parts: list[str] = []
    last: float | None = None
    for place in places:
        height = heights[place]
        if height == last:
            continue
        x = (place + 1 if back else place) * step
        if last is None:
            parts.append(f"{'L' if back else 'M'}{x:.1f} {height:g}")
        else:
            parts.append(f"H{x:.1f}V{height:g}")
        last = height
    parts.append(f"H{0 if back else len(heights) * step:.1f}")
    return "".join(parts)


def _axis(window: TimeWindow, height: int) -> Markup:
    """Return ticks at round times, each a link to the part of the window that it begins."""
    step_s = nice_step_s(window.span_s, max(1, window.width // TICK_WIDTH))
    at = window.since - window.since % step_s
    ticks: list[Markup] = []
    lines: list[str] = []
    while at < window.until:
        left, right = window.x(at), window.x(at + step_s)
        text = _instant_text(at, step_s)
        words = f"only {seconds_text(step_s)} from {text} on"
        # The name of a tick that is cut off at the left would stand on that of the next one.
        label = text if at >= window.since and right - left > TICK_WIDTH / 2 else ""
        address = TimeWindow(at, at + step_s, window.width).address()
        ticks.append(_TICK.format(address, words, left, right - left, height, left + 3, label))
        lines.append(f"M{left:.1f} 0V{height}")
        at += step_s
    return Markup("").join(ticks) + _LINE.format("".join(lines))


def _instant_text(at: float, step_s: float) -> str:
    date = datetime.fromtimestamp(max(0.0, at), UTC)
    if step_s >= _DAY_S or (date.hour, date.minute, date.second) == (0, 0, 0):
        return f"{date:%d %b}"
    if step_s >= _MINUTE_S:
        return f"{date:%H:%M}"
    return f"{date:%H:%M:%S}" if step_s >= 1 else f"{date:%H:%M:%S}.{date.microsecond // 100_000}"


def about_worker(slots: int, attempts: int) -> str:
    """Return what stands beside a worker's name."""
    had = f"{number_text(attempts)} {'attempt' if attempts == 1 else 'attempts'}"
    return f"{slots} slots, {had}" if slots else had
