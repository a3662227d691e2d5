"""Admission of graphs: closed over their needs and free of circles. Checked before any fact of one.

All of it pauses, since the graph of a mass rebuild has some hundred thousand steps.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from itertools import chain

from scheduler import events as e
from scheduler.model import StepKey, StepSpec, SubmissionRefusedError
from scheduler.pauses import PAUSE, PIECE, Pause, emptied
from scheduler.state import FarmState


def check_graph(state: FarmState, event: e.SubmissionReceived | e.SubmissionGrown) -> Generator[Pause, None, None]:
    """Raise `SubmissionRefusedError` for a graph with missing members, or whose recipes in use run in a circle."""
    if not (yield from _stands_in_order(state, event)):
        yield from _check_closed(state, event)
        yield from _check_acyclic(state, event)


def _stands_in_order(state: FarmState, event: e.SubmissionReceived | e.SubmissionGrown) -> Generator[Pause, None, bool]:
    """Return whether each step comes once, after all that it needs and that is not known, as plans have them.

    Then nothing is missing, and a circle is impossible: what is known needs only what was known before, unless it was
    known as merely held. Much less than what finds out why a graph is none.
    """
    known = state.steps
    before = set(event.held)
    looked_at = 0
    for spec in event.steps:
        key = spec.key
        if key in before or not spec.recipes or (key in known and not known[key].recipes):
            return False
        needs = _all_needs(spec)
        if not before.issuperset(needs) and not all(need in before or need in known for need in needs):
            return False
        before.add(key)
        looked_at += 1 + len(needs)
        if looked_at >= PIECE:
            looked_at = 0
            yield PAUSE
    for count, root in enumerate(event.roots, 1):
        if root not in before and root not in known:
            return False
        if not count % PIECE:
            yield PAUSE
    return True


def _check_closed(state: FarmState, event: e.SubmissionReceived | e.SubmissionGrown) -> Generator[Pause, None, None]:
    given = dict.fromkeys(event.held)
    for count, spec in enumerate(event.steps, 1):
        if not spec.recipes:
            raise SubmissionRefusedError(f"{spec.key} has no recipe")
        given[spec.key] = None
        if not count % PIECE:
            yield PAUSE
    looked_at = 0
    # Steps count too: very many may need nothing.
    for keys in chain(((root,) for root in event.roots), (_all_needs(spec) for spec in event.steps)):
        for key in keys:
            if key not in given and key not in state.steps:
                raise SubmissionRefusedError(f"{key} is needed and neither known, given nor held")
        looked_at += 1 + len(keys)
        if looked_at >= PIECE:
            looked_at = 0
            yield PAUSE
    yield from emptied(given)


def _all_needs(spec: StepSpec) -> tuple[StepKey, ...]:
    return spec.recipes[0].needs if len(spec.recipes) == 1 else tuple(chain(*[each.needs for each in spec.recipes]))


def _check_acyclic(state: FarmState, event: e.SubmissionReceived | e.SubmissionGrown) -> Generator[Pause, None, None]:
    """Look for a circle in the graph of recipes in use.

    Recipes of known steps need only steps that were known when they came, so a circle runs through steps that get
    their first recipe now. It runs through these alone unless one of them was known as merely held.
    """
    graph: dict[StepKey, tuple[StepKey, ...]] = {}
    known_before: list[StepKey] = []
    for count, spec in enumerate(event.steps, 1):
        known = state.steps.get(spec.key)
        if known is None or not known.recipes:
            graph.setdefault(spec.key, spec.recipes[0].needs)
            known_before += [] if known is None else [spec.key]
        if not count % PIECE:
            yield PAUSE
    if known_before:
        yield from _add_known(state, graph)
    yield from _sort(graph)


def _sort(graph: Mapping[StepKey, tuple[StepKey, ...]]) -> Generator[Pause, None, None]:
    """Sort a graph topologically, as Kahn does, only to see whether that can be done."""
    dependents: dict[StepKey, list[StepKey]] = {}
    unmet: dict[StepKey, int] = {}
    # Edges, not steps: few steps may have very many.
    looked_at = 0
    for key, needs in graph.items():
        inner = [need for need in needs if need in graph]
        unmet[key] = len(inner)
        for need in inner:
            dependents.setdefault(need, []).append(key)
        looked_at += 1 + len(needs)
        if looked_at >= PIECE:
            looked_at = 0
            yield PAUSE
    # The list grows while it is walked.
    clear = [key for key, count in unmet.items() if count == 0]
    for key in clear:
        for dependent in dependents.get(key, ()):
            unmet[dependent] -= 1
            if unmet[dependent] == 0:
                clear.append(dependent)
            looked_at += 1
            if looked_at >= PIECE:
                looked_at = 0
                yield PAUSE
        looked_at += 1
    if len(clear) < len(graph):
        in_circle = next(key for key, count in unmet.items() if count)
        raise SubmissionRefusedError(f"the needs of {in_circle} run in a circle")


def _add_known(state: FarmState, graph: dict[StepKey, tuple[StepKey, ...]]) -> Generator[Pause, None, None]:
    """Add what is known and stands below the steps of `graph`, with the recipes in use."""
    pending: list[StepKey] = []
    looked_at = 0
    for needs in graph.values():
        pending += needs
        looked_at += 1 + len(needs)
        if looked_at >= PIECE:
            looked_at = 0
            yield PAUSE
    while pending:
        looked_at += 1
        if not looked_at % PIECE:
            yield PAUSE
        key = pending.pop()
        step = state.steps.get(key)
        if key not in graph and step is not None and step.recipes:
            graph[key] = step.recipe.needs
            pending += step.recipe.needs
