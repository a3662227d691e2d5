"""From effects to the outside: every effect goes through one port and ends in one event.

Rules:
1. `hand` never waits, so the engine never waits for a worker or an object store. What is under way is bounded by the
   core: leases by the workers' capacities, publishing by `PUBLISH_BACKLOG`, beyond which reports wait at the sink.
2. Effects for one worker go out in order, batched: a start and its cancel never overtake each other.
3. A start that does not get through is no event. The worker's next heartbeat lacks the lease and the core sends it
   again; the loss of the worker frees it. So nothing is built twice because an answer was lost.
4. Publishing trusts nothing in the evidence: the outputs must be exactly those of the step, and the cache checks bytes,
   hashes and references before it signs.
5. What is uploaded is not built again because a store or a database is away: publishing is tried again, within
   `PUBLISH_WITHIN_S`, and others of the same batch do not wait for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.codec import CodecError, Evidence, decode_evidence
from coordinator.derivations import BuildOrder, DerivationsError, DerivationStore, StepInfo
from coordinator.limits import StepLimits
from infra.cache.cache import Cache
from infra.cache.candidates import Candidate, Conflict, PublishOutcome, Rejected, RejectReason
from infra.cache.errors import CacheError
from infra.patience import Patience
from scheduler.effects import CancelBuild, Effect, PublishOutputs, StartBuild
from scheduler.events import BuildFailed, Event, OutputsPublished, PublishFailed
from scheduler.model import Failure, FailureKind, LeaseId, StepKey
from workers.fleet import Fleet, FleetError
from workers.protocol import Lease, LeaseOrder, Output

#: Leases in one call to a worker, and publications in one call of the cache.
START_BATCH = 256
PUBLISH_BATCH = 256
#: Calls of the cache at one time: one verifies while the other waits for a large object.
PUBLISHERS = 2
#: Publications waiting before workers' reports are no longer taken in.
PUBLISH_BACKLOG = 4096
#: Seconds for which publishing is tried again where what keeps it may pass.
PUBLISH_WITHIN_S = 60.0

Post = Callable[[Sequence[Event]], Awaitable[None]]

#: Gives what lets a worker upload the outputs of one lease; takes the bytes of its .drv.
UploadToken = Callable[[LeaseId, bytes], str]

_log = logging.getLogger(__name__)


def no_upload_token(_lease: LeaseId, _derivation: bytes) -> str:
    """Let workers upload nothing over HTTP: for farms whose workers all see the object store."""
    return ""


@dataclass(slots=True, eq=False)
class _Lane:
    """What one worker must still be told, in order."""

    waiting: deque[StartBuild | CancelBuild] = field(default_factory=deque)
    filled: asyncio.Event = field(default_factory=asyncio.Event)


class Dispatch:
    """Carries out effects until `run` is cancelled. `post` takes the events that they end in."""

    def __init__(
        self,
        fleet: Fleet,
        cache: Cache,
        derivations: DerivationStore,
        limits_of: Callable[[StepKey], StepLimits],
        post: Post,
        *,
        upload_token: UploadToken = no_upload_token,
    ) -> None:
        self._fleet = fleet
        self._cache = cache
        self._derivations = derivations
        self._limits_of = limits_of
        self._post = post
        self._upload_token = upload_token
        self._lanes: dict[str, _Lane] = {}
        self._new_lanes: asyncio.Queue[str] = asyncio.Queue()
        self._publish: deque[PublishOutputs] = deque()
        self._publish_filled = asyncio.Event()
        self._publish_roomy = asyncio.Event()
        self._publish_roomy.set()
        #: What each publisher waits for, as a sentence.
        self._troubles: dict[int, str] = {}

    @property
    def trouble(self) -> str:
        """Why publishing waits at the moment, "" while all is well."""
        return next(iter(self._troubles.values()), "")

    def hand(self, effects: Sequence[Effect]) -> None:
        """Take effects over; returns at once."""
        for effect in effects:
            if isinstance(effect, PublishOutputs):
                self._publish.append(effect)
                self._publish_filled.set()
                continue
            lane = self._lanes.get(effect.builder)
            if lane is None:
                lane = self._lanes[effect.builder] = _Lane()
                self._new_lanes.put_nowait(effect.builder)
            lane.waiting.append(effect)
            lane.filled.set()
        if len(self._publish) > PUBLISH_BACKLOG:
            self._publish_roomy.clear()

    async def room(self) -> None:
        """Wait until publishing has caught up; whoever brings more outputs asks first."""
        await self._publish_roomy.wait()

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(PUBLISHERS):
                group.create_task(self._publish_loop(number))
            while True:
                worker = await self._new_lanes.get()
                group.create_task(self._lane_loop(worker, self._lanes[worker]))

    # Starting and cancelling.

    async def _lane_loop(self, worker: str, lane: _Lane) -> None:
        while True:
            await lane.filled.wait()
            batch = [lane.waiting.popleft() for _ in range(min(START_BATCH, len(lane.waiting)))]
            if not lane.waiting:
                lane.filled.clear()
            # Every start before every cancel keeps their order: an attempt is never started after its cancel.
            cancels = [effect.lease for effect in batch if isinstance(effect, CancelBuild)]
            cancelled = frozenset(cancels)
            starts = [e for e in batch if isinstance(e, StartBuild) and e.lease not in cancelled]
            try:
                if starts:
                    await self._start(worker, starts)
                if cancels:
                    leases = [Lease(step=lease.step, attempt=lease.attempt) for lease in cancels]
                    await self._fleet.cancel(worker, leases)
            except FleetError as error:
                _log.warning("worker %s was not reached: %s", worker, error)

    async def _start(self, worker: str, starts: Sequence[StartBuild]) -> None:
        wanted = [(start.lease.step, start.recipe) for start in starts]
        try:
            known = await self._derivations.orders(wanted)
        except DerivationsError as error:
            _log.warning("worker %s gets no leases: %s", worker, error)
            await self._give_back(starts, "the derivation could not be read from the coordinator's database")
            return
        absent = [start for start in starts if (start.lease.step, start.recipe) not in known]
        if absent:
            await self._give_back(absent, "the coordinator does not have the derivation any more; submit it again")
        orders = [
            self._order(start.lease, known[start.lease.step, start.recipe])
            for start in starts
            if (start.lease.step, start.recipe) in known
        ]
        if orders:
            await self._fleet.start_many(worker, orders)

    def _order(self, lease: LeaseId, order: BuildOrder) -> LeaseOrder:
        limits = self._limits_of(lease.step)
        return LeaseOrder(
            step=lease.step,
            attempt=lease.attempt,
            drv_path=order.drv_path,
            derivation=order.derivation,
            inputs=order.inputs,
            upload_token=self._upload_token(lease, order.derivation),
            timeout_s=limits.timeout_s,
            max_silent_s=limits.silence_s,
            max_log_bytes=limits.log_bytes,
            max_output_bytes=limits.output_bytes,
            memory_bytes=limits.memory_bytes,
        )

    async def _give_back(self, starts: Sequence[StartBuild], message: str) -> None:
        failure = Failure(FailureKind.INFRASTRUCTURE, message)
        await self._post([BuildFailed(start.lease, start.builder, failure) for start in starts])

    # Publishing.

    async def _publish_loop(self, number: int) -> None:
        while True:
            await self._publish_filled.wait()
            batch = [self._publish.popleft() for _ in range(min(PUBLISH_BATCH, len(self._publish)))]
            if not self._publish:
                self._publish_filled.clear()
            if len(self._publish) <= PUBLISH_BACKLOG:
                self._publish_roomy.set()
            if batch:
                await self._publish_patiently(number, batch)

    async def _publish_patiently(self, number: int, batch: Sequence[PublishOutputs]) -> None:
        """Publish a batch, what fails in a way that may pass again for a while; posts one event for each effect."""
        patience = Patience(PUBLISH_WITHIN_S)
        while batch:
            events: list[Event] = []
            again: dict[PublishOutputs, PublishFailed] = {}
            for effect, event in zip(batch, await self._publish_many(batch), strict=True):
                if isinstance(event, _NotNow):
                    again[effect] = event.failed
                else:
                    events.append(event)
            await self._post(events)
            if again:
                sentence = next(iter(again.values())).failure.message
                if number not in self._troubles:
                    _log.warning("%s; it is tried again", sentence)
                self._troubles[number] = sentence
                if not await patience.pause():
                    await self._post(list(again.values()))
                    again.clear()
            batch = list(again)
        if self._troubles.pop(number, ""):
            _log.warning("publishing goes on")

    async def _publish_many(self, batch: Sequence[PublishOutputs]) -> list[Event | _NotNow]:
        """Publish a batch with one call of the cache; one event for each effect, in order."""
        try:
            infos = await self._derivations.steps([effect.lease.step for effect in batch])
            checked = [(effect.lease, _claim(effect, infos)) for effect in batch]
            candidates = [
                claim_of(output, infos[lease.step].drv.rpartition("/")[2])
                for lease, claim in checked
                if isinstance(claim, Evidence)
                for output in claim.outputs
            ]
            outcomes = {outcome.store_path: outcome for outcome in await self._cache.publish(candidates)}
        except (CacheError, DerivationsError) as error:
            failure = Failure(FailureKind.INFRASTRUCTURE, f"publishing failed: {error}")
            return [_NotNow(PublishFailed(effect.lease, failure)) for effect in batch]
        return [_verdict(lease, claim, outcomes) for lease, claim in checked]


@dataclass(frozen=True, slots=True)
class _NotNow:
    """Publishing failed in a way that may pass; `failed` is what is said where it does not."""

    failed: PublishFailed


def _claim(effect: PublishOutputs, infos: Mapping[StepKey, StepInfo]) -> Evidence | str:
    """Return the evidence if it is about exactly the outputs of the step, else a sentence why not."""
    try:
        evidence = decode_evidence(effect.evidence)
    except CodecError as error:
        return str(error)
    info = infos.get(effect.lease.step)
    if info is None:
        return "the coordinator does not know the outputs of the step"
    wanted = sorted(path for _, path in info.outputs)
    told = sorted(output.path for output in evidence.outputs)
    if wanted != told:
        other = next((path for path in told if path not in wanted), "")
        what = f"reported {other}, which is no output of it" if other else "did not report all outputs"
        return f"the worker {what}"
    return evidence


def claim_of(output: Output, deriver: str = "") -> Candidate:
    """Return the claim that a worker makes with an output; `deriver` is the base name of its .drv."""
    return Candidate(
        store_path=output.path,
        nar_hash=output.nar_hash,
        nar_size=output.nar_size,
        references=output.references,
        url=output.url,
        compression=output.compression,
        file_hash=output.file_hash,
        file_size=output.file_size,
        deriver=deriver,
        ca=output.ca,
    )


def _verdict(lease: LeaseId, claim: Evidence | str, outcomes: Mapping[str, PublishOutcome]) -> Event | _NotNow:
    """Say what became of one step's outputs. A conflict is no failure: the first bits stay and can be fetched."""
    if isinstance(claim, str):
        return PublishFailed(lease, Failure(FailureKind.INFRASTRUCTURE, f"publishing was refused: {claim}"))
    for output in claim.outputs:
        outcome = outcomes.get(output.path)
        if isinstance(outcome, Conflict):
            _log.warning("%s is not reproducible: its first publication stays", output.path)
        elif outcome is None or isinstance(outcome, Rejected):
            why = outcome.message if isinstance(outcome, Rejected) else "the cache did not answer"
            passes = isinstance(outcome, Rejected) and outcome.reason is RejectReason.STORE_FAILED
            sentence = f"publishing of {output.path} {'failed' if passes else 'was refused'}: {why}"
            failed = PublishFailed(lease, Failure(FailureKind.INFRASTRUCTURE, sentence))
            return _NotNow(failed) if passes else failed
    return OutputsPublished(lease)
