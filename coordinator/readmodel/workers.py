"""The part of the read model about workers: as they last described themselves, and what the core derives of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from coordinator.api.flakes import WorkerRecordView
from coordinator.api.models import WorkerState, WorkerView
from workers.wire.grades import LEVELS, UNMEASURED, IsolationGrade
from workers.wire.messages import Batch, HeldLease, Hello, Vitals

#: Nothing is known of a machine.
NO_VITALS: Final = Vitals()
#: States of a worker whose agent answers calls. One in quarantine has one of them too.
_ANSWERING: Final = frozenset[WorkerState]({"online", "draining"})


@dataclass(slots=True, eq=False)
class WorkerRow:
    """A worker as it last described itself."""

    hello: Hello
    #: How it keeps builds from its machine, as it last reported.
    isolation: IsolationGrade
    state: WorkerState = "online"
    leases: tuple[HeldLease, ...] = ()
    built: int = 0
    last_seen: float = 0.0
    reason: str = ""
    #: Until when the farm gives it no work, and why; 0 where it does.
    quarantined_until: float = 0.0
    quarantine: str = ""
    #: As its machine was at its last heartbeat.
    vitals: Vitals = NO_VITALS
    #: Slots that it offers now and why these are not all; None: all.
    offered: int | None = None
    offers_less: str = ""

    @property
    def told_state(self) -> WorkerState:
        """The state as people see it."""
        return "quarantined" if self.quarantined_until and self.state in _ANSWERING else self.state


class Workforce:
    """All workers, by name. `changed` is called where one came or went."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._rows: dict[str, WorkerRow] = {}
        self._changed = changed
        self._records: Mapping[str, WorkerRecordView] = {}
        #: As the core has them: worker -> system -> speed, and worker -> bytes of inputs a second.
        self._speeds: Mapping[str, Mapping[str, float]] = {}
        self._rates: Mapping[str, int] = {}

    def connected(self, hello: Hello, now: float) -> None:
        """A worker introduced itself."""
        old = self._rows.get(hello.worker)
        built = old.built if old is not None else 0
        grade = hello.isolation or UNMEASURED
        self._rows[hello.worker] = WorkerRow(hello, grade, leases=hello.leases, built=built, last_seen=now)
        self._changed()

    def reported(self, worker: str, batch: Batch, now: float) -> None:
        """Take in a heartbeat."""
        row = self._rows.get(worker)
        if row is None or row.hello.incarnation != batch.incarnation:
            return
        row.state, row.reason = ("draining" if batch.draining else "online"), ""
        row.leases, row.last_seen = batch.leases, now
        row.isolation = batch.isolation or row.isolation
        row.vitals = batch.vitals or row.vitals
        row.offered, row.offers_less = batch.offered, batch.offers_less

    def unreachable(self, worker: str, incarnation: str, reason: str, *, gone: bool) -> None:
        """The transport lost a worker for now (`gone` false) or for ever."""
        row = self._rows.get(worker)
        if row is None or row.hello.incarnation != incarnation:
            return
        row.state, row.reason = ("gone" if gone else "silent"), reason
        if gone:
            row.leases = ()
        self._changed()

    def has_built(self, worker: str) -> None:
        """Count a build."""
        row = self._rows.get(worker)
        if row is not None:
            row.built += 1

    def quarantine(self, worker: str, until: float, reason: str) -> None:
        """The core gives it no work for a while; until 0, it does again."""
        row = self._rows.get(worker)
        if row is not None:
            row.quarantined_until, row.quarantine = until, reason

    def compared(self, records: Mapping[str, WorkerRecordView]) -> None:
        """Take in what became of workers' newest attempts, in place of what was known of them."""
        self._records = records

    def rated(self, speeds: Iterable[tuple[str, str, float]], rates: Iterable[tuple[str, int]]) -> None:
        """Take in how fast workers are, in place of what was known of them."""
        found: dict[str, dict[str, float]] = {}
        for worker, system, speed in speeds:
            found.setdefault(worker, {})[system] = speed
        self._speeds, self._rates = found, dict(rates)

    def isolation(self, worker: str) -> IsolationGrade:
        """Return how a worker keeps builds from its machine; `UNMEASURED` for one that is not known."""
        row = self._rows.get(worker)
        return UNMEASURED if row is None else row.isolation

    def slots(self, worker: str) -> int:
        """Return how many builds a worker does at one time; 0 for one that is not known or not there."""
        row = self._rows.get(worker)
        return row.hello.slots if row is not None and row.state in _ANSWERING else 0

    def emulates(self, worker: str, system: str) -> bool:
        """Return whether a worker that is known has a system only by emulation."""
        row = self._rows.get(worker)
        return row is not None and system in row.hello.emulated

    def takes_cores(self, worker: str) -> bool:
        """Return whether a worker that is known reads how many processors a build has use for."""
        row = self._rows.get(worker)
        return row is not None and row.hello.takes_cores

    def takes_hints(self, worker: str) -> bool:
        """Return whether a worker that is known fetches inputs ahead of their lease when it is let."""
        row = self._rows.get(worker)
        return row is not None and row.hello.takes_hints

    def emulating(self) -> list[tuple[str, str]]:
        """Return (worker, system) of all systems that a worker has only by emulation."""
        return [(name, system) for name, row in self._rows.items() for system in row.hello.emulated]

    def views(self) -> list[WorkerView]:
        """Return all workers, by name."""
        return [
            replace(
                _view(name, row, self._records.get(name)),
                speeds={system: round(speed, 3) for system, speed in self._speeds.get(name, {}).items()},
                fetch_rate=self._rates.get(name),
            )
            for name, row in sorted(self._rows.items())
        ]

    def answering(self) -> tuple[str, ...]:
        """Return the names of workers whose agent answers, by name: quarantined ones are among them."""
        return tuple(name for name, row in sorted(self._rows.items()) if row.state in _ANSWERING)

    def vitals(self) -> Iterator[tuple[str, Vitals]]:
        """Yield the machine's figures of each worker that is there; those that no agent sent are None."""
        return ((name, row.vitals) for name, row in self._rows.items() if row.state != "gone")

    def counts(self) -> Counter[str]:
        """Count workers by state."""
        return Counter(row.told_state for row in self._rows.values())

    def isolation_counts(self) -> Counter[str]:
        """Count workers that are there by the class of their isolation; all classes are named."""
        counted = Counter(dict.fromkeys(LEVELS, 0))
        counted.update(row.isolation.level for row in self._rows.values() if row.state != "gone")
        return counted


def _view(name: str, row: WorkerRow, record: WorkerRecordView | None) -> WorkerView:
    return WorkerView(
        name=name,
        state=row.told_state,
        systems=row.hello.systems,
        emulated=row.hello.emulated,
        features=row.hello.features,
        slots=row.hello.slots,
        offered=row.hello.slots if row.offered is None else min(row.offered, row.hello.slots),
        offers_less=row.offers_less,
        leases=tuple((lease.step, lease.stage.value) for lease in row.leases),
        nix_version=row.hello.nix_version,
        isolation=row.isolation.level,
        isolation_reasons=row.isolation.reasons,
        isolation_report=row.isolation.report.model_dump() if row.isolation.report else None,
        built=row.built,
        last_seen=row.last_seen,
        reason=row.reason or row.quarantine,
        until=row.quarantined_until,
        load=row.vitals.load,
        memory_available_bytes=row.vitals.memory_available_bytes,
        disk_free_bytes=row.vitals.disk_free_bytes,
        record=record,
    )
