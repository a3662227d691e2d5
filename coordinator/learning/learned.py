"""Works of packages and speeds of workers, from builds that ended well. Pure: the same builds teach the same.

A build of a package on a worker takes work / speed. Both are unknown, and their product is measured: the logarithms of
times are fitted by median polish (Tukey, Exploratory Data Analysis, 1977, chapter 11), which outliers do not move. The
usual worker has speed 1. Only packages that several workers have built say anything of speeds; a worker with few such
builds is taken for a usual one in part.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from coordinator.learning.costs import Cost, ExpectedCost, LearnedCosts, learn_costs, learn_rates
from coordinator.learning.works import Key, TimedBuild, WorkClass, WorkKind, WorkSource, class_of
from scheduler.model import UNKNOWN_WORK_MS

#: Builds of one package and system that are looked at, the newest.
NEWEST: Final = 9
#: Rounds of the polish. Each halves what is wrong yet: two workers that only have each other to compare with would swap
#: their errors for ever if a round took in all of it.
ROUNDS: Final = 6
#: Builds shorter than this say nothing of a worker's speed: starting them takes most of their time.
SHORTEST_S: Final = 1.0
#: No build is taken to last longer, whatever a worker sends: a sum over many steps is a small integer then.
LONGEST_S: Final = 30 * 86400.0
#: Comparisons that a worker's speed is half believed with, and those below which it is not believed at all.
HALF_BELIEVED: Final = 4
FEWEST: Final = 3
#: No worker is taken for faster or slower than this.
FASTEST: Final = 16.0
#: Packages that systems are compared by at least, to carry a work over from one to the other.
SHARED_PACKAGES: Final = 5
#: Work of what is fetched and of what is copied or patched, where nothing of that kind was built yet.
FETCH_MS: Final = 5_000
#: Builds of one package that its spread is taken from at least; the spread where no package has as many, and the
#: least one: standard deviations of the logarithm of times. Half of all lie within `HALF_WITHIN` of these.
SPREAD_FROM: Final = 4
USUAL_SPREAD: Final = 0.25
LEAST_SPREAD: Final = 0.05
HALF_WITHIN: Final = 0.6745
#: Part of all packages than which one that is not known may take longer, at least.
SURPRISE_PART: Final = 0.75
TRIVIAL_MS: Final = 1_000
#: What takes so many times as long as its package, or as short, is remembered by itself.
OWN_TIME: Final = 1.25


#: Feature that the authors of large packages ask for, and how much longer than the usual such a package takes.
LARGE_FEATURE: Final = "big-parallel"
LARGE: Final = 10


@dataclass(frozen=True, slots=True)
class ExpectedWork:
    """Milliseconds on a worker of speed 1, and whence that is known. `builds` are those that it was taken from."""

    work_ms: int
    source: WorkSource
    builds: int = 0


@dataclass(frozen=True, slots=True)
class Learned:
    """All that was learned."""

    #: Package, system and kind -> seconds at speed 1, and of how many builds.
    works: Mapping[Key, tuple[float, int]] = field(default_factory=dict)
    #: (worker, system) -> speed.
    speeds: Mapping[tuple[str, str], float] = field(default_factory=dict)
    #: (system, another) -> how often as long a package takes on the first.
    ratios: Mapping[tuple[str, str], float] = field(default_factory=dict)
    #: WorkKind -> usual seconds at speed 1, and the same of packages that ask for certain features.
    kinds: Mapping[WorkKind, float] = field(default_factory=dict)
    featured: Mapping[WorkClass, float] = field(default_factory=dict)
    #: Package, system and kind -> memory that a build of it should take at most.
    memories: Mapping[Key, int] = field(default_factory=dict)
    #: How far builds of one package lie apart, of those with enough builds, and of the others.
    spreads: Mapping[Key, float] = field(default_factory=dict)
    usual_spread: float = USUAL_SPREAD
    #: Seconds at speed 1 of all packages that are built, the shortest first.
    built: tuple[float, ...] = ()
    #: Step -> seconds at speed 1, and of how many builds, of those that take another time than their package.
    exact: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    costs: LearnedCosts = field(default_factory=LearnedCosts)
    #: Worker -> bytes of inputs a second.
    fetch_rates: Mapping[str, int] = field(default_factory=dict)

    def expected(
        self, package: str, system: str, kind: WorkKind, features: Sequence[str] = (), step: str = ""
    ) -> ExpectedWork:
        """Return the expected work of a step: of itself, of its package, of that on another system, or of its kind.

        Features tell kinds apart where nothing is known of the package: what is fetched needs the network, whatever its
        name, packages that ask for the same are alike, and what asks for `big-parallel` is large by its authors' word.
        """
        own = self.exact.get(step)
        if own is not None:
            return ExpectedWork(_ms(own[0]), WorkSource.DERIVATION, own[1])
        found = self._known(package, system, kind)
        if found is not None:
            return found
        alike = class_of(kind, features)
        if alike in self.featured:
            return ExpectedWork(_ms(self.featured[alike]), WorkSource.FEATURES)
        usual = self._usual(alike[0])
        return replace(usual, work_ms=usual.work_ms * LARGE) if LARGE_FEATURE in features else usual

    def memory_bytes(self, package: str, system: str, kind: WorkKind) -> int:
        """Return the memory that a build of a package should take at most; 0: not known."""
        return self.memories.get((package, system, kind), 0)

    def expected_costs(
        self, package: str, system: str, kind: WorkKind, features: Sequence[str] = ()
    ) -> tuple[ExpectedCost, ...]:
        """Return what is known of the costs of a build beside its time, in the order of `Cost`."""
        return self.costs.expected((package, system, kind), class_of(kind, features), self._others(system))

    def cost(self, cost: Cost, package: str, system: str, kind: WorkKind, features: Sequence[str] = ()) -> float:
        """Return one cost of a build; 0 where nothing is known of it."""
        return self.costs.value(cost, (package, system, kind), class_of(kind, features), self._others(system))

    def _others(self, system: str) -> list[str]:
        """Return the systems that a package is looked for on instead, those with most packages in common first."""
        return [other for here, other in self.ratios if here == system]

    def _known(self, package: str, system: str, kind: WorkKind) -> ExpectedWork | None:
        known = self.works.get((package, system, kind))
        if known is not None:
            return ExpectedWork(_ms(known[0]), WorkSource.PACKAGE, known[1])
        for (here, other), ratio in self.ratios.items():
            elsewhere = self.works.get((package, other, kind)) if here == system else None
            if elsewhere is not None:
                return ExpectedWork(_ms(elsewhere[0] * ratio), WorkSource.OTHER_SYSTEM, elsewhere[1])
        return None

    def _usual(self, kind: WorkKind) -> ExpectedWork:
        if kind in self.kinds:
            return ExpectedWork(_ms(self.kinds[kind]), WorkSource.KIND)
        usual = {WorkKind.FETCH: FETCH_MS, WorkKind.TRIVIAL: TRIVIAL_MS, WorkKind.BUILD: UNKNOWN_WORK_MS}[kind]
        return ExpectedWork(usual, WorkSource.NOTHING)

    def between(self, package: str, system: str, kind: WorkKind) -> tuple[float, float] | None:
        """Return the seconds at speed 1 between which half of a package's builds take; None where none is known."""
        found = self.expected(package, system, kind)
        if found.source not in (WorkSource.PACKAGE, WorkSource.OTHER_SYSTEM):
            return None
        factor = math.exp(HALF_WITHIN * self.spreads.get((package, system, kind), self.usual_spread))
        return found.work_ms / 1000 / factor, found.work_ms / 1000 * factor

    def longest_of(self, count: int) -> float:
        """Return the seconds that the longest of so many unknown packages should take, by those that are known."""
        if not self.built or not count:
            return 0.0
        part = max(SURPRISE_PART, 1 - 1 / count)
        return self.built[min(len(self.built) - 1, int(part * len(self.built)))]


