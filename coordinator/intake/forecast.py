"""Forecast of a submission: what it would build, begin from and take, before anything is built.

The graph is planned as a submission would be and thrown away. Times are those of the newest successful builds of the
same packages; what has no history is counted and not guessed at, but for the end (`readmodel.estimate`). One forecast
is made at a time, and what walks a graph does so in a thread or in slices.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from coordinator.api.models import StepStatus
from coordinator.api.rebuild_models import ForecastView, RootForecast, SystemForecast
from coordinator.errors import UnavailableError
from coordinator.intake import planning
from coordinator.intake.graph import Graph
from coordinator.intake.intake import Intake
from coordinator.readmodel.estimate import Estimate, Expected, Outlook, estimating
from coordinator.readmodel.usual_times import quartiles
from coordinator.readmodel.views import Views
from coordinator.stores.timings import TimingsError
from infra.cache.cache import Cache
from infra.cache.errors import ClosureTooLargeError
from infra.nix import narinfo as narinfo_format
from infra.nix.store_path import base_name_of, drv_name_of, package_of
from infra.slices import free_in_slices, in_slices
from scheduler.farm import Farm
from scheduler.model import Requirements, StepKey, StepSpec

#: Forecasts that wait for the one that is made.
MAX_WAITING: Final = 8
#: Builds of a package that its times are taken from; packages of one query, and of one forecast.
BUILDS: Final = 10
PACKAGES_AT_ONCE: Final = 64
MAX_PACKAGES: Final = 20_000
#: Steps looked at between two pauses.
_PIECE: Final = 500
_OPEN: Final = frozenset({StepStatus.WAITING, StepStatus.READY, StepStatus.RUNNING, StepStatus.PUBLISHING})
_FAILED: Final = frozenset({StepStatus.FAILED, StepStatus.DOOMED})

#: (package, system) -> seconds of its newest builds, each with those of processors where they were measured.
Costs = Callable[
    [Sequence[tuple[str, str]], int], Awaitable[Mapping[tuple[str, str], Sequence[tuple[float, float | None]]]]
]


@dataclass(frozen=True, slots=True)
class BuildCost:
    """Usual cost of a build of a package; None where that is not known."""

    rest: Expected | None = None
    build_s: float | None = None
    cpu_s: float | None = None


@dataclass(slots=True, eq=False)
class PlannedStep:
    """A step that would be built."""

    key: StepKey
    name: str
    kind: Requirements
    needs: list[PlannedStep]
    depth: int
    cost: BuildCost = field(default_factory=BuildCost)


@dataclass(frozen=True, slots=True)
class CutGraph:
    """A graph cut where the cache holds it."""

    steps: list[PlannedStep]
    #: Outputs in the cache that the steps begin from, full paths.
    inputs: list[str]
    cached: int
    #: Step of each derivation of the question.
    roots: list[StepKey]
    held: frozenset[StepKey]
    derivations: int


class Forecaster:
    """Makes forecasts."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        intake: Intake,
        cache: Cache,
        views: Views,
        farm: Farm,
        costs: Costs,
        flush: Callable[[], Awaitable[None]],
    ) -> None:
        """`flush` has timings written that are not yet."""
        self._intake = intake
        self._cache = cache
        self._views = views
        self._farm = farm
        self._costs = costs
        self._flush = flush
        #: Gives the times by which the scheduler expects a name on a system to be built, where it knows its package.
        self.times: Callable[[str, str], Expected | None] = lambda _name, _system: None
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def of(self, drvs: Sequence[str]) -> ForecastView:
        """Forecast a submission of stored derivations, full paths.

        Raises:
            IntakeError: As `Intake.submit`.
            UnavailableError: Too many forecasts are wanted at once.
        """
        async with self._in_turn():
            return await self._of(drvs)

    async def graph(self, drvs: Sequence[str]) -> CutGraph:
        """Return the steps of stored derivations, full paths, that would be built, with their costs.

        Raises:
            IntakeError: As `Intake.submit`.
            UnavailableError: Too many forecasts are wanted at once.
        """
        async with self._in_turn():
            return await self._graph(drvs)

    @contextlib.asynccontextmanager
    async def _in_turn(self) -> AsyncGenerator[None, None]:
        """Wait until no other forecast is made. Raises `UnavailableError`."""
        if self._waiting >= MAX_WAITING:
            raise UnavailableError(f"{MAX_WAITING} forecasts are being made, the limit; ask again in a moment.")
        self._waiting += 1
        try:
            async with self._turn:
                yield
        finally:
            self._waiting -= 1

    async def _graph(self, drvs: Sequence[str]) -> CutGraph:
        graph = await self._intake.look(drvs)
        absent = await self._cache.missing(await asyncio.to_thread(graph.paths))
        plan = await asyncio.to_thread(_plan, graph, drvs, absent)
        await self.price(plan.steps)
        return plan

    async def _of(self, drvs: Sequence[str]) -> ForecastView:
        plan = await self._graph(drvs)
        inputs, input_bytes = await self._inputs(plan.inputs)
        states = await in_slices(self._states(plan))
        found = await in_slices(
            estimating(plan.steps, lambda step: Outlook((self,), step.kind, step.cost.rest), self.slots, [self])
        )
        systems = await asyncio.to_thread(lambda: {step.kind.system for step in plan.steps})
        slots = {system: self.slots(Requirements(system, ())) for system in systems}
        view = await asyncio.to_thread(_view, plan, states, found.get(self), slots, (inputs, input_bytes))
        freed: list[object] = [*plan.steps]
        plan.steps.clear()
        del found, states
        await free_in_slices(freed)
        return view

    async def price(self, steps: Sequence[PlannedStep]) -> None:
        """Give steps their costs, as far as the database of timings has them."""
        known = await self.costs(await asyncio.to_thread(_packages, steps))
        await asyncio.to_thread(_give_costs, steps, known, self.times)

    async def costs(self, packages: Sequence[tuple[str, str]]) -> dict[tuple[str, str], BuildCost]:
        """Return the costs of packages, (package, system), as far as the database of timings has them."""
        known: dict[tuple[str, str], BuildCost] = {}
        if not packages:
            return known
        with contextlib.suppress(TimingsError):
            await self._flush()
        for start in range(0, len(packages), PACKAGES_AT_ONCE):
            some = packages[start : start + PACKAGES_AT_ONCE]
            try:
                costs = await self._costs(some, BUILDS)
            except TimingsError:
                # What is not known is counted as such.
                break
            known.update((package, _cost(its)) for package, its in costs.items())
        return known

    async def _inputs(self, paths: Sequence[str]) -> tuple[int, int]:
        """Return how many of some paths the cache has, and the bytes of their objects."""
        try:
            texts, _ = await self._cache.closure(paths, recursive=False)
        except ClosureTooLargeError:
            return len(paths), 0
        store_dir = self._cache.store_dir
        size = await asyncio.to_thread(
            lambda: sum(narinfo_format.parse(text, store_dir).stored.file_size for text in texts)
        )
        return len(texts), size

    def _states(self, plan: CutGraph) -> Generator[None, None, dict[StepKey, RootForecast]]:
        """Return what is known of each step, with pauses."""
        found: dict[StepKey, RootForecast] = {}
        for count, key in enumerate(dict.fromkeys([*plan.roots, *(step.key for step in plan.steps)]), 1):
            found[key] = self._state(key, cached=key in plan.held)
            if not count % _PIECE:
                yield
        return found

    def _state(self, key: StepKey, *, cached: bool) -> RootForecast:
        if cached:
            return RootForecast(step=key, state="cached")
        row = self._views.row_of(key)
        if row is None:
            return RootForecast(step=key, state="unknown")
        if row.state in _FAILED:
            return RootForecast(step=key, state="failed", cause=self._views.step_view(row).cause or key)
        is_wanted = row.state in _OPEN and any(not (each.ended or each.withdrawn) for each in row.submissions)
        return RootForecast(step=key, state="running" if is_wanted else "unknown")

    def slots(self, kind: Requirements) -> int:
        """Return how many builds of a kind workers do at one time now."""
        return sum(self._views.workforce.slots(name) for name in self._farm.serving(kind))


