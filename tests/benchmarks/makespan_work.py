"""A mass rebuild to schedule: a real graph, works by package name, machines of several kinds, and bytes to move.

Works are heavy-tailed by package name and kind, and each build takes some 15 % more or less. They are seconds on a
machine of speed 1. What a step makes has a size by its name, and a machine that lacks an input fetches it first.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

from coordinator.learning.works import WorkKind, kind_of
from infra.nix.store_path import package_of

#: Standard deviation of the logarithm of a build's time around its package's.
NOISE = 0.15
#: Bytes a second that a machine fetches with, and most seconds of a work.
FETCH_RATE = 100e6
LONGEST_S = 6 * 3600.0
#: Median of the work in seconds and deviation of its logarithm, by kind.
WORKS = {WorkKind.FETCH: (2.0, 1.0), WorkKind.TRIVIAL: (0.5, 0.5), WorkKind.BUILD: (20.0, 1.9)}
SIZES = {WorkKind.FETCH: (300e3, 1.5), WorkKind.TRIVIAL: (2e3, 1.0), WorkKind.BUILD: (1e6, 1.8)}
ONE_SYSTEM = "x86_64-linux"
_Drawn = dict[WorkKind, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine: its system, how fast it is, and how many builds it runs at once."""

    name: str
    system: str
    speed: float
    slots: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A graph: for each step its name, kind, system, and the steps that it needs, which come before it in `order`."""

    names: tuple[str, ...]
    packages: tuple[str, ...]
    kinds: tuple[WorkKind, ...]
    systems: tuple[str, ...]
    needs: tuple[tuple[int, ...], ...]
    dependents: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]


def _fleet(system: str, *kinds: tuple[int, float, int]) -> list[Machine]:
    made: list[Machine] = []
    for count, speed, slots in kinds:
        made += [Machine(f"{system}-{len(made) + n}", system, speed, slots) for n in range(count)]
    return made


#: Fleets by name: four kinds of machine with 148 and 44 slots, and 123 slots in three systems.
FLEETS: dict[str, list[Machine]] = {
    "148": _fleet(ONE_SYSTEM, (4, 0.6, 8), (3, 0.8, 4), (10, 1.0, 8), (2, 1.6, 12)),
    "44": _fleet(ONE_SYSTEM, (2, 0.6, 8), (1, 0.8, 4), (2, 1.0, 8), (1, 1.6, 8)),
    "123": [
        *_fleet(ONE_SYSTEM, (2, 0.6, 8), (5, 1.0, 8), (2, 1.6, 11)),
        *_fleet("aarch64-linux", (2, 0.8, 8), (1, 1.2, 9)),
        *_fleet("aarch64-darwin", (3, 0.7, 4), (1, 1.4, 8)),
    ],
}


def read_shape(path: Path) -> Shape:
    """Read `{"fields": ["name", "system", "fixed_output", "inputs"], "nodes": [...]}`, zstd if it ends in .zst."""
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data).read()
    graph = json.loads(data)
    at = {name: index for index, name in enumerate(graph["fields"])}
    nodes = graph["nodes"]
    names = tuple(node[at["name"]] for node in nodes)
    needs = tuple(tuple(node[at["inputs"]]) for node in nodes)
    kinds = tuple(kind_of(node[at["name"]], fixed_output=bool(node[at["fixed_output"]])) for node in nodes)
    return shape_of(names, kinds, needs)


def layered_shape(seed: int = 1, layers: int = 40, width: int = 150) -> Shape:
    """A graph for those who have no file: layers of packages, each with three needs in the layer below."""
    chance = random.Random(seed)
    names: list[str] = []
    needs: list[tuple[int, ...]] = []
    for layer in range(layers):
        below = range((layer - 1) * width, layer * width)
        for number in range(width):
            names.append(f"package{chance.randrange(layers * width // 2)}-{layer}.{number}")
            needs.append(tuple(chance.sample(below, 3)) if layer else ())
    return shape_of(tuple(names), (WorkKind.BUILD,) * len(names), tuple(needs))


def shape_of(names: tuple[str, ...], kinds: tuple[WorkKind, ...], needs: tuple[tuple[int, ...], ...]) -> Shape:
    """Return the shape of one system, with its order and dependents."""
    dependents: list[list[int]] = [[] for _ in names]
    for step, below in enumerate(needs):
        for need in below:
            dependents[need].append(step)
    left = [len(below) for below in needs]
    order = [step for step, count in enumerate(left) if not count]
    for step in order:
        for above in dependents[step]:
            left[above] -= 1
            if not left[above]:
                order.append(above)
    packages = tuple(package_of(name) for name in names)
    systems = (ONE_SYSTEM,) * len(names)
    return Shape(names, packages, kinds, systems, needs, tuple(map(tuple, dependents)), tuple(order))


def spread_over(shape: Shape, fleet: Sequence[Machine], seed: int) -> Shape:
    """Return the shape with its steps spread over the systems of a fleet, by their slots and by name."""
    slots: dict[str, int] = {}
    for machine in fleet:
        slots[machine.system] = slots.get(machine.system, 0) + machine.slots
    if len(slots) == 1:
        return shape
    chance = random.Random(f"systems {seed}")
    chosen = {name: chance.choices(list(slots), list(slots.values()))[0] for name in sorted(set(shape.names))}
    systems = tuple(chosen[name] for name in shape.names)
    return Shape(shape.names, shape.packages, shape.kinds, systems, shape.needs, shape.dependents, shape.order)


def works_of(shape: Shape, seed: int) -> list[float]:
    """Return the work of each step in seconds, the same for steps of one package and kind."""
    return _by_package(shape, random.Random(f"works {seed}"), WORKS, LONGEST_S)


def sizes_of(shape: Shape, seed: int) -> list[float]:
    """Return the bytes of each step's result."""
    return _by_package(shape, random.Random(f"sizes {seed}"), SIZES, 4e9)


