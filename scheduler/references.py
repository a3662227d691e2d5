"""Reference counts of steps: recipes refer to a need, submissions to a root. A step without any may be forgotten.

An index of the state and nothing more: it can be made anew from steps and submissions. Since a submission refers to its
roots until it is forgotten, and every step to its needs, all that a submission stands on is known as long as it is
itself. Steps whose recipes refer to each other in a circle (through recipes not in use) are never forgotten. Written by
`evolve` alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.model import StepKey
from scheduler.records import Step


class ReferenceCounts:
    """Reference counts over the steps of a state: keeps `Step.refcount`, and the steps where it is 0."""

    __slots__ = ("_expected", "_steps", "unreferenced")

    def __init__(self, steps: dict[StepKey, Step]) -> None:
        self._steps = steps
        #: The steps without a reference.
        self.unreferenced: dict[StepKey, Step] = {}
        #: References to steps that are not known yet; empty between calls of `handle`.
        self._expected: dict[StepKey, int] = {}

    def meet(self, step: Step) -> None:
        """Take in a step that has become known."""
        step.refcount = self._expected.pop(step.key, 0)
        if not step.refcount:
            self.unreferenced[step.key] = step

    def add(self, keys: Iterable[StepKey]) -> None:
        """Add one reference to each of these; some may become known only later."""
        for key in keys:
            step = self._steps.get(key)
            if step is None:
                self._expected[key] = self._expected.get(key, 0) + 1
                continue
            if not step.refcount:
                del self.unreferenced[key]
                if not self.unreferenced:
                    # Its table, which does not shrink as entries go: all steps of a submission stood there until now.
                    self.unreferenced.clear()
            step.refcount += 1

    def add_needs(self, step: Step) -> None:
        """Add a reference to each need of a step's recipes."""
        for recipe in step.recipes:
            self.add(recipe.needs)

    def drop(self, keys: Iterable[StepKey]) -> None:
        """Drop one reference to each of these."""
        for key in keys:
            step = self._steps[key]
            step.refcount -= 1
            if not step.refcount:
                self.unreferenced[key] = step

    def forget(self, step: Step) -> None:
        """Forget a step without references, and drop its references to its needs."""
        del self.unreferenced[step.key]
        for recipe in step.recipes:
            self.drop(recipe.needs)
