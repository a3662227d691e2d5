"""Reference counts of steps: recipes refer to a need, submissions to a root. A step without any may be forgotten.

An index of the state and nothing more: it can be made anew from steps and submissions. Since a submission names its
roots until it is forgotten, and every step its needs, all that a submission stands on is known as long as it is itself.
Steps whose recipes name each other in a circle (through recipes not in use) are never forgotten. Written by `evolve`
alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.model import StepKey
from scheduler.records import Step


class Names:
    """Keeps `Step.named` and the steps where it is 0, over the steps of a state."""

    __slots__ = ("_expected", "_steps", "loose")

    def __init__(self, steps: dict[StepKey, Step]) -> None:
        self._steps = steps
        #: The steps that nothing names.
        self.loose: dict[StepKey, Step] = {}
        #: How often steps are named that are not known yet; empty between calls of `handle`.
        self._expected: dict[StepKey, int] = {}

    def meet(self, step: Step) -> None:
        """Take in a step that has become known."""
        step.named = self._expected.pop(step.key, 0)
        if not step.named:
            self.loose[step.key] = step

    def add(self, keys: Iterable[StepKey]) -> None:
        """Count that these are named once more; some may become known only later."""
        for key in keys:
            step = self._steps.get(key)
            if step is None:
                self._expected[key] = self._expected.get(key, 0) + 1
                continue
            if not step.named:
                del self.loose[key]
            step.named += 1

    def add_needs(self, step: Step) -> None:
        """Count what a step's recipes name."""
        for recipe in step.recipes:
            self.add(recipe.needs)

    def drop(self, keys: Iterable[StepKey]) -> None:
        """Count that these are named once less."""
        for key in keys:
            step = self._steps[key]
            step.named -= 1
            if not step.named:
                self.loose[key] = step

    def forget(self, step: Step) -> None:
        """Let go of a step that nothing names, and of what it names."""
        del self.loose[step.key]
        for recipe in step.recipes:
            self.drop(recipe.needs)