def _view(
    plan: CutGraph,
    states: Mapping[StepKey, RootForecast],
    estimate: Estimate[PlannedStep] | None,
    slots: Mapping[str, int],
    inputs: tuple[int, int],
) -> ForecastView:
    """Render a forecast; `inputs` are the number of outputs and the bytes of their objects."""
    steps = plan.steps
    now = Counter(states[step.key].state for step in steps)
    builds = [step.cost.build_s for step in steps if step.cost.build_s is not None]
    processors = [step.cost.cpu_s for step in steps if step.cost.cpu_s is not None]
    bound_kind = None if estimate is None else estimate.bound_kind
    return ForecastView(
        roots=tuple([states[key] for key in plan.roots]),
        derivations=plan.derivations,
        steps=len(steps),
        cached=plan.cached,
        failed=now["failed"],
        running=now["running"],
        systems=_systems(steps, slots),
        inputs=inputs[0],
        input_bytes=inputs[1],
        build_s=sum(builds),
        unknown=len(steps) - len(builds),
        cpu_s=sum(processors),
        cpu_unknown=len(steps) - len(processors),
        sooner_s=0.0 if estimate is None else estimate.sooner_s,
        later_s=0.0 if estimate is None else estimate.later_s,
        bound="" if estimate is None else estimate.bound,
        bound_system="" if bound_kind is None else bound_kind.system,
    )


