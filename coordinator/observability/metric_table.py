"""Table of all metrics of a farm: name, unit, labels and meaning, from which code and documentation take them.

Names begin with `drover_`. `Metric.exposed` adds the endings that Prometheus wants. Labels are bounded: names of
caches, states, phases, workers, systems, classes, never a store path or a derivation. Counters begin at 0 with each
start of the coordinator, which Prometheus' `rate` and `increase` allow for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from infra.cache.counters import CacheCounters
from infra.telemetry import Metric
from workers.wire.messages import Vitals

STEPS: Final = Metric("drover_steps", "gauge", "Steps that the farm remembers, by state.", ("state",))
READY_STEPS: Final = Metric(
    "drover_ready_steps",
    "gauge",
    "Ready steps by what they require and by what holds them (`reason`, as in `drover status --json`).",
    ("system", "features", "reason"),
)
CAPACITY_SLOTS: Final = Metric(
    "drover_capacity_slots",
    "gauge",
    "Slots that are worth having for what can be built now, by what it requires; memory of one build in bytes, or 0.",
    ("system", "features", "memory"),
)
CAPACITY_HOURS: Final = Metric(
    "drover_capacity_hours",
    "gauge",
    "Hours of one usual slot that all open steps should take, by what they require.",
    ("system", "features", "memory"),
)
SUBMISSIONS: Final = Metric("drover_submissions", "gauge", "Submissions, by state.", ("state",))
WORKERS: Final = Metric("drover_workers", "gauge", "Workers, by state.", ("state",))
WORKERS_ISOLATION: Final = Metric(
    "drover_workers_isolation",
    "gauge",
    "Workers by how they keep builds from their machine: A full, B the macOS sandbox, C weaker.",
    ("class",),
)
TROUBLES: Final = Metric(
    "drover_troubles", "gauge", "Things that the coordinator waits for. `drover status` names them."
)

WORKER_SLOTS: Final = Metric("drover_worker_slots", "gauge", "Builds that a worker runs side by side.", ("worker",))
WORKER_LEASES: Final = Metric(
    "drover_worker_leases", "gauge", "Leases that a worker holds, by stage.", ("worker", "stage")
)
WORKER_BUILT: Final = Metric("drover_worker_built", "counter", "Steps that a worker built.", ("worker",))
#: The same labels and source for all of them; a figure that the worker's machine does not give is absent, not 0.
WORKER_VITALS: Final[Mapping[Metric, Callable[[Vitals], float | None]]] = {
    Metric(
        "drover_worker_load", "gauge", "Load average of a worker's machine over a minute, by processor.", ("worker",)
    ): lambda v: v.load,
    Metric(
        "drover_worker_cpu_pressure",
        "gauge",
        "Part of the last 10 s in which some task of a worker's machine waited for a processor (Linux PSI), 0 to 1.",
        ("worker",),
    ): lambda v: v.cpu_pressure,
    Metric(
        "drover_worker_memory_pressure",
        "gauge",
        "Part of the last 10 s in which some task of a worker's machine waited for memory (Linux PSI), 0 to 1.",
        ("worker",),
    ): lambda v: v.memory_pressure,
    Metric(
        "drover_worker_io_pressure",
        "gauge",
        "Part of the last 10 s in which some task of a worker's machine waited for a disk (Linux PSI), 0 to 1.",
        ("worker",),
    ): lambda v: v.io_pressure,
    Metric(
        "drover_worker_memory_available",
        "gauge",
        "Memory that a worker's machine can still give to programs.",
        ("worker",),
        "By",
    ): lambda v: v.memory_available_bytes,
    Metric(
        "drover_worker_disk_free",
        "gauge",
        "Room on the fullest of a worker's disks: store, build directory, state directory.",
        ("worker",),
        "By",
    ): lambda v: v.disk_free_bytes,
}
WORKER_FAILED: Final = Metric(
    "drover_worker_failed_steps",
    "gauge",
    "Steps of the last seven days that failed on a worker, succeeded somewhere, and are of packages that others tried.",
    ("worker",),
)
WORKER_EXPECTED: Final = Metric(
    "drover_worker_expected_failed_steps",
    "gauge",
    "How many of these steps would have failed on a worker if all workers were alike.",
    ("worker",),
)
WORKER_FAILS_MORE: Final = Metric(
    "drover_worker_fails_more",
    "gauge",
    "1 for a worker on which builds fail more often than elsewhere, beyond what chance explains; else 0.",
    ("worker",),
)

TIMINGS_WAITING: Final = Metric("drover_timings_waiting", "gauge", "Timings of attempts that are not written yet.")
TIMINGS_DROPPED: Final = Metric(
    "drover_timings_dropped",
    "counter",
    "Timings of attempts that were lost, because their database did not take them in time, or its file was removed.",
)

TURN: Final = Metric(
    "drover_engine_turn",
    "histogram",
    "Time of one turn of the engine, by part: core (decisions), journal (commit), views (folding).",
    ("part",),
    "s",
)
SCHEDULER_COMPILED: Final = Metric(
    "drover_scheduler_compiled", "gauge", "1 where the scheduler runs compiled (`./run compile`), 0 where from source."
)
TURN_EVENTS: Final = Metric("drover_engine_events", "counter", "Events that the core took in.")
JOURNAL_FACTS: Final = Metric("drover_journal_facts", "counter", "Facts that were written to the journal.")
FAILED_ATTEMPTS: Final = Metric(
    "drover_failed_attempts",
    "counter",
    "Attempts of steps that did not succeed, by kind of failure. Course `end`: a verdict on the step; `retry`: the "
    "farm is at fault, or may be; `hand back`: no fault.",
    ("kind", "course"),
)
ENDED_STEPS: Final = Metric(
    "drover_ended_steps", "counter", "Steps that ended by a build, by result: done or failed.", ("result",)
)

ATTEMPT: Final = Metric(
    "drover_attempt",
    "histogram",
    "Time that attempts spent in a phase: wait (ready, without a slot), inputs, build, pack, upload, verify, publish.",
    ("phase",),
    "s",
)
BUILDER_PHASE: Final = Metric(
    "drover_builder_phase",
    "histogram",
    "Time of the phases that builders announce: those of Nixpkgs' standard environment, all others as `other`.",
    ("phase",),
    "s",
)
HELPED_ATTEMPTS: Final = Metric(
    "drover_helped_attempts",
    "counter",
    "Attempts of which inputs were in the worker's store before the lease came, because it fetched them ahead.",
)
FETCHED_AHEAD: Final = Metric("drover_fetched_ahead", "counter", "Bytes of these inputs, unpacked.", unit="By")
CLIENT_STAGE: Final = Metric(
    "drover_client_stage",
    "histogram",
    "Time of what clients did before they submitted: evaluate, closure (reading derivations), upload.",
    ("stage",),
    "s",
)
SUBMITTED_DERIVATIONS: Final = Metric(
    "drover_submitted_derivations", "counter", "Derivations behind accepted submissions, known ones included."
)

STATE_DISK_FREE: Final = Metric(
    "drover_state_disk_free", "gauge", "Room on the disk of the coordinator's state directory.", unit="By"
)
SPANS_SENT: Final = Metric("drover_spans_sent", "counter", "Spans of traces that the collector took.")
SPANS_DROPPED: Final = Metric(
    "drover_spans_dropped",
    "counter",
    "Spans that the collector did not take, and attempts whose spans could not wait.",
)
CONNECTIONS: Final = Metric("drover_connections", "gauge", "Open HTTP connections.")
CONNECTIONS_CLOSED: Final = Metric(
    "drover_connections_closed",
    "counter",
    "Connections closed by the gate: for another, refused, without a head or a reader in time.",
    ("reason",),
)
REQUESTS_ABANDONED: Final = Metric(
    "drover_requests_abandoned", "counter", "Requests whose client left in the middle of them."
)
LOOP_STALL: Final = Metric(
    "drover_loop_stall", "histogram", "Processor time for which one callback held the event loop, above 25 ms.", (), "s"
)
LOOP_STALLS: Final = Metric("drover_loop_stalls", "counter", "Times that the event loop was held over 50 ms.")
LOOP_LONGEST: Final = Metric("drover_loop_longest_stall", "gauge", "Longest time that the loop was held.", unit="s")

_CACHE: Final = ("cache",)
CACHE_COUNTERS: Final[Mapping[Metric, Callable[[CacheCounters], float]]] = {
    Metric("drover_cache_narinfo_hits", "counter", "Narinfo requests that were answered.", _CACHE): (
        lambda c: c.narinfo_hits
    ),
    Metric("drover_cache_narinfo_misses", "counter", "Narinfo requests for paths that are not there.", _CACHE): (
        lambda c: c.narinfo_misses
    ),
    Metric("drover_cache_nar_requests", "counter", "NAR requests that were answered.", _CACHE): lambda c: (
        c.nar_requests
    ),
    Metric("drover_cache_nar_served", "counter", "Bytes of NAR answers.", _CACHE, "By"): lambda c: c.nar_bytes,
    Metric("drover_cache_published_paths", "counter", "Paths published.", _CACHE): lambda c: c.published,
    Metric("drover_cache_already_published_paths", "counter", "Paths offered again with the same bits.", _CACHE): (
        lambda c: c.already_published
    ),
    Metric("drover_cache_conflicts", "counter", "Paths offered with other bits than the published ones.", _CACHE): (
        lambda c: c.conflicts
    ),
    Metric("drover_cache_rejected_paths", "counter", "Paths refused: untrue claims, missing references.", _CACHE): (
        lambda c: c.rejected
    ),
    Metric("drover_cache_uploaded", "counter", "Compressed bytes taken in over HTTP.", _CACHE, "By"): (
        lambda c: c.uploaded_bytes
    ),
    Metric("drover_cache_collections", "counter", "Garbage collections that ended.", _CACHE): lambda c: c.collections,
    Metric("drover_cache_tombstoned_paths", "counter", "Paths made invisible by collections.", _CACHE): (
        lambda c: c.tombstoned_paths
    ),
    Metric("drover_cache_deleted_paths", "counter", "Paths deleted by collections.", _CACHE): lambda c: c.deleted_paths,
    Metric("drover_cache_deleted_objects", "counter", "Objects deleted by collections.", _CACHE): (
        lambda c: c.deleted_objects
    ),
    Metric("drover_cache_deleted", "counter", "Bytes of deleted objects.", _CACHE, "By"): lambda c: c.deleted_bytes,
}
CACHE_COLLECTION_PHASE: Final = Metric(
    "drover_cache_collection_phase", "counter", "Time of each phase of collections.", ("cache", "phase"), "s"
)
CACHE_PATHS: Final = Metric("drover_cache_paths", "gauge", "Paths that can be fetched.", _CACHE)
CACHE_STORED: Final = Metric("drover_cache_stored", "gauge", "Bytes of stored objects.", _CACHE, "By")
CACHE_LEASES: Final = Metric("drover_cache_leases", "gauge", "Leases on paths.", _CACHE)
CACHE_DANGLING: Final = Metric(
    "drover_cache_dangling_references",
    "gauge",
    "Published paths whose reference cannot be fetched. Above 0, something destroyed what the cache needs.",
    _CACHE,
)
CACHE_PUBLISH: Final = Metric(
    "drover_cache_publish", "histogram", "Time of one publishing call, verification included.", _CACHE, "s"
)

#: In the order of the documentation.
METRICS: Final[tuple[Metric, ...]] = (
    STEPS,
    READY_STEPS,
    SUBMISSIONS,
    ENDED_STEPS,
    FAILED_ATTEMPTS,
    ATTEMPT,
    BUILDER_PHASE,
    HELPED_ATTEMPTS,
    FETCHED_AHEAD,
    CLIENT_STAGE,
    SUBMITTED_DERIVATIONS,
    TROUBLES,
    WORKERS,
    WORKERS_ISOLATION,
    WORKER_SLOTS,
    WORKER_LEASES,
    WORKER_BUILT,
    WORKER_FAILED,
    WORKER_EXPECTED,
    WORKER_FAILS_MORE,
    TIMINGS_WAITING,
    TIMINGS_DROPPED,
    *WORKER_VITALS,
    TURN,
    SCHEDULER_COMPILED,
    TURN_EVENTS,
    JOURNAL_FACTS,
    STATE_DISK_FREE,
    *CACHE_COUNTERS,
    CACHE_COLLECTION_PHASE,
    CACHE_PATHS,
    CACHE_STORED,
    CACHE_LEASES,
    CACHE_DANGLING,
    CACHE_PUBLISH,
    SPANS_SENT,
    SPANS_DROPPED,
    CONNECTIONS,
    CONNECTIONS_CLOSED,
    REQUESTS_ABANDONED,
    LOOP_STALL,
    LOOP_STALLS,
    LOOP_LONGEST,
)
