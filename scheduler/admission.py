"""Which graphs the core takes: closed over their needs, and free of circles. Asked before any fact is said of one."""

from __future__ import annotations

from scheduler import events as e
from scheduler.model import StepKey, SubmissionRefusedError
from scheduler.state import FarmState


def check_graph(state: FarmState, event: e.SubmissionReceived) -> None:
    """Raise `SubmissionRefusedError` for a graph with missing members, or whose recipes in use run in a circle."""
    _check_closed(state, event)
    _check_acyclic(state, event)


def _check_closed(state: FarmState, event: e.SubmissionReceived) -> None:
    known = dict.fromkeys(event.held)
    for spec in event.steps:
        if not spec.recipes:
            raise SubmissionRefusedError(f"{spec.key} has no recipe")
        known[spec.key] = None
    named = [*event.roots, *(need for spec in event.steps for recipe in spec.recipes for need in recipe.needs)]
    for key in named:
        if key not in known and key not in state.steps:
            raise SubmissionRefusedError(f"{key} is needed and neither known, given nor held")


def _check_acyclic(state: FarmState, event: e.SubmissionReceived) -> None:
    """Look for a circle in the graph of recipes in use.

    Recipes of known steps need only steps that were known when they came, so a circle runs through steps that get
    their first recipe now. It runs through these alone unless one of them was known as merely held.
    """
    graph: dict[StepKey, tuple[StepKey, ...]] = {}
    known_before: list[StepKey] = []
    for spec in event.steps:
        known = state.steps.get(spec.key)
        if known is None or not known.recipes:
            graph.setdefault(spec.key, spec.recipes[0].needs)
            known_before += [] if known is None else [spec.key]
    if known_before:
        _add_known(state, graph)
    dependents: dict[StepKey, list[StepKey]] = {key: [] for key in graph}
    unmet: dict[StepKey, int] = {}
    for key, needs in graph.items():
        inner = [need for need in needs if need in graph]
        unmet[key] = len(inner)
        for need in inner:
            dependents[need].append(key)
    clear = [key for key, count in unmet.items() if count == 0]
    # The list grows while it is walked: Kahn's topological sort.
    for key in clear:
        for dependent in dependents[key]:
            unmet[dependent] -= 1
            if unmet[dependent] == 0:
                clear.append(dependent)
    if len(clear) < len(graph):
        stuck = next(key for key, count in unmet.items() if count)
        raise SubmissionRefusedError(f"the needs of {stuck} run in a circle")


def _add_known(state: FarmState, graph: dict[StepKey, tuple[StepKey, ...]]) -> None:
    """Add what is known and stands below the steps of `graph`, with the recipes in use."""
    pending = [need for needs in graph.values() for need in needs]
    while pending:
        key = pending.pop()
        step = state.steps.get(key)
        if key not in graph and step is not None and step.recipes:
            graph[key] = step.recipe.needs
            pending += step.recipe.needs
