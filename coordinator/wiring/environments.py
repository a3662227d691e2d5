"""Tracked environments: what looks after them, and their routes."""

from __future__ import annotations

from aiohttp import web

from coordinator.config import Settings
from coordinator.environments.evaluated import EvaluatedSources
from coordinator.environments.packages import FarmPackages
from coordinator.environments.reports import CoverageReports
from coordinator.environments.sources import BoundedSources
from coordinator.environments.standings import PlannedStandings
from coordinator.environments.submitted import SubmittedContent
from coordinator.environments.tracker import EnvironmentTracker
from coordinator.http.api.environments import EnvironmentApi
from coordinator.http.routing import serve as serve_routes
from coordinator.plans.planner import Planner
from coordinator.remote_evaluation.evaluations import RemoteEvaluations
from coordinator.wiring.caches import ServedCaches
from coordinator.wiring.core import Core
from coordinator.wiring.stores import Stores
from infra.clock import Clock
from workers.agent.settings import native_system


def serve_environments(  # noqa: PLR0917 - collaborators, named by their types
    app: web.Application,
    settings: Settings,
    clock: Clock,
    stores: Stores,
    core: Core,
    caches: ServedCaches,
    planner: Planner,
    evaluations: RemoteEvaluations,
) -> EnvironmentTracker:
    """Make the room of environments and serve its routes; it works once its `run` does."""
    submitted = SubmittedContent(core.views, stores.derivations)
    packages = FarmPackages(
        stores.cache,
        stores.derivations,
        core.submissions,
        submitted,
        caches.mirroring.have,
        PlannedStandings(planner.of_list).of,
    )
    sources = BoundedSources(settings.environments, settings.state_dir / "environment-sources")
    sources.clear()
    tracker = EnvironmentTracker(
        stores.environments, stores.cache, packages, sources.read, settings.environments, clock
    )
    packages.on_end = tracker.stir
    tracker.wishes = EvaluatedSources(evaluations, stores.cache.store_dir).wishes
    reports = CoverageReports(stores.environments, clock)
    api = EnvironmentApi(tracker, reports, submitted, stores.cache.store_dir, native_system(), clock)
    serve_routes(app, api.handlers())
    return tracker
