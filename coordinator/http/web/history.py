"""View of a package's history: how long its builds took, what they needed, and how they ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from aiohttp import web
from markupsafe import Markup

from coordinator.errors import NotFoundError
from coordinator.http.web.guards import VISITOR, html
from coordinator.http.web.rendering import PageRenderer
from coordinator.http.web.texts import seconds_text
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
class SystemLine:
    """Builds of a package on one system, summed up."""

    system: str
    attempts: int
    #: Attempts that ended well, and by a fault of the recipe.
    done: int
    failed: int
    #: Steps that failed and were built later with the same recipe, and steps in all.
    flaky: int
    steps: int
    #: Of successful builds; None where there is none.
    median_s: float | None
    longest_s: float | None
    peak_memory_bytes: int | None
    output_bytes: int | None
    drawing: Markup


@dataclass(frozen=True, slots=True)
class HistoryData:
    """The whole page."""

    name: str
    #: Why the newest attempts may be missing, "" while none are.
    trouble: str
    systems: tuple[SystemLine, ...]
    attempts: tuple[AttemptTiming, ...]
    #: Worker -> attempts, and failed ones.
    workers: tuple[tuple[str, int, int], ...]


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
        systems = sorted({attempt.system or "" for attempt in attempts})
        data = HistoryData(
            name,
            trouble,
            tuple(_system(system, [each for each in attempts if (each.system or "") == system]) for system in systems),
            tuple(attempts),
            _workers(attempts),
        )
        return html(await self._renderer.page("history.html", visitor=request[VISITOR], page=data))


def _system(system: str, attempts: Sequence[AttemptTiming]) -> SystemLine:
    done = [each for each in attempts if each.outcome == "done"]
    failed = [each for each in attempts if each.outcome == "failed"]
    builds = [each.build_s for each in done if each.build_s is not None]
    built = {each.step for each in done}
    return SystemLine(
        system=system,
        attempts=len(attempts),
        done=len(done),
        failed=len(failed),
        flaky=len(built & {each.step for each in failed}),
        steps=len({each.step for each in attempts}),
        median_s=median(builds) if builds else None,
        longest_s=max(builds, default=None),
        peak_memory_bytes=max((each.peak_memory_bytes for each in done if each.peak_memory_bytes), default=None),
        output_bytes=next((each.output_bytes for each in done if each.output_bytes is not None), None),
        drawing=_drawing(attempts),
    )


def _drawing(attempts: Sequence[AttemptTiming]) -> Markup:
    """Return bars of the builds' lengths, the newest on the right."""
    highest = max((each.build_s or 0.0 for each in attempts), default=0.0) or 1.0
    bars = []
    for place, each in enumerate(reversed(attempts)):
        height = max(2.0, (each.build_s or 0.0) / highest * HEIGHT)
        words = f"{each.outcome}, {seconds_text(each.build_s or 0.0)}"
        bars.append(_BAR.format(each.outcome, place * BAR_WIDTH, HEIGHT - height, BAR_WIDTH - 2, height, words))
    label = f"Build times of {len(attempts)} attempts, at most {seconds_text(highest)}"
    return _SVG.format(w=max(1, len(attempts)) * BAR_WIDTH, h=HEIGHT, label=label, body=Markup("").join(bars))


def _workers(attempts: Sequence[AttemptTiming]) -> tuple[tuple[str, int, int], ...]:
    names = sorted({each.worker for each in attempts if each.worker})
    counts = []
    for name in names:
        its = [each for each in attempts if each.worker == name]
        counts.append((name, len(its), sum(each.outcome not in {"done", "cancelled", "returned"} for each in its)))
    return tuple(counts)
