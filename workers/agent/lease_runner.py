"""Lease runner: walks each lease of a worker through inputs, slot, build and upload, to exactly one report.

`lease_machine` decides which lease goes on when and what an error means; the runner carries that out with one task a
lease. Whatever happens in a lease, it ends in one report in the `Outbox`, and nothing that happens in one ends another.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from infra.clock import Clock
from infra.daemon import BasicDerivation, DaemonError, DaemonOperationError
from infra.nix.errors import NixError
from infra.nix.path_info import PathInfo
from workers.agent.attempt_record import AttemptRecord, Moving
from workers.agent.build import (
    ConnectionLostError,
    LogGate,
    RecipeBrokeDaemonError,
    build_in_slot,
    parsed,
    required_features,
)
from workers.agent.build_cores import BuildCores
from workers.agent.daemon_pool import DaemonSession, DaemonUnreachableError
from workers.agent.farm_sources import FarmSources, InputError
from workers.agent.fetching_ahead import AheadFetcher
from workers.agent.health import HealthWatch
from workers.agent.input_guard import InputChangedError, InputCollectedError, InputGuard, MendingError
from workers.agent.inputs import InputFetcher
from workers.agent.lease_actions import Build, Fetch, HandBack, LeaseKey
from workers.agent.lease_machine import (
    DOUBTFUL,
    Ending,
    LeaseState,
    Trouble,
    WorkerMachine,
    judge_refusal,
    judge_status,
    judge_trouble,
)
from workers.agent.orphans import sweep_orphans
from workers.agent.outbox import Outbox
from workers.agent.output_reader import OutputError, OutputReader
from workers.agent.outputs import UPLOAD_WITHIN_S, deliver
from workers.errors import WorkerError
from workers.wire.messages import MAX_TRANSFERS, Failed, LeaseOrder, Report, Stage, StageChange, Succeeded

_log = logging.getLogger(__name__)

#: Finished and acknowledged leases whose repeated start is still recognised.
REMEMBERED_LEASES = 10_000
#: Seconds within which a report is sent while other builds run (several then share one answer), and a stage change.
REPORT_WITHIN_S = 0.015
STAGE_WITHIN_S = 0.1
#: Longest message of a failure that is sent, characters; the log has the rest.
MAX_MESSAGE = 4000

#: Of all other states it is `QUEUED`.
_STAGES = {
    LeaseState.FETCHING: Stage.FETCHING,
    LeaseState.BUILDING: Stage.BUILDING,
    LeaseState.UPLOADING: Stage.UPLOADING,
    # The work is done and only the report is on its way.
    LeaseState.REPORTING: Stage.UPLOADING,
}


@dataclass(slots=True)
class _Run:
    """One lease in hand."""

    order: LeaseOrder
    record: AttemptRecord
    #: The slot, once the machine has given one.
    slot: asyncio.Future[int]
    #: Set once all is built that the lease follows.
    released: asyncio.Event
    task: asyncio.Task[None] | None = None
    #: The task runs, so that it will report.
    begun: bool = False
    #: Why the task was cancelled; None means that the agent is closing.
    stop: Trouble | None = None
    started_at: float = 0.0
    building_at: float = 0.0
    built_at: float = 0.0
    #: Of the build, while it runs.
    cores: int = 0


@dataclass(slots=True)
class _Stopped(Exception):  # noqa: N818 - a lease that ended early is no error of the program
    """Carries the ending of a lease out of its steps."""

    ending: Ending = field()


class LeaseRunner:
    """All leases of a worker, from order to acknowledged report. Belongs to the agent's loop, from start to close.

    `sources` gives what the latest greeting named, None before the first. `store` is the physical store of the builds.
    Once `closing` is set, nothing begins any more.
    """

    def __init__(
        self,
        machine: WorkerMachine,
        clock: Clock,
        outbox: Outbox,
        group: asyncio.TaskGroup,
        *,
        slots: Sequence[DaemonSession],
        outputs: OutputReader,
        inputs: InputFetcher,
        ahead: AheadFetcher,
        guard: InputGuard,
        health: HealthWatch,
        sources: Callable[[], FarmSources | None],
        store: Path,
        build_cores: BuildCores,
        closing: asyncio.Event,
    ) -> None:
        self._machine = machine
        self._clock = clock
        self._outbox = outbox
        self._group = group
        self._slots, self._outputs = slots, outputs
        self._inputs, self._ahead = inputs, ahead
        self._guard, self._health = guard, health
        self._sources = sources
        self._store, self._build_cores = store, build_cores
        self._closing = closing
        #: Exactly the leases that the machine holds.
        self._runs: dict[LeaseKey, _Run] = {}
        #: Leases that left, oldest first, and whether each was built; at most REMEMBERED_LEASES.
        self._finished: OrderedDict[LeaseKey, bool] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        #: What mends the store; at most one.
        self._mending: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """No lease is in hand."""
        return not self._runs

    @property
    def draining(self) -> bool:
        """Leases that have not begun are handed back, and the capacity is 0."""
        return self._machine.draining

    @property
    def running(self) -> int:
        """Number of builds that run."""
        return self._machine.running

    @property
    def cores_of_a_build(self) -> int:
        """Cores that each of the builds that run has, on average and at least."""
        given = [run.cores for run in self._runs.values() if run.cores]
        return max(self._build_cores.usual, -(-sum(given) // len(given)) if given else 0)

    def offer(self, slots: int) -> None:
        """Offer so many of the slots from now on; what runs goes on."""
        self._machine.offered = slots
        self._advance()

    def drain(self, *, on: bool) -> None:
        """Set or clear `draining`."""
        self._machine.draining = on
        if on:
            self._ahead.drop()
        self._advance()

    def capacity(self, ended: frozenset[LeaseKey] | set[LeaseKey] = frozenset()) -> int:
        """Return how many leases the worker takes in all; `ended` are reported in the same answer."""
        return self._machine.capacity(ended)

    def held(self, ended: frozenset[LeaseKey] | set[LeaseKey] = frozenset()) -> list[dict[str, Any]]:
        """Return `HeldLease` of each lease in hand that is not among `ended`."""
        return [
            {"step": key[0], "attempt": key[1], "stage": self._stage(key, state)}
            for key, state in self._machine.held()
            if key not in ended
        ]

    def transfers(self) -> list[dict[str, Any]]:
        """Return a `Transfer` of each lease whose inputs or outputs are on their way, at most MAX_TRANSFERS."""
        moving = ((key, run.record.on_its_way()) for key, run in self._runs.items())
        found = ({"step": key[0], "attempt": key[1], **fields} for key, fields in moving if fields is not None)
        return list(islice(found, MAX_TRANSFERS))

    def start(self, orders: Iterable[LeaseOrder]) -> None:
        """Take leases; those in hand or finished already are no-ops."""
        now = self._clock.now()
        for order in orders:
            key, ahead = (order.step, order.attempt), [(lease.step, lease.attempt) for lease in order.after]
            if key in self._finished or not self._machine.accept(key, now, order.limits.memory_bytes, ahead):
                continue
            record = AttemptRecord(self._clock.now, order.traceparent)
            run = _Run(order, record, asyncio.get_running_loop().create_future(), asyncio.Event(), started_at=now)
            self._runs[key] = run
            self._health.work_came()
            if not self._machine.following.waits(key):
                run.released.set()
            if not all(self._finished.get(each) or self._machine.may_be_followed(each) for each in ahead):
                self._stop(key, Trouble.NOT_BUILT_HERE)
        self._advance()

    def acknowledged(self, keys: Iterable[LeaseKey]) -> None:
        """Forget leases whose reports the coordinator has."""
        for key in keys:
            self._finished[key] = self._machine.may_be_followed(key)
            self._machine.acknowledged(key)
            del self._runs[key]
            if len(self._finished) > REMEMBERED_LEASES:
                self._finished.popitem(last=False)

    def stop(self, keys: Iterable[LeaseKey], why: Trouble) -> None:
        """End leases, which are then reported; unknown and finished ones are no-ops."""
        for key in keys:
            self._stop(key, why)
        self._advance()

    def stop_all(self, why: Trouble) -> None:
        """End every lease, which is then reported."""
        self.stop(list(self._runs), why)

    def cancel_tasks(self) -> None:
        """End all work without a report, because the agent is closing; the task group waits for it."""
        if self._timer is not None:
            self._timer.cancel()
        for run in self._runs.values():
            if run.task is not None:
                run.task.cancel()
        if self._mending is not None:
            self._mending.cancel()
        self._ahead.stop()

    def _advance(self) -> None:
        """Carry out what the machine decides now, and wake up at its next deadline."""
        if self._closing.is_set():
            return
        now = self._clock.now()
        for action in self._machine.next_actions(now):
            run = self._runs[action.key]
            match action:
                # Not one that has just ended with what it followed, which was handed back.
                case Fetch(key=key) if self._machine.state(key) is LeaseState.FETCHING:
                    run.task = self._group.create_task(self._run(key, run), name=f"lease {key[0]} {key[1]}")
                case Build(slot=slot):
                    run.slot.set_result(slot)
                case HandBack(key=key):
                    self._stop(key, Trouble.NOT_STARTED)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (deadline := self._machine.deadline(now)) is not None:
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
        except Exception as error:  # noqa: BLE001 - reported as the end of the lease
            _log.exception("lease %s attempt %d failed in an unexpected way%s", *key, run.record.in_trace)
            result = judge_trouble(Trouble.UNEXPECTED, f"{type(error).__name__}: {error}")
        self._report(key, run, result)
        self._advance()

    def _report(self, key: LeaseKey, run: _Run, result: Succeeded | Ending) -> None:
        now = self._clock.now()
        reason = result.reason if isinstance(result, Ending) else None
        if reason in DOUBTFUL:
            self._health.doubt()
        if not self._machine.report(key, now, reason):
            return
        outcome: Succeeded | Failed
        if isinstance(result, Ending):
            outcome = Failed(
                reason=result.reason,
                message=result.message[:MAX_MESSAGE],
                limit=run.order.limits.limit_of(result.reason),
                missing=result.missing,
                signature=result.signature,
            )
        else:
            outcome = result
        report = Report(
            step=key[0],
            attempt=key[1],
            started_at=run.started_at,
            building_at=run.building_at,
            built_at=run.built_at,
            ended_at=now,
            result=outcome,
            measures=run.record.measures(),
        )
        _log.info("lease %s attempt %d ended: %s%s", *key, reason or outcome.kind, run.record.in_trace)
        self._outbox.report(report, within_s=0.0 if self._machine.has_idle_slot else REPORT_WITHIN_S)
        if not self._machine.may_be_followed(key):
            self.stop(self._machine.following.waiting_for(key), Trouble.NOT_BUILT_HERE)

    async def _work(self, key: LeaseKey, run: _Run) -> Succeeded:
        """Raises `_Stopped` where the lease ends without a result."""
        order, sources = run.order, self._sources()
        if sources is None:
            raise _Stopped(judge_trouble(Trouble.NOT_GREETED))
        run.record.ahead_bytes = self._ahead.taken(order.step)
        try:
            derivation = await parsed(order.derivation, order.inputs)
        except NixError as error:
            raise _Stopped(judge_trouble(Trouble.DERIVATION_UNREADABLE, str(error))) from None
        try:
            await (self._follow(run, sources) if order.after else self._fetch(key, run, sources))
            self._machine.fetched(key, fetches=any(output.hash for output in derivation.outputs))
            self._advance()
            known = await self._build(key, run, await run.slot, derivation)
            self._advance()
            # What begins in its place sends its request first, before what is left to do here.
            await asyncio.sleep(0)
            self._tell_stage(key, Stage.UPLOADING)
            built = await self._built(derivation, known, order.limits.output_bytes)
            return await self._upload(key, run, built, sources)
        except (RecipeBrokeDaemonError, ConnectionLostError) as error:
            raise _Stopped(judge_trouble(error.trouble, str(error))) from None
        except InputError as error:
            ending = judge_trouble(Trouble.INPUT_MISSING, str(error))
            raise _Stopped(replace(ending, missing=error.missing)) from None
        except OutputError as error:
            raise _Stopped(judge_trouble(Trouble.UPLOAD_FAILED, str(error))) from None
        except DaemonOperationError as error:
            self._inputs.forget()
            raise _Stopped(judge_trouble(Trouble.DAEMON_REFUSED, str(error))) from None
        except (DaemonError, DaemonUnreachableError) as error:
            raise _Stopped(judge_trouble(Trouble.DAEMON_LOST, str(error))) from None

    async def _fetch(self, key: LeaseKey, run: _Run, sources: FarmSources) -> None:
        if not self._inputs.known(run.order.inputs):
            self._tell_stage(key, Stage.FETCHING)
            with run.record.span("inputs"):
                await self._inputs.ensure(run.order.inputs, sources, run.record)

    async def _follow(self, run: _Run, sources: FarmSources) -> None:
        """Fetch what else a lease needs while that is built which it follows, then take what this made.

        That is rooted before it is there, so that neither the store nor the cache is asked for it once it is built.
        """
        keys = [(lease.step, lease.attempt) for lease in run.order.after]
        orders = [self._runs[key].order for key in keys if key in self._runs]
        made = [output.path for each in orders for output in (await parsed(each.derivation, each.inputs)).outputs]
        try:
            with run.record.span("inputs"):
                await self._inputs.ensure(sorted({*run.order.inputs}.difference(made)), sources, run.record)
                await self._inputs.expect(made)
            await run.released.wait()
            self._inputs.arrived(made)
            await self._inputs.ensure(run.order.inputs, sources, run.record)
        except InputError as error:
            raise _Stopped(judge_trouble(Trouble.NOT_BUILT_HERE, str(error))) from None

    async def _build(self, key: LeaseKey, run: _Run, slot: int, derivation: BasicDerivation) -> Mapping[str, PathInfo]:
        """Build; return what the store knows of the outputs, by path, as far as it said so beside the verdict."""
        run.building_at = self._clock.now()
        self._tell_stage(key, Stage.BUILDING)
        gate = LogGate(run.order.limits.log_bytes, lambda data: self._outbox.log(key, data))
        outputs = [output.path for output in derivation.outputs]
        with self._ending_where_inputs_changed():
            watch = await self._guard.begin(derivation.inputs, outputs, self._slots[slot])

        def entered(phase: str, line: int) -> None:
            run.record.phase(phase, line)
            self._tell_stage(key, Stage.BUILDING, phase)

        cores = run.cores = self._build_cores.of(required_features(derivation), self._machine.running, run.order.cores)
        try:
            with run.record.span("build"):
                made = await build_in_slot(
                    self._slots[slot],
                    run.order.drv_path,
                    derivation,
                    limits=run.order.limits,
                    cores=cores,
                    gate=gate,
                    on_phase=entered,
                    pause=lambda: None if self._outbox.has_room(key) else self._outbox.wait_for_room(key),
                    use=run.record.use,
                )
        except (DaemonError, WorkerError) as error:
            if isinstance(error, ConnectionLostError):
                # What runs on may go on writing.
                await asyncio.to_thread(sweep_orphans, self._store)
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
        result = made.result
        disk_was_full = self._health.was_full_since(run.building_at)
        ending = judge_status(result.status, result.error_msg.strip(), disk_was_full=disk_was_full)
        if ending is not None:
            if ending.reason in ("infrastructure", "input_missing"):
                self._inputs.forget()
            raise _Stopped(ending)
        # Before those that follow it look at it.
        self._guard.knows(made.infos.values())
        for released in self._machine.built(key, run.built_at):
            self._runs[released].released.set()
        return made.infos

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
                self._health.hurt()
                self._mending = self._group.create_task(self._mend(), name="mend the store")

    async def _mend(self) -> None:
        await self._guard.mend(self._sources)
        self._health.doubt()

    async def _built(
        self, derivation: BasicDerivation, known: Mapping[str, PathInfo], limit_bytes: int
    ) -> dict[str, PathInfo]:
        """Return what the store knows of the outputs, by name; `limit_bytes` of all together, 0 for any."""
        infos = await self._outputs.infos([output.path for output in derivation.outputs], known)
        size = sum(infos[output.path].nar_size for output in derivation.outputs)
        if limit_bytes and size > limit_bytes:
            detail = f"{size} bytes, and at most {limit_bytes} are allowed"
            raise _Stopped(judge_trouble(Trouble.OUTPUT_TOO_LARGE, detail))
        return {output.name: infos[output.path] for output in derivation.outputs}

    async def _upload(self, key: LeaseKey, run: _Run, built: Mapping[str, PathInfo], sources: FarmSources) -> Succeeded:
        moving = Moving(notify=self._outbox.moved)
        with run.record.delivery() as packed, run.record.transfer("upload", (moving,)):
            outputs = await deliver(
                self._outputs,
                # Another coordinator may take over meanwhile: outputs go to the one that leads then.
                lambda: self._sources() or sources,
                built,
                run.order.upload_token,
                within_s=UPLOAD_WITHIN_S,
                waits=lambda why: self._tell_stage(key, Stage.UPLOADING, why[:MAX_MESSAGE]),
                packed=packed,
                moving=moving,
            )
        return Succeeded(outputs=outputs)

    def _stage(self, key: LeaseKey, state: LeaseState) -> Stage:
        return Stage.QUEUED if self._machine.following.waits(key) else _STAGES.get(state, Stage.QUEUED)

    def _tell_stage(self, key: LeaseKey, stage: Stage, phase: str = "") -> None:
        change = StageChange(step=key[0], attempt=key[1], stage=stage, phase=phase, at=self._clock.now())
        self._outbox.stage(change, within_s=STAGE_WITHIN_S)
