"""Capacity that the farm's open work could use, for people, metrics and what adds machines.

Walking 100,000 steps takes some 30 ms, in slices; so they are walked only where something has moved since. What workers
offer is looked at again and again, for the metrics.
"""

from __future__ import annotations

import asyncio
from typing import Final

from coordinator.api.capacity_routes import CapacityClassView, CapacityView
from coordinator.readmodel.views import Views
from infra.clock import Clock
from infra.slices import in_slices
from scheduler.farm import Farm
from scheduler.workload import Workload, workloads

#: Seconds between two looks for the metrics, and after which slots are looked at anew where nothing has moved.
LOOK_EVERY_S: Final = 10.0
#: Classes that are remembered with nothing to do, so that their metrics fall to 0.
REMEMBERED: Final = 256

#: System, features and memory of a class.
ClassKey = tuple[str, tuple[str, ...], int]


class Capacity:
    """The capacity that the farm could use. `run` keeps `latest` true."""

    def __init__(self, views: Views, farm: Farm, clock: Clock) -> None:
        self._views = views
        self._farm = farm
        self._clock = clock
        #: The open work, and what had moved when its steps were walked.
        self._loads: tuple[Workload, ...] = ()
        self._moves: int | None = None
        self._looking = asyncio.Lock()
        self._met: dict[ClassKey, None] = {}
        #: As it was found last.
        self.latest = CapacityView(at=0.0)

    async def of(self) -> CapacityView:
        """Return it as of now, or of a moment ago."""
        async with self._looking:
            if self._moves != self._views.moves or self._clock.now() - self.latest.at >= LOOK_EVERY_S:
                await self._look()
            return self.latest

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            await self.of()
            await asyncio.sleep(LOOK_EVERY_S)

    def classes_met(self) -> list[CapacityClassView]:
        """Return the classes of `latest`, and those with nothing to do that had something."""
        present = {_key(each): each for each in self.latest.classes}
        return [present.get(key) or _nothing(key) for key in self._met]

    async def _look(self) -> None:
        moves, now = self._views.moves, self._clock.now()
        if moves != self._moves:
            self._loads = await in_slices(workloads(self._farm.state))
            self._moves = moves
        self.latest = CapacityView(at=now, classes=tuple([self._class(load) for load in self._loads]))
        for each in self.latest.classes:
            self._met.pop(_key(each), None)
            self._met[_key(each)] = None
        while len(self._met) > REMEMBERED:
            del self._met[next(iter(self._met))]

    def _class(self, load: Workload) -> CapacityClassView:
        wanted = load.requirements
        return CapacityClassView(
            system=wanted.system,
            features=tuple(wanted.features),
            memory_bytes=load.memory_bytes,
            ready=load.ready,
            running=load.running,
            waiting=load.waiting,
            slots=load.slots,
            slots_present=sum([self._views.workforce.slots(name) for name in self._farm.serving(wanted)]),
            hours=load.work_ms / 3_600_000,
        )


def _key(view: CapacityClassView) -> ClassKey:
    return view.system, view.features, view.memory_bytes


def _nothing(key: ClassKey) -> CapacityClassView:
    system, features, memory_bytes = key
    return CapacityClassView(
        system=system,
        features=features,
        memory_bytes=memory_bytes,
        ready=0,
        running=0,
        waiting=0,
        slots=0,
        slots_present=0,
        hours=0.0,
    )
