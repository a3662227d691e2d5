"""Life of the coordinator's process: run until a stop is requested, wind down, and end with one error if any.

`serve` runs a coordinator over any fleet; `run_up` is `drover up`, the same over a Ray cluster of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext

import uvloop

from coordinator.config import Settings
from coordinator.errors import CoordinatorError, StoppedError, UnavailableError
from coordinator.fleet.ray_cluster import RayCluster, worker_state_dir
from coordinator.main import Coordinator, FleetFactory, Ready, open_coordinator
from coordinator.stop_signals import StopSignals
from infra.heap import keep_heap_small
from infra.objects.errors import CacheError
from workers.agent.stopping import stop_agents
from workers.errors import WorkerError
from workers.wire.fleet import Fleet, FleetError
from workers.wire.messages import FarmInfo


async def serve(
    settings: Settings,
    fleet_factory: FleetFactory,
    *,
    ready: Callable[[Ready], None],
    stop: asyncio.Event,
    wind_down: Callable[[Coordinator], Awaitable[None]] | None = None,
    standing_by: Callable[[str], None] = lambda _: None,
) -> None:
    """Run a coordinator until `stop` is set; `ready` is called once it answers, `wind_down` before it ends.

    `standing_by` gets the address where it has to wait for another coordinator to end.

    Raises `CoordinatorError` with one sentence where it cannot start or go on.
    """
    begun = False

    async def run() -> None:
        nonlocal begun
        async with open_coordinator(settings, fleet_factory, standing_by=standing_by) as coordinator:
            begun = True
            ready(coordinator.ready)
            await stop.wait()
            if wind_down is not None:
                await wind_down(coordinator)

    work, stopping = asyncio.create_task(run()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not begun:
            # It may be waiting for another coordinator to end.
            work.cancel()
        await work
    except asyncio.CancelledError:
        work.cancel()
        await asyncio.wait((work,))
        if not stop.is_set():
            raise
    except BaseExceptionGroup as group:
        raise first_cause(group) from None
    except (CacheError, WorkerError, FleetError) as error:
        raise StoppedError(str(error)) from None
    finally:
        stopping.cancel()


def run_up(settings: Settings, ready: Callable[[Ready], None], standing_by: Callable[[str], None]) -> None:
    """Be `drover up`: coordinator, Ray head and the configured workers, until SIGINT or SIGTERM.

    The first signal lets running builds finish within the grace and hands the others back, the second does so at once.

    Raises `CoordinatorError` with one sentence where the farm cannot start or go on.
    """
    keep_heap_small()

    async def run() -> None:
        signals = StopSignals.install()

        async def wind_down(coordinator: Coordinator) -> None:
            answering = frozenset(coordinator.views.workforce.answering())
            ours = [worker_state_dir(settings, worker.name) for worker in settings.workers if worker.name in answering]
            await stop_agents(ours, settings.stop_grace_s, signals.at_once.is_set)

        def fleet(info: FarmInfo) -> AbstractAsyncContextManager[Fleet]:
            return nullcontext(RayCluster(settings, info, signals.stop.is_set).fleet)

        await serve(settings, fleet, ready=ready, stop=signals.stop, wind_down=wind_down, standing_by=standing_by)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that made the others; that of a part which only lost its engine is not it."""
    errors = list(_flat(group))
    for error in errors:
        if isinstance(error, CoordinatorError) and not isinstance(error, UnavailableError):
            return error
    for error in errors:
        if isinstance(error, CacheError | WorkerError | FleetError):
            return StoppedError(str(error))
    return errors[0]


def _flat(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """Yield the single errors of a group, those of its last member first."""
    for error in reversed(group.exceptions):
        if isinstance(error, BaseExceptionGroup):
            yield from _flat(error)
        else:
            yield error
