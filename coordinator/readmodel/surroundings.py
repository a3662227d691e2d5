"""Surroundings of a step in the graph: what it needs and what stands on it, two levels each way, bounded.

The core keeps which wanted, unfinished steps stand on a step. Those that are finished are found by a look at the needs
of all steps, with pauses, because edges in the other direction would cost memory for each step of the farm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Final

from scheduler.farm import Farm
from scheduler.model import StepKey
from scheduler.pauses import PAUSE, Pause
from scheduler.records import Step

#: Steps of one level that are named.
LEVEL: Final = 8
#: Steps looked at between two pauses.
LOOKED_AT: Final = 2_000


@dataclass(frozen=True, slots=True)
class Level:
    """Steps at one distance: the first few, and how many there are. Of the second level, those at the first few."""

    steps: tuple[StepKey, ...] = ()
    total: int = 0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """A step and what is around it; `edges` are (need, the step that needs it), among the steps that are named."""

    step: StepKey
    needs: Level = Level()
    needs_of_needs: Level = Level()
    dependents: Level = Level()
    dependents_of_dependents: Level = Level()
    edges: tuple[tuple[StepKey, StepKey], ...] = ()
    #: Wanted, unfinished steps that stand on it.
    waiting: Level = Level()


def surrounding(farm: Farm, key: StepKey) -> Generator[Pause, None, Surroundings]:
    """Return the surroundings of a step, with pauses; empty for one that is not known."""
    steps = farm.state.steps
    step = steps.get(key)
    if step is None:
        return Surroundings(key)
    needs = _needs(step)
    first = _level(needs)
    second = _level(chain.from_iterable(_needs(steps[each]) for each in first.steps if each in steps))
    yield PAUSE
    waiting = Level(tuple([each.key for each in islice(step.dependents, LEVEL)]), len(step.dependents))
    above = _level((yield from _standing_on(farm, {key})) if step.refcount else ())
    higher = _level((yield from _standing_on(farm, set(above.steps))) if above.steps else ())
    named = [key, *first.steps, *second.steps, *above.steps, *higher.steps]
    return Surroundings(key, first, second, above, higher, tuple(_edges(farm, named)), waiting)


def way_down(
    farm: Farm, roots: Iterable[StepKey], key: StepKey, most_edges: int
) -> Generator[Pause, None, tuple[StepKey, ...]]:
    """Return a shortest way from one of the roots down to a step, both included, with pauses.

    It is empty where there is none, or where more than `most_edges` must be looked at. Steps that are done have it too.
    """
    steps = farm.state.steps
    above: dict[StepKey, StepKey | None] = dict.fromkeys(roots)
    waiting = deque(above)
    edges = paused_at = 0
    while waiting and key not in above and edges < most_edges:
        each = waiting.popleft()
        step = steps.get(each)
        needs = _needs(step) if step is not None else ()
        edges += len(needs) + 1
        for need in needs:
            if need not in above:
                above[need] = each
                waiting.append(need)
        if edges - paused_at >= LOOKED_AT:
            paused_at = edges
            yield PAUSE
    way: list[StepKey] = []
    at = key if key in above else None
    while at is not None:
        way.append(at)
        at = above[at]
    return tuple(reversed(way))


def _standing_on(farm: Farm, wanted: set[StepKey]) -> Generator[Pause, None, list[StepKey]]:
    """Return the steps whose recipe in use needs one of `wanted`, in the order in which they became known."""
    found = []
    # A copy: steps may come and go at a pause.
    for count, step in enumerate(list(farm.state.steps.values()), 1):
        if not wanted.isdisjoint(_needs(step)):
            found.append(step.key)
        if not count % LOOKED_AT:
            yield PAUSE
    return found


def _needs(step: Step) -> tuple[StepKey, ...]:
    return step.recipes[step.active].needs if step.recipes else ()


def _level(keys: Iterable[StepKey]) -> Level:
    distinct = tuple(dict.fromkeys(keys))
    return Level(distinct[:LEVEL], len(distinct))


def _edges(farm: Farm, named: list[StepKey]) -> list[tuple[StepKey, StepKey]]:
    """Return the edges among steps; a step may have as many needs as the farm has steps."""
    places = {key: place for place, key in enumerate(named)}
    steps = farm.state.steps
    return [
        (need, key)
        for key in places
        if key in steps
        for need in sorted(places.keys() & _needs(steps[key]), key=places.__getitem__)
    ]
