"""Closures of wished paths, and where each member can be fetched: pure.

A path can be fetched only with its whole runtime closure, so one member that no cache has takes all along that refer
to it, over any number of others. Members may refer to each other in circles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

#: Place of the farm's own cache; places above it are those of upstreams, in their order.
HERE = 0


class LocatedPath(NamedTuple):
    """A path that a cache has; `references` are full paths and may hold its own."""

    place: int
    file_size: int
    nar_size: int
    references: tuple[str, ...]


class Reach(IntEnum):
    """Extents to which a closure can be fetched, the best first."""

    HERE = 0
    UPSTREAM = 1
    #: A member was not looked up in time.
    UNKNOWN = 2
    ABSENT = 3


@dataclass(slots=True)
class ClosureSurvey:
    """Paths of some closures that were looked up."""

    located: dict[str, LocatedPath] = field(default_factory=dict)
    #: Paths that no cache has, and those that were not looked up in time.
    absent: set[str] = field(default_factory=set)
    unasked: set[str] = field(default_factory=set)

    def frontier(self, paths: Iterable[str]) -> set[str]:
        """Return those of some paths that nothing is known of."""
        return {
            path for path in paths if path not in self.located and path not in self.absent and path not in self.unasked
        }


def extents(survey: ClosureSurvey) -> dict[str, Reach]:
    """Return how far the closure of each path can be fetched; paths that are not in the survey are absent."""
    found = {path: Reach.HERE if each.place == HERE else Reach.UPSTREAM for path, each in survey.located.items()}
    referrers: dict[str, list[str]] = {}
    for path, each in survey.located.items():
        for reference in each.references:
            referrers.setdefault(reference, []).append(path)
    unlocated = [reference for reference in referrers if reference not in survey.located]
    found.update((path, Reach.UNKNOWN) for path in survey.unasked)
    found.update((path, Reach.ABSENT) for path in (*survey.absent, *unlocated) if path not in survey.unasked)
    # The worst goes to all that refer to it; each path is gone through once.
    for worst in (Reach.ABSENT, Reach.UNKNOWN, Reach.UPSTREAM):
        stack = [path for path, reach in found.items() if reach is worst]
        while stack:
            for referrer in referrers.get(stack.pop(), ()):
                if found[referrer] < worst:
                    found[referrer] = worst
                    stack.append(referrer)
    return found


class Closures:
    """Closures of located paths: made once, asked for each of thousands of wishes."""

    def __init__(self, located: Mapping[str, LocatedPath]) -> None:
        self._places = {path: place for place, path in enumerate(located)}
        self._located = list(located.values())
        places = self._places
        self._references = [[places[ref] for ref in each.references if ref in places] for each in self._located]

    def members(self, roots: Iterable[str], without: Iterable[str] = ()) -> list[LocatedPath]:
        """Return the located paths that some roots reach, each once, but for what those in `without` reach."""
        seen = bytearray(len(self._located))
        self._reach(without, seen)
        return [self._located[place] for place in self._reach(roots, seen)]

    def _reach(self, roots: Iterable[str], seen: bytearray) -> list[int]:
        """Return the places that are reached and were not seen, which they are from now on."""
        stack = []
        for path in roots:
            place = self._places.get(path)
            if place is not None and not seen[place]:
                seen[place] = 1
                stack.append(place)
        found = []
        references = self._references
        while stack:
            place = stack.pop()
            found.append(place)
            for reference in references[place]:
                if not seen[reference]:
                    seen[reference] = 1
                    stack.append(reference)
        return found
