"""Planner of wish lists: asks the stores and the farm, and changes nothing.

Nothing is stored, queued or built. What is asked is bounded: wishes of one list, plans at one time, paths of all
closures (`lookup`), seconds of upstreams (`lookup`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from coordinator.api.models import StepStatus
from coordinator.api.plan_models import PlanView
from coordinator.api.requests import PlannedDerivation, PlanQuery
from coordinator.errors import IntakeError, UnavailableError
from coordinator.intake.forecast import MAX_PACKAGES, BuildCost, Forecaster, PlannedStep
from coordinator.plans.closures import ClosureSurvey, Reach, extents
from coordinator.plans.judging import FarmFacts, KnownFailure, WishFacts, judge, package_key
from coordinator.plans.lookup import Lookup
from coordinator.readmodel.rows import StepRow
from coordinator.readmodel.views import Views
from coordinator.stores.derivation_records import Node
from coordinator.stores.derivations import DerivationStore
from coordinator.wishes.model import Wish, WishedDerivation, WishedPaths, WishList
from infra.cache.cache import Cache
from infra.nix.errors import FormatError
from infra.nix.store_path import StoreDir, base_name_of, drv_name_of, parse_base_name
from infra.slices import in_slices
from scheduler.model import Requirements, StepKey

#: Wishes of one plan, and plans that wait for the one that is made.
MAX_WISHES: Final = 20_000
MAX_WAITING: Final = 8
#: Rows of steps looked at between two pauses.
_PIECE: Final = 500
_OPEN: Final = frozenset({StepStatus.WAITING, StepStatus.READY, StepStatus.RUNNING, StepStatus.PUBLISHING})
_FAILED: Final = frozenset({StepStatus.FAILED, StepStatus.DOOMED})


class Planner:
    """Makes plans, one at a time."""

    def __init__(
        self,
        derivations: DerivationStore,
        lookup: Lookup,
        forecaster: Forecaster,
        views: Views,
        cache: Cache,
    ) -> None:
        self._store_dir = cache.store_dir
        self._missing_here = cache.missing
        self._derivations = derivations
        self._lookup = lookup
        self._forecaster = forecaster
        self._views = views
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def of(self, query: PlanQuery) -> PlanView:
        """Return the plan of a wish list.

        Raises:
            WishListError: It is none of this store.
            IntakeError: It has too many wishes, or stands on too many paths.
            UnavailableError: Too many plans are wanted at once.
        """
        wishes = await asyncio.to_thread(query.wishes.wish_list, self._store_dir)
        return await self.of_list(wishes, frozenset(query.present), query.graph)

    async def of_list(
        self,
        wishes: WishList,
        present: frozenset[str] = frozenset(),
        graph: Sequence[PlannedDerivation] = (),
    ) -> PlanView:
        """Return the plan of a wish list of this store, as on a machine that has the paths in `present`.

        `graph` has derivations that the farm does not have, by the asker's word.

        Raises:
            IntakeError: It has too many wishes, or stands on too many paths.
            UnavailableError: Too many plans are wanted at once.
        """
        if len(wishes.wishes) > MAX_WISHES:
            raise IntakeError(f"{len(wishes.wishes)} wishes are more than {MAX_WISHES}; plan them in parts.")
        if self._waiting >= MAX_WAITING:
            raise UnavailableError(f"{MAX_WAITING} plans are being made, the limit; ask again in a moment.")
        self._waiting += 1
        try:
            async with self._turn:
                return await self._of(wishes, present, graph)
        finally:
            self._waiting -= 1

    async def _of(self, wishes: WishList, present: frozenset[str], graph: Sequence[PlannedDerivation]) -> PlanView:
        nodes = await self._nodes(wishes.wishes)
        told = await asyncio.to_thread(_told, graph, self._store_dir)
        facts = await asyncio.to_thread(
            lambda: [_facts(wish, nodes.get(wish.key), told, present) for wish in wishes.wishes]
        )
        survey, upstreams = await self._lookup.survey({path for each in facts for path in each.paths})
        missing = await asyncio.to_thread(_missing, facts, survey)
        stored = [nodes[each.wish.key] for each in missing if each.wish.key in nodes]
        steps = await self._steps(stored, graph)
        packages = await asyncio.to_thread(_packages, missing)
        costs = await self._forecaster.costs(list(dict.fromkeys(packages.values()))[:MAX_PACKAGES])
        facts = await asyncio.to_thread(_with_costs, facts, packages, costs)
        keys = dict.fromkeys([*(step.key for step in steps), *(each.step for each in missing if each.step)])
        building, failures = await in_slices(self._states(list(keys)))
        kinds = {step.kind for step in steps} | {Requirements(system, ()) for system in wishes.systems}
        slots = {kind: self._forecaster.slots(kind) for kind in kinds}
        farm = FarmFacts(survey, steps, building, failures, slots, present, tuple(upstreams))
        return await asyncio.to_thread(judge, wishes, facts, farm)

    async def _steps(self, stored: Sequence[Node], graph: Sequence[PlannedDerivation]) -> list[PlannedStep]:
        """Return the steps that would be built, inputs first: of derivations that are stored, and of the asker's."""
        below = await self._derivations.nodes(list({name for each in graph for name in each.known}))
        drvs = dict.fromkeys(self._store_dir.full(node.drv) for node in (*stored, *below.values()))
        steps = list((await self._forecaster.graph(list(drvs))).steps) if drvs else []
        if not graph:
            return steps
        absent = await self._missing_here({path for each in graph for path in each.outputs})
        own = await asyncio.to_thread(
            _own_steps, graph, {name: node.step for name, node in below.items()}, steps, absent
        )
        await self._forecaster.price(own)
        return [*steps, *own]

    async def _nodes(self, wishes: Sequence[Wish]) -> dict[tuple[str, str], Node]:
        """Return the derivation of each wish, by its key, where the farm has one."""
        drvs = {wish.key: base_name_of(drv) for wish in wishes if (drv := _derivation(wish))}
        nodes = await self._derivations.nodes(list(dict.fromkeys(drvs.values())))
        found = {key: nodes[drv] for key, drv in drvs.items() if drv in nodes}
        paths = {
            wish.key: wish.target.paths[0]
            for wish in wishes
            if wish.key not in found and isinstance(wish.target, WishedPaths) and wish.target.outputs
        }
        makers = await self._derivations.makers(list(paths.values()))
        made = await self._derivations.nodes(list(dict.fromkeys(makers.values())))
        found.update((key, made[makers[path]]) for key, path in paths.items() if makers.get(path) in made)
        return found

    def _states(
        self, keys: Sequence[StepKey]
    ) -> Generator[None, None, tuple[frozenset[StepKey], dict[StepKey, KnownFailure]]]:
        """Return which steps submissions want, and which are known to fail, with pauses."""
        building: set[StepKey] = set()
        failures: dict[StepKey, KnownFailure] = {}
        for count, key in enumerate(keys, 1):
            row = self._views.row_of(key)
            if row is not None and row.state in _FAILED:
                failures[key] = self._failure(row)
            elif row is not None and row.state in _OPEN and self._views.submissions_of(key):
                building.add(key)
            if not count % _PIECE:
                yield
        return frozenset(building), failures

    def _failure(self, row: StepRow) -> KnownFailure:
        cause = self._views.row_of(StepKey(self._views.step_view(row).cause or row.key)) or row
        return KnownFailure(cause.key, self._views.name_of(cause), cause.life.ended_at or 0.0)


