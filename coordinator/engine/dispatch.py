"""From effects to the outside: every effect goes through one port and ends in one event.

Rules:
1. `submit` never waits, so the engine never waits for a worker or an object store. What is under way is bounded by the
   core: leases by the workers' capacities, publishing by its backlog (`publishing`).
2. Effects for one worker go out in order, batched: a start and its cancel never overtake each other.
3. A start that does not get through is no event. The worker's next heartbeat lacks the lease and the core sends it
   again; the loss of the worker frees it. So nothing is built twice because an answer was lost.
4. A hint to fetch ahead goes behind all else to a worker that takes hints, the newest only; lost ones are not missed.
5. A call to a worker carries at most `START_BYTES`, or one larger order alone; calls with large orders share
   `SENDING_BYTES` of memory, workers by turns. A derivation may have 64 MiB, and a worker hundreds of leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Final

from coordinator.api.streams import LARGE_BYTES
from coordinator.engine.publishing import Awaited, LossCheck, Post, Publications, Timed, always_awaited
from coordinator.stores.derivations import BuildOrder, DerivationsError, DerivationStore
from infra.byte_budget import ByteBudget
from infra.cache.cache import Cache
from infra.clock import Clock, SystemClock
from scheduler.effects import CancelBuild, Effect, FetchAhead, PublishOutputs, StartBuild
from scheduler.events import BuildFailed
from scheduler.model import Failure, FailureKind, LeaseId, StepKey
from scheduler.resource_limits import ResourceLimits
from workers.wire.fleet import Fleet, FleetError
from workers.wire.messages import BuildLimits, InputHint, Lease, LeaseOrder
from workers.wire.polling import DERIVATION_BYTES_PER_CALL

#: Effects for one worker that are carried out together.
START_BATCH: Final = 256
#: Bytes of orders that are sent together; a larger one goes alone. What one `start_many` of the fleet sends at a time.
START_BYTES: Final = DERIVATION_BYTES_PER_CALL
#: Memory for orders on their way, of all workers together, in calls of more than `LARGE_BYTES`.
SENDING_BYTES: Final = 256 * 1024 * 1024
#: Bytes in memory for each byte of an order: the database's row, inflated, and serialised twice by the transport.
SENDING_COST: Final = 4

#: Gives what lets a worker upload the outputs of one lease; takes their full paths.
UploadToken = Callable[[LeaseId, Iterable[str]], str]
#: Gives the processors that a step's build on a worker should have use for, by the worker's name; 0: not known.
CoresOf = Callable[[str, StepKey], int]
#: Gives the W3C trace context of a lease's attempt, "" where there is none.
Traceparent = Callable[[LeaseId], str]

_log = logging.getLogger(__name__)


def no_upload_token(_lease: LeaseId, _outputs: Iterable[str]) -> str:
    """Let workers upload nothing over HTTP: for farms whose workers all see the object store."""
    return ""


async def no_losses(_step: StepKey, _paths: Sequence[str]) -> str:
    """Take the cache for whole."""
    return ""


@dataclass(slots=True, eq=False)
class _WorkerQueue:
    """Effects that one worker has not yet received, in order."""

    waiting: deque[StartBuild | CancelBuild] = field(default_factory=deque)
    hint: FetchAhead | None = None
    filled: asyncio.Event = field(default_factory=asyncio.Event)


class Dispatch:
    """Carries out effects until `run` is cancelled. `post` takes the events that they end in."""

    def __init__(
        self,
        fleet: Fleet,
        cache: Cache,
        derivations: DerivationStore,
        limits_of: Callable[[StepKey], ResourceLimits],
        post: Post,
        *,
        losses: LossCheck = no_losses,
        upload_token: UploadToken = no_upload_token,
        traceparent: Traceparent = lambda _lease: "",
        cores_of: CoresOf = lambda _worker, _step: 0,
        takes_hints: Callable[[str], bool] = lambda _worker: False,
        clock: Clock | None = None,
        timed: Timed = lambda _lease, _began, _verified, _ended: None,
        awaited: Awaited = always_awaited,
        building: Callable[[], bool] = lambda: False,
    ) -> None:
        self._fleet = fleet
        self._derivations = derivations
        self._limits_of = limits_of
        self._post = post
        self._upload_token = upload_token
        self._traceparent = traceparent
        self._cores_of = cores_of
        self._takes_hints = takes_hints
        #: Memory for large orders on their way, of all workers together.
        self.budget = ByteBudget(SENDING_BYTES)
        self._worker_queues: dict[str, _WorkerQueue] = {}
        self._new_queues: asyncio.Queue[str] = asyncio.Queue()
        self._publications = Publications(
            cache, derivations, post, losses, clock or SystemClock(), timed, awaited=awaited, building=building
        )

    @property
    def trouble(self) -> str:
        """Reason that publishing waits at the moment, "" while all is well."""
        return self._publications.trouble

    def submit(self, effects: Sequence[Effect]) -> None:
        """Take effects over; returns at once."""
        for effect in effects:
            if isinstance(effect, PublishOutputs):
                self._publications.submit(effect)
                continue
            if isinstance(effect, FetchAhead) and not self._takes_hints(effect.builder):
                continue
            queue = self._worker_queues.get(effect.builder)
            if queue is None:
                queue = self._worker_queues[effect.builder] = _WorkerQueue()
                self._new_queues.put_nowait(effect.builder)
            if isinstance(effect, FetchAhead):
                queue.hint = effect
            else:
                queue.waiting.append(effect)
            queue.filled.set()

    async def room(self) -> None:
        """Wait until publishing has caught up; the caller has more outputs to bring."""
        await self._publications.room()

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._publications.run())
            while True:
                worker = await self._new_queues.get()
                group.create_task(self._drain_queue(worker, self._worker_queues[worker]))

    # Starting and cancelling.

    async def _drain_queue(self, worker: str, queue: _WorkerQueue) -> None:
        while True:
            await queue.filled.wait()
            batch = [queue.waiting.popleft() for _ in range(min(START_BATCH, len(queue.waiting)))]
            hint = None
            if not queue.waiting:
                hint, queue.hint = queue.hint, None
                queue.filled.clear()
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
                if hint is not None:
                    await self._let_fetch_ahead(worker, hint)
            except FleetError as error:
                _log.warning("worker %s was not reached: %s", worker, error)

    async def _let_fetch_ahead(self, worker: str, hint: FetchAhead) -> None:
        """Send a hint whose derivation is small, as nearly all are: the others are not worth their memory."""
        recipe = hint.step, hint.recipe
        try:
            _, small = await self._derivations.order_sizes([recipe])
        except DerivationsError as error:
            _log.debug("worker %s is not let fetch inputs of %s ahead: %s", worker, hint.step, error)
            return
        if recipe in small:
            await self._fleet.fetch_ahead(worker, InputHint(step=hint.step, inputs=small[recipe].inputs))

    async def _start(self, worker: str, starts: Sequence[StartBuild]) -> None:
        try:
            sizes, small = await self._derivations.order_sizes([_recipe_of(start) for start in starts])
        except DerivationsError as error:
            await self._unreadable(worker, starts, error)
            return
        absent = [start for start in starts if _recipe_of(start) not in sizes]
        if absent:
            await self._give_back(absent, "the coordinator does not have the derivation any more; submit it again")
        for portion, size in _portions([start for start in starts if _recipe_of(start) in sizes], sizes):
            async with self._room_for(worker, size):
                await self._send(worker, portion, small, large=size > LARGE_BYTES)

    def _room_for(self, worker: str, size: int) -> AbstractAsyncContextManager[None]:
        return self.budget.acquire(worker, size * SENDING_COST) if size > LARGE_BYTES else nullcontext()

    async def _send(
        self,
        worker: str,
        starts: Sequence[StartBuild],
        small: Mapping[tuple[StepKey, int], BuildOrder],
        *,
        large: bool,
    ) -> None:
        """Send orders; `small` are those that were read with their sizes."""
        rest = [recipe for start in starts if (recipe := _recipe_of(start)) not in small]
        try:
            known = {**small, **(await self._derivations.orders(rest))} if rest else small
        except DerivationsError as error:
            await self._unreadable(worker, starts, error)
            return
        # What belongs to the event loop is read on it.
        limits = [self._limits_of(start.lease.step) for start in starts]
        traces = [self._traceparent(start.lease) for start in starts]
        cores = [self._cores_of(worker, start.lease.step) for start in starts]

        def make() -> list[LeaseOrder]:
            found = zip(starts, limits, traces, cores, strict=True)
            return [self._order(s, known[_recipe_of(s)], limit, trace, use) for s, limit, trace, use in found]

        # Beside the loop where there are many names to look at; a thread costs more than few of them.
        orders = await asyncio.to_thread(make) if large else make()
        await self._fleet.start_many(worker, orders)

    def _order(
        self, start: StartBuild, order: BuildOrder, limits: ResourceLimits, traceparent: str, cores: int
    ) -> LeaseOrder:
        lease = start.lease
        return LeaseOrder(
            step=lease.step,
            attempt=lease.attempt,
            drv_path=order.drv_path,
            derivation=order.derivation,
            inputs=order.inputs,
            upload_token=self._upload_token(lease, order.outputs),
            traceparent=traceparent,
            cores=cores,
            after=tuple([Lease(step=ahead.step, attempt=ahead.attempt) for ahead in start.after]),
            limits=_limits(limits),
        )

    async def _unreadable(self, worker: str, starts: Sequence[StartBuild], error: DerivationsError) -> None:
        _log.warning("worker %s gets no leases: %s", worker, error)
        await self._give_back(starts, "the derivation could not be read from the coordinator's database")

    async def _give_back(self, starts: Sequence[StartBuild], message: str) -> None:
        failure = Failure(FailureKind.INFRASTRUCTURE, message)
        await self._post([BuildFailed(start.lease, start.builder, failure) for start in starts])


@lru_cache(maxsize=64)
def _limits(limits: ResourceLimits) -> BuildLimits:
    # Those of a submission's builds are nearly always the same.
    return BuildLimits.model_validate(asdict(limits))


def _recipe_of(start: StartBuild) -> tuple[StepKey, int]:
    return start.lease.step, start.recipe


def _portions(
    starts: Sequence[StartBuild], sizes: Mapping[tuple[StepKey, int], int]
) -> Iterator[tuple[list[StartBuild], int]]:
    """Split starts into calls of at most `START_BYTES`, in their order; yields each with its bytes."""
    portion: list[StartBuild] = []
    total = 0
    for start in starts:
        size = sizes[_recipe_of(start)]
        if portion and total + size > START_BYTES:
            yield portion, total
            portion, total = [], 0
        portion.append(start)
        total += size
    if portion:
        yield portion, total