def learn(builds: Iterable[TimedBuild]) -> Learned:
    """Return what builds teach, given from the oldest to the newest.

    Costs some 10 us a build, in one piece: call it in a thread.
    """
    newest: dict[Key, list[TimedBuild]] = defaultdict(list)
    for build in builds:
        if build.seconds > 0:
            newest[build.package, build.system, build.kind].append(build)
    kept = {key: many[-NEWEST:] for key, many in newest.items()}
    slowness = _slowness(kept)
    works = {
        key: (math.exp(statistics.median([_log(b) - slowness.get((b.worker, b.system), 0.0) for b in many])), len(many))
        for key, many in kept.items()
    }
    speeds = {key: math.exp(-each) for key, each in slowness.items()}
    spreads = _spreads(kept, slowness)
    usual = statistics.median(spreads.values()) if len(spreads) >= SHARED_PACKAGES else USUAL_SPREAD
    built = tuple(sorted([seconds for (_, _, kind), (seconds, _) in works.items() if kind is WorkKind.BUILD]))
    newest_of_all = [build for many in kept.values() for build in many]
    return Learned(
        works,
        speeds,
        _ratios(works),
        _kinds(works),
        _featured(works, kept),
        _memories(kept),
        spreads,
        usual,
        built,
        _exact(kept, works, slowness),
        learn_costs(kept),
        learn_rates(newest_of_all),
    )


def _exact(
    kept: Mapping[Key, Sequence[TimedBuild]],
    works: Mapping[Key, tuple[float, int]],
    slowness: Mapping[tuple[str, str], float],
) -> dict[str, tuple[float, int]]:
    """Return the works of steps that differ from their package's: stages of one compiler have one name."""
    found: dict[str, tuple[float, int]] = {}
    for key, many in kept.items():
        steps: dict[str, list[float]] = defaultdict(list)
        for build in many:
            steps[build.step].append(_log(build) - slowness.get((build.worker, build.system), 0.0))
        for step, its in steps.items():
            seconds = math.exp(statistics.median(its)) if step and len(steps) > 1 else works[key][0]
            if not works[key][0] / OWN_TIME < seconds < works[key][0] * OWN_TIME:
                found[step] = (seconds, len(its))
    return found


