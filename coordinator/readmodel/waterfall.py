"""Waterfalls of workers over time: the track of each attempt, and how busy workers were in each bucket of time.

Pure: no clock, no I/O. Where few attempts ran each gets a track of its worker, as a slot does; where many ran, buckets
say how many ran at a time. Buckets are made of two counts that a database gives in one look each: attempts that began
in a bucket and those that ended in it, with the sums of their instants. What is between follows, exactly.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from coordinator.stores.timing_windows import OTHER, Edges

#: Bounds of edges that are folded between two pauses.
EDGES_PIECE: Final = 256
#: Less is taken for nothing.
CRUMB_S: Final = 1e-6
#: Kinds of attempts that run, and of those whose end the store has lost; the others have their outcome as their kind.
RUNNING, UNKNOWN = "running", "unknown"
#: All kinds, as they are piled up: what went wrong is on top.
KINDS: Final = (OTHER, "done", RUNNING, "returned", "moved", "cancelled", "retried", "lost", "failed", UNKNOWN)


@dataclass(slots=True)
class Occupancy:
    """Attempts of one worker and kind in a window."""

    #: Seconds that they ran in each bucket, all together: the bucket's width times how many ran at a time.
    busy_s: list[float]
    #: Ends in each bucket.
    ended: list[int]
    attempts: int = 0


def assign_tracks(spans: Sequence[tuple[float, float]]) -> list[int]:
    """Give each span (begin, end) the lowest track, from 0, on which no other one runs; the spans come by begin.

    No two spans of a track overlap, and there are no more tracks than spans at a time. The track of a span depends on
    those that began before it alone.
    """
    tracks: list[int] = []
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    for begin, end in spans:
        while busy and busy[0][0] <= begin:
            heappush(free, heappop(busy)[1])
        track = heappop(free) if free else len(busy)
        heappush(busy, (max(begin, end), track))
        tracks.append(track)
    return tracks


def occupancies(
    begins: Iterable[Edges], ends: Iterable[Edges], buckets: int, width_s: float
) -> Generator[None, None, dict[str, dict[str, Occupancy]]]:
    """Return the occupancy of each worker by kind, with pauses.

    What began before the window begins in bucket 0 at instant 0; what ends behind it has no end.
    """
    found: dict[str, dict[str, Occupancy]] = {}
    #: Of each occupancy: what begins less what ends in a bucket, and the seconds that this adds there.
    changes: dict[str, dict[str, list[tuple[int, int, float]]]] = {}
    for edges, sign in ((begins, 1), (ends, -1)):
        for number, (bucket, worker, kind, count, sum_s) in enumerate(edges, 1):
            # Who began here ran from there to the bucket's end, unless it ended before.
            adds_s = sign * (count * (bucket + 1) * width_s - sum_s)
            changes.setdefault(worker, {}).setdefault(kind, []).append((bucket, sign * count, adds_s))
            if not number % EDGES_PIECE:
                yield
    for worker, kinds in changes.items():
        found[worker] = {}
        for kind, its in kinds.items():
            yield
            found[worker][kind] = _occupancy(its, buckets, width_s)
    return found


def _occupancy(changes: Iterable[tuple[int, int, float]], buckets: int, width_s: float) -> Occupancy:
    """Fold changes into what is between them."""
    result = Occupancy([0.0] * buckets, [0] * buckets)
    balance = [0] * buckets
    for place, change, adds_s in changes:
        # Floating point may put the window's last instant behind it.
        bucket = min(place, buckets - 1)
        balance[bucket] += change
        result.busy_s[bucket] += adds_s
        if change > 0:
            result.attempts += change
        else:
            result.ended[bucket] -= change
    running = 0
    for bucket, change in enumerate(balance):
        if running:
            result.busy_s[bucket] += running * width_s
        running += change
    # Sums of large numbers leave crumbs.
    result.busy_s = [busy_s if busy_s > CRUMB_S else 0.0 for busy_s in result.busy_s]
    return result


def nice_step_s(span_s: float, at_most: int) -> float:
    """Return a round number of seconds that divides a span in at most so many parts."""
    least = span_s / max(1, at_most)
    return next((step for step in _STEPS_S if step >= least), max(_STEPS_S[-1], least))


_STEPS_S: Final = (
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 30.0),
    *(60.0 * count for count in (1, 2, 5, 10, 15, 30)),
    *(3600.0 * count for count in (1, 2, 3, 6, 12)),
    *(86400.0 * count for count in (1, 2, 7, 14, 30)),
)
