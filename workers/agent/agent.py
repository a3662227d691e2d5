"""The agent of one worker: takes leases, works them off, tells what came of them. No transport is known here.

One task per lease walks it through inputs, slot, build and outputs; `lease_machine` decides who goes when and what an
error means, `outbox` keeps what must be told. A lease task ends in exactly one report, whatever happens in it; nothing
that happens in one lease ends the agent.

All methods belong to one event loop: an adapter whose transport calls from several threads must hop to the agent's.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from infra.clock import Clock, SystemClock
from infra.daemon import BasicDerivation, DaemonError, DaemonOperationError
from infra.nix.errors import NixError
from infra.objects.errors import CacheError
from workers.agent import stopping
from workers.agent.build import (
    BuildLimits,
    ConnectionLostError,
    LogGate,
    RecipeBrokeDaemonError,
    basic_derivation,
    build_in_slot,
)
from workers.agent.canary import Canary
from workers.agent.daemon_pool import DaemonOpener, DaemonUnreachableError, Line, Pool
from workers.agent.health import FitnessWatch
from workers.agent.input_guard import InputChangedError, InputCollectedError, InputGuard, MendingError
from workers.agent.inputs import TRANSFERS, FarmSources, InputError, InputFetcher, open_sources
from workers.agent.isolation import addresses_of, isolate
from workers.agent.lease_machine import (
    DOUBTFUL,
    Build,
    Ending,
    Fetch,
    HandBack,
    LeaseKey,
    LeaseState,
    Trouble,
    WorkerMachine,
    judge_refusal,
    judge_status,
    judge_trouble,
)
from workers.agent.orphans import MARK, sweep_leftovers, sweep_orphans
from workers.agent.outbox import Spool
from workers.agent.outputs import READERS, UPLOAD_WITHIN_S, OutputError, deliver, nar_size
from workers.agent.settings import Machine, WorkerSettings, daemon_argv, inspect_machine, load_settings, offer
from workers.errors import WorkerError
from workers.wire.grades import IsolationGrade
from workers.wire.messages import (
    LEASES,
    ORDERS,
    PROTOCOL_VERSION,
    CallName,
    Failed,
    FarmInfo,
    HeldLease,
    Hello,
    LeaseOrder,
    Report,
    Stage,
    StageChange,
    Succeeded,
)

log = logging.getLogger(__name__)

#: Finished and acknowledged leases whose repeated start is still recognised.
REMEMBERED_LEASES = 10_000
#: Seconds within which a report is sent while other builds run (several then share one answer), and a stage change.
REPORT_WITHIN_S = 0.015
STAGE_WITHIN_S = 0.1
#: Greetings whose connections are kept for the leases that began under them.
KEPT_SOURCES = 3
#: Longest message of a failure that is sent, characters; the log has the rest.
MAX_MESSAGE = 4000
#: Longest derivation that is parsed on the event loop, some milliseconds.
PARSE_HERE_BYTES = 256 * 1024
#: Longest wait of one `events` call, whatever is asked for, and most bytes of one answer.
MAX_WAIT_S = 30.0
MAX_ANSWER_BYTES = 8 * 1024 * 1024

_STAGES = {
    LeaseState.QUEUED: Stage.QUEUED,
    LeaseState.FETCHING: Stage.FETCHING,
    LeaseState.READY: Stage.QUEUED,
    LeaseState.BUILDING: Stage.BUILDING,
    LeaseState.UPLOADING: Stage.UPLOADING,
    # The work is done and only the report is on its way.
    LeaseState.REPORTING: Stage.UPLOADING,
}


class AgentError(WorkerError):
    """The agent cannot serve: it is closed, or does not see what the farm told it of."""


class StaleCoordinatorError(AgentError):
    """A coordinator speaks that another one has taken over from."""


@dataclass(slots=True)
class _Run:
    """One lease in hand."""

    order: LeaseOrder
    #: The slot, once the machine has given one.
    slot: asyncio.Future[int]
    task: asyncio.Task[None] | None = None
    #: The task runs, so that it will report.
    begun: bool = False
    #: Why the task was cancelled; None means that the agent is closing.
    stop: Trouble | None = None
    started_at: float = 0.0
    building_at: float = 0.0
    built_at: float = 0.0


@dataclass(slots=True)
class _Stopped(Exception):  # noqa: N818 - a lease that ended early is no error of the program
    """Carries the ending of a lease out of its steps."""

    ending: Ending = field()


class Agent:
    """See the module's text. Use it as an async context, or `start` and `close` it.

    The calls of `CallName` take and give plain containers (`Message.dump()`); they raise `pydantic.ValidationError` for
    what is not a message, `AgentError` where the agent cannot serve. Adapters make them through `answer`.
    """

    def __init__(self, settings: WorkerSettings, *, machine: Machine | None = None, clock: Clock | None = None) -> None:
        self._settings = settings
        self._host = machine or inspect_machine(settings.nix_daemon)
        self._offer = offer(settings, self._host)
        self._clock = clock or SystemClock()
        self._machine = WorkerMachine(self._offer.slots, self._host.memory_bytes)
        self._incarnation = secrets.token_hex(8)
        #: Exactly the leases that the machine holds.
        self._runs: dict[LeaseKey, _Run] = {}
        #: Leases that left, oldest first; at most REMEMBERED_LEASES.
        self._finished: OrderedDict[LeaseKey, None] = OrderedDict()
        self._nix_version = ""
        #: What the machine lacks to isolate builds better (`workers.agent.isolation`).
        self._shortfall = ""
        #: What the latest greeting said of the isolation.
        self._isolation_told: IsolationGrade | None = None
        self._sources: FarmSources | None = None
        #: Sources of earlier greetings, which leases in hand may still use; at most KEPT_SOURCES.
        self._old_sources: list[FarmSources] = []
        self._greeting = asyncio.Lock()
        self._owner: asyncio.Task[None] | None = None
        #: Done once `_serve` is ready for calls or has failed to be.
        self._ready: asyncio.Future[None] | None = None
        self._closing = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        #: What mends the store; at most one.
        self._mending: asyncio.Task[None] | None = None
        # These exist between start() and close(); see _serve.
        self._group: asyncio.TaskGroup
        self._spool: Spool
        self._slots: list[Line]
        self._builders: DaemonOpener
        self._fitness: FitnessWatch
        self._guard: InputGuard
        self._inputs: InputFetcher
        self._readers: Pool

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def name(self) -> str:
        """The worker's name."""
        return self._settings.name

    async def start(self) -> None:
        """Sweep the spool, reach the daemon, be ready. Raises `WorkerError` with one sentence; repeats are no-ops."""
        if self._ready is None:
            if self._closing.is_set():
                raise AgentError(f"worker {self.name} is closed")
            self._ready = asyncio.get_running_loop().create_future()
            self._owner = asyncio.create_task(self._serve(self._ready), name=f"agent {self.name}")
        await asyncio.shield(self._ready)

    async def close(self) -> None:
        """Stop all builds, wait for their processes, release everything. Idempotent."""
        self._closing.set()
        owner, self._owner = self._owner, None
        if owner is None:
            return
        await asyncio.wait((owner,))
        if not owner.cancelled() and (error := owner.exception()) is not None:
            log.error("agent %s ended badly", self.name, exc_info=error)

    async def answer(self, name: CallName, epoch: int, *arguments: Any) -> Any:
        """Answer a call of the coordinator that has `epoch` (`hello` brings its own).

        Raises `StaleCoordinatorError` where a later coordinator has been greeted; the look and the call are one turn of
        the agent's loop.
        """
        if name != "hello":
            self._require_reign(epoch)
        return await getattr(self, name)(*arguments)

    async def hello(self, farm: dict[str, Any]) -> dict[str, Any]:
        """Introduce both sides; takes `FarmInfo`, gives `Hello`. Starts the agent where it is not started.

        Raises `AgentError` where this machine does not see the farm's object store, `StaleCoordinatorError` where a
        later coordinator has said hello.
        """
        told = FarmInfo.model_validate(farm)
        self._require_reign(told.epoch)
        await self.start()
        async with self._greeting:
            # Again: a later coordinator may have been greeted while this one waited.
            self._require_reign(told.epoch)
            if self._sources is None or self._sources.farm != told:
                await self._meet(told)
        self._isolation_told = self._fitness.isolation
        return Hello(
            protocol=PROTOCOL_VERSION,
            worker=self.name,
            incarnation=self._incarnation,
            systems=self._offer.systems,
            emulated=self._offer.emulated,
            features=self._offer.features,
            mandatory_features=self._offer.mandatory_features,
            slots=self._offer.slots,
            capacity=self._machine.capacity(),
            unfit=self._fitness.unfit,
            isolation=self._isolation_told,
            nix_version=self._nix_version,
            leases=tuple(HeldLease.model_validate(held) for held in self._held(set())),
        ).dump()

    def _require_reign(self, epoch: int) -> None:
        """Raise `StaleCoordinatorError` if a coordinator with a higher epoch has been greeted."""
        if self._sources is not None and epoch < self._sources.farm.epoch:
            raise StaleCoordinatorError(
                f"worker {self.name} follows a later coordinator (epoch {self._sources.farm.epoch}, not {epoch})"
            )

    async def start_many(self, orders: Sequence[dict[str, Any]]) -> None:
        """Take leases (`LeaseOrder`); those in hand or finished already are no-ops."""
        parsed = ORDERS.validate_python(tuple(orders))
        self._check_started()
        now = self._clock.now()
        for order in parsed:
            key = (order.step, order.attempt)
            if key in self._finished or not self._machine.accept(key, now, order.memory_bytes):
                continue
            self._runs[key] = _Run(order, asyncio.get_running_loop().create_future(), started_at=now)
        self._advance()

    async def events(self, ack: int, max_bytes: int, wait_s: float) -> dict[str, Any]:
        """Forget what is at or below `ack`, then answer with what there is, or comes within `wait_s`; gives `Batch`."""
        self._check_started()
        for key in self._spool.acknowledge(ack):
            self._machine.acknowledged(key)
            del self._runs[key]
            self._finished[key] = None
            if len(self._finished) > REMEMBERED_LEASES:
                self._finished.popitem(last=False)
        await self._spool.wait(min(wait_s, MAX_WAIT_S))
        self._check_started()
        last, events, ended = self._spool.take(min(max_bytes, MAX_ANSWER_BYTES))
        isolation = self._fitness.isolation
        changed = isolation is not None and isolation is not self._isolation_told
        return {
            "incarnation": self._incarnation,
            "last": last,
            "events": events,
            "capacity": self._machine.capacity(ended),
            "leases": self._held(ended),
            "draining": self._machine.draining,
            "unfit": self._fitness.unfit,
            **({"isolation": isolation.model_dump()} if isolation is not None and changed else {}),
        }

    async def cancel(self, leases: Sequence[dict[str, Any]]) -> None:
        """Stop builds (`Lease`), which are then reported as cancelled; unknown and finished leases are no-ops."""
        parsed = LEASES.validate_python(tuple(leases))
        self._check_started()
        for lease in parsed:
            self._stop((lease.step, lease.attempt), Trouble.CANCELLED)
        self._advance()

    async def drain(self, on: bool) -> None:
        """While true, leases that have not begun are handed back and the capacity is 0."""
        self._check_started()
        self._machine.draining = on
        self._advance()
        # The coordinator shall not send more until its poll ends by itself.
        self._spool.stop_waiting()

    async def provide(self, paths: Sequence[str], token: str) -> list[dict[str, Any]]:
        """Upload those of the full paths that are valid in this store again; gives `Output` for each.

        Raises `AgentError` where they cannot be sent.
        """
        self._check_started()
        sources = self._sources
        if sources is None:
            return []
        try:
            async with self._readers.use() as connection:
                wanted = {path: path for path in sorted(await connection.query_valid_paths(paths))}
            outputs = await deliver(self._readers, lambda: sources, wanted, token, within_s=0.0, waits=lambda _: None)
        except (OutputError, DaemonError) as error:
            raise AgentError(f"worker {self.name} cannot send what it has: {error}") from error
        return [output.dump() for output in outputs]

    # The owner

    async def _serve(self, ready: asyncio.Future[None]) -> None:
        """Own everything that lives as long as the agent."""
        try:
            async with AsyncExitStack() as stack:
                stack.callback(os.close, _lock(self._settings.state_dir))
                self._spool = Spool(self._settings.state_dir / "spool")
                stack.push_async_callback(self._spool.close)
                stack.push_async_callback(self._close_sources)
                where = self._settings
                stopping.forget(where.state_dir)
                await asyncio.to_thread(sweep_leftovers, where.state_dir, where.physical_store)
                opener, builders = await self._openers()

                lines: list[Line] = []

                def line(by: DaemonOpener = opener) -> Line:
                    made = Line(by.open)
                    stack.push_async_callback(made.close)
                    lines.append(made)
                    return made

                async def let_go() -> bool:
                    if not await self._inputs.let_go(lambda: not self._runs):
                        return False
                    # A connection keeps what was built over it.
                    await asyncio.gather(*(each.hang_up() for each in lines if not each.busy))
                    return True

                self._slots = [line(builders) for _ in range(self._offer.slots)]
                self._readers = Pool([line() for _ in range(READERS)])
                roots, transfers = line(), Pool([line() for _ in range(TRANSFERS)])
                canary = Canary(self._native(), where.store_dir, where.physical_store, where.state_dir)
                self._fitness = FitnessWatch(
                    where,
                    line(builders),
                    canary,
                    self._clock,
                    lambda: not self._runs,
                    let_go,
                    self._spool.stop_waiting,
                    lambda: self._guard.trouble,
                    self._shortfall,
                )
                self._guard = InputGuard(where.physical_store, self._readers, self._trusts_builds)
                async with self._slots[0].use() as connection:
                    self._nix_version = connection.nix_version
                async with asyncio.TaskGroup() as self._group:
                    self._inputs = InputFetcher(roots, transfers, self._group)
                    # Before the farm is met: it shall not give a worker that cannot build anything to build.
                    await self._fitness.look()
                    watches = (
                        self._group.create_task(self._watch_stop(), name="watch for a stop request"),
                        self._group.create_task(self._fitness.run(), name="watch over fitness"),
                    )
                    ready.set_result(None)
                    await self._closing.wait()
                    for watch in watches:
                        watch.cancel()
                    self._stop_all()
        except (WorkerError, OSError) as error:
            if ready.done():
                raise
            ready.set_exception(error if isinstance(error, WorkerError) else AgentError(str(error)))
        except BaseException as error:
            if not ready.done():
                ready.set_exception(AgentError(f"the agent could not start: {type(error).__name__}"))
            raise
        finally:
            self._closing.set()

    async def _openers(self) -> tuple[DaemonOpener, DaemonOpener]:
        """Isolate the worker's builds; return what opens daemons that do not build, and those that do."""
        where = self._settings
        found = await asyncio.to_thread(isolate, where, self._host)
        self._offer, self._shortfall = offer(where, found.machine), found.shortfall
        variables = {MARK: str(where.state_dir), **found.environment}
        argv = daemon_argv(where, found.machine)
        self._builders = DaemonOpener(argv, where.store_dir, variables, found.building)
        return DaemonOpener(argv, where.store_dir, variables, found.confinement), self._builders

    async def _watch_stop(self) -> None:
        """Stop in order when the program that started the worker asks for it (`workers.agent.stopping`)."""
        where = self._settings.state_dir
        while (deadline := stopping.requested(where)) is None:  # noqa: ASYNC110 - a file sends no event
            await asyncio.sleep(stopping.LOOK_EVERY_S)
        self._machine.draining = True
        self._advance()
        self._spool.stop_waiting()
        while self._runs:
            if self._clock.now() >= deadline:
                for key in list(self._runs):
                    self._stop(key, Trouble.STOPPING)
                self._advance()
            await asyncio.sleep(stopping.LOOK_EVERY_S)
            deadline = min(deadline, stopping.requested(where) or deadline)
        stopping.answer(where)

    def _stop_all(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._spool.stop_waiting()
        for run in self._runs.values():
            if run.task is not None:
                run.task.cancel()
        if self._mending is not None:
            self._mending.cancel()
        self._inputs.stop()

    async def _close_sources(self) -> None:
        for sources in (*self._old_sources, self._sources):
            if sources is not None:
                await sources.close()

    async def _meet(self, farm: FarmInfo) -> None:
        own = self._settings.store_dir
        if farm.store_dir != own:
            raise AgentError(f"worker {self.name} builds for {own}, the farm for {farm.store_dir}")
        try:
            sources = await open_sources(farm)
        except (CacheError, NixError) as error:
            raise AgentError(f"worker {self.name} cannot serve this farm: {error}") from error
        if self._builders.deny(await asyncio.to_thread(addresses_of, urlsplit(farm.cache_url).hostname or "")):
            await asyncio.gather(*(slot.hang_up() for slot in self._slots if not slot.busy))
        if self._sources is not None:
            self._old_sources.append(self._sources)
        self._sources = sources
        if len(self._old_sources) > KEPT_SOURCES:
            await self._old_sources.pop(0).close()

    def _trusts_builds(self) -> bool:
        """Whether builds are kept from the worker's store."""
        isolation = self._fitness.isolation
        return isolation is not None and isolation.level != "C"

    def _native(self) -> str:
        """A system that the worker's Nix builds for: the machine's own where it offers that."""
        systems = self._offer.systems
        return self._host.system if self._host.system in systems else systems[0]

    def _check_started(self) -> None:
        if self._closing.is_set():
            raise AgentError(f"worker {self.name} is closed")
        if self._ready is None or not self._ready.done():
            raise AgentError(f"worker {self.name} is not started")

    def _held(self, told: set[LeaseKey]) -> list[dict[str, Any]]:
        return [
            {"step": key[0], "attempt": key[1], "stage": _STAGES[state]}
            for key, state in self._machine.held()
            if key not in told
        ]

    # Leases

    def _advance(self) -> None:
        """Carry out what the machine decides now, and wake up when it wants to be asked again."""
        if self._closing.is_set():
            return
        now = self._clock.now()
        for action in self._machine.next_actions(now):
            run = self._runs[action.key]
            match action:
                case Fetch(key=key):
                    run.task = self._group.create_task(self._run(key, run), name=f"lease {key[0]} {key[1]}")
                case Build(slot=slot):
                    run.slot.set_result(slot)
                case HandBack(key=key):
                    self._stop(key, Trouble.NOT_STARTED)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._machine.deadline(now)
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_later(deadline - now + 0.001, self._advance)

    def _stop(self, key: LeaseKey, why: Trouble) -> None:
        run = self._runs.get(key)
        if run is None or run.stop is not None or self._machine.state(key) is LeaseState.REPORTING:
            return
        run.stop = why
        if run.task is not None:
            run.task.cancel()
        if not run.begun:
            # A task that is cancelled before its first step never gets to report.
            self._report(key, run, judge_trouble(why))

    async def _run(self, key: LeaseKey, run: _Run) -> None:
        """One lease from beginning to report."""
        run.begun = True
        result: Succeeded | Ending
        try:
            result = await self._work(key, run)
        except asyncio.CancelledError:
            if run.stop is None:
                raise
            result = judge_trouble(run.stop)
        except _Stopped as stopped:
            result = stopped.ending
        except Exception as error:
            log.exception("lease %s attempt %d failed in an unexpected way", *key)
            result = judge_trouble(Trouble.UNEXPECTED, f"{type(error).__name__}: {error}")
        self._report(key, run, result)
        self._advance()

    def _report(self, key: LeaseKey, run: _Run, result: Succeeded | Ending) -> None:
        now = self._clock.now()
        reason = result.reason if isinstance(result, Ending) else None
        if reason in DOUBTFUL:
            self._fitness.doubt()
        if not self._machine.report(key, now, reason):
            return
        told: Succeeded | Failed
        if isinstance(result, Ending):
            limit = run.order.limit_of(result.reason)
            told = Failed(
                reason=result.reason,
                message=result.message[:MAX_MESSAGE],
                limit=limit,
                missing=result.missing,
                signature=result.signature,
            )
        else:
            told = result
        report = Report(
            step=key[0],
            attempt=key[1],
            started_at=run.started_at,
            building_at=run.building_at,
            built_at=run.built_at,
            ended_at=now,
            result=told,
        )
        self._spool.report(report, within_s=0.0 if self._machine.has_idle_slot else REPORT_WITHIN_S)

    async def _work(self, key: LeaseKey, run: _Run) -> Succeeded:
        """Raises `_Stopped` where the lease ends without a result."""
        order, sources = run.order, self._sources
        if sources is None:
            raise _Stopped(judge_trouble(Trouble.NOT_GREETED))
        try:
            derivation = await _parsed(order)
        except NixError as error:
            raise _Stopped(judge_trouble(Trouble.DERIVATION_UNREADABLE, str(error))) from None
        try:
            if not self._inputs.known(order.inputs):
                self._tell_stage(key, Stage.FETCHING)
                await self._inputs.ensure(order.inputs, sources)
            self._machine.fetched(key)
            self._advance()
            await self._build(key, run, await run.slot, derivation)
            self._advance()
            self._tell_stage(key, Stage.UPLOADING)
            await self._check_size(derivation, order.max_output_bytes)
            return await self._upload(key, derivation, sources, order.upload_token)
        except RecipeBrokeDaemonError as error:
            raise _Stopped(judge_trouble(error.trouble, str(error))) from None
        except InputError as error:
            ending = judge_trouble(Trouble.INPUT_MISSING, str(error))
            raise _Stopped(replace(ending, missing=error.missing)) from None
        except OutputError as error:
            raise _Stopped(judge_trouble(Trouble.UPLOAD_FAILED, str(error))) from None
        except DaemonOperationError as error:
            self._inputs.forget()
            raise _Stopped(judge_trouble(Trouble.DAEMON_REFUSED, str(error))) from None
        except ConnectionLostError as error:
            raise _Stopped(judge_trouble(Trouble.CONNECTION_LOST, str(error))) from None
        except (DaemonError, DaemonUnreachableError) as error:
            raise _Stopped(judge_trouble(Trouble.DAEMON_LOST, str(error))) from None

    async def _build(self, key: LeaseKey, run: _Run, slot: int, derivation: BasicDerivation) -> None:
        run.building_at = self._clock.now()
        self._tell_stage(key, Stage.BUILDING)
        gate = LogGate(run.order.max_log_bytes, lambda data: self._spool.log(key, data))
        outputs = [output.path for output in derivation.outputs]
        with self._ending_where_inputs_changed():
            watch = await self._guard.begin(derivation.inputs, outputs, self._slots[slot])
        try:
            result = await build_in_slot(
                self._slots[slot],
                run.order.drv_path,
                derivation,
                limits=BuildLimits(run.order.timeout_s, run.order.max_silent_s, self._offer.build_cores),
                gate=gate,
                on_phase=lambda phase: self._tell_stage(key, Stage.BUILDING, phase),
                pause=self._pause,
            )
        except (DaemonError, WorkerError) as error:
            if isinstance(error, ConnectionLostError):
                # What runs on may go on writing.
                await asyncio.to_thread(sweep_orphans, self._settings.physical_store)
            # It ran all the same. Where nothing can be looked at, the next build looks first.
            with self._ending_where_inputs_changed(), suppress(DaemonError, DaemonUnreachableError):
                await self._guard.end(watch, outputs, self._slots[slot])
            if isinstance(error, DaemonOperationError):
                self._inputs.forget()
                raise _Stopped(judge_refusal(str(error))) from None
            raise
        run.built_at = self._clock.now()
        # Before it is judged: a build that failed may have failed by what it read.
        with self._ending_where_inputs_changed():
            await self._guard.end(watch, outputs, self._slots[slot])
        disk_was_full = self._fitness.was_full_since(run.building_at)
        ending = judge_status(result.status, result.error_msg.strip(), disk_was_full=disk_was_full)
        if ending is not None:
            if ending.reason in ("infrastructure", "input_missing"):
                self._inputs.forget()
            raise _Stopped(ending)
        self._machine.built(key, run.built_at)

    @contextmanager
    def _ending_where_inputs_changed(self) -> Iterator[None]:
        """End the lease where the guard finds a changed input, and have it mended; have a collected one fetched."""
        try:
            yield
        except MendingError as error:
            raise _Stopped(judge_trouble(Trouble.MENDING, str(error))) from None
        except InputCollectedError:
            self._inputs.forget()
            raise
        except InputChangedError as error:
            self._inputs.forget()
            raise _Stopped(judge_trouble(Trouble.INPUT_CHANGED, str(error))) from None
        finally:
            # Also where the lease is cancelled as soon as the guard has found something.
            if self._guard.trouble and (self._mending is None or self._mending.done()) and not self._closing.is_set():
                self._fitness.hurt()
                self._mending = self._group.create_task(self._mend(), name="mend the store")

    async def _mend(self) -> None:
        await self._guard.mend(lambda: self._sources)
        self._fitness.doubt()

    async def _check_size(self, derivation: BasicDerivation, limit_bytes: int) -> None:
        paths = [output.path for output in derivation.outputs]
        if limit_bytes and (size := await nar_size(self._readers, paths)) > limit_bytes:
            detail = f"{size} bytes, and at most {limit_bytes} are allowed"
            raise _Stopped(judge_trouble(Trouble.OUTPUT_TOO_LARGE, detail))

    async def _upload(self, key: LeaseKey, derivation: BasicDerivation, sources: FarmSources, token: str) -> Succeeded:
        outputs = await deliver(
            self._readers,
            # Another coordinator may take over meanwhile: outputs go to the one that leads then.
            lambda: self._sources or sources,
            {output.name: output.path for output in derivation.outputs},
            token,
            within_s=UPLOAD_WITHIN_S,
            waits=lambda why: self._tell_stage(key, Stage.UPLOADING, why[:MAX_MESSAGE]),
        )
        return Succeeded(outputs=outputs)

    def _pause(self) -> Awaitable[object] | None:
        return None if self._spool.room.is_set() else self._spool.room.wait()

    def _tell_stage(self, key: LeaseKey, stage: Stage, phase: str = "") -> None:
        change = StageChange(step=key[0], attempt=key[1], stage=stage, phase=phase, at=self._clock.now())
        self._spool.stage(change, within_s=STAGE_WITHIN_S)


async def _parsed(order: LeaseOrder) -> BasicDerivation:
    """Parse the derivation, a long one in a thread. Raises `infra.nix.errors.FormatError`."""
    if len(order.derivation) <= PARSE_HERE_BYTES:
        return basic_derivation(order.derivation, order.inputs)
    return await asyncio.to_thread(basic_derivation, order.derivation, order.inputs)


def _lock(state_dir: Path) -> int:
    """Make the state directory this process's own until the descriptor is closed. Raises `AgentError`."""
    state_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(state_dir / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise AgentError(f"another worker uses the state directory {state_dir}") from None
    return descriptor


async def open_agent(settings: WorkerSettings | None = None) -> Agent:
    """Return a started agent; the settings default to the file that `DROVER_WORKER_SETTINGS` names.

    Raises `WorkerError` with one sentence. The caller closes it.
    """
    agent = Agent(load_settings() if settings is None else settings)
    await agent.start()
    return agent
