"""View of a package's history: how long its builds took, what they needed, and how they ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from markupsafe import Markup

from coordinator.api.timeline_models import SystemHistoryView
from coordinator.errors import NotFoundError
from coordinator.http.web.guards import VISITOR, html
from coordinator.http.web.rendering import PageRenderer
from coordinator.http.web.texts import bytes_text, date_text, seconds_text
from coordinator.readmodel.history import history_view
from coordinator.stores.timings import AttemptTiming, TimingsError, TimingStore

#: Attempts that are looked at, the newest.
ATTEMPTS_SHOWN: Final = 200
#: Measures of a drawing.
BAR_WIDTH: Final = 8
HEIGHT: Final = 60
_BAR: Final = Markup('<rect class="run is-{}" x="{}" y="{:.1f}" width="{}" height="{:.1f}"><title>{}</title></rect>')
_SVG: Final = Markup(
    '<svg class="spark" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{label}">{body}</svg>'
)


@dataclass(frozen=True, slots=True)
class Measure:
    """Something that each attempt has a figure of, where it was measured."""

    title: str
    of: Callable[[AttemptTiming], float | None]
    text: Callable[[float], str]


MEASURES: Final = (
    Measure("Build time", lambda attempt: attempt.build_s, seconds_text),
    Measure("Memory at most", lambda attempt: attempt.peak_memory_bytes, bytes_text),
    Measure("Outputs", lambda attempt: attempt.output_bytes, bytes_text),
)


@dataclass(frozen=True, slots=True)
class Drawing:
    """One measure over time, the newest on the right."""

    title: str
    #: The largest figure.
    most: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class SystemLine:
    """Builds of a package on one system, summed up."""

    view: SystemHistoryView
    attempts: int
    drawings: tuple[Drawing, ...]


@dataclass(frozen=True, slots=True)
class HistoryData:
    """The whole page."""

    name: str
    #: Why the newest attempts may be missing, "" while none are.
    trouble: str
    systems: tuple[SystemLine, ...]
    attempts: tuple[AttemptTiming, ...]


class HistoryPage:
    """The page at `/packages/NAME`."""

    def __init__(self, timings: TimingStore, renderer: PageRenderer) -> None:
        self._timings = timings
        self._renderer = renderer

    async def show(self, request: web.Request) -> web.Response:
        """Show what is kept of a package."""
        name = request.match_info["name"]
        attempts = await self._timings.of_package(name, "", ATTEMPTS_SHOWN)
        trouble = self._timings.trouble
        if not attempts and trouble:
            raise TimingsError(trouble)
        if not attempts:
            raise NotFoundError(f"there is no build of a package {name[:80]!r} that is remembered.")
        data = HistoryData(name, trouble, system_lines(name, attempts), tuple(attempts))
        return html(await self._renderer.page("history.html", visitor=request[VISITOR], page=data))


def system_lines(name: str, attempts: Sequence[AttemptTiming]) -> tuple[SystemLine, ...]:
    """Return the attempts, newest first, summed up by system."""
    lines = []
    for view in history_view(name, attempts).systems:
        its = [each for each in attempts if (each.system or "") == view.system]
        drawings = [drawing for measure in MEASURES if (drawing := _drawing(measure, its)) is not None]
        lines.append(SystemLine(view, len(its), tuple(drawings)))
    return tuple(lines)


def _drawing(measure: Measure, attempts: Sequence[AttemptTiming]) -> Drawing | None:
    """Return bars of what was measured of each attempt; None where nothing was."""
    known = [(each, figure) for each in reversed(attempts) if (figure := measure.of(each)) is not None]
    if not known:
        return None
    highest = max(figure for _, figure in known)
    bars = []
    for place, (each, figure) in enumerate(known):
        height = max(2.0, figure / (highest or 1.0) * HEIGHT)
        words = f"{each.outcome}, {measure.text(figure)}, {date_text(each.ended_at or 0.0)}"
        bars.append(_BAR.format(each.outcome, place * BAR_WIDTH, HEIGHT - height, BAR_WIDTH - 2, height, words))
    label = f"{measure.title} of {len(known)} attempts, at most {measure.text(highest)}"
    svg = _SVG.format(w=len(known) * BAR_WIDTH, h=HEIGHT, label=label, body=Markup("").join(bars))
    return Drawing(measure.title, measure.text(highest), svg)
