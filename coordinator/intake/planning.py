"""From verified derivations to steps: pure graph work, iterative throughout.

Derivations with one output set are one step (infra/nix/FORMATS.md 3.4), whose key is the base name of its first output
path. An input-addressed step has one recipe: all its members need the same steps. A fixed-output step keeps its members
as further recipes, unless one would make a step need itself: two fetchers of one file, one of which stands on the
other, are no cycle as derivations and would be one as steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from coordinator.errors import IntakeError
from coordinator.stores.derivation_records import Kind, Node
from infra.dependency_order import CycleError, inputs_first
from scheduler.model import Recipe, Requirements, StepKey, StepSpec
from workers.wire.messages import NETWORK_FEATURE

#: Steps visited in one plan to see whether further recipes would close a cycle; what is not looked at is left out.
MAX_CYCLE_VISITS = 2_000_000


@dataclass(frozen=True, slots=True)
class Recipes:
    """Derivations of each step by recipe index, and those of these recipes that are new."""

    by_step: Mapping[StepKey, Sequence[str]]
    #: (step, recipe index, .drv base name).
    new: tuple[tuple[StepKey, int, str], ...]


def closure(roots: Iterable[str], nodes: Mapping[str, Node]) -> list[str]:
    """Return `roots` and all that they need, so that every derivation stands after its inputs.

    Raises:
        IntakeError: A member is missing, or the graph has a cycle; the sentence names the member.
    """

    def needs(name: str) -> tuple[str, ...]:
        if name not in nodes:
            raise IntakeError(f"the derivation {name} is not known here; send it and everything below it first")
        return nodes[name].needs

    try:
        return inputs_first(roots, needs)
    except CycleError as error:
        raise IntakeError(f"the derivation {error.first} is part of a cycle: {error}") from None


def with_made_sources(nodes: Mapping[str, Node]) -> dict[str, Node]:
    """Let each derivation need those among `nodes` that make one of its input sources.

    Such a source is a built path that an evaluation named by its path alone (`builtins.storePath`).
    """
    sources = {source for node in nodes.values() for source in node.sources}
    makers: dict[str, str] = {}
    for node in nodes.values() if sources else ():
        for _, path in node.outputs:
            if path in sources:
                makers.setdefault(path, node.drv)
    if not makers:
        return dict(nodes)
    return {name: _with_made_sources(node, makers) for name, node in nodes.items()}


def _with_made_sources(node: Node, makers: Mapping[str, str]) -> Node:
    made = {makers[source] for source in node.sources if source in makers}
    if not made:
        return node
    sources = tuple(source for source in node.sources if source not in makers)
    return replace(node, needs=tuple(sorted(made.union(node.needs))), sources=sources)


def assign_recipes(
    order: Sequence[str],
    nodes: Mapping[str, Node],
    members: Mapping[StepKey, Sequence[str]],
    max_recipes: int,
) -> Recipes:
    """Give each derivation its place among its step's recipes; `members` holds the places already given.

    `order` has inputs first and covers the closure of all fixed-output members in `members`.
    """
    by_step: dict[StepKey, list[str]] = {step: list(places) for step, places in members.items()}
    #: What the steps need by the recipes that they have; made where a step may gain a further one.
    needs: dict[StepKey, set[StepKey]] | None = None
    visits = MAX_CYCLE_VISITS
    new: list[tuple[StepKey, int, str]] = []
    for name in order:
        node = nodes[name]
        step = node.step
        places = by_step.setdefault(step, [])
        if places:
            if name in places or node.kind is not Kind.FIXED or len(places) >= max_recipes:
                continue
            if needs is None:
                needs = _needs_of_steps(order, nodes, members)
            wanted = step_needs(node, nodes)
            leads, visits = _leads_to(wanted, step, needs, visits)
            if leads:
                continue
            needs.setdefault(step, set()).update(wanted)
        new.append((step, len(places), name))
        places.append(name)
    return Recipes(by_step, tuple(new))


def _needs_of_steps(
    order: Iterable[str], nodes: Mapping[str, Node], members: Mapping[StepKey, Sequence[str]]
) -> dict[StepKey, set[StepKey]]:
    """Return what each step of `order` needs by the recipes in `members`, by any of its derivations where it has none.

    Of an input-addressed step all derivations need the same.
    """
    needs: dict[StepKey, set[StepKey]] = {}
    for name in order:
        node = nodes[name]
        places = members.get(node.step)
        if not places or name in places or node.kind is not Kind.FIXED:
            needs.setdefault(node.step, set()).update(step_needs(node, nodes))
    return needs


def step_needs(node: Node, nodes: Mapping[str, Node]) -> set[StepKey]:
    """Return the steps that must be done before `node` can be built."""
    return {nodes[need].step for need in node.needs}


def _leads_to(
    starts: Iterable[StepKey], goal: StepKey, needs: Mapping[StepKey, Collection[StepKey]], visits: int
) -> tuple[bool, int]:
    """Return whether one of `starts` is `goal` or stands on it, and the rest of `visits`; true where they run out."""
    seen: set[StepKey] = set()
    stack = list(starts)
    while stack:
        step = stack.pop()
        if step == goal or visits == 0:
            return True, visits
        if step in seen:
            continue
        if step not in needs:
            # The graph ends there, and what is below is not known: no further recipe is worth a cycle.
            return True, visits
        visits -= 1
        seen.add(step)
        stack.extend(needs[step])
    return False, visits


def steps_to_do(
    roots: Iterable[StepKey],
    recipes: Mapping[StepKey, Sequence[str]],
    nodes: Mapping[str, Node],
    stand_in: Mapping[StepKey, str],
    held: Collection[StepKey],
) -> tuple[list[StepSpec], list[StepKey]]:
    """Return the steps to make, inputs first, and the held steps at which the graph ends.

    `stand_in` names a derivation of this submission for a step whose first recipe is not loaded: members of one
    input-addressed step need the same steps.
    """
    specs: dict[StepKey, StepSpec] = {}
    # Thousands of steps share each: what a recipe requires, and the recipe alone of one that needs no step.
    requirements: dict[tuple[str, tuple[str, ...], bool], Requirements] = {}
    without_needs: dict[Requirements, tuple[Recipe]] = {}

    def recipe(step: StepKey, drv: str) -> tuple[Recipe]:
        node = nodes.get(drv) or nodes[stand_in[step]]
        wanted = (node.system, node.features, node.kind is Kind.FIXED)
        found = requirements.get(wanted)
        if found is None:
            found = requirements[wanted] = _requirements(node)
            without_needs[found] = (Recipe(found),)
        needs = step_needs(node, nodes)
        return (Recipe(found, tuple(sorted(needs))),) if needs else without_needs[found]

    def needs(step: StepKey) -> Sequence[StepKey]:
        if step in held:
            return ()
        drvs = recipes[step]
        if len(drvs) == 1:
            only = recipe(step, drvs[0])
            specs[step] = StepSpec(step, only)
            return only[0].needs
        specs[step] = spec = StepSpec(step, tuple([each for drv in drvs for each in recipe(step, drv)]))
        return [need for each in spec.recipes for need in each.needs]

    try:
        order = inputs_first(roots, needs)
    except CycleError as error:
        raise IntakeError(f"the step {error.first} is part of a cycle: {error}") from None
    return [specs[step] for step in order if step in specs], [step for step in order if step in held]


def _requirements(node: Node) -> Requirements:
    features = node.features
    if node.kind is Kind.FIXED:
        # What may use the network waits in queues of its own, for workers that let it.
        features = tuple(sorted({*features, NETWORK_FEATURE}))
    return Requirements(node.system, features)
