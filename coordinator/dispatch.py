"""From effects to the outside: every effect goes through one port and ends in one event.

Rules:
1. `hand` never waits, so the engine never waits for a worker or an object store. What is under way is bounded by the
   core: leases by the workers' capacities, publishing by its backlog (`publishing`).
2. Effects for one worker go out in order, batched: a start and its cancel never overtake each other.
3. A start that does not get through is no event. The worker's next heartbeat lacks the lease and the core sends it
   again; the loss of the worker frees it. So nothing is built twice because an answer was lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from coordinator.derivations import BuildOrder, DerivationsError, DerivationStore
from coordinator.limits import StepLimits
from coordinator.publishing import LossCheck, Post, Publications
from infra.cache.cache import Cache
from scheduler.effects import CancelBuild, Effect, PublishOutputs, StartBuild
from scheduler.events import BuildFailed
from scheduler.model import Failure, FailureKind, LeaseId, StepKey
from workers.fleet import Fleet, FleetError
from workers.protocol import Lease, LeaseOrder

#: Leases in one call to a worker.
START_BATCH = 256

#: Gives what lets a worker upload the outputs of one lease; takes the bytes of its .drv.
UploadToken = Callable[[LeaseId, bytes], str]

_log = logging.getLogger(__name__)


def no_upload_token(_lease: LeaseId, _derivation: bytes) -> str:
    """Let workers upload nothing over HTTP: for farms whose workers all see the object store."""
    return ""


async def no_losses(_step: StepKey, _paths: Sequence[str]) -> str:
    """Take the cache for whole."""
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
        losses: LossCheck = no_losses,
        upload_token: UploadToken = no_upload_token,
    ) -> None:
        self._fleet = fleet
        self._derivations = derivations
        self._limits_of = limits_of
        self._post = post
        self._upload_token = upload_token
        self._lanes: dict[str, _Lane] = {}
        self._new_lanes: asyncio.Queue[str] = asyncio.Queue()
        self._publications = Publications(cache, derivations, post, losses)

    @property
    def trouble(self) -> str:
        """Why publishing waits at the moment, "" while all is well."""
        return self._publications.trouble

    def hand(self, effects: Sequence[Effect]) -> None:
        """Take effects over; returns at once."""
        for effect in effects:
            if isinstance(effect, PublishOutputs):
                self._publications.hand(effect)
                continue
            lane = self._lanes.get(effect.builder)
            if lane is None:
                lane = self._lanes[effect.builder] = _Lane()
                self._new_lanes.put_nowait(effect.builder)
            lane.waiting.append(effect)
            lane.filled.set()

    async def room(self) -> None:
        """Wait until publishing has caught up; whoever brings more outputs asks first."""
        await self._publications.room()

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._publications.run())
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
