"""The pages as a whole: binds each page to its routes, behind the guards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

from coordinator.api import web_routes as routes
from coordinator.api.models import FarmView
from coordinator.http.routing import serve_guarded
from coordinator.http.web.assets import Assets
from coordinator.http.web.farm import FarmPage
from coordinator.http.web.guards import Guards
from coordinator.http.web.live import LiveStreams
from coordinator.http.web.rendering import PageRenderer
from coordinator.readmodel.views import Views
from coordinator.security.sessions import Sessions
from infra.clock import Clock
from scheduler.model import Requirements


@dataclass(frozen=True, slots=True)
class PageSources:
    """The rooms that pages are fed by."""

    views: Views
    farm: Callable[[], FarmView]
    #: What each class of ready steps waits for.
    queues: Callable[[], Mapping[Requirements, str]]
    clock: Clock


def add_web_routes(
    app: web.Application, sources: PageSources, sessions: Sessions, streams: LiveStreams, public_url: str
) -> None:
    """Serve every route of `coordinator.api.web_routes`."""
    assets = Assets()
    renderer = PageRenderer(assets, sources.clock)
    guards = Guards(sessions, renderer, sources.clock, public_url)
    farm = FarmPage(sources.views, sources.farm, sources.queues, renderer, streams)
    handlers = {
        routes.FARM_PAGE: farm.show,
        routes.FARM_LIVE: farm.live,
        routes.LOGIN_PAGE: guards.login_page,
        routes.LOGIN: guards.login,
        routes.LOGOUT: guards.logout,
        routes.ASSET: assets.serve,
    }
    serve_guarded(app, handlers, guards.by_right())