def _derivation(wish: Wish) -> str | None:
    target = wish.target
    if isinstance(target, WishedDerivation):
        return target.path
    return target.derivation if isinstance(target, WishedPaths) else None


def _told(graph: Sequence[PlannedDerivation], store_dir: StoreDir) -> dict[str, StepKey]:
    """Return the step of each of the asker's derivations. Raises `IntakeError` for what is none of a graph."""
    for place, each in enumerate(graph):
        try:
            for name in (each.drv, *each.known):
                parse_base_name(name)
            for path in each.outputs:
                store_dir.parse(path)
        except FormatError as error:
            raise IntakeError(
                f"derivation {place} of the graph names what is no store path: {error.message}."
            ) from None
        if any(need >= place for need in each.needs):
            raise IntakeError(f"derivation {place} of the graph needs one that is not before it; send inputs first.")
    return {each.drv: StepKey(base_name_of(each.outputs[0])) for each in graph}


def _own_steps(
    graph: Sequence[PlannedDerivation],
    below: Mapping[str, StepKey],
    stored: Sequence[PlannedStep],
    absent: Collection[str],
) -> list[PlannedStep]:
    """Return the steps of the asker's derivations that the cache does not hold, inputs first."""
    by_key = {step.key: step for step in stored}
    places: list[PlannedStep | None] = []
    own = []
    for each in graph:
        key = StepKey(base_name_of(each.outputs[0]))
        step = by_key.get(key)
        if step is None and any(path in absent for path in each.outputs):
            needs = [need for place in each.needs if (need := places[place]) is not None]
            needs += [by_key[below[name]] for name in each.known if below.get(name) in by_key]
            step = by_key[key] = PlannedStep(key, drv_name_of(each.drv), Requirements(each.system, ()), needs, 0)
            own.append(step)
        places.append(step)
    return own


def _facts(wish: Wish, node: Node | None, told: Mapping[str, StepKey], present: frozenset[str]) -> WishFacts:
    """Return what is known of a wish before anything is looked up."""
    target = wish.target
    paths: tuple[str, ...] = ()
    step = told.get(base_name_of(_derivation(wish) or "")) if node is None else node.step
    graphed = step is not None
    if isinstance(target, WishedPaths):
        paths = target.paths
        if step is None:
            # The key of a step is the base name of its first output.
            step = StepKey(base_name_of(min((*target.outputs, *target.others), key=lambda each: each.name).path))
    elif node is not None and isinstance(target, WishedDerivation):
        paths = tuple(path for name, path in node.outputs if not target.outputs or name in target.outputs)
    is_present = bool(paths) and present.issuperset(paths)
    return WishFacts(wish, paths, step, graphed=graphed, present=is_present)


def _missing(facts: Sequence[WishFacts], survey: ClosureSurvey) -> list[WishFacts]:
    """Return the wishes of which no cache has the whole closure."""
    reach = extents(survey)
    return [
        each
        for each in facts
        if max((reach.get(path, Reach.ABSENT) for path in each.paths), default=Reach.ABSENT) > Reach.UPSTREAM
    ]


def _packages(missing: Sequence[WishFacts]) -> dict[tuple[str, str], tuple[str, str]]:
    """Return package and system of each wish whose derivation the farm does not have, by the wish's key."""
    return {each.wish.key: package_key(each.wish) for each in missing if not each.graphed}


def _with_costs(
    facts: Sequence[WishFacts],
    packages: Mapping[tuple[str, str], tuple[str, str]],
    costs: Mapping[tuple[str, str], BuildCost],
) -> list[WishFacts]:
    return [
        replace(each, cost=costs[package]) if (package := packages.get(each.wish.key, ("", ""))) in costs else each
        for each in facts
    ]
