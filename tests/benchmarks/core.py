"""Drain a large graph through the core in memory and state the microseconds per finished build.

The builders are ideal: each grants what it is given at once, and reports arrive in batches. Time covers `handle_many`
alone (reports, publishing, next leases), not the making of events nor intake, which is told apart. It is processor
time of this process: the core does nothing but compute, and the figure should not tell what else the machine does.
"""

from __future__ import annotations

import argparse
import gc
import graphlib
import heapq
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import zstandard

from infra.compiled import finder
from scheduler.effects import PublishOutputs, StartBuild
from scheduler.events import BuilderJoined, BuildSucceeded, Event, OutputsPublished, SubmissionReceived
from scheduler.farm import Farm
from scheduler.model import BuilderId, BuilderSpec, Instant, Recipe, Requirements, StepKey, StepSpec, SubmissionId
from tests.benchmarks import core_calls

TARGET_US = 15.0
#: Times of the floor, and milliseconds of a piece between two pauses.
TARGET_FLOORS = 6.0
TARGET_PIECE_MS = 5.0
LAYERS = 100
WIDTH = 1000
NEEDS = 3
BUILDERS = 16
SLOTS = 4


@dataclass(frozen=True, slots=True)
class Graph:
    """Steps ready to submit."""

    name: str
    steps: tuple[StepSpec, ...]
    roots: tuple[StepKey, ...]
    systems: frozenset[str]


@dataclass(frozen=True, slots=True)
class Drain:
    """One run: microseconds per finished build, and what else was seen."""

    us_per_build: float
    intake_s: float
    builds: int
    #: What graphlib and heapq took in the same process, the mean of just before and just after.
    floor_us: float = 0.0


def layered(seed: int = 1, layers: int = LAYERS) -> Graph:
    """Layers of 1,000 steps, each with three needs in the layer below; all that nobody needs is wanted."""
    chance = random.Random(seed)
    requirements = Requirements("x86_64-linux")
    steps: list[StepSpec] = []
    below: list[StepKey] = []
    for layer in range(layers):
        # As long as a real key: hashing and comparing it is part of the work.
        here = [StepKey(f"/nix/store/{chance.getrandbits(160):032x}-step-{layer}-{i}") for i in range(WIDTH)]
        for key in here:
            needs = tuple(chance.sample(below, NEEDS)) if below else ()
            steps.append(StepSpec(key, (Recipe(requirements, needs),)))
        below = here
    needed = {need for step in steps for need in step.recipes[0].needs}
    roots = tuple(step.key for step in steps if step.key not in needed)
    return Graph("layered", tuple(steps), roots, frozenset({"x86_64-linux"}))


def from_file(path: Path) -> Graph:
    """Read `{"fields": ["name", "system", "fixed_output", "inputs"], "nodes": [...]}`, zstd if it ends in .zst."""
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data).read()
    graph = json.loads(data)
    fields = graph["fields"]
    system_at, inputs_at, name_at = fields.index("system"), fields.index("inputs"), fields.index("name")
    nodes = graph["nodes"]
    keys = [StepKey(f"{index:032x}-{node[name_at]}") for index, node in enumerate(nodes)]
    needed = {index for node in nodes for index in node[inputs_at]}
    steps = tuple(
        StepSpec(key, (Recipe(Requirements(node[system_at]), tuple(keys[i] for i in node[inputs_at])),))
        for key, node in zip(keys, nodes, strict=True)
    )
    roots = tuple(key for index, key in enumerate(keys) if index not in needed)
    return Graph(path.name, steps, roots, frozenset(node[system_at] for node in nodes))


def drain(graph: Graph, batch: int) -> Drain:
    """Run the graph to its end, `batch` finished builds and as many published ones per call."""
    farm = Farm()
    now = 0.0
    started = time.process_time()
    submission = SubmissionReceived(SubmissionId("bench"), graph.roots, graph.steps)
    farm.handle(submission, Instant(now))
    intake_s = time.process_time() - started
    joins = [BuilderJoined(BuilderSpec(BuilderId(f"builder-{i}"), "1", graph.systems), SLOTS) for i in range(BUILDERS)]
    _, effects = farm.handle_many(joins, Instant(now))
    running = [effect for effect in effects if isinstance(effect, StartBuild)]
    publishing: list[PublishOutputs] = []
    spent = 0.0
    builds = 0
    clock = time.process_time
    while running or publishing:
        now += 0.001
        ended, running = running[:batch], running[batch:]
        events: list[Event] = [OutputsPublished(effect.lease) for effect in publishing]
        events += [BuildSucceeded(effect.lease, effect.builder, b"evidence") for effect in ended]
        builds += len(publishing)
        began = clock()
        _, effects = farm.handle_many(events, Instant(now))
        spent += clock() - began
        publishing = []
        for effect in effects:
            if isinstance(effect, StartBuild):
                running.append(effect)
            elif isinstance(effect, PublishOutputs):
                publishing.append(effect)
    if builds != len(graph.steps) or not farm.ended(SubmissionId("bench")):
        raise SystemExit(f"only {builds} of {len(graph.steps)} steps were built")
    return Drain(spent / builds * 1e6, intake_s, builds)


