"""Memory of the newest plans: a graph that is submitted again is not walked again.

A derivation never changes, so the graph of some roots changes only where a step gains a recipe. Where it is cut follows
from what the cache lacks. While nothing was published, tombstoned or repaired since (`Cache.changes`), only the loss of
objects can have changed that: so only the paths that were there are looked at. Anything may be forgotten at any time,
and large plans are while no client sends anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from coordinator.intake.graph import Graph, Planned
from scheduler.model import StepKey

#: Derivations of all plans in memory together, some 700 bytes each; the plan that was used longest ago goes first.
MAX_REMEMBERED: Final = 100_000
#: As many, once nothing was planned for a while: a plan of so many is made anew within a second.
KEPT_AT_REST: Final = 25_000

#: Base names of roots and makers, and whether fixed outputs were looked for by their content.
PlanKey = tuple[tuple[str, ...], tuple[str, ...], bool]


@dataclass(slots=True, eq=False)
class RememberedPlan:
    """A plan, and all that it follows from."""

    graph: Graph
    #: Those output paths of the graph and sources that the cache lacked.
    absent: set[str]
    #: Name of the lease of all of them.
    lease: str
    #: Of the cache, before it was asked.
    changes: int
    planned: Planned

    def present(self) -> list[str]:
        """Return those paths that the cache had. For a thread."""
        return [path for path in self.graph.paths() if path not in self.absent]

    def objects(self) -> list[object]:
        """Return what there is very much of, to be freed in slices."""
        return [*self.planned.objects(), *self.graph.recipes.by_step.values(), *self.graph.nodes.values()]


class PlanMemory:
    """Plans by what they are of. What is forgotten is returned, to be freed in slices."""

    def __init__(self) -> None:
        self._plans: OrderedDict[PlanKey, RememberedPlan] = OrderedDict()
        self._derivations = 0
        #: Grows whenever steps gain recipes: a graph that was read before may lack them.
        self.recipe_changes = 0

    def find(self, key: PlanKey) -> RememberedPlan | None:
        """Return the plan of the same roots and makers."""
        plan = self._plans.get(key)
        if plan is not None:
            self._plans.move_to_end(key)
        return plan

    def keep(self, key: PlanKey, plan: RememberedPlan, recipe_changes: int) -> list[object]:
        """Remember a plan; it takes the place of an earlier one.

        `recipe_changes` is of when its graph was read. One that is out of date or larger than all room is forgotten.
        """
        gone = self._forget(key)
        if recipe_changes != self.recipe_changes or len(plan.graph.nodes) > MAX_REMEMBERED:
            return gone
        self._plans[key] = plan
        self._derivations += len(plan.graph.nodes)
        return gone + self._shrunk_to(MAX_REMEMBERED)

    def rest(self) -> list[object]:
        """Forget plans, those that were used longest ago first, until no more than `KEPT_AT_REST` is left."""
        return self._shrunk_to(KEPT_AT_REST)

    def _shrunk_to(self, derivations: int) -> list[object]:
        gone: list[object] = []
        while self._derivations > derivations:
            gone += self._forget(next(iter(self._plans)))
        return gone

    def forget_steps(self, changed: AbstractSet[StepKey]) -> list[object]:
        """Forget the plans that have one of these steps: it has gained a recipe."""
        gone: list[object] = []
        if not changed:
            return gone
        self.recipe_changes += 1
        for key, plan in list(self._plans.items()):
            # Looks up the smaller of both in the larger one: a large submission meets thousands of small plans.
            if not plan.graph.recipes.by_step.keys().isdisjoint(changed):
                gone += self._forget(key)
        return gone

    def _forget(self, key: PlanKey) -> list[object]:
        plan = self._plans.pop(key, None)
        if plan is None:
            return []
        self._derivations -= len(plan.graph.nodes)
        return plan.objects()
