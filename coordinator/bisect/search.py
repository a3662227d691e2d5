"""The strategy of a bisection: what to look at next, given what is known and how many builds may run.

A *position* is a commit of a line; the first one is good and the last one bad. An evaluation gives a position its
*class*: positions of one derivation are one class, and one build answers for all of them. Some positions cannot be
tested, because they do not evaluate or because their build says neither good nor bad.

The first bad position that is known, and the last good one before it, bound the search. Positions are picked so that
they cut what lies between into even parts; where several picks are of one class, what is left of the slots cuts the
largest parts whose ends differ. So `slots` builds at a time need at most as many rounds as `slots + 1`-ary search, and
a history in which the derivation seldom changes is searched by evaluations alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Final

#: Part of a part by which a pick may move to a position that is evaluated already.
_SLACK: Final = 4


class Judgement(StrEnum):
    """The meaning of a build for the search."""

    GOOD = "good"
    BAD = "bad"
    #: Neither: the position is passed over.
    UNTESTABLE = "untestable"


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Knowledge of a search: the first position's class is good and the last one's bad."""

    #: Positions, both ends included.
    count: int
    #: Of each position that was evaluated.
    classes: Mapping[int, str]
    answers: Mapping[str, Judgement]
    #: Positions that do not evaluate.
    broken: AbstractSet[int] = frozenset()

    def answer(self, position: int) -> Judgement | None:
        """Return what is known of a position."""
        if position in self.broken:
            return Judgement.UNTESTABLE
        return self.answers.get(self.classes.get(position, ""))


@dataclass(frozen=True, slots=True)
class EvaluateNow:
    """Positions to evaluate, side by side."""

    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BuildNow:
    """A position for each class that is to be built now; none: those that run must end first."""

    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A good position and the next bad one; nothing between them can be tested."""

    good: int
    bad: int
    between: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Line:
    """The positions that may still be where it began: a good one, those that can be tested, a bad one."""

    points: tuple[int, ...]
    known: Knowledge
    #: Index of each point.
    places: Mapping[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", {point: index for index, point in enumerate(self.points)})

    def class_at(self, index: int) -> str | None:
        return self.known.classes.get(self.points[index])


def bounds(known: Knowledge) -> tuple[int, int]:
    """Return the first bad position that is known, and the last good one before it, the good one first."""
    good = 0
    for position in range(known.count):
        match known.answer(position):
            case Judgement.GOOD:
                good = position
            case Judgement.BAD:
                return good, position
            case _:
                pass
    raise ValueError("the last position is not bad")


def good_again(known: Knowledge) -> tuple[int, ...]:
    """Return the good positions after the first bad one: with any, there are several places where it turns bad."""
    _, bad = bounds(known)
    return tuple(each for each in range(bad, known.count) if known.answer(each) is Judgement.GOOD)


def still_wanted(known: Knowledge, running: AbstractSet[str]) -> frozenset[str]:
    """Return the classes of those being built that say something about what lies between the bounds."""
    good, bad = bounds(known)
    return frozenset({known.classes[each] for each in range(good + 1, bad) if each in known.classes} & running)


def rounds_needed(count: int, slots: int) -> int:
    """Return the rounds of `slots` builds that a search of `count` positions takes at most, both ends included."""
    rounds, reach = 0, 1
    while reach < count - 1:
        rounds, reach = rounds + 1, reach * (slots + 1)
    return rounds


def next_step(known: Knowledge, slots: int, running: AbstractSet[str] = frozenset()) -> EvaluateNow | BuildNow | Found:
    """Return what to do next.

    Args:
        known: What is known.
        slots: Builds that may run at a time, with those that run.
        running: Classes that are being built.
    """
    good, bad = bounds(known)
    between = tuple(range(good + 1, bad))
    testable = tuple(each for each in between if known.answer(each) is not Judgement.UNTESTABLE)
    if not testable:
        return Found(good, bad, between)
    line = _Line((good, *testable, bad), known)
    under_way = {each for each in testable if known.classes.get(each) in running}
    free = slots - len({known.classes[each] for each in under_way})
    if free <= 0:
        return BuildNow(())
    if not under_way:
        picks = _even(line, free)
        if unknown := tuple(each for each in picks if each not in known.classes):
            return EvaluateNow(unknown)
    else:
        picks = ()
    return _filled(line, picks, under_way, free)


def _even(line: _Line, parts: int) -> tuple[int, ...]:
    """Return at most `parts` points that cut the line evenly; those that are evaluated are taken where they are near.

    No part becomes larger than what the rounds that are needed after this one can search.
    """
    last = len(line.points) - 1
    if last - 1 <= parts:
        return line.points[1:-1]
    largest = (parts + 1) ** (rounds_needed(last + 1, parts) - 1)
    slack = last // (parts + 1) // _SLACK
    picks: list[int] = []
    before = 0
    for number in range(1, parts + 1):
        ideal = round(number * last / (parts + 1))
        lowest = max(before + 1, ideal - slack, last - largest * (parts + 1 - number))
        highest = min(before + largest, ideal + slack, last - 1 - (parts - number))
        near = sorted(range(lowest, highest + 1), key=lambda index: (abs(index - ideal), index))
        before = next((index for index in near if line.class_at(index) is not None), near[0] if near else ideal)
        picks.append(line.points[before])
    return tuple(picks)


def _filled(line: _Line, picks: Sequence[int], under_way: AbstractSet[int], free: int) -> EvaluateNow | BuildNow:
    """Return the picks, one of each class, and more of them in the largest parts while slots are left."""
    classes = line.known.classes
    built: dict[str, int] = {}
    for pick in picks:
        built.setdefault(classes[pick], pick)
    cuts = {0, len(line.points) - 1, *(line.places[each] for each in (*picks, *under_way))}
    taken = {classes[each] for each in under_way}
    wanted: list[int] = []
    while len(built) + len(wanted) < free:
        middle = _largest_middle(line, cuts)
        if middle is None:
            break
        cuts.add(middle)
        its_class = line.class_at(middle)
        if its_class is None:
            wanted.append(line.points[middle])
        elif its_class not in taken:
            built.setdefault(its_class, line.points[middle])
    return EvaluateNow(tuple(wanted)) if wanted else BuildNow(tuple(built.values()))


def _largest_middle(line: _Line, cuts: AbstractSet[int]) -> int | None:
    """Return the middle of the largest part whose ends are of different classes; None where there is none.

    Where both ends are of one class nothing is taken to have changed between them. An end whose evaluation is asked
    for only now may be of any class.
    """
    ordered = sorted(cuts)
    widest, middle = 1, None
    for left, right in pairwise(ordered):
        end = line.class_at(left)
        if right - left > widest and (end is None or end != line.class_at(right)):
            widest, middle = right - left, (left + right) // 2
    return middle
