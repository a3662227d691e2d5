"""Schedule mass rebuilds with the real core in a simulation, and compare the makespan with others and the bound.

The core is the product's, with its defaults; machines, times and bytes are simulated (`makespan_work`). The first
rebuild begins with nothing learned, each further one with what the ones before taught (`coordinator.learning`). Beside
it: first fit, reverse dependencies, the longest path in steps on the emptiest machine (drover before it learned), list
scheduling and HEFT that know every time exactly, and the bound that no schedule beats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from multiprocessing import get_context
from pathlib import Path

from coordinator.learning.learned import Learned, learn
from coordinator.learning.learner import OpenWork, revised
from coordinator.learning.works import TimedBuild
from scheduler.effects import PublishOutputs, StartBuild
from scheduler.events import (
    BuilderJoined,
    BuildSucceeded,
    Event,
    OutputsPublished,
    SpeedsMeasured,
    SubmissionReceived,
    TimePassed,
    WorksEstimated,
)
from scheduler.farm import Farm
from scheduler.model import BuilderId, BuilderSpec, Instant, Recipe, Requirements, StepKey, StepSpec, SubmissionId
from scheduler.pauses import whole
from scheduler.policy import Limits
from scheduler.terms import Terms
from tests.benchmarks import makespan_peers as peers
from tests.benchmarks.makespan_ends import ForeseenEnd, ForeseenEnds, judged
from tests.benchmarks.makespan_work import (
    FLEETS,
    Machine,
    Rebuild,
    Shape,
    Stores,
    build_of,
    layered_shape,
    read_shape,
    sizes_of,
    spread_over,
    works_of,
)
from tests.benchmarks.report import progress

#: Seconds of the simulation between two looks at what was built, as the learner's, and part of the time so far: later
#: ones change little and cost time of the benchmark.
MEASURE_EVERY_S = 60.0
MEASURE_PART = 0.1
#: The shortest jobs are this part of all.
SHORTEST = 0.2
#: Owners whose delays are compared.
OWNERS = 2
TARGET_OVER_BEST = 1.03
TARGET_FIRST = 0.9


@dataclass
class Played:
    """One rebuild by the core."""

    makespan_s: float = 0.0
    #: Seconds from ready to begun, by step.
    waits: dict[int, float] = field(default_factory=dict)
    #: Owner -> when the last of the steps that it wants ended.
    ends: dict[str, float] = field(default_factory=dict)
    builds: list[TimedBuild] = field(default_factory=list)
    #: Looks at its end while it ran.
    foreseen: list[ForeseenEnd] = field(default_factory=list)
    #: Builds that moved to a faster machine, and the seconds that they had run before.
    moves: int = 0
    moved_s: float = 0.0
    core_s: float = 0.0
    longest_call_s: float = 0.0


class CoreRebuild:
    """The core, played through one rebuild, which as many owners ask for in parts; of these `only` one, if it is given.

    Each owner has every n-th root, with what is below it.
    """

    def __init__(
        self,
        rebuild: Rebuild,
        learned: Learned,
        before: Sequence[TimedBuild],
        *,
        owners: int = 1,
        only: int | None = None,
    ) -> None:
        self._rebuild = rebuild
        self._learned = self._measured = learned
        self._before = before
        self._wanted = {
            f"owner{number}": wanted
            for number, wanted in enumerate(parts_of(rebuild.shape, owners))
            if only in {None, number}
        }
        self._ends_foreseen = ForeseenEnds(rebuild)
        self._farm = Farm(Limits(lease_ttl_s=1e9))
        self._stores = Stores(rebuild)
        self._keys = [StepKey(f"{step:08x}-{name}") for step, name in enumerate(rebuild.shape.names)]
        self._step_of = {key: step for step, key in enumerate(self._keys)}
        self._machine_of = {machine.name: index for index, machine in enumerate(rebuild.fleet)}
        self._expected: dict[StepKey, int] = {}
        self._ended: set[int] = set()
        #: When each step's open lease began, with its order.
        self._begun: dict[int, tuple[StartBuild, float]] = {}
        self._ends: list[tuple[float, int, StartBuild]] = []
        self._now = 0.0
        self._ready_at: dict[int, float] = {}
        self.played = Played()

    def run(self) -> Played:
        """Play it to its end."""
        self._measure(self._learned)
        machines = [
            BuilderJoined(BuilderSpec(BuilderId(each.name), "1", frozenset({each.system})), each.slots)
            for each in self._rebuild.fleet
        ]
        self._call(*machines)
        for submission in self._submissions():
            self._call(submission)
        measured_at = 0.0
        while self._ends:
            _, step, order = self._ends[0]
            if self._begun[step][0].lease != order.lease:
                # It moved: the rebuild does not last until it would have ended where it was.
                heappop(self._ends)
                continue
            deadline = self._farm.deadline()
            first = self._ends[0][0]
            if deadline is not None and deadline < first:
                self._now = max(self._now, deadline)
                self._call(TimePassed())
                continue
            if self._ends_foreseen.is_due(len(self.played.builds)):
                self._ends_foreseen.look(self._farm, self._measured, self._now)
            self._now, step, order = heappop(self._ends)
            self._note(step, order)
            self._call(BuildSucceeded(order.lease, order.builder, b"", int(self._rebuild.sizes[step])))
            if self._now >= measured_at + max(MEASURE_EVERY_S, self._now * MEASURE_PART):
                measured_at = self._now
                self._measure(learn([*self._before, *self.played.builds]))
        for owner in self._wanted:
            if not self._farm.ended(SubmissionId(owner)):
                raise SystemExit(f"{owner} does not end")
        self.played.makespan_s, self.played.foreseen = self._now, self._ends_foreseen.looks
        return self.played

    def _submissions(self) -> list[SubmissionReceived]:
        """Return one submission for each owner."""
        made = []
        for owner, (roots, wanted) in self._wanted.items():
            steps = tuple(self._spec(step) for step in self._rebuild.shape.order if step in wanted)
            keys = tuple(self._keys[root] for root in roots)
            made.append(SubmissionReceived(SubmissionId(owner), keys, steps, terms=Terms(owner=owner)))
        return made

    def _spec(self, step: int) -> StepSpec:
        shape = self._rebuild.shape
        needs = tuple(self._keys[need] for need in shape.needs[step])
        expected = self._learned.expected(shape.packages[step], shape.systems[step], shape.kinds[step])
        self._expected[self._keys[step]] = expected.work_ms
        return StepSpec(self._keys[step], (Recipe(Requirements(shape.systems[step]), needs),), expected.work_ms)

    def _note(self, step: int, order: StartBuild) -> None:
        shape = self._rebuild.shape
        machine = self._rebuild.fleet[self._machine_of[order.builder]]
        seconds = self._rebuild.works[step] / machine.speed
        self.played.builds.append(
            TimedBuild(shape.packages[step], shape.systems[step], machine.name, seconds, shape.kinds[step])
        )
        self._ended.add(step)
        for owner, (_, wanted) in self._wanted.items():
            if step in wanted:
                self.played.ends[owner] = self._now

    def _measure(self, learned: Learned) -> None:
        self._measured = learned
        speeds = tuple((BuilderId(worker), on, speed) for (worker, on), speed in sorted(learned.speeds.items()))
        self._call(SpeedsMeasured(speeds))
        works = whole(revised(learned, self._open_works())) if self.played.builds else ()
        if works:
            self._expected.update(works)
            self._call(WorksEstimated(works))

    def _open_works(self) -> Iterator[OpenWork]:
        shape = self._rebuild.shape
        for step, key in enumerate(self._keys):
            if step not in self._ended and key in self._expected:
                yield OpenWork(key, shape.names[step], shape.systems[step], shape.kinds[step], self._expected[key])

    def _call(self, *events: Event) -> None:
        """Hand events over, and what follows from publishing at once; begin what is ordered."""
        pending = list(events)
        while pending:
            began = time.perf_counter()
            _, effects = self._farm.handle_many(pending, Instant(self._now))
            took = time.perf_counter() - began
            self.played.core_s += took
            if not isinstance(pending[0], SubmissionReceived):
                self.played.longest_call_s = max(self.played.longest_call_s, took)
            pending = []
            for effect in effects:
                if isinstance(effect, StartBuild):
                    self._begin(effect)
                elif isinstance(effect, PublishOutputs):
                    pending.append(OutputsPublished(effect.lease))

    def _begin(self, order: StartBuild) -> None:
        step, machine = self._step_of[order.lease.step], self._machine_of[order.builder]
        if step in self._begun:
            before, since = self._begun[step]
            self.played.moves += 1
            self.played.moved_s += self._now - since
            self._stores.leave(step, self._machine_of[before.builder])
        self._begun[step] = order, self._now
        fetch_s = self._stores.fetch_s(step, machine)
        self._stores.put(step, machine)
        ends = self._now + fetch_s + self._rebuild.works[step] / self._rebuild.fleet[machine].speed
        heappush(self._ends, (ends, step, order))
        needs = self._rebuild.shape.needs[step]
        ready = max([self._ready_at.get(need, 0.0) for need in needs], default=0.0)
        self.played.waits.setdefault(step, self._now - ready)
        self._ready_at[step] = ends


def parts_of(shape: Shape, owners: int) -> list[tuple[list[int], set[int]]]:
    """Return for each owner every n-th root, and these with all that is below them."""
    roots = [step for step, above in enumerate(shape.dependents) if not above]
    parts = []
    for number in range(owners):
        mine = roots[number::owners]
        wanted = set(mine)
        todo = list(mine)
        while todo:
            further = set(shape.needs[todo.pop()]) - wanted
            wanted |= further
            todo.extend(further)
        parts.append((mine, wanted))
    return parts


def fairness(rebuild: Rebuild, learned: Learned, known: Sequence[TimedBuild]) -> float:
    """Let two owners rebuild halves at one time; return the smaller over the larger of their delays.

    A delay is the time until all that an owner wants has ended, over what that takes it alone on the same machines.
    What both want is built once, for both.
    """
    alone = [CoreRebuild(rebuild, learned, known, owners=OWNERS, only=each).run().makespan_s for each in range(OWNERS)]
    together = CoreRebuild(rebuild, learned, known, owners=OWNERS).run().ends
    delays = [ends / by_itself for ends, by_itself in zip(together.values(), alone, strict=True)]
    return min(delays) / max(delays)


def compared(shape: Shape, fleet: Sequence[Machine], seed: int, *, rebuilds: int, fair: bool) -> dict[str, float]:
    """Return makespans over the bound of one seed's rebuilds: `drover 1` is the first, and so on."""
    shape = spread_over(shape, fleet, seed)
    works, sizes = works_of(shape, seed), sizes_of(shape, seed)
    found: dict[str, float] = {}
    known: list[TimedBuild] = []
    learned = Learned()
    for number in range(1, rebuilds + 1):
        rebuild = Rebuild(shape, build_of(works, seed, number), sizes, fleet)
        played = CoreRebuild(rebuild, learned, known).run()
        least = peers.bound(rebuild)
        found[f"drover {number}"] = played.makespan_s / least
        found |= {f"moves {number}": played.moves, f"hours before moves {number}": played.moved_s / 3600}
        found |= {f"{name} {number}": part for name, part in judged(played.foreseen, played.makespan_s).items()}
        found["us a build"] = played.core_s / len(shape.names) * 1e6
        found["longest call, ms"] = played.longest_call_s * 1e3
        if number == min(2, rebuilds):
            found |= _peers(rebuild, least)
            if fair:
                found["fairness of two owners"] = fairness(rebuild, learned, known)
            short = sorted(range(len(works)), key=lambda step: works[step])[: int(len(works) * SHORTEST)]
            found["wait of the shortest, s"] = statistics.quantiles([played.waits[step] for step in short], n=20)[-1]
        known += played.builds
        learned = learn(known)
    return found


