"""Times that builds are expected to take, of what was learned: what the foreseen ends and forecasts are made of.

They are those of a worker of speed 1, as the works that the scheduler ranks and places by (`learner`). What is known
only of its kind is not known here: it ranks a step, and says nothing of when it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from coordinator.learning.learned import Learned
from coordinator.learning.works import WorkKind, kind_of
from coordinator.readmodel.estimate import Expected
from infra.nix.store_path import package_of

#: Names and systems that are remembered, some 300 bytes each, until something new is learned.
REMEMBERED: Final = 100_000


class LearnedTimes:
    """`coordinator.readmodel.etas.Durations` of what is learned by now; `learned` gives that."""

    def __init__(self, learned: Callable[[], Learned]) -> None:
        self._learned = learned
        self._of: Learned | None = None
        self._answers = 0
        self._known: dict[tuple[str, str], Expected | None] = {}

    @property
    def answers(self) -> int:
        """A number that changes when something new is known."""
        self._look()
        return self._answers

    def expected(self, name: str, system: str) -> Expected | None:
        """Return the seconds between which half of its builds take; None where none of its package is known."""
        learned = self._look()
        key = name, system
        if key not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[key] = times_of(learned, name, system)
        return self._known[key]

    def usual_s(self) -> float:
        """Return the mean seconds of a package that is built; 0 where too few are known."""
        return self._look().kinds.get(WorkKind.BUILD, 0.0)

    def surprise_s(self, unknown: int) -> float:
        """Return the seconds that the longest of so many steps of unknown packages should take."""
        return self._look().longest_of(unknown)

    def _look(self) -> Learned:
        learned = self._learned()
        if learned is not self._of:
            self._of, self._known = learned, {}
            self._answers += 1
        return learned


def times_of(learned: Learned, name: str, system: str) -> Expected | None:
    """Return the seconds between which half of the builds of a name take; None where none of its package is known."""
    between = learned.between(package_of(name), system, kind_of(name))
    return None if between is None else Expected(*between)
