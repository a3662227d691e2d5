"""Schedules to compare with: those of others, those that know all times, and what no schedule can beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count

from tests.benchmarks.makespan_work import Machine, Rebuild, Shape, Stores

#: Free slots by machine, the machines that may -> the one that takes the next step.
Choice = Callable[[list[int], list[int]], int]


def tails(shape: Shape, works: Sequence[float]) -> list[float]:
    """Return the longest work of a path from the start of each step to the end of a root."""
    found = [0.0] * len(works)
    for step in reversed(shape.order):
        found[step] = works[step] + max([found[above] for above in shape.dependents[step]], default=0.0)
    return found


def counts_above(shape: Shape) -> list[float]:
    """Return how many steps stand on each step, directly or not (reverse dependencies)."""
    # As bits of one number for each step: exact, and fast enough for some ten thousand.
    above = [0] * len(shape.names)
    for step in reversed(shape.order):
        for other in shape.dependents[step]:
            above[step] |= above[other] | 1 << other
    return [float(bits.bit_count()) for bits in above]


def bound(rebuild: Rebuild) -> float:
    """Return the seconds that no schedule beats: the critical path on the fastest machines, or work by capacity."""
    shape, works, fleet = rebuild.shape, rebuild.works, rebuild.fleet
    fastest = {machine.system: 0.0 for machine in fleet}
    capacity = dict.fromkeys(fastest, 0.0)
    for machine in fleet:
        fastest[machine.system] = max(fastest[machine.system], machine.speed)
        capacity[machine.system] += machine.speed * machine.slots
    work = dict.fromkeys(fastest, 0.0)
    for system, each in zip(shape.systems, works, strict=True):
        work[system] += each
    shortest = [each / fastest[system] for system, each in zip(shape.systems, works, strict=True)]
    return max(*tails(shape, shortest), *(work[system] / capacity[system] for system in work))


def list_schedule(rebuild: Rebuild, rank: Sequence[float], choose: Choice) -> float:
    """Return the makespan where the first ready step by `rank` begins wherever a slot is free: no machine waits."""
    shape, works, fleet = rebuild.shape, rebuild.works, rebuild.fleet
    left = [len(needs) for needs in shape.needs]
    ready: dict[str, list[tuple[float, int]]] = {machine.system: [] for machine in fleet}
    for step, open_ in enumerate(left):
        if not open_:
            ready[shape.systems[step]].append((-rank[step], step))
    for heap in ready.values():
        heapify(heap)
    free = [machine.slots for machine in fleet]
    of = {system: [index for index, machine in enumerate(fleet) if machine.system == system] for system in ready}
    stores = Stores(rebuild)
    running: list[tuple[float, int, int]] = []
    now = 0.0
    while True:
        for system, heap in ready.items():
            while heap and (able := [index for index in of[system] if free[index]]):
                _, step = heappop(heap)
                machine = choose(free, able)
                free[machine] -= 1
                ends = now + stores.fetch_s(step, machine) + works[step] / fleet[machine].speed
                stores.put(step, machine)
                heappush(running, (ends, step, machine))
        if not running:
            return now
        now, ended, machine = heappop(running)
        free[machine] += 1
        for above in shape.dependents[ended]:
            left[above] -= 1
            if not left[above]:
                heappush(ready[shape.systems[above]], (-rank[above], above))


def first_fit(_free: list[int], able: list[int]) -> int:
    """The first machine of the list."""
    return able[0]


def emptiest(free: list[int], able: list[int]) -> int:
    """The machine with most free slots."""
    return max(able, key=lambda index: free[index])


def fastest_of(fleet: Sequence[Machine]) -> Choice:
    """Return the choice of the fastest machine."""
    return lambda _free, able: max(able, key=lambda index: fleet[index].speed)


def heft(rebuild: Rebuild) -> float:
    """Return the makespan of HEFT (Topcuoglu, Hariri, Wu 2002): by upward rank, each where it ends earliest.

    Times are known exactly, and the schedule is made before anything begins. Slots take steps one after the other.
    """
    shape, works, fleet = rebuild.shape, rebuild.works, rebuild.fleet
    speeds: dict[str, list[float]] = {}
    for machine in fleet:
        speeds.setdefault(machine.system, []).extend([machine.speed] * machine.slots)
    mean = {system: sum(1 / speed for speed in many) / len(many) for system, many in speeds.items()}
    rank = tails(shape, [work * mean[system] for work, system in zip(works, shape.systems, strict=True)])
    place = {step: index for index, step in enumerate(shape.order)}
    free = [[0.0] * machine.slots for machine in fleet]
    stores = Stores(rebuild)
    ends = [0.0] * len(works)
    for step in sorted(place, key=lambda each: (-rank[each], place[each])):
        ready = max([ends[need] for need in shape.needs[step]], default=0.0)
        best = min(
            (max(free[index][0], ready) + stores.fetch_s(step, index) + works[step] / machine.speed, index)
            for index, machine in enumerate(fleet)
            if machine.system == shape.systems[step]
        )
        ends[step], chosen = best
        heapreplace(free[chosen], best[0])
        stores.put(step, chosen)
    return max(ends)


def unit(shape: Shape) -> list[float]:
    """Return the number of steps on the longest path to a root."""
    return tails(shape, [1.0] * len(shape.names))


def arrival(shape: Shape) -> list[float]:
    """Return ranks by the order in which steps stand in the graph."""
    turns = count()
    place = {step: next(turns) for step in shape.order}
    return [-float(place[step]) for step in range(len(shape.names))]
