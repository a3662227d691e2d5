"""Causes of a mass rebuild: of many derivations that changed, the few differences that all the others follow from.

A changed `stdenv` changes every package, and is one cause. `fold` walks the pairs of inputs that differ, level by
level, from all changed derivations together. A pair with changes of its own is a cause, and causes with the same
changes are one. Then each pair gets the causes that it or an input of it has, inputs first. It is pure: a generator
that yields the pairs that it wants to have compared and is sent their differences, as `infra.nix.causes`.

Rules:
1. Every pair is compared once, so that the time is linear in the graphs' size. Of a pair there stay its inputs and one
   number.
2. At most MAX_FOLDED causes are told apart; the others count, and are all taken for one.
3. At most `Bounds.pairs` pairs are compared, down to `Bounds.depth`; `unfollowed` counts those that were left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from infra.nix.causes import BATCH, Bounds, Compared, Uncompared
from infra.nix.difference import Change, ChangedInput, Difference
from infra.nix.store_path import HASH_PART_PATTERN, drv_name_of

#: Causes that are told apart.
MAX_FOLDED: Final = 1024
#: Derivations that a cause names.
MAX_NAMES: Final = 8
_HASH: Final = re.compile(f"{HASH_PART_PATTERN}(?=-)")


@dataclass(frozen=True, slots=True)
class RebuildCause:
    """One thing that changed, or could not be compared, in `count` derivations."""

    #: Of the first of them, on both sides.
    pair: ChangedInput
    #: Names of the derivations, the first MAX_NAMES in order.
    names: tuple[str, ...]
    count: int
    #: The first of `change_count`.
    changes: tuple[Change, ...] = ()
    change_count: int = 0
    uncompared: Uncompared | None = None
    #: Changed derivations of the question that follow from it.
    reach: int = 0


@dataclass(frozen=True, slots=True)
class FoldedRebuild:
    """The causes that reach most first, and the causes of each changed derivation as places among them."""

    causes: tuple[RebuildCause, ...] = ()
    #: Those that were found, beyond MAX_FOLDED too; the last of `causes` then stands for the rest.
    cause_count: int = 0
    reasons: Mapping[ChangedInput, tuple[int, ...]] = field(default_factory=dict)
    compared: int = 0
    unfollowed: int = 0


def fold(
    changed: Iterable[ChangedInput], bounds: Bounds
) -> Generator[Sequence[ChangedInput], Sequence[Compared], FoldedRebuild]:
    """Search what all of `changed` follow from. Pairs are full paths."""
    tops = list(dict.fromkeys(changed))
    found = _Causes()
    #: Pair -> its inputs that differ, in the order in which pairs were met.
    inputs: dict[ChangedInput, tuple[ChangedInput, ...]] = {}
    own: dict[ChangedInput, int] = {}
    room = max(0, bounds.pairs)
    level, unfollowed = tops[:room], max(0, len(tops) - room)
    known = set(level)
    depth = 0
    while level:
        following: list[ChangedInput] = []
        for start in range(0, len(level), BATCH):
            batch = level[start : start + BATCH]
            for pair, answer in zip(batch, (yield batch), strict=True):
                its = answer.inputs if isinstance(answer, Difference) else ()
                if (cause := found.of(pair, answer)) is not None:
                    own[pair] = cause
                for each in its:
                    if each in known:
                        continue
                    if len(known) >= bounds.pairs or depth >= bounds.depth:
                        unfollowed += 1
                        continue
                    known.add(each)
                    following.append(each)
                inputs[pair] = tuple([each for each in its if each in known])
                if isinstance(answer, Difference):
                    unfollowed += answer.input_count - len(its)
        level, depth = following, depth + 1
    reached = _reached(inputs, own)
    return found.folded({top: reached.get(top, 0) for top in tops}, len(inputs), unfollowed)


def few_dependents(
    needs: Mapping[str, Iterable[str]], wanted: Collection[str], at_most: int
) -> dict[str, frozenset[str]]:
    """Return those of `wanted` on which at most `at_most` others of them stand, and which these are.

    `needs` has all derivations with their inputs, inputs first. Sets that grow larger are dropped as they do, so that
    the time is linear in the graph's size, and in `at_most`.
    """
    #: What stands on each; None where that is too much.
    above: dict[str, frozenset[str] | None] = {}
    for name in reversed(list(needs)):
        its = above.get(name, frozenset())
        passed_on = its | {name} if its is not None and name in wanted else its
        for need in needs[name]:
            before = above.get(need, frozenset())
            if before is None or passed_on is None:
                above[need] = None
                continue
            both = before | passed_on
            above[need] = both if len(both) <= at_most else None
        if name not in wanted:
            above.pop(name, None)
    found = {name: above.get(name, frozenset()) for name in needs if name in wanted}
    return {name: its for name, its in found.items() if its is not None and len(its) <= at_most}


class _Causes:
    """Causes by what changed."""

    def __init__(self) -> None:
        self._places: dict[object, int] = {}
        self._pairs: list[ChangedInput] = []
        self._changes: list[tuple[tuple[Change, ...], int, Uncompared | None]] = []
        self._names: list[dict[str, None]] = []
        self._counts: list[int] = []
        self._beyond = 0

    def of(self, pair: ChangedInput, answer: Compared) -> int | None:
        """Return the place of what a pair shows of its own; None where it only follows from its inputs."""
        changes: tuple[Change, ...] = ()
        count = 0
        uncompared: Uncompared | None = None
        key: object
        if isinstance(answer, Uncompared):
            uncompared = key = answer
        else:
            changes, count = answer.changes, answer.change_count
            if not changes and not answer.inputs:
                # Nothing else says why: a path that stands in a text without being an input.
                changes, count = answer.path_changes, answer.path_change_count
            if not changes:
                return None
            key = (tuple(map(_without_hashes, changes)), count)
        place = self._places.get(key)
        if place is None:
            if len(self._pairs) == MAX_FOLDED:
                self._beyond += 1
                place = MAX_FOLDED - 1
            else:
                place = len(self._pairs)
                self._pairs.append(pair)
                self._changes.append((changes, count, uncompared))
                self._names.append({})
                self._counts.append(0)
            if len(self._places) < 2 * MAX_FOLDED:
                self._places[key] = place
        self._counts[place] += 1
        names = self._names[place]
        if len(names) < MAX_NAMES:
            names[drv_name_of(pair.after)] = None
        return place

    def folded(self, tops: Mapping[ChangedInput, int], compared: int, unfollowed: int) -> FoldedRebuild:
        """Return them with those that each of `tops` has, a bit for each place."""
        reach = [0] * len(self._pairs)
        of_bits: dict[int, tuple[int, ...]] = {}
        for bits in tops.values():
            if bits not in of_bits:
                of_bits[bits] = tuple([place for place in range(len(self._pairs)) if bits >> place & 1])
            for place in of_bits[bits]:
                reach[place] += 1
        order = sorted(range(len(self._pairs)), key=lambda place: (-reach[place], place))
        at = {place: number for number, place in enumerate(order)}
        sorted_places = {bits: tuple(sorted(at[place] for place in its)) for bits, its in of_bits.items()}
        causes = tuple(
            RebuildCause(
                self._pairs[place], tuple(self._names[place]), self._counts[place], *self._changes[place], reach[place]
            )
            for place in order
        )
        reasons = {top: sorted_places[bits] for top, bits in tops.items()}
        return FoldedRebuild(causes, len(causes) + self._beyond, reasons, compared, unfollowed)


def _reached(
    inputs: Mapping[ChangedInput, tuple[ChangedInput, ...]], own: Mapping[ChangedInput, int]
) -> dict[ChangedInput, int]:
    """Return for each pair a bit for each cause that it or a pair below it has."""
    reached: dict[ChangedInput, int] = {}
    for top in inputs:
        stack = [top]
        while stack:
            pair = stack[-1]
            if pair in reached:
                stack.pop()
                continue
            left = [each for each in inputs[pair] if each not in reached and each in inputs]
            if left:
                stack += left
                continue
            bits = 1 << own[pair] if pair in own else 0
            for each in inputs[pair]:
                bits |= reached.get(each, 0)
            reached[pair] = bits
            stack.pop()
    return reached


def _without_hashes(change: Change) -> Change:
    sides = (None if side is None else _HASH.sub("", side) for side in (change.before, change.after))
    return Change(change.field, change.name, *sides)
