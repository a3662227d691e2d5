"""Sink of the fleet port: turns what workers send into events of the core, log chunks and rows of the read model.

The core knows which incarnation of a worker joined last, which leases it has granted and what follows from a failure;
the sink asks it. Returning means "safe": logs are written and what follows from the reports is durable, so the agent
may forget them. Reports come before the heartbeat of the same batch, because the heartbeat would otherwise name a
finished lease as missing.

A worker is believed about its own leases only: what it sends of another's is dropped, whatever it is. Log of a lease
that has ended is taken for `scheduler.ended_leases.LATE_S` more, because a worker that was silent still holds it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import TypeVar

from coordinator.engine.dispatch import Dispatch, no_losses
from coordinator.engine.engine import Engine
from coordinator.engine.publishing import LossCheck
from coordinator.journal.codec import Evidence, encode_evidence
from coordinator.readmodel.clock_offsets import ClockOffset, sample_of
from coordinator.readmodel.timeline import Here
from coordinator.readmodel.views import Views
from coordinator.security.isolation import WeakIsolation
from coordinator.stores.logs import LogError, LogStore
from infra.clock import Clock
from scheduler.events import BuilderJoined, BuilderLost, BuilderReported, BuildFailed, BuildSucceeded, Event
from scheduler.farm import Farm
from scheduler.model import MOST_OUTPUT_BYTES, BuilderId, BuilderSpec, Failure, FailureKind, Instant, LeaseId, StepKey
from workers.wire.fleet import FleetEvent, NotKnownError, WorkerConnected, WorkerGone, WorkerSilent, WorkerSpoke
from workers.wire.grades import UNMEASURED, IsolationGrade
from workers.wire.messages import NETWORK_FEATURE, HeldLease, LogChunk, Report, StageChange, Succeeded, Transfer

_log = logging.getLogger(__name__)

#: Characters of a worker's message that are kept; the rest is in the log.
MESSAGE_CHARACTERS = 4096

#: What names the lease that it is of.
_OfLease = Report | StageChange | LogChunk | HeldLease | Transfer
_Of = TypeVar("_Of", Report | StageChange | LogChunk, HeldLease)


class FleetSink:
    """Takes fleet events, in order for each worker."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        engine: Engine,
        dispatch: Dispatch,
        farm: Farm,
        views: Views,
        logs: LogStore,
        clock: Clock,
        losses: LossCheck = no_losses,
        *,
        weak: WeakIsolation,
    ) -> None:
        self._losses = losses
        self._weak = weak
        self._engine = engine
        self._dispatch = dispatch
        #: For reading only: the engine owns it.
        self._farm = farm
        self._views = views
        #: How each worker keeps builds from its machine, as it last reported.
        self._grades: dict[str, IsolationGrade] = {}
        self._logs = logs
        self._clock = clock
        #: How each worker's clock stands against this one's, by its name and incarnation.
        self._offsets: dict[str, tuple[str, ClockOffset]] = {}

    async def __call__(self, event: FleetEvent) -> None:
        """Take one event; returns once it is safe.

        Raises `UnavailableError` while the engine stops, `NotKnownError` where the core holds another incarnation.
        """
        match event:
            case WorkerConnected(hello):
                if self._offsets.get(hello.worker, ("", None))[0] != hello.incarnation:
                    self._offsets[hello.worker] = hello.incarnation, ClockOffset()
                now = self._clock.now()
                own = self._own(hello.worker, hello.incarnation, hello.leases, now)
                self._views.workforce.connected(hello.model_copy(update={"leases": own}), now)
                spec = BuilderSpec(
                    id=BuilderId(hello.worker),
                    incarnation=hello.incarnation,
                    systems=frozenset(hello.systems),
                    features=frozenset((*hello.features, *((NETWORK_FEATURE,) if hello.network else ()))),
                    mandatory=frozenset(hello.mandatory_features),
                    memory_bytes=hello.memory_bytes,
                    takes_successors=hello.takes_successors,
                )
                self._grades[hello.worker] = hello.isolation or UNMEASURED
                unfit = self._unfit(hello.worker, hello.unfit)
                await self._engine.offer(BuilderJoined(spec, hello.capacity, _held(hello.leases), unfit=unfit))
            case WorkerSpoke():
                await self._spoke(event)
            case WorkerSilent(worker, incarnation, reason):
                self._views.workforce.unreachable(worker, incarnation, reason, gone=False)
            case WorkerGone(worker, incarnation, reason):
                self._views.workforce.unreachable(worker, incarnation, reason, gone=True)
                if self._farm.holds(BuilderId(worker), incarnation):
                    self._grades.pop(worker, None)
                    self._offsets.pop(worker, None)
                await self._engine.offer(BuilderLost(BuilderId(worker), incarnation, _clean(reason)))

    async def _spoke(self, event: WorkerSpoke) -> None:
        worker, batch = event.worker, event.batch
        if not self._farm.holds(BuilderId(worker), batch.incarnation):
            raise NotKnownError(f"worker {worker} sent events of a life that is not the one that was greeted last")
        self._grades[worker] = batch.isolation or self._grade(worker)
        level = self._grade(worker).level
        offset = self._offset(event, now := self._clock.now())
        reports: list[Report] = []
        chunks: list[LogChunk] = []
        for item in batch.events:
            if not self._own(worker, batch.incarnation, (item,), now):
                continue
            if isinstance(item, LogChunk):
                chunks.append(item)
            elif isinstance(item, StageChange):
                if self._holds(worker, item):
                    self._views.stage(item)
                    here = _converter(offset, item.at, now)
                    self._views.timelines.stage(worker, item, now, here, isolation=level)
            else:
                reports.append(item)
                here = _converter(offset, item.ended_at, now)
                self._views.timelines.reported(worker, item, now, here, isolation=level)
        ended = {(chunk.step, chunk.attempt) for chunk in chunks if not self._holds(worker, chunk)}
        try:
            await self._logs.append(chunks, ended)
        except LogError as error:
            # A log is lost, a build is not: a full disk must not end the farm.
            _log.warning("%s", error)
        own = self._own(worker, batch.incarnation, batch.leases, now)
        self._views.workforce.reported(worker, batch.model_copy(update={"leases": own}), now)
        self._views.transfers(worker, [each for each in batch.transfers if self._holds(worker, each)], now)
        if reports:
            await self._dispatch.room()
        heartbeat = BuilderReported(
            BuilderId(worker),
            batch.incarnation,
            batch.capacity,
            _held(batch.leases),
            draining=batch.draining,
            unfit=self._unfit(worker, batch.unfit),
            collections=batch.collections,
        )
        await self._engine.offer(*[await self._event(worker, report) for report in reports], heartbeat)
        for report in reports:
            self._logs.wake(report.step, report.attempt)

    def _holds(self, worker: str, item: _OfLease) -> bool:
        return self._farm.is_held_by(_lease(item), BuilderId(worker))

    def _own(self, worker: str, incarnation: str, items: Iterable[_Of], now: float) -> tuple[_Of, ...]:
        """Return what is of leases that this worker has, or had until not long ago."""
        was_held_by, builder, instant = self._farm.was_held_by, BuilderId(worker), Instant(now)
        return tuple(
            item
            for item in items
            if self._holds(worker, item) or was_held_by(_lease(item), builder, incarnation, instant)
        )

    def _offset(self, event: WorkerSpoke, now: float) -> ClockOffset:
        """Return the offset of a worker's clock, with what this poll shows of it."""
        _, offset = self._offsets.setdefault(event.worker, (event.batch.incarnation, ClockOffset()))
        received, answered = event.batch.received_at, event.batch.answered_at
        if event.took_s is not None and received is not None and answered is not None:
            sample = sample_of(now - event.took_s, now, received, answered)
            if math.isfinite(sample.offset_s) and math.isfinite(sample.at):
                offset.add(sample)
        return offset

    def _grade(self, worker: str) -> IsolationGrade:
        return self._grades.get(worker, UNMEASURED)

    def _unfit(self, worker: str, own_reason: str) -> str:
        """Return the reason that a worker should get no work, its own or the weakness of its isolation; "" for none."""
        return _clean(own_reason or self._weak.refusal(worker, self._grade(worker)))

    async def _event(self, worker: str, report: Report) -> Event:
        lease = _lease(report)
        if isinstance(report.result, Succeeded):
            evidence = Evidence(report.result.outputs, self._grade(worker).level)
            size = sum([output.nar_size for output in report.result.outputs])
            output_bytes = size if 0 < size <= MOST_OUTPUT_BYTES else 0
            return BuildSucceeded(lease, BuilderId(worker), encode_evidence(evidence), output_bytes)
        kind, message = FailureKind(report.result.reason), _clean(report.result.message)
        if report.result.missing and self._holds(worker, report):
            # The worker's word alone counts for nothing: it may have lost its way to the cache.
            lost = await self._losses(lease.step, report.result.missing)
            kind, message = (FailureKind.INPUT_LOST, lost) if lost else (kind, message)
        failure = Failure(kind, message, report.result.signature)
        return BuildFailed(lease, BuilderId(worker), failure, report.result.limit)


def _converter(offset: ClockOffset, newest: float, now: float) -> Here:
    """Return what converts an agent's times; without an offset its newest time is taken for now (an older agent)."""
    return offset.here if offset.known else lambda at: at - newest + now


def _lease(item: _OfLease) -> LeaseId:
    return LeaseId(StepKey(item.step), item.attempt)


def _held(leases: Iterable[HeldLease]) -> tuple[LeaseId, ...]:
    return tuple(_lease(lease) for lease in leases)


def _clean(message: str) -> str:
    """Bound a worker's words and make them storable: text from afar may hold lone surrogates."""
    return message[:MESSAGE_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
