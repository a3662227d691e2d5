"""Agent of one worker: answers the coordinator's calls, and owns what its leases work with. It knows no transport.

`lease_runner` walks the leases from order to report, `outbox` keeps what the coordinator must get, `health` watches
over the machine. Nothing that happens in one lease ends the agent.

All methods belong to one event loop: an adapter whose transport calls from several threads must hop to the agent's.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from infra.clock import Clock, SystemClock
from infra.daemon import ControlGroups, DaemonError
from infra.nix.errors import NixError
from infra.objects.errors import CacheError
from workers.agent import stopping
from workers.agent.admission import Machine, SlotOffer, next_offer
from workers.agent.build_cores import BuildCores
from workers.agent.canary import Canary
from workers.agent.daemon_pool import DaemonOpener, DaemonSession, SessionPool
from workers.agent.farm_sources import FarmSources, open_sources
from workers.agent.fetching_ahead import AheadFetcher
from workers.agent.health import HealthWatch
from workers.agent.input_guard import InputGuard
from workers.agent.inputs import TRANSFERS, InputFetcher
from workers.agent.isolation import addresses_of, isolate
from workers.agent.lease_machine import Trouble, WorkerMachine
from workers.agent.lease_runner import LeaseRunner
from workers.agent.orphans import MARK, sweep_earlier_agents
from workers.agent.outbox import Outbox
from workers.agent.output_reader import READERS, OutputError, OutputReader
from workers.agent.outputs import deliver
from workers.agent.settings import HostSpec, WorkerSettings, daemon_argv, inspect_host, load_settings, offer
from workers.errors import WorkerError
from workers.wire.grades import IsolationGrade
from workers.wire.messages import (
    LEASES,
    ORDERS,
    PROTOCOL_VERSION,
    CallName,
    FarmInfo,
    HeldLease,
    Hello,
    InputHint,
    Introduction,
    Vitals,
)

_log = logging.getLogger(__name__)

#: Greetings whose connections are kept for the leases that began under them.
KEPT_SOURCES = 3
#: Longest wait of one `events` call, whatever the caller requests, and most bytes of one answer.
MAX_WAIT_S = 30.0
MAX_ANSWER_BYTES = 8 * 1024 * 1024


class AgentError(WorkerError):
    """The agent cannot serve: it is closed, has another store directory, or cannot open the farm's cache."""


class StaleCoordinatorError(AgentError):
    """A call came from a coordinator that another one has taken over from."""


