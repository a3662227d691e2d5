"""`drover workers` as a table: what each worker is, has done and offers, and why it gets no work."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.api.flakes import WorkerRecordView, worker_sentence
from coordinator.api.models import WorkerView
from coordinator.cli.rendering import duration, one_line, table_lines


def worker_lines(workers: Sequence[WorkerView], now: float) -> list[str]:
    """Return a table of workers, and below it why those that get no work get none."""
    heads = ("WORKER", "STATE", "CLASS", "BUSY", "BUILT", "FAILED", "SPEED", "SEEN", "NIX", "SYSTEMS", "FEATURES")
    rows: list[tuple[str, ...]] = [heads]
    for worker in workers:
        systems = [
            f"{system} (emulated)" if system in worker.emulated else system
            for system in dict.fromkeys((*worker.systems, *worker.emulated))
        ]
        rows.append(
            (
                worker.name,
                worker.state,
                worker.isolation,
                f"{len(worker.leases)}/{worker.slots}",
                str(worker.built),
                _failed_share(worker.record),
                _speeds(worker),
                f"{duration(now - worker.last_seen)} ago" if worker.last_seen else "-",
                worker.nix_version or "-",
                # Last, where a window that is too narrow wraps them.
                ", ".join(systems),
                ", ".join(worker.features) or "-",
            )
        )
    reasons = [
        f"{worker.name} is {worker.state}{_until(worker, now)}: {one_line(worker.reason)}"
        for worker in workers
        if worker.reason
    ]
    reasons += [
        f"{worker.name} offers {worker.offered} of its {worker.slots} slots: {one_line(worker.offers_less)}"
        for worker in workers
        if worker.offers_less
    ]
    reasons += [f"{worker.name}: {note}" for worker in workers if (note := worker_sentence(worker.record))]
    reasons += [
        f"{worker.name} is of isolation class {worker.isolation}: {one_line('; '.join(worker.isolation_reasons))}"
        for worker in workers
        if worker.isolation_reasons
    ]
    return [*table_lines(rows), *([""] if reasons else []), *reasons]


def _speeds(worker: WorkerView) -> str:
    """Return how fast a worker builds; with each system where it has several speeds."""
    if len(set(worker.speeds.values())) == 1:
        return f"{next(iter(worker.speeds.values())):.2g}"
    return ", ".join([f"{system} {speed:.2g}" for system, speed in sorted(worker.speeds.items())]) or "-"


def _failed_share(record: WorkerRecordView | None) -> str:
    """Return the share of the newest attempts that failed."""
    if record is None or not record.attempts:
        return "-"
    return f"{record.failed_attempts}/{record.attempts}"


def _until(worker: WorkerView, now: float) -> str:
    return f" for {duration(max(0.0, worker.until - now))}" if worker.until else ""
