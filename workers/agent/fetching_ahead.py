"""Inputs of a lease to come, fetched while the slots build: what the coordinator's hints ask for.

A hint is worth nothing but time, so it costs little: one is carried out at a time and one waits, the newest; its bytes
stand back where leases wait for theirs (`inputs`); it takes no room that the disk needs; what goes wrong with it is
logged at debug, and is no failure of anything. A lease whose inputs are being fetched ahead waits for the path that is
under way and fetches the rest itself.

Its paths are kept from collection by a connection of its own, for `KEPT_S` at most twice over: a step that goes
elsewhere must not fill this store.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

from infra.clock import Clock
from infra.daemon import DaemonError
from infra.nix.errors import NixError
from infra.nix.narinfo import NarInfo
from workers.agent.attempt_record import FetchLog, Moving
from workers.agent.daemon_pool import DaemonSession
from workers.agent.farm_sources import FarmSources
from workers.agent.inputs import InputFetcher
from workers.errors import WorkerError
from workers.wire.messages import InputHint

#: Bytes that are fetched together, or one larger path: as much as a lease may have to wait for.
TOGETHER_BYTES = 8 * 1024 * 1024
#: Seconds for which what was fetched is kept from collection after the last hint, and by one connection at most.
KEPT_S = 600.0
#: Steps of which it is remembered what was fetched for them.
REMEMBERED = 64

_log = logging.getLogger(__name__)


class AheadFetcher:
    """See the module's text. `has_room` says whether so many bytes may come; nothing is begun once it does not."""

    def __init__(
        self,
        inputs: InputFetcher,
        session: DaemonSession,
        group: asyncio.TaskGroup,
        clock: Clock,
        has_room: Callable[[int], bool],
    ) -> None:
        self._inputs = inputs
        self._session = session
        self._group = group
        self._clock = clock
        self._has_room = has_room
        self._waiting: tuple[InputHint, FarmSources] | None = None
        #: The step that is fetched for; "" once its lease has come.
        self._step = ""
        self._task: asyncio.Task[None] | None = None
        #: What lets the paths go in the end; one of both, or none.
        self._timer: asyncio.TimerHandle | None = None
        self._letting_go: asyncio.Task[None] | None = None
        #: When the connection began to keep paths; 0: it keeps none.
        self._kept_since = 0.0
        #: Bytes that came ahead of the lease, by step, the latest last.
        self._brought: OrderedDict[str, int] = OrderedDict()

    @property
    def busy(self) -> bool:
        """True while a hint is carried out."""
        return self._task is not None and not self._task.done()

    @property
    def keeps(self) -> bool:
        """True while paths that came ahead are kept from collection."""
        return bool(self._kept_since)

    def fetch(self, hint: InputHint, sources: FarmSources) -> None:
        """Take a hint; one that waits is dropped for it."""
        self._waiting = hint, sources
        if not self.busy:
            self._task = self._group.create_task(self._run(), name="fetch ahead")

    def taken(self, step: str) -> int:
        """Return the bytes that came for a step whose lease has come, and leave the rest to that."""
        if self._step == step:
            self._step = ""
        if self._waiting is not None and self._waiting[0].step == step:
            self._waiting = None
        return self._brought.pop(step, 0)

    def drop(self) -> None:
        """Begin nothing further of what hints asked for so far."""
        self._waiting, self._step = None, ""

    def stop(self) -> None:
        """End all work, because the agent is closing."""
        self.drop()
        self._cancel_timer()
        for task in (self._task, self._letting_go):
            if task is not None:
                task.cancel()

    async def _run(self) -> None:
        self._cancel_timer()
        while self._waiting is not None:
            (hint, sources), self._waiting = self._waiting, None
            self._step = hint.step
            try:
                await self._fetch(hint, sources)
            except (WorkerError, DaemonError, NixError) as error:
                _log.debug("inputs of %s do not come ahead of its lease: %s", hint.step, error)
            except Exception:  # noqa: BLE001 - the lease will show it, if one comes
                _log.debug("inputs of %s do not come ahead of its lease", hint.step, exc_info=True)
        self._step = ""
        self._timer = asyncio.get_running_loop().call_later(KEPT_S, self._let_go)

    async def _fetch(self, hint: InputHint, sources: FarmSources) -> None:
        if self._kept_since and self._clock.now() - self._kept_since > KEPT_S:
            await self._hang_up()
        self._kept_since = self._kept_since or self._clock.now()
        missing = await self._lacking(hint.inputs)
        if not missing:
            return
        closure = await sources.narinfos(missing)
        missing = await self._lacking(info.store_path for info in closure)
        infos = [info for info in closure if info.store_path in missing]
        left = sum(info.path.nar_size for info in infos)
        for batch in _batches(infos):
            if self._waiting is not None or self._step != hint.step or not self._has_room(left):
                return
            size = sum(info.path.nar_size for info in batch)
            log = FetchLog(Moving(sources.kind, size))
            error = await self._inputs.bring(batch, sources, log, self._session)
            if error is not None:
                raise error
            left -= size
            if self._step == hint.step and log.moving.done_bytes:
                self._note(hint.step, log.moving.done_bytes)

    async def _lacking(self, paths: Iterable[str]) -> set[str]:
        """Keep paths from collection, then return those that are not valid."""
        wanted = set(paths)
        async with self._session.use() as connection:
            await self._session.keep(wanted)
            return wanted - await connection.query_valid_paths(wanted)

    def _note(self, step: str, bytes_: int) -> None:
        self._brought[step] = self._brought.pop(step, 0) + bytes_
        if len(self._brought) > REMEMBERED:
            self._brought.popitem(last=False)

    def _let_go(self) -> None:
        if not self.busy:
            self._letting_go = self._group.create_task(self._hang_up(), name="let go of inputs that came ahead")

    async def _hang_up(self) -> None:
        self._kept_since = 0.0
        await self._session.hang_up()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _batches(infos: Sequence[NarInfo]) -> Iterator[list[NarInfo]]:
    """Split a closure into what is fetched together, in its order."""
    batch: list[NarInfo] = []
    size = 0
    for info in infos:
        if batch and size + info.path.nar_size > TOGETHER_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(info)
        size += info.path.nar_size
    if batch:
        yield batch
