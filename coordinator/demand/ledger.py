"""Ledger of misses: which paths people wait for, in bounded memory, whatever is asked for.

Counts are of people, not of requests: each path has 64 bits, and a request sets the one that the asker's address maps
to under a salt of the day. How many are set says roughly how many askers there were, and nothing says who they were.

Two shelves keep a flood of made-up paths from drowning what people wait for. What is new lies on the open shelf, from
which the one asked for longest ago falls off. The kept shelf takes what the farm could build, or what two have asked
for; when it is full, a path gets in only where it stands above the lowest of some that are looked at in turn. What the
farm could build stands above everything else, then more people above fewer.

Pure: the caller gives the time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import nlargest
from itertools import islice
from typing import Final

from coordinator.stores.known_outputs import KnownOutput

#: Paths of each shelf, some 300 bytes each.
KEPT: Final = 4096
OPEN: Final = 8192
#: Kept paths that are looked at for the lowest.
LOOKED_AT: Final = 16
#: Bits of one path.
BITS: Final = 64
#: Seconds after which a path that the farm could not build is to be looked up again: its derivation may have come.
LOOK_AGAIN_S: Final = 600.0
#: People below which a path is forgotten at the end of a day, after halving: one asker is remembered for two days.
FORGOTTEN_BELOW: Final = 0.5
#: How many have asked, most likely, by how many bits are set (linear counting).
_COUNTED: Final = tuple(BITS * math.log(BITS / max(BITS - bits, 0.5)) for bits in range(BITS + 1))


@dataclass(slots=True)
class Miss:
    """A path that was asked for and is not there."""

    hash_part: str
    first_at: float
    last_at: float
    #: Bits of those who asked today.
    askers: int = 0
    #: People of the days before, halved with each day.
    earlier: float = 0.0
    #: Halved with each day too.
    requests: float = 0.0
    #: What the farm knows how to build; None where it does not, or has not looked yet.
    known: KnownOutput | None = None
    #: When it was last to be looked up.
    sought_at: float = -math.inf
    #: When the farm last did something about it, and what; 0 for never.
    acted_at: float = 0.0
    note: str = ""
    submission: str = ""

    @property
    def people(self) -> float:
        """Roughly how many wait, lately."""
        return max(self.earlier, _COUNTED[self.askers.bit_count()])

    @property
    def rank(self) -> tuple[bool, float]:
        """Place among others, the higher the more it counts."""
        return self.known is not None, self.people


class MissLedger:
    """The two shelves."""

    def __init__(self, kept: int = KEPT, shelf: int = OPEN) -> None:
        self._most_kept = kept
        self._most_open = shelf
        #: Those looked at longest ago first.
        self._kept: OrderedDict[str, Miss] = OrderedDict()
        #: Those asked for longest ago first.
        self._open: OrderedDict[str, Miss] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept) + len(self._open)

    def __iter__(self) -> Iterator[Miss]:
        yield from self._kept.values()
        yield from self._open.values()

    def get(self, hash_part: str) -> Miss | None:
        """Return what is known of a path."""
        return self._kept.get(hash_part) or self._open.get(hash_part)

    def note(self, hash_part: str, asker: int, now: float) -> bool:
        """Count a request by the asker with this number; return whether the path is to be looked up (`identify`)."""
        miss = self.get(hash_part)
        if miss is None:
            miss = self._open[hash_part] = Miss(hash_part, now, now)
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        miss.last_at = now
        miss.askers |= 1 << asker % BITS
        miss.requests += 1
        if hash_part in self._open:
            self._open.move_to_end(hash_part)
            if miss.askers.bit_count() > 1:
                self._keep(miss)
        if miss.known is not None or now - miss.sought_at < LOOK_AGAIN_S:
            return False
        miss.sought_at = now
        return True

    def identify(self, known: KnownOutput) -> None:
        """Note that the farm knows how to build a path; one that has fallen off the shelf meanwhile stays off."""
        miss = self.get(known.hash_part)
        if miss is not None:
            miss.known = known
            if known.hash_part in self._open:
                self._keep(miss)

    def forget(self, hash_parts: Iterable[str]) -> None:
        """Forget paths that are there by now."""
        for hash_part in hash_parts:
            self._kept.pop(hash_part, None)
            self._open.pop(hash_part, None)

    def end_day(self) -> None:
        """Halve what was counted, and forget what had no asker lately. Askers of tomorrow have other bits."""
        for shelf in (self._kept, self._open):
            for hash_part, miss in list(shelf.items()):
                miss.earlier, miss.askers = miss.people / 2, 0
                miss.requests /= 2
                if miss.earlier < FORGOTTEN_BELOW:
                    del shelf[hash_part]

    def buildable(self, most: int, counts: Callable[[Miss, KnownOutput], bool]) -> list[tuple[Miss, KnownOutput]]:
        """Return some of what the farm could build and `counts`, the most wanted first."""
        known = ((miss, miss.known) for miss in self._kept.values() if miss.known is not None)
        return nlargest(most, (pair for pair in known if counts(*pair)), key=lambda pair: _place(pair[0]))

    def _keep(self, miss: Miss) -> None:
        """Put a path of the open shelf on the kept one, where there is room or it stands above another."""
        if len(self._kept) >= self._most_kept:
            looked_at = list(islice(self._kept.values(), LOOKED_AT))
            lowest = min(looked_at, key=lambda each: each.rank)
            for each in looked_at:
                self._kept.move_to_end(each.hash_part)
            if lowest.rank >= miss.rank:
                return
            del self._kept[lowest.hash_part]
        del self._open[miss.hash_part]
        self._kept[miss.hash_part] = miss


def in_order(misses: Iterable[Miss]) -> list[Miss]:
    """Return misses by rank, the highest first; the latest first among equals."""
    return sorted(misses, key=_place, reverse=True)


def _place(miss: Miss) -> tuple[bool, float, float]:
    return (*miss.rank, miss.last_at)
