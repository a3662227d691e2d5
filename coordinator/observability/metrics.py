"""Metrics of a farm at `/metrics`: each record of the metric table with the room that its numbers come from.

Counting happens where things happen, as plain integers (`infra.cache.counters`, `coordinator.engine.meter`) or in the
rows of the views; here they only get names.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import get_args

from coordinator.api.capacity_routes import CapacityClassView
from coordinator.api.flakes import WorkerRecordView
from coordinator.api.models import FarmView, StepStatus, SubmissionState, WaitingKind, WorkerState
from coordinator.caches.housekeeping import CacheGauges
from coordinator.engine.meter import EngineMeter
from coordinator.intake.client_meter import ClientMeter
from coordinator.observability import metric_table as table
from coordinator.observability.trace_exporter import TraceExporter
from coordinator.readmodel.attempt_meter import AttemptMeter
from coordinator.readmodel.capacity import Capacity
from coordinator.readmodel.views import Views
from infra.cache.cache import Cache
from infra.cache.counters import CacheCounters
from infra.compiled.finder import is_compiled
from infra.loop_watch import LoopWatch
from infra.telemetry import Labels, Observe, Telemetry
from scheduler.failures import CONSEQUENCES
from scheduler.model import FailureKind, Requirements
from workers.wire.grades import LEVELS
from workers.wire.messages import Vitals

_Values = Iterable[tuple[float, Labels]]


def add_cache_metrics(telemetry: Telemetry, caches: Mapping[str, Cache], gauges: Mapping[str, CacheGauges]) -> None:
    """Show the counters of `caches` and the `gauges` of the same names."""

    def of_counters(read: Callable[[CacheCounters], float]) -> Observe:
        return lambda: [(read(cache.counters), {"cache": name}) for name, cache in caches.items()]

    def of_gauges(read: Callable[[CacheGauges], float]) -> Observe:
        return lambda: [(read(gauge), {"cache": name}) for name, gauge in gauges.items()]

    for metric, read in table.CACHE_COUNTERS.items():
        telemetry.show(metric, of_counters(read))
    telemetry.show(table.CACHE_COLLECTION_PHASE, lambda: _phases(caches))
    telemetry.show(table.CACHE_PATHS, of_gauges(lambda g: g.paths))
    telemetry.show(table.CACHE_STORED, of_gauges(lambda g: g.stored_bytes))
    telemetry.show(table.CACHE_LEASES, of_gauges(lambda g: g.leases))
    telemetry.show(table.CACHE_DANGLING, of_gauges(lambda g: g.dangling))
    telemetry.show_durations(
        table.CACHE_PUBLISH, {name: cache.counters.publish_seconds for name, cache in caches.items()}
    )


def add_farm_metrics(
    telemetry: Telemetry,
    views: Views,
    farm: Callable[[], FarmView],
    holding: Callable[[], Mapping[Requirements, WaitingKind]],
) -> None:
    """Show steps, submissions, workers and troubles; `holding` gives what holds each class of ready steps."""
    workforce = views.workforce
    telemetry.show(table.STEPS, lambda: _by("state", views.step_counts(), StepStatus))
    telemetry.show(table.READY_STEPS, lambda: _ready(views.ready(), holding()))
    telemetry.show(table.SUBMISSIONS, lambda: _by("state", views.submission_counts(), SubmissionState))
    telemetry.show(table.TROUBLES, lambda: [(len(farm().troubles), {})])
    telemetry.show(table.WORKERS, lambda: _by("state", workforce.counts(), get_args(WorkerState)))
    telemetry.show(table.WORKERS_ISOLATION, lambda: _by("class", workforce.isolation_counts(), LEVELS))
    telemetry.show(table.WORKER_SLOTS, lambda: [(each.slots, {"worker": each.name}) for each in workforce.views()])
    telemetry.show(table.WORKER_BUILT, lambda: [(each.built, {"worker": each.name}) for each in workforce.views()])
    telemetry.show(table.WORKER_LEASES, lambda: _leases(views))
    telemetry.show(table.WORKER_FAILED, lambda: _of_records(views, lambda record: record.failed))
    telemetry.show(table.WORKER_EXPECTED, lambda: _of_records(views, lambda record: record.expected))
    telemetry.show(table.WORKER_FAILS_MORE, lambda: _of_records(views, lambda record: record.stands_out))
    telemetry.show(table.TIMINGS_WAITING, lambda: [(views.timelines.waiting, {})])
    telemetry.show(table.TIMINGS_DROPPED, lambda: [(views.timelines.dropped, {})])

    def of_vitals(read: Callable[[Vitals], float | None]) -> Observe:
        def observe() -> _Values:
            for worker, vitals in workforce.vitals():
                value = read(vitals)
                if value is not None:
                    yield value, {"worker": worker}

        return observe

    for metric, read in table.WORKER_VITALS.items():
        telemetry.show(metric, of_vitals(read))


def add_capacity_metrics(telemetry: Telemetry, capacity: Capacity) -> None:
    """Show the capacity that open work could use; a class that has none any more is 0."""

    def of(read: Callable[[CapacityClassView], float]) -> Observe:
        def observe() -> _Values:
            for each in capacity.classes_met():
                labels = {"system": each.system, "features": ",".join(each.features), "memory": str(each.memory_bytes)}
                yield read(each), labels

        return observe

    telemetry.show(table.CAPACITY_SLOTS, of(lambda each: each.slots))
    telemetry.show(table.CAPACITY_HOURS, of(lambda each: each.hours))


def add_engine_metrics(telemetry: Telemetry, meter: EngineMeter, state_dir: Path) -> None:
    """Show what the engine does, and the room on the disk that its state is on."""
    telemetry.show(table.SCHEDULER_COMPILED, lambda: [(float(is_compiled()), {})])
    telemetry.show(table.TURN_EVENTS, lambda: [(meter.events, {})])
    telemetry.show(table.JOURNAL_FACTS, lambda: [(meter.durable_facts, {})])
    telemetry.show(table.FAILED_ATTEMPTS, lambda: _failures(meter))
    telemetry.show(table.ENDED_STEPS, lambda: _by("result", meter.ended, ("done", "failed")))
    telemetry.show(table.STATE_DISK_FREE, lambda: _free(state_dir))
    telemetry.show_durations(table.TURN, meter.parts)


def add_time_metrics(telemetry: Telemetry, attempts: AttemptMeter, clients: ClientMeter) -> None:
    """Show where the time of attempts went, and of clients before they submitted."""
    telemetry.show_durations(table.ATTEMPT, attempts.phases)
    telemetry.show_durations(table.BUILDER_PHASE, attempts.builder_phases)
    telemetry.show(table.HELPED_ATTEMPTS, lambda: [(attempts.helped, {})])
    telemetry.show(table.FETCHED_AHEAD, lambda: [(attempts.ahead_bytes, {})])
    telemetry.show_durations(table.CLIENT_STAGE, clients.stages)
    telemetry.show(table.SUBMITTED_DERIVATIONS, lambda: [(clients.derivations, {})])


def add_trace_metrics(telemetry: Telemetry, exporter: TraceExporter | None) -> None:
    """Show what became of spans; 0 where no traces are sent."""
    telemetry.show(table.SPANS_SENT, lambda: [(exporter.sent if exporter else 0, {})])
    telemetry.show(table.SPANS_DROPPED, lambda: [(exporter.dropped if exporter else 0, {})])


def add_loop_metrics(telemetry: Telemetry, watch: LoopWatch) -> None:
    """Show what holds the event loop; to be called before the watch begins."""
    watch.on_slice = telemetry.histogram(table.LOOP_STALL).record
    telemetry.show(table.LOOP_STALLS, lambda: [(watch.stalls, {})])
    telemetry.show(table.LOOP_LONGEST, lambda: [(watch.longest_s, {})])


def _phases(caches: Mapping[str, Cache]) -> _Values:
    for name, cache in caches.items():
        for phase, seconds in cache.counters.phase_seconds.items():
            yield seconds, {"cache": name, "phase": phase}


def _ready(counts: Mapping[Requirements, int], holding: Mapping[Requirements, WaitingKind]) -> _Values:
    for wanted, count in counts.items():
        reason = holding.get(wanted, "back_off")
        yield count, {"system": wanted.system, "features": ",".join(wanted.features), "reason": reason}


def _of_records(views: Views, read: Callable[[WorkerRecordView], float]) -> _Values:
    """Give a figure of each worker's record; 0 of one without or gone, so that its line does not stay where it was."""
    for worker in views.workforce.views():
        record = None if worker.state == "gone" else worker.record
        yield 0.0 if record is None else float(read(record)), {"worker": worker.name}


def _leases(views: Views) -> _Values:
    """Count each worker's leases by stage; a worker without any has one 0, so that its line does not end."""
    for worker in views.workforce.views():
        stages = Counter(stage for _, stage in worker.leases) or {"building": 0}
        for stage, count in stages.items():
            yield count, {"worker": worker.name, "stage": stage}


def _free(directory: Path) -> _Values:
    with suppress(OSError):
        room = os.statvfs(directory)
        return [(room.f_bavail * room.f_frsize, {})]
    return []


def _failures(meter: EngineMeter) -> _Values:
    for kind in FailureKind:
        yield meter.failures[kind], {"kind": kind.value, "course": CONSEQUENCES[kind].course.value}


def _by(label: str, counts: Mapping[str, int], values: Iterable[str]) -> _Values:
    """Give a count to each of all `values`: one that is absent would leave Prometheus with its last number."""
    return [(counts.get(value, 0), {label: str(value)}) for value in values]