def _systems(steps: Sequence[PlannedStep], slots: Mapping[str, int]) -> tuple[SystemForecast, ...]:
    by_system: dict[str, list[PlannedStep]] = {}
    for step in steps:
        by_system.setdefault(step.kind.system, []).append(step)
    return tuple(
        SystemForecast(
            system=system,
            steps=len(its),
            unknown=sum(step.cost.build_s is None for step in its),
            build_s=sum(step.cost.build_s or 0.0 for step in its),
            slots=slots[system],
        )
        for system, its in sorted(by_system.items())
    )


def _packages(steps: Sequence[PlannedStep]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((package_of(step.name), step.kind.system) for step in steps))[:MAX_PACKAGES]


def _give_costs(
    steps: Sequence[PlannedStep],
    known: Mapping[tuple[str, str], BuildCost],
    times: Callable[[str, str], Expected | None],
) -> None:
    nothing = BuildCost()
    for step in steps:
        cost = known.get((package_of(step.name), step.kind.system), nothing)
        rest = times(step.name, step.kind.system)
        step.cost = cost if rest is None else replace(cost, rest=rest)


def _cost(builds: Sequence[tuple[float, float | None]]) -> BuildCost:
    times = [build_s for build_s, _ in builds]
    processors = [cpu_s for _, cpu_s in builds if cpu_s is not None]
    return BuildCost(
        quartiles(times),
        statistics.median(times) if times else None,
        statistics.median(processors) if processors else None,
    )


def _plan(graph: Graph, drvs: Sequence[str], absent: set[str]) -> CutGraph:
    """Cut a graph where the cache holds it."""
    held = frozenset(node.step for node in graph.nodes.values() if not any(path in absent for _, path in node.outputs))
    stand_in = {graph.nodes[name].step: name for name in graph.own}
    roots = [graph.nodes[base_name_of(drv)].step for drv in drvs]
    specs, ends = planning.steps_to_do(dict.fromkeys(roots), graph.recipes.by_step, graph.nodes, stand_in, held)
    steps: dict[StepKey, PlannedStep] = {}
    for number, spec in enumerate(specs):
        drv = _recipe_drv(graph, spec, stand_in)
        needs = [steps[need] for need in spec.recipes[0].needs if need in steps]
        # Inputs come first, and are deeper.
        depth = len(specs) - number
        steps[spec.key] = PlannedStep(spec.key, drv_name_of(drv), spec.recipes[0].requirements, needs, depth)
    begun_from = [stand_in.get(key) or graph.recipes.by_step[key][0] for key in ends]
    inputs = [path for drv in begun_from for _, path in graph.nodes[drv].outputs]
    return CutGraph(list(steps.values()), inputs if steps else [], len(ends), roots, held, len(graph.own))


def _recipe_drv(graph: Graph, spec: StepSpec, stand_in: Mapping[StepKey, str]) -> str:
    first = graph.recipes.by_step[spec.key][0]
    return first if first in graph.nodes else stand_in[spec.key]
