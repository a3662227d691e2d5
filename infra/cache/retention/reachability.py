"""Marking: which paths are kept, and by which root first. Integers only, and one pass over the references.

A path's serial is greater than those of all that it refers to. So one pass over the references in falling order of the
referrer sees each path's own mark complete before it hands it on: no stack, no second look, twelve bytes for each path
(and as many again for tombstones).

Roots have ranks: 0 is kept whatever it costs, then come those that a size budget may end, the last used first. A path
gets the lowest rank that reaches it. What is added up by rank then shows how much each root adds to those before it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator

#: The rank of what no root reaches.
UNREACHED = 2**31 - 1


class Marks:
    """Published paths by serial, each with its rank and when it was tombstoned (0.0: it is not).

    First all paths are added in rising order, then roots are marked, then all references are followed, then it is
    queried.
    """

    def __init__(self) -> None:
        self._serials = array("q")
        self._tombstoned = array("d")
        self._ranks = array("i")

    def __len__(self) -> int:
        return len(self._serials)

    def add(self, serial: int, tombstoned_at: float | None, *, kept: bool) -> None:
        """Add the path with the next greater serial; `kept`: it is a root of rank 0."""
        self._serials.append(serial)
        self._tombstoned.append(tombstoned_at or 0.0)
        self._ranks.append(0 if kept else UNREACHED)

    def mark(self, serial: int, rank: int) -> None:
        """Let a root of this rank name a path; one that was not added is none of ours."""
        index = bisect_left(self._serials, serial)
        if index < len(self._serials) and self._serials[index] == serial:
            self._ranks[index] = min(self._ranks[index], rank)

    def follow(self, references: Iterable[tuple[int, int]]) -> None:
        """Hand marks on along some (referrer, reference), of all in falling order of the referrer."""
        serials, ranks = self._serials, self._ranks
        last, rank = -1, UNREACHED
        for referrer, reference in references:
            if referrer != last:
                last, rank = referrer, self.rank(referrer)
            if rank != UNREACHED:
                index = bisect_left(serials, reference)
                if index < len(serials) and serials[index] == reference and ranks[index] > rank:
                    ranks[index] = rank

    def rank(self, serial: int) -> int:
        """Return the lowest rank that reaches a path."""
        index = bisect_left(self._serials, serial)
        if index < len(self._serials) and self._serials[index] == serial:
            return self._ranks[index]
        # Published after the others were added: for this collection it is kept.
        return 0

    def limit(self, ranks: int) -> None:
        """Let go of what only roots from this rank on reach."""
        for index, rank in enumerate(self._ranks):
            if rank >= ranks:
                self._ranks[index] = UNREACHED

    def kept(self) -> int:
        """Return how many paths a root reaches."""
        return len(self._ranks) - self._ranks.count(UNREACHED)

    def to_revive(self) -> list[int]:
        """Return reached paths that are tombstoned."""
        return [serial for serial, rank, at in self._rows() if rank != UNREACHED and at]

    def to_tombstone(self) -> list[int]:
        """Return paths that no root reaches and that are not tombstoned; referrers before what they refer to."""
        return [serial for serial, rank, at in self._rows() if rank == UNREACHED and not at][::-1]

    def to_delete(self, tombstoned_before: float) -> list[int]:
        """Return paths that no root reaches and that were tombstoned by then; referrers before what they refer to."""
        return [serial for serial, rank, at in self._rows() if rank == UNREACHED and 0 < at <= tombstoned_before][::-1]

    def _rows(self) -> Iterator[tuple[int, int, float]]:
        return zip(self._serials, self._ranks, self._tombstoned, strict=True)


def within_budget(added: Iterable[int], max_bytes: int) -> int:
    """Return how many ranks fit: `added` is what each adds to those before it, rank 0 first, which always fits."""
    total = 0
    for rank, size in enumerate(added):
        total += size
        if rank and total > max_bytes:
            return rank
    return UNREACHED


def removable_together(falling: Iterable[int], named: set[int], referrers: Iterable[tuple[int, int]]) -> list[int]:
    """Return those of some paths that can go together because nothing that stays needs them.

    Args:
        falling: serials, in falling order: referrers before what they refer to.
        named: serials of those that a root names.
        referrers: (reference, referrer) for each living referrer of one of them; itself excepted.
    """
    needed_by: dict[int, list[int]] = {}
    for reference, referrer in referrers:
        needed_by.setdefault(reference, []).append(referrer)
    going: set[int] = set()
    for serial in falling:
        if serial not in named and all(referrer in going for referrer in needed_by.get(serial, ())):
            going.add(serial)
    return sorted(going, reverse=True)
