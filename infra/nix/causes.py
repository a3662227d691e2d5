"""Search for the first causes of a difference: follows inputs that differ down to those whose own fields do.

Two builds of one package usually differ because something far below them does: `hello` because `stdenv` differs because
`bash` has another patch. `search` compares the two derivations, then the pairs of inputs that differ, level by level,
and says of each pair with own changes how it is reached. It is pure: a generator that yields the pairs that it wants to
have compared and is sent their differences.

Rules:
1. Every pair is compared once, however many ways lead to it; the shortest way is told.
2. Pairs of one package with the same changes are one cause (`alike` counts the others): a bootstrap builds the same
   package several times.
3. At most `Bounds.pairs` pairs are compared, down to `Bounds.depth`; `unfollowed` counts those that were left out.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from infra.nix.difference import Change, ChangedInput, Difference
from infra.nix.store_path import HASH_PART_PATTERN, drv_name_of, package_of

#: Pairs that are asked for at once.
BATCH: Final = 256
#: Causes that are told.
MAX_CAUSES: Final = 20
_HASH: Final = re.compile(f"{HASH_PART_PATTERN}(?=-)")


class Uncompared(Enum):
    """Reasons why a pair has no difference."""

    #: One of the two derivations is not there.
    UNKNOWN = "unknown"
    #: Together they are larger than what may be compared.
    TOO_LARGE = "too large"


#: An empty difference stands for a pair of which the dependents see no difference.
Compared = Difference | Uncompared


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of a search."""

    pairs: int
    depth: int = 100


@dataclass(frozen=True, slots=True)
class Cause:
    """A pair whose own fields differ, or that could not be compared."""

    #: Names from an input of the derivation in question down to this one; empty for that derivation itself.
    way: tuple[str, ...]
    pair: ChangedInput
    #: The first of `change_count`.
    changes: tuple[Change, ...] = ()
    change_count: int = 0
    uncompared: Uncompared | None = None
    #: Other pairs of the package that have the same changes.
    alike: int = 0


@dataclass(frozen=True, slots=True)
class Causes:
    """Result of a search: the first MAX_CAUSES of `count` causes, those next to the derivation in question first."""

    causes: tuple[Cause, ...] = ()
    count: int = 0
    #: Pairs that were compared, and those that were seen and not looked at.
    compared: int = 0
    unfollowed: int = 0


def search(before: str, after: str, bounds: Bounds) -> Generator[Sequence[ChangedInput], Sequence[Compared], Causes]:
    """Search the causes of what differs between two derivations, given by full path."""
    top = ChangedInput(before, after)
    ways: dict[ChangedInput, tuple[ChangedInput, ...]] = {top: ()}
    level, compared, unfollowed = [top], 0, 0
    found = _Folded()
    for depth in range(bounds.depth + 1):
        following: list[ChangedInput] = []
        for start in range(0, len(level), BATCH):
            batch = level[start : start + BATCH]
            for pair, answer in zip(batch, (yield batch), strict=True):
                found.add(pair, ways[pair], answer)
                inputs = answer.inputs if isinstance(answer, Difference) else ()
                fresh = [each for each in dict.fromkeys(inputs) if each not in ways]
                room = max(0, bounds.pairs - len(ways)) if depth < bounds.depth else 0
                ways.update((each, (*ways[pair], each)) for each in fresh[:room])
                following += fresh[:room]
                unfollowed += len(fresh) - len(fresh[:room])
                if isinstance(answer, Difference):
                    unfollowed += answer.input_count - len(answer.inputs)
            compared += len(batch)
        level = following
    causes = list(found.causes.values())
    return Causes(tuple(causes[:MAX_CAUSES]), len(causes), compared, unfollowed)


class _Folded:
    """Causes, each once."""

    def __init__(self) -> None:
        self.causes: dict[object, Cause] = {}

    def add(self, pair: ChangedInput, way: tuple[ChangedInput, ...], answer: Compared) -> None:
        """Take what is known of a pair."""
        names = tuple([drv_name_of(each.after) for each in way])
        if isinstance(answer, Uncompared):
            self.causes[pair] = Cause(names, pair, uncompared=answer)
            return
        changes, count = answer.changes, answer.change_count
        if not changes and not answer.inputs:
            # Nothing else says why: a path that stands in a text without being an input.
            changes, count = answer.path_changes, answer.path_change_count
        if not changes:
            return
        key = (package_of(drv_name_of(pair.after)), tuple(map(_without_hashes, changes)), count)
        known = self.causes.get(key)
        if known is None:
            self.causes[key] = Cause(names, pair, changes, count)
        else:
            self.causes[key] = replace(known, alike=known.alike + 1)


def _without_hashes(change: Change) -> Change:
    sides = (None if side is None else _HASH.sub("", side) for side in (change.before, change.after))
    return Change(change.field, change.name, *sides)