def _peers(rebuild: Rebuild, least: float) -> dict[str, float]:
    shape, fleet = rebuild.shape, rebuild.fleet
    known = peers.tails(shape, rebuild.works)
    return {
        "first fit": peers.list_schedule(rebuild, peers.arrival(shape), peers.first_fit) / least,
        "reverse dependencies": peers.list_schedule(rebuild, peers.counts_above(shape), peers.emptiest) / least,
        "steps, emptiest": peers.list_schedule(rebuild, peers.unit(shape), peers.emptiest) / least,
        "list, all known": peers.list_schedule(rebuild, known, peers.fastest_of(fleet)) / least,
        "HEFT, all known": peers.heft(rebuild) / least,
    }


def report(fleet: str, rows: list[dict[str, float]]) -> dict[str, float]:
    """Print medians and spreads, and return the ratios that have a target."""
    for name in rows[0]:
        values = [row[name] for row in rows]
        progress(f"  {name:26} {statistics.median(values):8.3f}   {min(values):.3f} to {max(values):.3f}")
    second = "drover 2" if "drover 2" in rows[0] else "drover 1"
    over = [row[second] / min(row["list, all known"], row["HEFT, all known"]) for row in rows]
    first = [row["drover 1"] / row["steps, emptiest"] for row in rows]
    later = [row[second] / row["steps, emptiest"] for row in rows]
    progress(f"  {second} over the better that knows all: {statistics.median(over):.3f} (target {TARGET_OVER_BEST})")
    progress(f"  {second} over steps on the emptiest, worst seed: {max(later):.3f} (target 1)")
    progress(f"  drover 1 over steps on the emptiest: {statistics.median(first):.3f} (target {TARGET_FIRST})")
    return {
        f"{fleet}: second over best known": round(statistics.median(over), 3),
        f"{fleet}: first over unit": round(statistics.median(first), 3),
        f"{fleet}: second over unit, worst seed": round(max(later), 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="bench makespan", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--graph", type=Path, help="graph to schedule (JSON, or JSON in zstd); else a layered one")
    parser.add_argument("--seed", type=int, action="append", help="seed of works and noise; may be repeated")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 1, without --seed")
    parser.add_argument("--learned", type=int, default=3, help="rebuilds in turn, each with what was learned before")
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run at one time, each in a process")
    parser.add_argument("--fair", action="store_true", help="let two owners rebuild too, which takes as long again")
    parser.add_argument("--fleet", action="append", choices=sorted(FLEETS), help="by slots; may be repeated")
    options = parser.parse_args(argv)
    shape = layered_shape() if options.graph is None else read_shape(options.graph)
    ratios: dict[str, float] = {}
    for fleet in options.fleet or FLEETS:
        rows = []
        seeds = options.seed or range(1, options.seeds + 1)
        # Seeds know nothing of each other; a process each, since the core keeps a processor busy.
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            each = partial(compared, shape, FLEETS[fleet], rebuilds=options.learned, fair=options.fair)
            played = pool.map(each, seeds)
            for seed, row in zip(seeds, played, strict=True):
                rows.append(row)
                print(f"fleet {fleet}, seed {seed}: { ({k: round(v, 3) for k, v in row.items()}) }", file=sys.stderr)
        progress(f"{fleet} slots, {len(shape.names)} steps, over the bound, median of {len(rows)} seeds and spread:")
        ratios |= report(fleet, rows)
    if options.json:
        print(json.dumps({"bench": "makespan", "steps": len(shape.names), "ratios": ratios}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
