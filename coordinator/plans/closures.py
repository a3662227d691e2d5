"""Closures of wished paths, and where each member can be fetched: pure.

A path can be fetched only with its whole runtime closure, so one member that no cache has takes all along that refer
to it, over any number of others. Members may refer to each other in circles.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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
class Survey:
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


def extents(survey: Survey) -> dict[str, Reach]:
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


def members(located: Mapping[str, LocatedPath], roots: Iterable[str], without: Collection[str] = ()) -> list[str]:
    """Return the located paths that some roots reach, each once; the way does not lead through those in `without`."""
    seen = set(without)
    found: list[str] = []
    stack = list(roots)
    while stack:
        path = stack.pop()
        if path in seen or path not in located:
            continue
        seen.add(path)
        found.append(path)
        stack.extend(located[path].references)
    return found
