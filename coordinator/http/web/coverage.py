"""Views of coverage: how much of each environment can be fetched on each system, what is missing, and how that was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from markupsafe import Markup

from coordinator.api.environments import CoverageView, EnvironmentView, SystemCoverageView, TrendView
from coordinator.environments.reports import CoverageReports, environment_view
from coordinator.environments.store import EnvironmentStore
from coordinator.errors import BadRequestError, NotFoundError
from coordinator.http.web.guards import VISITOR, html
from coordinator.http.web.rendering import PageRenderer
from coordinator.http.web.svg import bar
from coordinator.http.web.texts import date_text, number_text

#: Environments of one page, gaps of one page, and revisions.
ENVIRONMENTS_SHOWN: Final = 50
GAPS_SHOWN: Final = 200
REVISIONS_SHOWN: Final = 20
_DIGITS: Final = 9
#: Measures of a trend in its own units; the page scales it.
_WEEK_WIDTH: Final = 10
_HEIGHT: Final = 40
_WEEK: Final = Markup('<rect class="fill-done" x="{}" y="{:.1f}" width="{}" height="{:.1f}"><title>{}</title></rect>')
_TREND: Final = Markup(
    '<svg class="spark" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{label}">{body}</svg>'
)
#: Ways in which packages come, with the class of their colour and the words of a legend.
WAYS: Final = (
    ("here", "fill-done", "from here"),
    ("upstream", "fill-publishing", "from upstream"),
    ("local", "fill-ready", "built locally"),
    ("impossible", "fill-failed", "impossible"),
)


@dataclass(frozen=True, slots=True)
class WayFigure:
    """Packages that come in one way."""

    colour: str
    words: str
    count: int
    percent: float


@dataclass(frozen=True, slots=True)
class SystemCard:
    """Coverage of one system as a page shows it."""

    view: SystemCoverageView
    bar: Markup
    figures: tuple[WayFigure, ...]
    #: Drawing of the weeks; None while there is one alone.
    trend: Markup | None


@dataclass(frozen=True, slots=True)
class EnvironmentCard:
    """One environment in the list of all."""

    view: EnvironmentView
    coverage: CoverageView
    systems: tuple[SystemCard, ...]


@dataclass(frozen=True, slots=True)
class CoverageData:
    """The page of one environment."""

    view: EnvironmentView
    coverage: CoverageView
    systems: tuple[SystemCard, ...]
    #: The system whose gaps alone are shown, "" for all.
    system: str
    gaps_shown: int


class CoveragePages:
    """The pages at `/coverage` and `/coverage/NAME`."""

    def __init__(self, store: EnvironmentStore, reports: CoverageReports, renderer: PageRenderer) -> None:
        self._store = store
        self._reports = reports
        self._renderer = renderer

    async def environments(self, request: web.Request) -> web.Response:
        """List environments, each with its systems."""
        after = _position_of(request)
        found = await self._store.environments()
        cards = []
        for each in found[after : after + ENVIRONMENTS_SHOWN]:
            coverage = await self._reports.brief(each.name)
            view = environment_view(each, (), await self._store.pointers(each.name))
            cards.append(EnvironmentCard(view, coverage, system_cards(coverage)))
        following = after + ENVIRONMENTS_SHOWN if len(found) > after + ENVIRONMENTS_SHOWN else 0
        page = {"cards": cards, "after": after, "following": following}
        return html(await self._renderer.page("coverages.html", visitor=request[VISITOR], **page))

    async def environment(self, request: web.Request) -> web.Response:
        """Show one environment."""
        name = request.match_info["name"]
        found = await self._store.environment(name)
        if found is None:
            raise NotFoundError(f"there is no environment {name[:80]!r}; the page Coverage has all.")
        coverage = await self._reports.whole(name)
        revisions = (await self._store.revisions(name))[:REVISIONS_SHOWN]
        view = environment_view(found, revisions, await self._store.pointers(name))
        system = request.query.get("system", "")
        data = CoverageData(view, coverage, system_cards(coverage), system[:80], GAPS_SHOWN)
        return html(await self._renderer.page("coverage.html", visitor=request[VISITOR], page=data))


def system_cards(coverage: CoverageView) -> tuple[SystemCard, ...]:
    """Return the systems of an environment with their drawings."""
    return tuple(_card(each) for each in coverage.systems)


def _card(view: SystemCoverageView) -> SystemCard:
    figures = tuple(
        WayFigure(colour, words, getattr(view, way), getattr(view, f"{way}_percent")) for way, colour, words in WAYS
    )
    label = f"{view.system}: " + ", ".join(f"{each.percent:g} % {each.words}" for each in figures)
    shares = [(each.colour.removeprefix("fill-"), each.count) for each in figures]
    return SystemCard(view, bar(label, shares, view.packages), figures, _trend(view.system, view.trend))


def _trend(system: str, trend: Sequence[TrendView]) -> Markup | None:
    if len(trend) < 2:
        return None
    bars = []
    for place, each in enumerate(trend):
        height = max(1.0, each.fetched / 100 * _HEIGHT)
        words = f"{date_text(each.day_at)[:10]}: {each.fetched:g} % of {number_text(each.packages)} packages"
        bars.append(_WEEK.format(place * _WEEK_WIDTH, _HEIGHT - height, _WEEK_WIDTH - 2, height, words))
    label = f"Fetched on {system} by week: from {trend[0].fetched:g} % to {trend[-1].fetched:g} %"
    return _TREND.format(w=len(trend) * _WEEK_WIDTH, h=_HEIGHT, label=label, body=Markup("").join(bars))


def _position_of(request: web.Request) -> int:
    digits = request.query.get("after", "") or "0"
    if not digits.isascii() or not digits.isdigit() or len(digits) > _DIGITS:
        raise BadRequestError("`after` is the number of rows before the page.")
    return int(digits)
