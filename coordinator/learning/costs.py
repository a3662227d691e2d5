"""Costs of packages beside the time of their builds: fetching, sending, processors, outputs. Pure, as `learned`.

Each is the median of a package's newest builds, with a spread that outliers do not move. Where nothing is known of a
package itself, it is taken from its builds on another system, then from packages that ask for the same features, then
from all of its kind. What was not measured teaches nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from coordinator.learning.works import Key, TimedBuild, WorkClass, WorkKind, WorkSource, class_of

#: Packages that a kind, or those that ask for the same features, must have at least before they say anything.
SHARED_PACKAGES: Final = 5
#: Builds shorter than this say nothing of how many processors a package uses.
SHORTEST_S: Final = 1.0
#: Fetches of fewer bytes say nothing of how fast a worker fetches; nor do fewer fetches than so many.
LEAST_FETCHED_BYTES: Final = 1 << 20
FEWEST_FETCHES: Final = 3
#: Standard deviation of what is spread normally, for each unit of the median distance from its median.
BY_MEDIAN: Final = 1.4826


class Cost(StrEnum):
    """Costs that are learned, by the unit of each: seconds, bytes, or processors in use at one time."""

    FETCH_S = "fetch_s"
    UPLOAD_S = "upload_s"
    CPU_S = "cpu_s"
    CORES = "cores"
    OUTPUT_BYTES = "output_bytes"


class Usual(NamedTuple):
    """Median of the newest builds of a package, how far they lie from it, and how many they are."""

    middle: float
    spread: float
    builds: int


@dataclass(frozen=True, slots=True)
class ExpectedCost:
    """One cost of a build, and whence it is known; `builds` are those of the package that it was taken from."""

    cost: Cost
    value: float
    spread: float
    source: WorkSource
    builds: int = 0


#: As `WorkClass`; None for all of a kind, whatever they ask for.
_Class = tuple[WorkKind, tuple[str, ...] | None]


@dataclass(frozen=True, slots=True)
class LearnedCosts:
    """Costs of all packages that were built: at most one value of each cost for each key, some 150 bytes each."""

    of_package: Mapping[Key, Mapping[Cost, Usual]] = field(default_factory=dict)
    of_class: Mapping[_Class, Mapping[Cost, Usual]] = field(default_factory=dict)

    def expected(self, key: Key, alike: WorkClass, others: Sequence[str]) -> tuple[ExpectedCost, ...]:
        """Return what is known of each cost, in the order of `Cost`.

        Args:
            key: The package.
            alike: What it is taken for where nothing is known of it.
            others: Systems to look for it on instead, in this order.
        """
        found: list[ExpectedCost] = []
        for cost in Cost:
            usual, source = self._find(cost, key, alike, others)
            if usual is not None:
                found.append(ExpectedCost(cost, usual.middle, usual.spread, source, usual.builds))
        return tuple(found)

    def value(self, cost: Cost, key: Key, alike: WorkClass, others: Sequence[str]) -> float:
        """Return one cost, as `expected` has it; 0 where nothing is known of it."""
        usual, _ = self._find(cost, key, alike, others)
        return 0.0 if usual is None else usual.middle

    def _find(self, cost: Cost, key: Key, alike: WorkClass, others: Sequence[str]) -> tuple[Usual | None, WorkSource]:
        if (own := self.of_package.get(key, _NONE).get(cost)) is not None:
            return own, WorkSource.PACKAGE
        for other in others:
            if (found := self.of_package.get((key[0], other, key[2]), _NONE).get(cost)) is not None:
                return found, WorkSource.OTHER_SYSTEM
        kind, features = alike
        if features and (same := self.of_class.get((kind, features), _NONE).get(cost)) is not None:
            return same._replace(builds=0), WorkSource.FEATURES
        if (usual := self.of_class.get((kind, None), _NONE).get(cost)) is not None:
            return usual._replace(builds=0), WorkSource.KIND
        return None, WorkSource.NOTHING


_NONE: Final[Mapping[Cost, Usual]] = {}


def learn_costs(kept: Mapping[Key, Sequence[TimedBuild]]) -> LearnedCosts:
    """Return the costs of packages, of the newest builds of each."""
    of_package: dict[Key, dict[Cost, Usual]] = {}
    classes: dict[_Class, dict[Cost, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, builds in kept.items():
        found = {cost: usual for cost, read in _READ.items() if (usual := _usual(map(read, builds))) is not None}
        if not found:
            continue
        of_package[key] = found
        kind, features = class_of(key[2], builds[-1].features)
        for cost, usual in found.items():
            classes[kind, None][cost].append(usual.middle)
            if features:
                classes[kind, features][cost].append(usual.middle)
    of_class = {
        each: {cost: usual for cost, many in costs.items() if (usual := _usual(many)) is not None and _enough(usual)}
        for each, costs in classes.items()
    }
    return LearnedCosts(of_package, of_class)


def learn_rates(builds: Iterable[TimedBuild]) -> dict[str, int]:
    """Return the bytes a second that workers fetch their inputs with, unpacked; those with few fetches are absent."""
    rates: dict[str, list[float]] = defaultdict(list)
    for build in builds:
        if build.fetch_s and (build.fetched_bytes or 0) >= LEAST_FETCHED_BYTES:
            rates[build.worker].append((build.fetched_bytes or 0) / build.fetch_s)
    return {worker: max(1, int(middle_of(many))) for worker, many in rates.items() if len(many) >= FEWEST_FETCHES}


def middle_of(values: Iterable[float]) -> float:
    """Return the median; there must be a value. `statistics.median` takes thrice as long for few."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _usual(measured: Iterable[float | None]) -> Usual | None:
    values = [value for value in measured if value is not None]
    if not values:
        return None
    middle = middle_of(values)
    return Usual(middle, BY_MEDIAN * middle_of([abs(value - middle) for value in values]), len(values))


def _enough(usual: Usual) -> bool:
    return usual.builds >= SHARED_PACKAGES


def _cores(build: TimedBuild) -> float | None:
    if build.cpu_s is None or build.seconds < SHORTEST_S:
        return None
    return build.cpu_s / build.seconds


_READ: Final[Mapping[Cost, Callable[[TimedBuild], float | None]]] = {
    Cost.FETCH_S: lambda build: build.fetch_s,
    Cost.UPLOAD_S: lambda build: build.upload_s,
    Cost.CPU_S: lambda build: build.cpu_s,
    Cost.CORES: _cores,
    Cost.OUTPUT_BYTES: lambda build: build.output_bytes,
}
