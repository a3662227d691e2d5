"""The rooms between the core and the workers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from coordinator.caches.losses import Losses
from coordinator.caches.worker_repair import WorkerSource
from coordinator.config import Settings
from coordinator.engine.dispatch import Dispatch
from coordinator.engine.log_archiver import LogArchiver
from coordinator.engine.worker_events import FleetSink
from coordinator.observability.spans import Trace
from coordinator.readmodel.views import Views
from coordinator.security.isolation import WeakIsolation
from coordinator.sources.room import SourceRoom
from coordinator.wiring.core import Core
from coordinator.wiring.stores import Stores
from infra.cache.repair.fsck import RepairSource
from infra.clock import Clock
from scheduler.model import LeaseId, StepKey
from workers.wire.fleet import Fleet


@dataclass(frozen=True, slots=True)
class Work:
    """The rooms between the core and the workers."""

    fleet: Fleet
    dispatch: Dispatch
    sink: FleetSink
    losses: Losses
    archiver: LogArchiver
    workers: WorkerSource
    #: Where lost objects are looked for, in order; upstreams are added once they are open.
    repair_sources: list[RepairSource]
    #: What has fixed outputs from elsewhere than a worker's network.
    sources: SourceRoom


def _traceparent(views: Views, lease: LeaseId) -> str:
    """Return the span that a lease's attempt will be, in the trace of the oldest submission that wants its step."""
    row = views.row_of(lease.step)
    if row is None or not row.submissions:
        return ""
    oldest = row.submissions[0]
    return str(Trace(oldest.id, views.note(oldest.id).traceparent).attempt(lease.step, lease.attempt))


def _cores_of(core: Core, worker: str, step: StepKey) -> int:
    """Return the processors that a build should have use for; 0 where that is not known, or the worker is older."""
    named = core.views.named(step) if core.views.workforce.takes_cores(worker) else None
    return 0 if named is None else core.learner.cores(*named)


def connect_workers(settings: Settings, clock: Clock, stores: Stores, core: Core, fleet: Fleet) -> Work:
    """Make the rooms between the core and the workers, and give dispatch the effects."""
    tokens, views = stores.upload_tokens, core.views
    workers = WorkerSource(fleet, views, stores.cache.objects, tokens.for_path(clock))
    sources: list[RepairSource] = [workers]
    losses = Losses(stores.cache, stores.derivations, core.farm, views, clock, core.submissions.replan, sources)

    def published(lease: LeaseId, *times: float) -> None:
        views.timelines.published(lease.step, lease.attempt, *times)
        fixed.published(lease.step)

    dispatch = Dispatch(
        fleet,
        stores.cache,
        stores.derivations,
        core.farm.limits_of,
        core.engine.post,
        losses=losses.check,
        upload_token=tokens.for_lease(clock),
        traceparent=lambda lease: _traceparent(views, lease),
        cores_of=partial(_cores_of, core),
        takes_hints=views.workforce.takes_hints,
        clock=clock,
        timed=published,
        awaited=lambda step: bool(core.farm.above(step, 1)),
        building=views.is_building,
    )
    core.relay.dispatch = dispatch
    fixed = SourceRoom(
        core.intake.fixed,
        stores.cache,
        stores.derivations,
        views,
        core.engine,
        clock,
        dispatch.submit,
        settings.sources.at_once,
    )
    core.relay.detour, core.intake.fixed.on_lacking = fixed.detour, fixed.want
    weak = WeakIsolation(settings.weak_isolation)
    sink = FleetSink(core.engine, dispatch, core.farm, views, stores.logs, clock, losses.check, weak=weak)
    archiver = LogArchiver(stores.logs, core.farm, clock, settings.limits.log_days)
    return Work(fleet, dispatch, sink, losses, archiver, workers, sources, fixed)
