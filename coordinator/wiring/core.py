"""The engine with what it decides from, recovered from the journal, and the ways in for clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from coordinator.config import LimitSettings, Settings
from coordinator.defaults import OPERATOR
from coordinator.demand_settings import DemandAction
from coordinator.engine.dispatch import Dispatch
from coordinator.engine.engine import Engine
from coordinator.engine.timing_writer import TimingWriter
from coordinator.intake.growth import Growth
from coordinator.intake.intake import Intake
from coordinator.intake.limits import IntakeLimits
from coordinator.intake.submissions import Submissions
from coordinator.intake.verifier_pool import VerifierPool
from coordinator.journal.codec import decode_notes
from coordinator.learning.learned_times import LearnedTimes
from coordinator.learning.learner import Learner, open_works, timed_builds
from coordinator.readmodel.attempt_meter import AttemptMeter
from coordinator.readmodel.capacity import Capacity
from coordinator.readmodel.differences import Differences
from coordinator.readmodel.etas import Etas
from coordinator.readmodel.explain import FarmExplainer
from coordinator.readmodel.packed_roots import with_packed_roots
from coordinator.readmodel.runs import Runs
from coordinator.readmodel.throughput import Throughput
from coordinator.readmodel.usual_times import UsualTimes
from coordinator.readmodel.views import Views
from coordinator.readmodel.worker_records import WorkerRecords
from coordinator.stores.timings import AttemptTiming
from coordinator.stores.worker_counts import worker_counts
from coordinator.wiring.stores import Stores
from infra.clock import Clock
from scheduler.effects import Effect
from scheduler.farm import Farm
from scheduler.policy import Limits, LongestPathFirst
from scheduler.resource_limits import ResourceLimits

#: Weight of an owner of weight 1 for each of the farm's own owner of builds for readers (`coordinator.demand`).
OWNERS_BEFORE_DEMAND: Final = 10


class EffectRelay:
    """Relay of effects from the engine to dispatch; breaks the circle, because dispatch posts events to the engine."""

    def __init__(self) -> None:
        self.dispatch: Dispatch | None = None
        #: Returns those of some effects that need not wait for a source.
        self.detour: Callable[[Sequence[Effect]], Sequence[Effect]] = lambda effects: effects

    def submit(self, effects: Sequence[Effect]) -> None:
        """Pass effects on; those of the replay, before there are workers, are not."""
        if self.dispatch is not None:
            self.dispatch.submit(self.detour(effects))


@dataclass(frozen=True, slots=True)
class Core:
    """The engine with what it decides from, and the ways in for clients."""

    farm: Farm
    engine: Engine
    views: Views
    explainer: FarmExplainer
    intake: Intake
    submissions: Submissions
    growth: Growth
    relay: EffectRelay
    timings: TimingWriter
    usual: UsualTimes
    runs: Runs
    etas: Etas
    capacity: Capacity
    throughput: Throughput
    workers: WorkerRecords
    learner: Learner
    #: Facts that were replayed.
    replayed: int


async def recover(settings: Settings, clock: Clock, stores: Stores) -> Core:
    """Make the core and replay the journal into it."""
    limits = settings.limits
    farm = Farm(
        Limits(
            failure_ttl_s=limits.failure_ttl_s,
            lease_ttl_s=limits.worker_silence_s,
            give_up_s=limits.give_up_s,
            retries_per_hour=limits.retries_per_hour,
            build=_build_limits(limits),
        ),
        LongestPathFirst(weights=_weights(settings)),
    )
    explainer = FarmExplainer(farm, stores.logs, clock)
    usual = UsualTimes(stores.timings.usual_builds, clock)
    views = Views(explainer, usual=usual.of)
    throughput = Throughput(views, stores.timings.ended_between, clock)
    relay = EffectRelay()
    engine = Engine(farm, stores.journal, views, clock, relay.submit)
    notes = decode_notes(await stores.journal.notes())
    replayed = await engine.recover(notes)
    views.add_details({}, {name: with_packed_roots(note) for name, note in notes.items()})
    # What a replay counted is history of an earlier process.
    views.timelines.meter = AttemptMeter()
    cache = stores.cache
    writer = TimingWriter(views.timelines, stores.timings, views.named, clock, limits.timings_days, limits.timings_rows)
    intake = Intake(
        stores.derivations,
        cache,
        cache.objects,
        cache.store_dir,
        IntakeLimits.of(limits),
        verifiers=VerifierPool(cache.store_dir.path),
    )
    if not settings.sources.across_names:
        intake.fixed.offers = None
    learner = _learner(stores, engine, views, farm, clock)
    intake.works, explainer.source, explainer.costs = learner.expect, learner.source, learner.costs
    writer.features = farm.features_of
    writer.on_saved = partial(_were_built, usual, learner)
    etas = _foresee(views, farm, learner, clock)
    submissions = Submissions(engine, views, intake)
    growth = Growth(engine, views, intake, submissions, limits.open_silence_s)
    views.recipes.read = writer.ends_of
    runs = Runs(views, farm, stores.timings, Differences(views, stores.derivations, stores.timings, writer.flush))
    workers = WorkerRecords(partial(worker_counts, stores.timings), clock, views.workforce.compared)
    return Core(
        farm,
        engine,
        views,
        explainer,
        intake,
        submissions,
        growth,
        relay,
        writer,
        usual,
        runs,
        etas,
        Capacity(views, farm, clock),
        throughput,
        workers,
        learner,
        replayed,
    )


def _were_built(usual: UsualTimes, learner: Learner, attempts: Sequence[AttemptTiming]) -> None:
    usual.were_built(attempts)
    learner.were_built()


def _learner(stores: Stores, engine: Engine, views: Views, farm: Farm, clock: Clock) -> Learner:
    return Learner(
        partial(timed_builds, stores.timings),
        engine.post,
        views.workforce.emulating,
        clock,
        partial(open_works, farm.state, views.step_name),
    )


def _foresee(views: Views, farm: Farm, learner: Learner, clock: Clock) -> Etas:
    times = LearnedTimes(lambda: learner.learned)
    etas = Etas(views, farm, times, clock)
    etas.surprise_s, etas.usual_s = times.surprise_s, times.usual_s
    views.eta_of, learner.on_learned = etas.of, etas.wake
    return etas


def _weights(settings: Settings) -> dict[str, int]:
    """Return the weights of owners; what is built because readers asked for it has a part of the smallest."""
    weights = {owner.name: owner.weight for owner in settings.owners}
    if settings.demand.action is not DemandAction.BUILD:
        return weights
    weights.setdefault(OPERATOR, 1)
    return {name: weight * OWNERS_BEFORE_DEMAND for name, weight in weights.items()}


def _build_limits(limits: LimitSettings) -> ResourceLimits:
    return ResourceLimits(
        timeout_s=limits.build_timeout_s,
        silence_s=limits.build_silence_s,
        log_bytes=limits.log_bytes,
        output_bytes=limits.build_output_bytes,
    )
