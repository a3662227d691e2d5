"""The tasks that run for as long as a coordinator does, in the order in which they are to end."""

from __future__ import annotations

import asyncio

from coordinator.config import Settings
from coordinator.engine.compaction import Compactor
from coordinator.engine.expiry import Forgetter
from coordinator.fleet.autoscaling import Autoscaling
from coordinator.journal.takeover import Lead
from coordinator.wiring.core import Core
from coordinator.wiring.site import Site
from coordinator.wiring.work import Work
from infra.clock import Clock
from workers.ray_transport.fleet import RayFleet


def start_tasks(  # noqa: PLR0917 - collaborators, named by their types
    group: asyncio.TaskGroup, settings: Settings, clock: Clock, lead: Lead, core: Core, work: Work, site: Site
) -> list[asyncio.Task[None]]:
    """Start what runs for as long as the coordinator does; returns the tasks in the order in which they are to end."""
    engine, journal, exporter = core.engine, lead.journal, site.observation.exporter
    return [
        # First, because they wait for the engine.
        group.create_task(core.growth.run(), name="open submissions"),
        group.create_task(site.environments.run(), name="environments"),
        group.create_task(site.demand.run(), name="demand"),
        group.create_task(work.sources.run(), name="sources"),
        group.create_task(core.learner.run(), name="learning"),
        group.create_task(Forgetter(engine, core.views, settings.limits, clock).run(), name="forgetting"),
        group.create_task(work.fleet.run(work.sink), name="fleet"),
        group.create_task(work.dispatch.run(), name="dispatch"),
        group.create_task(engine.run(), name="engine"),
        group.create_task(work.losses.run(), name="losses"),
        group.create_task(work.archiver.run(), name="log archiver"),
        *(group.create_task(each.uploads.run(), name="uploads") for each in site.caches.services),
        group.create_task(lead.leadership.hold(journal), name="leadership"),
        group.create_task(_compactor(settings, lead, core).run(), name="compaction"),
        group.create_task(core.intake.run(), name="intake"),
        *([group.create_task(verifiers.run(), name="verifiers")] if (verifiers := core.intake.verifiers) else []),
        group.create_task(core.usual.run(), name="usual times"),
        group.create_task(core.etas.run(), name="foreseen ends"),
        group.create_task(core.capacity.run(), name="capacity"),
        group.create_task(core.workers.run(), name="records of workers"),
        *(
            [group.create_task(Autoscaling(core.capacity.of, fleet.request_nodes, clock).run(), name="autoscaling")]
            if settings.ray_autoscaler and isinstance(fleet := work.fleet, RayFleet)
            else []
        ),
        # Last: they write and send what the others have left.
        group.create_task(core.timings.run(), name="timings"),
        *([group.create_task(exporter.run(), name="traces")] if exporter else []),
    ]


def _compactor(settings: Settings, lead: Lead, core: Core) -> Compactor:
    steps = core.farm.state.steps
    return Compactor(settings.database_url("journal"), lead.journal, steps=lambda: len(steps))


def start_housekeeping(group: asyncio.TaskGroup, site: Site) -> list[asyncio.Task[None]]:
    """Start the housekeepers of all caches."""
    return [group.create_task(each.run(), name="housekeeping") for each in site.caches.keepers.values()]