def _spreads(kept: Mapping[Key, Sequence[TimedBuild]], slowness: Mapping[tuple[str, str], float]) -> dict[Key, float]:
    """Return how far the builds of each package lie apart, by the median of their distances from their median."""
    found: dict[Key, float] = {}
    for key, many in kept.items():
        if len(many) >= SPREAD_FROM:
            works = [_log(build) - slowness.get((build.worker, build.system), 0.0) for build in many]
            middle = statistics.median(works)
            away = statistics.median([abs(work - middle) for work in works])
            found[key] = max(LEAST_SPREAD, away / HALF_WITHIN)
    return found


def _slowness(kept: Mapping[Key, Sequence[TimedBuild]]) -> dict[tuple[str, str], float]:
    """Return (worker, system) -> logarithm of how often as long it takes as the usual worker."""
    shared = [many for many in kept.values() if len({build.worker for build in many if _says_speed(build)}) > 1]
    slowness: dict[tuple[str, str], float] = defaultdict(float)
    counts: dict[tuple[str, str], int] = {}
    for _ in range(ROUNDS):
        rests: dict[tuple[str, str], list[float]] = defaultdict(list)
        for many in shared:
            usable = [build for build in many if _says_speed(build)]
            works = [(build.worker, _log(build) - slowness[build.worker, build.system]) for build in usable]
            for build in usable:
                # Its own builds would vote for the worker.
                others = [work for worker, work in works if worker != build.worker]
                rests[build.worker, build.system].append(_log(build) - statistics.median(others))
        counts = {key: len(values) for key, values in rests.items()}
        halves = {key: (slowness[key] + statistics.median(values)) / 2 for key, values in rests.items()}
        slowness = defaultdict(float, halves)
        for system in {key[1] for key in slowness}:
            here = [key for key in slowness if key[1] == system]
            usual = statistics.median([slowness[key] for key in here])
            for key in here:
                slowness[key] -= usual
    most = math.log(FASTEST)
    return {
        key: max(-most, min(most, each * counts[key] / (counts[key] + HALF_BELIEVED)))
        for key, each in slowness.items()
        if counts[key] >= FEWEST
    }


def _ratios(works: Mapping[Key, tuple[float, int]]) -> dict[tuple[str, str], float]:
    """Return how systems compare, those with most packages in common first."""
    of: dict[str, dict[tuple[str, WorkKind], float]] = defaultdict(dict)
    for (package, system, kind), (seconds, _) in works.items():
        of[system][package, kind] = seconds
    found: list[tuple[int, tuple[str, str], float]] = []
    for here, packages in of.items():
        for other, others in of.items():
            both = packages.keys() & others.keys() if here != other else set()
            if len(both) >= SHARED_PACKAGES:
                ratio = statistics.median([packages[package] / others[package] for package in both])
                found.append((len(both), (here, other), ratio))
    return {pair: ratio for _, pair, ratio in sorted(found, reverse=True)}


def _kinds(works: Mapping[Key, tuple[float, int]]) -> dict[WorkKind, float]:
    """Return the mean work of each kind that has some packages: what is long is rare, and decides when all ends."""
    of: dict[WorkKind, list[float]] = defaultdict(list)
    for (_, _, kind), (seconds, _) in works.items():
        of[kind].append(seconds)
    return {kind: statistics.fmean(many) for kind, many in of.items() if len(many) >= SHARED_PACKAGES}


def _featured(
    works: Mapping[Key, tuple[float, int]], kept: Mapping[Key, Sequence[TimedBuild]]
) -> dict[WorkClass, float]:
    """Return the mean work of packages that ask for the same features, where enough do."""
    of: dict[WorkClass, list[float]] = defaultdict(list)
    for key, (seconds, _) in works.items():
        alike = class_of(key[2], kept[key][-1].features)
        if alike[1]:
            of[alike].append(seconds)
    return {key: statistics.fmean(many) for key, many in of.items() if len(many) >= SHARED_PACKAGES}


def _memories(kept: Mapping[Key, Sequence[TimedBuild]]) -> dict[Key, int]:
    """Return the least of the newest peaks of each package.

    A control group counts pages of files too, of which the kernel keeps as many as there is room for: the least is
    nearest to what a build needs. One that dies of too little asks for twice as much by itself.
    """
    measured = {key: [build.memory_bytes for build in many if build.memory_bytes > 0] for key, many in kept.items()}
    return {key: min(many) for key, many in measured.items() if many}


def _says_speed(build: TimedBuild) -> bool:
    return build.seconds >= SHORTEST_S


def _log(build: TimedBuild) -> float:
    return math.log(min(build.seconds, LONGEST_S))


def _ms(seconds: float) -> int:
    return max(1, round(min(seconds, LONGEST_S) * 1000))
