"""Views of coverage: how much of each environment can be fetched on each system, what is missing, and how that was."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from aiohttp import web
from markupsafe import Markup

from coordinator.api.environments import CoverageView, EnvironmentView, SystemCoverageView, TrendView
from coordinator.environments.reports import CoverageReports, environment_view
from coordinator.environments.store import EnvironmentStore
from coordinator.errors import BadRequestError, NotFoundError
from coordinator.http.web.guards import VISITOR, html
from coordinator.http.web.live import LiveStreams
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


class _FollowedPage:
    """Parts of a page, made anew only when what they show has changed: coverage is large, and stays for long."""

    def __init__(
        self, stamp: Callable[[], Awaitable[object]], render: Callable[[], Awaitable[Mapping[str, str] | None]]
    ) -> None:
        self._stamp = stamp
        self._render = render
        self._seen: object = None
        self._parts: Mapping[str, str] = {}

    async def parts(self) -> tuple[Mapping[str, str], bool]:
        """Return the parts, and whether they are final because nothing is left to show."""
        stamp = await self._stamp()
        if stamp != self._seen:
            parts = await self._render()
            if parts is None:
                return self._parts, True
            self._parts, self._seen = parts, stamp
        return self._parts, False


class CoveragePages:
    """The pages at `/coverage` and `/coverage/NAME`."""

    def __init__(
        self, store: EnvironmentStore, reports: CoverageReports, renderer: PageRenderer, streams: LiveStreams
    ) -> None:
        self._store = store
        self._reports = reports
        self._renderer = renderer
        self._streams = streams

    async def environments(self, request: web.Request) -> web.Response:
        """List environments, each with its systems."""
        page = await self._list(_position_of(request))
        return html(await self._renderer.page("coverages.html", visitor=request[VISITOR], **page))

    async def environments_live(self, request: web.Request) -> web.StreamResponse:
        """Stream what changes of that list."""
        after = _position_of(request)

        async def render() -> Mapping[str, str]:
            return await self._renderer.parts("coverages.html", **await self._list(after))

        return await self._streams.serve(request, _FollowedPage(self._store.stamp, render).parts)

    async def environment(self, request: web.Request) -> web.Response:
        """Show one environment."""
        data = await self._one(request)
        return html(await self._renderer.page("coverage.html", visitor=request[VISITOR], page=data))

    async def environment_live(self, request: web.Request) -> web.StreamResponse:
        """Stream what changes of one environment until it is forgotten."""
        await self._one(request)

        async def render() -> Mapping[str, str] | None:
            try:
                data = await self._one(request)
            except NotFoundError:
                return None
            return await self._renderer.parts("coverage.html", page=data)

        name = request.match_info["name"]
        return await self._streams.serve(request, _FollowedPage(partial(self._store.stamp, name), render).parts)

    async def _list(self, after: int) -> dict[str, Any]:
        found = await self._store.environments()
        cards = []
        for each in found[after : after + ENVIRONMENTS_SHOWN]:
            coverage = await self._reports.brief(each.name)
            view = environment_view(each, (), await self._store.pointers(each.name))
            cards.append(EnvironmentCard(view, coverage, system_cards(coverage)))
        following = after + ENVIRONMENTS_SHOWN if len(found) > after + ENVIRONMENTS_SHOWN else 0
        return {"cards": cards, "after": after, "following": following}

    async def _one(self, request: web.Request) -> CoverageData:
        """Return what the page of an environment shows. Raises `NotFoundError`."""
        name = request.match_info["name"]
        found = await self._store.environment(name)
        if found is None:
            raise NotFoundError(f"there is no environment {name[:80]!r}; the page Coverage has all.")
        coverage = await self._reports.whole(name)
        revisions = (await self._store.revisions(name))[:REVISIONS_SHOWN]
        view = environment_view(found, revisions, await self._store.pointers(name))
        system = request.query.get("system", "")
        return CoverageData(view, coverage, system_cards(coverage), system[:80], GAPS_SHOWN)


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