def floor_us(graph: Graph, batch: int) -> float:
    """Drain the graph with graphlib and heapq alone: microseconds a step of what any scheduler in Python takes.

    Ready steps go by the longest path above them to as many slots, and `batch` of them end at a time.
    """
    depth = dict.fromkeys((step.key for step in graph.steps), 0)
    for step in reversed(graph.steps):
        for need in step.recipes[0].needs:
            depth[need] = max(depth[need], depth[step.key] + 1)
    order = {step.key: (-depth[step.key], index, step.key) for index, step in enumerate(graph.steps)}
    sorter = graphlib.TopologicalSorter({step.key: step.recipes[0].needs for step in graph.steps})
    sorter.prepare()
    heap: list[tuple[int, int, StepKey]] = []
    running: list[StepKey] = []
    began = time.process_time()
    while sorter.is_active():
        for key in sorter.get_ready():
            heapq.heappush(heap, order[key])
        while heap and len(running) < BUILDERS * SLOTS:
            running.append(heapq.heappop(heap)[2])
        ended, running = running[:batch], running[batch:]
        sorter.done(*ended)
    return (time.process_time() - began) / len(graph.steps) * 1e6


def measure(graph: Graph, batch: int, runs: int) -> list[Drain]:
    """Drain several times, telling each on standard error.

    The collector is off, as it is in the engine while a turn is under way (`infra.collector`).
    """
    results: list[Drain] = []
    for run in range(runs):
        gc.collect()
        gc.disable()
        try:
            before = floor_us(graph, batch)
            result = drain(graph, batch)
            # Alone it differs by a third within a minute, with what else uses the processor's cache.
            floor = (before + floor_us(graph, batch)) / 2
            result = replace(result, floor_us=floor)
        finally:
            gc.enable()
        results.append(result)
        print(
            f"{graph.name}, batch {batch}, run {run + 1}/{runs}: {result.us_per_build:.2f} us/build, "
            f"{result.us_per_build / floor:.1f} x the floor of {floor:.2f}, "
            f"{result.builds} builds, intake {result.intake_s:.2f} s",
            file=sys.stderr,
            flush=True,
        )
    return results


def calls(layers: int, only: str) -> int:
    """Print the longest pieces of each kind of event, and mark those beyond the target."""
    beyond = 0
    for pieces in core_calls.look(layered(layers=layers).steps, only):
        late = pieces.longest_ms > TARGET_PIECE_MS
        beyond += late
        print("**" if late else "  ", pieces, flush=True)
    print(f"core: {beyond} kinds of events with a piece over {TARGET_PIECE_MS:.0f} ms", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; `ours` is the median of the layered graph (or of --graph) at the first batch size given."""
    parser = argparse.ArgumentParser(prog="bench core", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1], help="finished builds per call of the core")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of 1,000 steps each: 300 for 300,000 steps")
    parser.add_argument("--calls", action="store_true", help="look at pieces between pauses, each kind of event")
    parser.add_argument("--only", default="", help="with --calls: those whose name has this in it")
    parser.add_argument("--graph", type=Path, help="also drain the graph in this file (JSON, or JSON in zstd)")
    options = parser.parse_args(argv)
    if options.runs < 1 or min(options.batch) < 1:
        parser.error("--runs and --batch must be at least 1")
    if options.calls:
        return calls(options.layers, options.only)
    graphs = [layered(layers=options.layers)]
    if options.graph is not None:
        graphs.append(from_file(options.graph))
    medians: dict[str, float] = {}
    first: list[float] = []
    floors: list[float] = []
    for graph in graphs:
        for batch in options.batch:
            results = measure(graph, batch, options.runs)
            figures = [result.us_per_build for result in results]
            floors = floors or [result.us_per_build / result.floor_us for result in results]
            medians[f"{graph.name}/{batch}"] = round(statistics.median(figures), 2)
            first = first or figures
    ours = statistics.median(first)
    print(
        f"core, {'compiled' if finder.is_compiled() else 'from source'}: "
        f"{ours:.2f} us per finished build (target {TARGET_US:.0f} us or less), "
        f"{statistics.median(floors):.1f} x the floor (target {TARGET_FLOORS:.0f} or less), all: {medians}",
        file=sys.stderr,
    )
    if options.json:
        answer = {
            "bench": "core",
            "ours": round(ours, 3),
            "peer": TARGET_US,
            "ratio": round(TARGET_US / ours, 3),
            "unit": "us/build",
            "runs": options.runs,
            "spread": round(max(first) - min(first), 3),
            "compiled": finder.is_compiled(),
            "detail": {**medians, "floors": round(statistics.median(floors), 2)},
        }
        print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