def _by_package(shape: Shape, chance: random.Random, of: _Drawn, most: float) -> list[float]:
    drawn: dict[tuple[str, WorkKind], float] = {}
    for key in zip(shape.packages, shape.kinds, strict=True):
        if key not in drawn:
            median, deviation = of[key[1]]
            drawn[key] = min(most, chance.lognormvariate(math.log(median), deviation))
    return [drawn[key] for key in zip(shape.packages, shape.kinds, strict=True)]


def build_of(works: Sequence[float], seed: int, rebuild: int) -> list[float]:
    """Return what each build of one rebuild takes at speed 1."""
    chance = random.Random(f"noise {seed} {rebuild}")
    return [work * chance.lognormvariate(0.0, NOISE) for work in works]


@dataclass(frozen=True, slots=True)
class Rebuild:
    """All that a schedule is made for: what each build takes at speed 1, bytes of results, and the machines."""

    shape: Shape
    works: Sequence[float]
    sizes: Sequence[float]
    fleet: Sequence[Machine]


class Stores:
    """What each machine has of the results."""

    def __init__(self, rebuild: Rebuild) -> None:
        self._shape = rebuild.shape
        self._sizes = rebuild.sizes
        self._has: list[set[int]] = [set() for _ in rebuild.fleet]

    def fetch_s(self, step: int, machine: int) -> float:
        """Return how long the machine would fetch inputs that it lacks."""
        has = self._has[machine]
        return sum([self._sizes[need] for need in self._shape.needs[step] if need not in has]) / FETCH_RATE

    def put(self, step: int, machine: int) -> None:
        """The machine builds the step: it has the inputs, and will have the result."""
        self._has[machine].update(self._shape.needs[step])
        self._has[machine].add(step)

    def leave(self, step: int, machine: int) -> None:
        """The build moves: the machine keeps the inputs and will not have the result."""
        self._has[machine].discard(step)
