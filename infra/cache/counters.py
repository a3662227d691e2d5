"""Counters of one cache: plain numbers, so that counting costs nothing on the paths that must be quick.

Incremented on the event loop's thread only. Telemetry reads them at a scrape; nothing here knows how.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from infra.cache.publishing.claims import AlreadyPublished, Conflict, Published, PublishOutcome
from infra.cache.retention.collector import CollectReport
from infra.histogram import SECONDS, Histogram


@dataclass(slots=True)
class CacheCounters:
    """Counts since the start of the process. Sizes are bytes."""

    #: Answers to GET and HEAD of a narinfo.
    narinfo_hits: int = 0
    narinfo_misses: int = 0
    #: NAR answers with a body (or a redirect to one), and the bytes that they stand for.
    nar_requests: int = 0
    nar_bytes: int = 0
    #: Outcomes of publishing, by path.
    published: int = 0
    already_published: int = 0
    conflicts: int = 0
    rejected: int = 0
    #: Compressed bytes taken in by uploads over HTTP.
    uploaded_bytes: int = 0
    #: Collections that ended, what they did, and the seconds of each phase.
    collections: int = 0
    tombstoned_paths: int = 0
    deleted_paths: int = 0
    deleted_objects: int = 0
    deleted_bytes: int = 0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    #: Wall time of each call of `publish`.
    publish_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))

    def count_outcomes(self, outcomes: Iterable[PublishOutcome]) -> None:
        """Count what became of the paths of one `publish`."""
        for outcome in outcomes:
            match outcome:
                case Published():
                    self.published += 1
                case AlreadyPublished():
                    self.already_published += 1
                case Conflict():
                    self.conflicts += 1
                case _:
                    self.rejected += 1

    def count_collection(self, report: CollectReport) -> None:
        """Count a collection that ended, unless it was a rehearsal."""
        if report.dry_run:
            return
        self.collections += 1
        self.tombstoned_paths += report.tombstoned
        self.deleted_paths += report.deleted_paths
        self.deleted_objects += report.deleted_objects
        self.deleted_bytes += report.deleted_bytes
        for phase, seconds in report.phase_seconds.items():
            self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + seconds
