"""The pages as a whole: binds each page to its routes, behind the guards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

from coordinator.api import web_routes as routes
from coordinator.api.models import FarmView
from coordinator.caches.housekeeping import Housekeeper
from coordinator.demand.demand import Demand
from coordinator.environments.reports import CoverageReports
from coordinator.environments.store import EnvironmentStore
from coordinator.fleet.draining import Drain
from coordinator.http.routing import serve_guarded
from coordinator.http.web.assets import Assets
from coordinator.http.web.cache import CachePage
from coordinator.http.web.coverage import CoveragePages
from coordinator.http.web.farm import FarmPage
from coordinator.http.web.guards import Guards
from coordinator.http.web.history import HistoryPage
from coordinator.http.web.live import LiveStreams
from coordinator.http.web.log import LogPage
from coordinator.http.web.rendering import PageRenderer
from coordinator.http.web.step import StepPage
from coordinator.http.web.submission import SubmissionPage
from coordinator.http.web.submission_lists import SubmissionLists
from coordinator.http.web.timeline import TimelinePage
from coordinator.http.web.workers import WorkersPage
from coordinator.intake.submissions import Submissions
from coordinator.readmodel.etas import Etas
from coordinator.readmodel.runs import Runs
from coordinator.readmodel.throughput import Throughput
from coordinator.readmodel.views import Views
from coordinator.security.sessions import Sessions
from coordinator.stores.logs import LogStore
from coordinator.stores.timings import TimingStore
from infra.cache.cache import Cache
from infra.clock import Clock
from scheduler.farm import Farm as Core
from scheduler.model import Requirements


@dataclass(frozen=True, slots=True)
class PageSources:
    """The rooms that pages read."""

    views: Views
    farm: Callable[[], FarmView]
    #: What each class of ready steps waits for.
    queues: Callable[[], Mapping[Requirements, str]]
    core: Core
    #: The cache that the farm publishes to.
    cache: Cache
    logs: LogStore
    timings: TimingStore
    #: Why steps ran.
    runs: Runs
    etas: Etas
    throughput: Throughput
    demand: Demand
    environments: EnvironmentStore


@dataclass(frozen=True, slots=True)
class PageActions:
    """The rooms that do what forms ask for."""

    submissions: Submissions
    drain: Drain
    #: Of all caches by name.
    housekeepers: Mapping[str, Housekeeper]


def add_web_routes(  # noqa: PLR0917 - collaborators, named by their types
    app: web.Application,
    sources: PageSources,
    actions: PageActions,
    clock: Clock,
    sessions: Sessions,
    streams: LiveStreams,
    public_url: str,
) -> None:
    """Serve every route of `coordinator.api.web_routes`."""
    assets = Assets()
    renderer = PageRenderer(assets, clock)
    guards = Guards(sessions, renderer, clock, public_url)
    views = sources.views
    farm = FarmPage(views, sources.farm, sources.queues, sources.throughput, renderer, streams)
    submission = SubmissionPage(
        views, actions.submissions, sources.farm, sources.queues, sources.core, sources.etas, renderer, streams
    )
    lists = SubmissionLists(views, renderer)
    step = StepPage(
        views, sources.core, actions.submissions, sources.cache, sources.timings, sources.runs, renderer, streams
    )
    timeline = TimelinePage(views, sources.timings, renderer, streams, clock)
    history = HistoryPage(sources.timings, renderer)
    log = LogPage(views, sources.logs, sources.timings, renderer, streams)
    workers = WorkersPage(views, actions.drain, renderer, streams)
    cache = CachePage(actions.housekeepers, sources.demand, renderer)
    coverage = CoveragePages(sources.environments, CoverageReports(sources.environments, clock), renderer, streams)
    handlers = {
        routes.FARM_PAGE: farm.show,
        routes.FARM_LIVE: farm.live,
        routes.SUBMISSIONS_PAGE: lists.submissions,
        routes.SUBMISSION_PAGE: submission.show,
        routes.SUBMISSION_LIVE: submission.live,
        routes.STEPS_PAGE: lists.steps,
        routes.FARM_TIMELINE_PAGE: timeline.show,
        routes.FARM_TIMELINE_LIVE: timeline.live,
        routes.TIMELINE_PAGE: timeline.show,
        routes.TIMELINE_LIVE: timeline.live,
        routes.CANCEL_FORM: submission.cancel,
        routes.RETRY_FORM: submission.retry,
        routes.FIND_STEP: step.find,
        routes.STEP_PAGE: step.show,
        routes.STEP_LIVE: step.live,
        routes.RETRY_STEP_FORM: step.retry,
        routes.LOG_PAGE: log.show,
        routes.LOG_LIVE: log.live,
        routes.HISTORY_PAGE: history.show,
        routes.WORKERS_PAGE: workers.show,
        routes.WORKERS_LIVE: workers.live,
        routes.DRAIN_FORM: workers.drain,
        routes.CACHE_PAGE: cache.show,
        routes.PIN_FORM: cache.pin,
        routes.UNPIN_FORM: cache.unpin,
        routes.COVERAGES_PAGE: coverage.environments,
        routes.COVERAGES_LIVE: coverage.environments_live,
        routes.COVERAGE_PAGE: coverage.environment,
        routes.COVERAGE_LIVE: coverage.environment_live,
        routes.LOGIN_PAGE: guards.login_page,
        routes.LOGIN: guards.login,
        routes.LOGOUT: guards.logout,
        routes.ASSET: assets.serve,
    }
    serve_guarded(app, handlers, guards.by_right())
