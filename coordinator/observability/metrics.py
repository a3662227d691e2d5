"""Metrics of a farm at `/metrics`: each number with its name and the room that it comes from.

Counting happens where things happen, as plain integers (`infra.cache.counters`) or in the rows of the views; here they
only get names. Names begin with `drover_`; units are last, as Prometheus wants them. Labels are bounded: names of
caches, states, phases, workers, classes, never a store path or a derivation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from coordinator.caches.housekeeping import CacheGauges
from coordinator.readmodel.views import Views
from infra.cache.cache import Cache
from infra.cache.counters import CacheCounters
from infra.telemetry import Observe, Telemetry

_COUNTED: Final[Mapping[str, tuple[str, Callable[[CacheCounters], float]]]] = {
    "narinfo_hits": ("Narinfo requests that were answered.", lambda c: c.narinfo_hits),
    "narinfo_misses": ("Narinfo requests for paths that are not there.", lambda c: c.narinfo_misses),
    "nar_requests": ("NAR requests that were answered.", lambda c: c.nar_requests),
    "published_paths": ("Paths published.", lambda c: c.published),
    "already_published_paths": ("Paths offered again with the same bits.", lambda c: c.already_published),
    "conflicts": ("Paths offered with other bits than the published ones.", lambda c: c.conflicts),
    "rejected_paths": ("Paths refused: untrue claims, missing references.", lambda c: c.rejected),
    "collections": ("Garbage collections that ended.", lambda c: c.collections),
    "tombstoned_paths": ("Paths made invisible by collections.", lambda c: c.tombstoned_paths),
    "deleted_paths": ("Paths deleted by collections.", lambda c: c.deleted_paths),
    "deleted_objects": ("Objects deleted by collections.", lambda c: c.deleted_objects),
}
_COUNTED_BYTES: Final[Mapping[str, tuple[str, Callable[[CacheCounters], float]]]] = {
    "nar_served": ("Bytes of NAR answers.", lambda c: c.nar_bytes),
    "uploaded": ("Compressed bytes taken in over HTTP.", lambda c: c.uploaded_bytes),
    "deleted": ("Bytes of deleted objects.", lambda c: c.deleted_bytes),
}


def add_cache_metrics(telemetry: Telemetry, caches: Mapping[str, Cache], gauges: Mapping[str, CacheGauges]) -> None:
    """Show the counters of `caches` and the `gauges` of the same names."""

    def of_counters(read: Callable[[CacheCounters], float]) -> Observe:
        return lambda: [(read(cache.counters), {"cache": name}) for name, cache in caches.items()]

    def of_gauges(read: Callable[[CacheGauges], float]) -> Observe:
        return lambda: [(read(gauge), {"cache": name}) for name, gauge in gauges.items()]

    for name, (text, read) in _COUNTED.items():
        telemetry.counter(f"drover_cache_{name}", text, of_counters(read))
    for name, (text, read) in _COUNTED_BYTES.items():
        telemetry.counter(f"drover_cache_{name}", text, of_counters(read), unit="By")
    telemetry.counter(
        "drover_cache_collection_phase", "Time of each phase of collections.", lambda: _phases(caches), unit="s"
    )
    telemetry.gauge("drover_cache_paths", "Paths that can be fetched.", of_gauges(lambda g: g.paths))
    telemetry.gauge("drover_cache_stored", "Bytes of stored objects.", of_gauges(lambda g: g.stored_bytes), unit="By")
    telemetry.gauge("drover_cache_leases", "Leases on paths.", of_gauges(lambda g: g.leases))
    telemetry.gauge(
        "drover_cache_dangling_references",
        "Published paths whose reference cannot be fetched; always 0.",
        of_gauges(lambda g: g.dangling),
    )
    latency = telemetry.seconds("drover_cache_publish", "Time of one publishing call, verification included.")
    for name, cache in caches.items():
        cache.counters.on_publish = _recorder(latency.record, {"cache": name})


def add_farm_metrics(telemetry: Telemetry, views: Views) -> None:
    """Show steps, submissions and workers by state."""
    telemetry.gauge("drover_steps", "Steps by state.", lambda: _by_state(views.step_counts()))
    telemetry.gauge("drover_submissions", "Submissions by state.", lambda: _by_state(views.submission_counts()))
    telemetry.gauge("drover_workers", "Workers by state.", lambda: _by_state(views.workforce.counts()))
    telemetry.gauge(
        "drover_workers_isolation",
        "Workers by how they keep builds from their machine: A full, B the macOS sandbox, C weaker.",
        lambda: [(count, {"class": level}) for level, count in views.workforce.isolation_counts().items()],
    )
    telemetry.gauge(
        "drover_worker_leases",
        "Leases in a worker's hands.",
        lambda: [(len(worker.leases), {"worker": worker.name}) for worker in views.workforce.views()],
    )


def _recorder(record: Callable[[float, Mapping[str, str]], None], labels: Mapping[str, str]) -> Callable[[float], None]:
    return lambda seconds: record(seconds, labels)


def _phases(caches: Mapping[str, Cache]) -> Iterable[tuple[float, Mapping[str, str]]]:
    for name, cache in caches.items():
        for phase, seconds in cache.counters.phase_seconds.items():
            yield seconds, {"cache": name, "phase": phase}


def _by_state(counts: Mapping[str, int]) -> Iterable[tuple[float, Mapping[str, str]]]:
    return [(count, {"state": state}) for state, count in counts.items()]