class _Sessions:
    """The agent's daemon sessions; the stack closes them."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._all: list[DaemonSession] = []

    def add(self, opener: DaemonOpener, count: int) -> list[DaemonSession]:
        """Return new sessions, which connect when they are used."""
        made = [DaemonSession(opener) for _ in range(count)]
        for line in made:
            self._stack.push_async_callback(line.close)
        self._all += made
        return made

    async def hang_up_idle(self) -> None:
        """End idle connections, because a connection keeps what was built over it from collection."""
        await asyncio.gather(*(line.hang_up() for line in self._all if not line.busy))


class Agent:
    """See the module's text. Use it as an async context, or `start` and `close` it.

    The calls of `CallName` take and give plain containers (`Message.dump()`); they raise `pydantic.ValidationError` for
    what is not a message, `AgentError` where the agent cannot serve. Adapters make them through `answer`.
    """

    def __init__(self, settings: WorkerSettings, *, host: HostSpec | None = None, clock: Clock | None = None) -> None:
        self._settings = settings
        self._host = host or inspect_host(settings.nix_daemon)
        self._offer = offer(settings, self._host)
        self._clock = clock or SystemClock()
        self._incarnation = secrets.token_hex(8)
        self._nix_version = ""
        #: Slots that are offered now.
        self._admitted = SlotOffer(self._offer.slots)
        #: What the machine lacks to isolate builds better (`workers.agent.isolation`).
        self._shortfall = ""
        #: What the latest greeting said of the isolation.
        self._isolation_sent: IsolationGrade | None = None
        self._sources: FarmSources | None = None
        #: Sources of earlier greetings, which leases in hand may still use; at most KEPT_SOURCES.
        self._old_sources: list[FarmSources] = []
        self._greeting = asyncio.Lock()
        self._owner: asyncio.Task[None] | None = None
        #: Done once `_serve` is ready for calls or has failed to be.
        self._ready: asyncio.Future[None] | None = None
        self._closing = asyncio.Event()
        # These exist between start() and close(); see _serve.
        self._outbox: Outbox
        self._slots: list[DaemonSession]
        self._builders: DaemonOpener
        self._health: HealthWatch
        self._guard: InputGuard
        self._inputs: InputFetcher
        self._ahead: AheadFetcher
        self._readers: SessionPool
        self._outputs: OutputReader
        self._leases: LeaseRunner

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
        """Sweep the outbox, reach the daemon, be ready. Raises `WorkerError` with one sentence; repeats are no-ops."""
        if self._ready is None:
            self._check_open()
            self._ready = asyncio.get_running_loop().create_future()
            self._owner = asyncio.create_task(self._serve(self._ready), name=f"agent {self.name}")
        await asyncio.shield(self._ready)

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise AgentError(f"worker {self.name} is closed")

    async def close(self) -> None:
        """Stop all builds, wait for their processes, release everything. Idempotent."""
        self._closing.set()
        owner, self._owner = self._owner, None
        if owner is None:
            return
        await asyncio.wait((owner,))
        if not owner.cancelled() and (error := owner.exception()) is not None:
            _log.error("agent %s ended badly", self.name, exc_info=error)

    async def answer(self, name: CallName, epoch: int, *arguments: Any) -> Any:
        """Answer a call of the coordinator that has `epoch` (`hello` brings its own).

        Raises `StaleCoordinatorError` where a later coordinator has been greeted; the look and the call are one turn of
        the agent's loop.
        """
        if name != "hello":
            self._check_epoch(epoch)
        return await getattr(self, name)(*arguments)

    async def hello(self, farm: dict[str, Any]) -> dict[str, Any]:
        """Introduce both sides; takes `FarmInfo`, gives `Hello`. Starts the agent where it is not started.

        Raises `AgentError` where this machine does not see the farm's object store or the coordinator speaks another
        protocol, `StaleCoordinatorError` where a later coordinator has greeted it.
        """
        if (spoken := Introduction.model_validate(farm).protocol) != PROTOCOL_VERSION:
            raise AgentError(
                f"the coordinator speaks protocol {spoken}, worker {self.name} {PROTOCOL_VERSION}; update the older one"
            )
        info = FarmInfo.model_validate(farm)
        self._check_epoch(info.epoch)
        await self.start()
        async with self._greeting:
            # Again: a later coordinator may have been greeted while this one waited.
            self._check_epoch(info.epoch)
            before = None if self._sources is None else self._sources.farm
            if before != info:
                await self._meet(info)
            if before is not None and info.epoch > before.epoch:
                # Logs that the one before had not yet moved to the object store are on its disk alone.
                self._outbox.send_again()
        self._isolation_sent = self._health.isolation
        return Hello(
            protocol=PROTOCOL_VERSION,
            worker=self.name,
            incarnation=self._incarnation,
            systems=self._offer.systems,
            emulated=self._offer.emulated,
            features=self._offer.features,
            mandatory_features=self._offer.mandatory_features,
            slots=self._offer.slots,
            capacity=self._leases.capacity(),
            unfit=self._health.unfit,
            isolation=self._isolation_sent,
            network=self._settings.network,
            memory_bytes=self._offer.memory_bytes,
            takes_cores=True,
            takes_successors=True,
            takes_hints=True,
            nix_version=self._nix_version,
            leases=tuple(HeldLease.model_validate(held) for held in self._leases.held()),
        ).dump()

    def _check_epoch(self, epoch: int) -> None:
        """Raise `StaleCoordinatorError` if a coordinator with a higher epoch has been greeted."""
        if self._sources is not None and epoch < self._sources.farm.epoch:
            raise StaleCoordinatorError(
                f"worker {self.name} follows a later coordinator (epoch {self._sources.farm.epoch}, not {epoch})"
            )

    async def start_many(self, orders: Sequence[dict[str, Any]]) -> None:
        """Take leases (`LeaseOrder`); those in hand or finished already are no-ops."""
        parsed = ORDERS.validate_python(tuple(orders))
        self._check_started()
        self._leases.start(parsed)

    async def events(self, ack: int, max_bytes: int, wait_s: float) -> dict[str, Any]:
        """Forget what is at or below `ack`, then answer with what there is, or comes within `wait_s`; gives `Batch`."""
        self._check_started()
        received_at = self._clock.now()
        self._leases.acknowledged(self._outbox.acknowledge(ack))
        await self._outbox.wait(min(wait_s, MAX_WAIT_S))
        self._check_started()
        last, events, ended = self._outbox.take(min(max_bytes, MAX_ANSWER_BYTES))
        isolation = self._health.isolation
        changed = isolation is not None and isolation is not self._isolation_sent
        vitals = self._health.vitals
        return {
            "incarnation": self._incarnation,
            "last": last,
            "events": events,
            "capacity": self._leases.capacity(ended),
            "leases": self._leases.held(ended),
            "draining": self._leases.draining,
            "unfit": self._health.unfit,
            "received_at": received_at,
            "answered_at": self._clock.now(),
            "transfers": self._leases.transfers(),
            "vitals": None if vitals is None else vitals.model_dump(),
            "offered": self._admitted.slots,
            "offers_less": self._admitted.because,
            **({"isolation": isolation.model_dump()} if isolation is not None and changed else {}),
            # A coordinator of before 2026-11-30 does not know the field.
            **({"collections": self._health.collections} if self._health.collections else {}),
        }

    async def cancel(self, leases: Sequence[dict[str, Any]]) -> None:
        """Stop builds (`Lease`), which are then reported as cancelled; unknown and finished leases are no-ops."""
        parsed = LEASES.validate_python(tuple(leases))
        self._check_started()
        self._leases.stop([(lease.step, lease.attempt) for lease in parsed], Trouble.CANCELLED)

    async def drain(self, on: bool) -> None:
        """While true, leases that have not begun are handed back and the capacity is 0."""
        self._check_started()
        self._leases.drain(on=on)
        # The coordinator shall not send more until its poll ends by itself.
        self._outbox.stop_waiting()

    async def fetch_ahead(self, hint: dict[str, Any]) -> None:
        """Fetch the inputs of a lease to come (`InputHint`) beside all else."""
        parsed = InputHint.model_validate(hint)
        self._check_started()
        if self._sources is not None and not self._leases.draining:
            self._ahead.fetch(parsed, self._sources)

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
                valid = sorted(await connection.query_valid_paths(paths))
            wanted = await self._outputs.infos(valid)
            outputs = await deliver(self._outputs, lambda: sources, wanted, token, within_s=0.0, waits=lambda _: None)
        except (OutputError, DaemonError) as error:
            raise AgentError(f"worker {self.name} cannot send what it has: {error}") from error
        return [output.dump() for output in outputs]

    # The owner

    async def _serve(self, ready: asyncio.Future[None]) -> None:
        """Own everything that lives as long as the agent."""
        try:
            async with AsyncExitStack() as stack:
                stack.callback(os.close, _lock(self._settings.state_dir))
                self._outbox = Outbox(self._settings.state_dir / "spool")
                stack.push_async_callback(self._outbox.close)
                stack.push_async_callback(self._close_sources)
                where = self._settings
                stopping.forget(where.state_dir)
                await asyncio.to_thread(sweep_earlier_agents, where.state_dir, where.physical_store)
                opener, builders = await self._openers()
                sessions = _Sessions(stack)

                async def let_go() -> bool:
                    if not await self._inputs.let_go(lambda: self._leases.idle):
                        return False
                    await sessions.hang_up_idle()
                    return True

                self._slots = sessions.add(builders, self._offer.slots)
                self._readers = SessionPool(sessions.add(opener, READERS))
                self._outputs = OutputReader(self._readers, where.physical_store)
                [roots], transfers = sessions.add(opener, 1), SessionPool(sessions.add(opener, TRANSFERS))
                [ahead], [trials] = sessions.add(opener, 1), sessions.add(builders, 1)
                canary = Canary(self._native(), where.store_dir, where.physical_store, where.state_dir)
                self._health = HealthWatch(
                    where,
                    trials,
                    canary,
                    self._clock,
                    lambda: self._leases.idle,
                    let_go,
                    self._outbox.stop_waiting,
                    lambda: self._guard.trouble,
                    self._shortfall,
                )
                self._guard = InputGuard(where.physical_store, self._readers, self._trusts_builds)
                async with self._slots[0].use() as connection:
                    self._nix_version = connection.nix_version
                async with asyncio.TaskGroup() as group:
                    self._inputs = InputFetcher(
                        roots, transfers, group, self._clock, moved=self._outbox.moved, added=self._guard.knows
                    )
                    self._ahead = AheadFetcher(self._inputs, ahead, group, self._clock, self._health.has_room)
                    self._leases = self._runner(group)
                    # Before the farm is met: it shall not give a worker that cannot build anything to build.
                    self._health.on_vitals = self._admit
                    await self._health.look()
                    watches = (
                        group.create_task(self._watch_stop(), name="watch for a stop request"),
                        group.create_task(self._health.run(), name="watch over health"),
                    )
                    ready.set_result(None)
                    await self._closing.wait()
                    for watch in watches:
                        watch.cancel()
                    self._leases.cancel_tasks()
                    self._outbox.stop_waiting()
                    self._inputs.stop()
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

    def _runner(self, group: asyncio.TaskGroup) -> LeaseRunner:
        return LeaseRunner(
            WorkerMachine(self._offer.slots, self._host.memory_bytes, self._settings.fetches),
            self._clock,
            self._outbox,
            group,
            slots=self._slots,
            outputs=self._outputs,
            inputs=self._inputs,
            ahead=self._ahead,
            guard=self._guard,
            health=self._health,
            sources=lambda: self._sources,
            store=self._settings.physical_store,
            build_cores=BuildCores(self._host.cores, self._offer.build_cores, fixed=self._settings.build_cores > 0),
            closing=self._closing,
        )

    def _admit(self, vitals: Vitals) -> None:
        """Offer as many slots as the machine's figures let the worker."""
        if not self._settings.yield_to_others:
            return
        slots, cores = self._offer.slots, self._leases.cores_of_a_build
        machine = Machine(slots, os.cpu_count() or 1, self._host.memory_bytes, cores)
        before, now = self._admitted, self._clock.now()
        self._admitted = next_offer(before, machine, vitals, self._leases.running, now)
        if self._admitted.slots != before.slots:
            why = f": {self._admitted.because}" if self._admitted.because else ""
            _log.info("worker %s offers %d of its %d slots%s", self.name, self._admitted.slots, slots, why)
            self._leases.offer(self._admitted.slots)
            # The farm shall not send more until its poll ends by itself.
            self._outbox.stop_waiting()

    async def _openers(self) -> tuple[DaemonOpener, DaemonOpener]:
        """Isolate the worker's builds; return what opens daemons that do not build, and those that do."""
        where = self._settings
        found = await asyncio.to_thread(isolate, where, self._host)
        self._offer, self._shortfall = offer(where, found.machine), found.shortfall
        variables = {MARK: str(where.state_dir), **found.environment}
        argv = daemon_argv(where, found.machine)
        groups = ControlGroups.found(str(where.state_dir))
        if groups is not None:
            # What ran in them has been ended: an earlier worker was killed.
            groups.sweep()
        self._builders = DaemonOpener(argv, where.store_dir, variables, found.building, groups)
        return DaemonOpener(argv, where.store_dir, variables, found.confinement), self._builders

    async def _watch_stop(self) -> None:
        """Stop in order when the program that started the worker asks for it (`workers.agent.stopping`)."""
        where = self._settings.state_dir
        deadline = await stopping.wait_for_request(where)
        self._leases.drain(on=True)
        self._outbox.stop_waiting()
        while not self._leases.idle:
            if self._clock.now() >= deadline:
                self._leases.stop_all(Trouble.STOPPING)
            await asyncio.sleep(stopping.LOOK_EVERY_S)
            deadline = min(deadline, stopping.requested(where) or deadline)
        stopping.answer(where)

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
        try:
            self._builders.deny(await asyncio.to_thread(addresses_of, urlsplit(farm.cache_url).hostname or ""))
            self._check_open()
        except BaseException:
            # Nothing else closes them: the greeting is cancelled, or the worker is closed already.
            await sources.close()
            raise
        if self._sources is not None:
            self._old_sources.append(self._sources)
        self._sources = sources
        if len(self._old_sources) > KEPT_SOURCES:
            await self._old_sources.pop(0).close()

    def _trusts_builds(self) -> bool:
        """Return whether builds are kept from the worker's store."""
        isolation = self._health.isolation
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
