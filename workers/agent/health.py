"""Health of a worker: room on its disks, and trial builds that go the way of the real ones.

A worker that is not fit reports why in every answer (`unfit` on the wire) and the farm gives it nothing new; what runs
goes on. It is fit again by itself: a disk once there is room, a trial once it succeeds. Trials run while no lease is
in hand, but for a cheap one soon after a build ended in a way that the machine may be to blame for. There are two: a
cheap one that only shows that Nix builds, and the canary (`workers.agent.canary`), which measures how builds are
isolated: at the start, every few hours, and after doubt. What follows from its grade is the coordinator's decision.

Where the worker may, it makes the room itself, by letting its store collect garbage: all it has is in the farm's cache.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from infra.clock import Clock
from infra.daemon import BasicDerivation, BasicOutput, BuildEvent, DaemonConnection, DaemonError, GcAction
from infra.nix import base32
from workers.agent.canary import Canary, CanaryError
from workers.agent.daemon_pool import DaemonSession, DaemonUnreachableError
from workers.agent.lease_machine import judge_status
from workers.agent.settings import WorkerSettings
from workers.agent.vitals import read_vitals
from workers.wire.grades import IsolationGrade, grade
from workers.wire.messages import MAX_SENTENCE, Vitals

_log = logging.getLogger(__name__)

#: Seconds between two looks at the disks; a builder fills gigabytes in a few. So many times as long while the worker is
#: fit and has nothing to do.
LOOK_EVERY_S = 1.0
LONGER_AT_REST = 5
#: Seconds after which a trial build that failed is tried again, and within which one must end.
TRIAL_AGAIN_S = 15.0
TRIAL_WITHIN_S = 60.0
#: A disk that ran low counts as low until this much more than the floor is free, so that the verdict does not flap.
RECOVERED = 1.25
#: A build that fails after a disk had less room than this is not judged by its failure. Nix itself looks for 8 MiB
#: where the build ended; a builder that cleans up after itself is caught only here.
FULL_BYTES = 32 * 1024 * 1024
#: Part of a file system's inodes that must be free.
FREE_INODES = 0.01
#: Seconds between two collections, and within which one must end.
COLLECT_AGAIN_S = 60.0
COLLECT_WITHIN_S = 1800.0
#: How much is to be free after a collection, and beside what is fetched ahead of leases, in floors.
COLLECT_TO = 3


@dataclass(frozen=True, slots=True)
class Room:
    """Free space of one file system."""

    place: Path
    #: `st_dev`: places on one file system have one room.
    device: int
    free_bytes: int
    #: Part of the inodes that is free; 1.0 where the file system does not count them.
    free_inodes: float


def look_at(places: Iterable[Path]) -> list[Room]:
    """Read the room of each file system that the places lie on; one that cannot be read is left out."""
    rooms: dict[int, Room] = {}
    for place in places:
        try:
            device = place.stat().st_dev
            if device not in rooms:
                status = os.statvfs(place)
                inodes = status.f_favail / status.f_files if status.f_files else 1.0
                rooms[device] = Room(place, device, status.f_bavail * status.f_frsize, inodes)
        except OSError:
            continue
    return list(rooms.values())


def too_little(rooms: Iterable[Room], floor_bytes: int) -> tuple[Room, str] | None:
    """The first room that is below the floor and what is wrong with it in one sentence, None where all have enough."""
    for room in rooms:
        if room.free_bytes < floor_bytes:
            wanted = f"less than {floor_bytes >> 20} MiB are free on the disk of {room.place}"
        elif room.free_inodes < FREE_INODES:
            wanted = f"less than {FREE_INODES:.0%} of the inodes are free on the disk of {room.place}"
        else:
            continue
        return room, f"{wanted}; make room, or lower the worker's min_free_mb"
    return None


class HealthWatch:
    """Looks after one worker. `look` once at the start, then `run` for as long as the worker lives."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        settings: WorkerSettings,
        session: DaemonSession,
        canary: Canary,
        clock: Clock,
        idle: Callable[[], bool],
        let_go: Callable[[], Awaitable[bool]],
        changed: Callable[[], None],
        broken_store: Callable[[], str],
        shortfall: str = "",
    ) -> None:
        """Look at nothing yet.

        `idle`: no lease is in hand. `let_go` drops what keeps the store's paths from collection, False where leases
        need it. `changed` is called when `unfit` or `isolation` has changed. `broken_store` says what is wrong with the
        store's paths (`workers.agent.input_guard`), nothing while all is well.
        `shortfall`: what the machine lacks to isolate builds better.
        """
        self._floor_bytes = settings.min_free_mb << 20
        self._trial_every_s = settings.trial_every_s
        self._canary_every_s = settings.canary_every_s
        self._may_collect = settings.collects_garbage
        self._store_dir = settings.store_dir
        self._store = settings.physical_store
        # Where Nix unpacks and builds, where results lie, where logs and reports wait.
        build_dir = Path(os.environ.get("TMPDIR") or "/tmp")  # noqa: S108 - read, never written
        self._places = (self._store, build_dir, settings.state_dir)
        self._name = settings.name
        self._session = session
        self._canary = canary
        self._clock = clock
        self._idle = idle
        self._let_go = let_go
        self._changed = changed
        self._broken_store = broken_store
        self._shortfall = shortfall
        #: What was wrong with the store at the last look, until a canary was well after it.
        self._hurt = ""
        #: The room that is too little at the moment, and its message for as long as it has not recovered.
        self._low_room: Room | None = None
        self._low = ""
        self._broken = ""
        #: How builds are isolated, once a canary has measured it; the same object for as long as the grade is the same.
        self.isolation: IsolationGrade | None = None
        self._next_trial = self._next_canary = self._next_collection = 0.0
        #: The machine's figures as of the last look; None before the first. `on_vitals` gets them at each look.
        self.vitals: Vitals | None = None
        #: How often the store has begun to delete garbage.
        self.collections = 0
        self.on_vitals: Callable[[Vitals], None] = lambda _: None
        self._full_at = 0.0
        self._doubted = False
        self._next_doubt = 0.0
        #: Set once there is something to do.
        self._work_came = asyncio.Event()

    @property
    def unfit(self) -> str:
        """Reason that the worker should get no leases, one sentence; empty while it is fit."""
        return (self._broken_store() or self._hurt or self._low or self._broken)[:MAX_SENTENCE]

    def has_room(self, bytes_: int) -> bool:
        """Return whether the worker is fit and so many bytes more would leave what a collection is to free."""
        free = None if self.vitals is None else self.vitals.disk_free_bytes
        return not self.unfit and (free is None or free - bytes_ >= COLLECT_TO * self._floor_bytes)

    def was_full_since(self, at: float) -> bool:
        """Return whether a disk was all but full at some look since then (seconds of the clock)."""
        return self._full_at >= at

    def hurt(self) -> None:
        """The store was found broken: the worker is unfit until it is mended and a canary was well after that."""
        self._hurt = self._broken_store()
        self._next_canary = 0.0
        self._work_came.set()
        self._changed()

    def doubt(self) -> None:
        """A build ended in a way that a broken machine explains: try one now, and the canary once no lease is in hand.

        Not only then: the farm gives a machine that fails everything at once new leases without end.
        """
        self._next_canary = 0.0
        self._doubted = True

    def work_came(self) -> None:
        """A lease is in hand: look as often as one needs."""
        self._work_came.set()

    async def run(self) -> None:
        """Look again and again, and make room where it is wanted, until cancelled."""
        while True:
            await self._rest()
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look()
            low, due = self._low_room, self._clock.now() >= self._next_collection
            if low is not None and self._may_collect and due and self._idle():
                await self._collect(low)

    async def _rest(self) -> None:
        """Wait for something to do, as long as a worker at rest is not looked at."""
        if self.unfit or not self._idle():
            return
        self._work_came.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout((LONGER_AT_REST - 1) * LOOK_EVERY_S):
                await self._work_came.wait()

    async def look(self) -> None:
        """Look at the disks, and try a build where that is due."""
        before, isolation = self.unfit, self.isolation
        await self._look_at_disks()
        # A trial on a full disk would only show again that it is full.
        now = self._clock.now()
        if not self._low and self._doubted and not self._idle():
            if now >= self._next_doubt:
                self._doubted, self._next_doubt = False, now + TRIAL_AGAIN_S
                await self._try(self._trial)
        elif not self._low and self._idle():
            self._doubted = False
            if self._clock.now() >= self._next_canary:
                await self._try(self._measure)
            elif self._trial_every_s and self._clock.now() >= self._next_trial:
                await self._try(self._trial)
        if self.isolation is not isolation:
            self._tell_isolation()
            self._changed()
        if self.unfit != before:
            if self.unfit:
                _log.warning("worker %s takes no work: %s", self._name, self.unfit)
            else:
                _log.info("worker %s takes work again", self._name)
            self._changed()

    async def _look_at_disks(self) -> None:
        rooms, vitals = await asyncio.to_thread(self._read)
        self.vitals = vitals
        self.on_vitals(vitals)
        if too_little(rooms, FULL_BYTES) is not None:
            self._full_at = self._clock.now()
        if not self._floor_bytes:
            return
        low = too_little(rooms, self._floor_bytes)
        self._low_room = low[0] if low is not None else None
        if low is not None:
            # The sentence of the moment at which it ran low: another at every look would be news every time.
            self._low = self._low or low[1]
        elif self._low and too_little(rooms, int(self._floor_bytes * RECOVERED)) is None:
            self._low = ""

    def _read(self) -> tuple[list[Room], Vitals]:
        rooms = look_at(self._places)
        return rooms, read_vitals(room.free_bytes for room in rooms)

    async def _collect(self, low: Room) -> None:
        """Let the store delete garbage until there is room again, where it lies on the disk that ran low."""
        rooms = await asyncio.to_thread(look_at, [self._store])
        if not rooms or rooms[0].device != low.device or not await self._let_go():
            return
        self._next_collection = self._clock.now() + COLLECT_AGAIN_S
        wanted = max(0, self._floor_bytes * COLLECT_TO - low.free_bytes)
        self.collections += 1
        try:
            async with asyncio.timeout(COLLECT_WITHIN_S), self._session.use() as connection:
                done = await connection.collect_garbage(GcAction.DELETE_DEAD, max_freed_bytes=wanted)
        except TimeoutError:
            _log.warning("worker %s did not collect garbage within %.0f s", self._name, COLLECT_WITHIN_S)
        except (DaemonError, DaemonUnreachableError) as error:
            _log.warning("worker %s could not collect garbage: %s", self._name, error)
        else:
            _log.info("worker %s deleted %d paths, %d bytes", self._name, len(done.paths), done.freed_bytes)

    async def _try(self, trial: Callable[[DaemonConnection], Awaitable[str]]) -> None:
        """Do a trial, and decide what follows for the worker and when the next one is due."""
        try:
            async with asyncio.timeout(TRIAL_WITHIN_S), self._session.use() as connection:
                problem = await trial(connection)
        except TimeoutError:
            problem = f"it did not end within {TRIAL_WITHIN_S:.0f} s"
        except (CanaryError, DaemonError, DaemonUnreachableError) as error:
            problem = str(error)
        self._broken = f"a trial build fails: {problem}" if problem else ""
        now = self._clock.now()
        if problem:
            # What is mended (a nix.conf, a daemon) shows on new connections only, those of the slots too.
            await self._let_go()
            # It may come back as another machine.
            self._next_canary = now + TRIAL_AGAIN_S
        self._next_trial = now + self._trial_every_s

    async def _measure(self, connection: DaemonConnection) -> str:
        """Build the canary and grade what it reports; raises where that fails."""
        found = grade(await self._canary.measure(connection), self._shortfall)
        if found != self.isolation:
            self.isolation = found
        self._hurt = self._broken_store()
        self._next_canary = self._clock.now() + (self._canary_every_s or math.inf)
        return ""

    async def _trial(self, connection: DaemonConnection) -> str:
        """Build something new; returns what went wrong, empty where nothing did."""
        result = await connection.build_derivation(*trial_derivation(self._store_dir), _ignore)
        ending = judge_status(result.status, result.error_msg.strip())
        return "" if ending is None else ending.message

    def _tell_isolation(self) -> None:
        if self.isolation is not None:
            level, why = self.isolation.level, self.isolation.summary
            _log.info("worker %s isolates its builds as class %s%s", self._name, level, f": {why}" if why else "")


def trial_derivation(store_dir: str) -> tuple[str, BasicDerivation]:
    """A build that was never done before, as (path of its .drv, derivation).

    Its builder is one of Nix's own, which needs neither a shell nor inputs and is no fixed output: it is sandboxed like
    any other (libstore's `builtin:buildenv`, which makes a directory with one link).
    """
    # Not a hash of anything: the daemon believes a trusted client's input-addressed paths.
    name = f"{base32.encode(secrets.token_bytes(20))}-drover-trial"
    out = f"{store_dir}/{name}"
    env = {"derivations": "", "manifest": "/drover", "name": "drover-trial", "out": out, "system": "builtin"}
    return f"{out}.drv", BasicDerivation(
        outputs=(BasicOutput("out", out),),
        inputs=(),
        system="builtin",
        builder=b"builtin:buildenv",
        args=(),
        env=tuple(sorted((key.encode(), value.encode()) for key, value in env.items())),
    )


def _ignore(_event: BuildEvent) -> None:
    """The log of a trial is of no use: the verdict has the end of it."""
