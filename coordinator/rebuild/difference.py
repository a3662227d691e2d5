"""Difference of two evaluations, and the choice of what of it is looked at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from coordinator.rebuild.model import AttrReport, Package, SetChange, SetSide

#: Causes that are named for one attribute.
MAX_REASONS = 8


@dataclass(frozen=True, slots=True)
class AttrPair:
    """An attribute on both sides; None where it is not."""

    attr: str
    change: SetChange
    before: Package | None = None
    after: Package | None = None
    error: str = ""

    @property
    def system(self) -> str:
        """The system it is for; "" where it evaluates on no side."""
        package = self.after or self.before
        return package.system if package else ""

    @property
    def maintainers(self) -> tuple[str, ...]:
        """Its maintainers at the head, or else at the base."""
        package = self.after or self.before
        return package.maintainers if package else ()

    def report(self) -> AttrReport:
        """Return what a report says of it before anything is built."""
        return AttrReport(
            self.attr,
            self.system,
            self.change,
            before=self.before.drv if self.before else "",
            after=self.after.drv if self.after else "",
            error=self.error,
        )


@dataclass(frozen=True, slots=True)
class SetDifference:
    """All attributes that differ, by name, and how many do not."""

    pairs: tuple[AttrPair, ...]
    unchanged: int
    #: Those that a selection left out.
    left_out: int = 0


def differ(base: SetSide, head: SetSide) -> SetDifference:
    """Compare two evaluations by attribute. An attribute is changed where one of its output paths is."""
    pairs = []
    unchanged = 0
    names = base.packages.keys() | base.failed.keys() | head.packages.keys() | head.failed.keys()
    for attr in sorted(names):
        before, after = base.packages.get(attr), head.packages.get(attr)
        error = head.failed.get(attr) or base.failed.get(attr) or ""
        change = _change(attr, base, head)
        if change is SetChange.CHANGED and before and after and _is_same(before, after):
            unchanged += 1
            continue
        pairs.append(AttrPair(attr, change, before, after, error))
    return SetDifference(tuple(pairs), unchanged)


def _is_same(before: Package, after: Package) -> bool:
    if before.drv == after.drv:
        return before.outputs == after.outputs
    return bool(before.outputs) and before.outputs == after.outputs and all(path for _, path in before.outputs)


def _change(attr: str, base: SetSide, head: SetSide) -> SetChange:
    match attr in base.packages, attr in head.packages:
        case True, True:
            return SetChange.CHANGED
        case True, False:
            return SetChange.NO_LONGER_EVALUATES if attr in head.failed else SetChange.REMOVED
        case False, True:
            return SetChange.EVALUATES_AGAIN if attr in base.failed else SetChange.ADDED
        case _:
            if attr not in base.failed:
                return SetChange.NO_LONGER_EVALUATES
            return SetChange.NEVER_EVALUATES if attr in head.failed else SetChange.REMOVED


@dataclass(frozen=True, slots=True)
class Selection:
    """Choice of attributes; each test that is given must hold."""

    #: Shell patterns, of which one must match the attribute, with or without its system in front.
    globs: tuple[str, ...] = ()
    expression: re.Pattern[str] | None = None
    maintainers: tuple[str, ...] = ()
    #: Attributes that at most so many others stand on; those that do not exist at the head are left out.
    at_most_dependents: int | None = None

    @property
    def is_everything(self) -> bool:
        """True where nothing is left out."""
        return self == Selection()


def select(
    difference: SetDifference,
    selection: Selection,
    dependents: Callable[[], Mapping[str, object]] = dict,
) -> SetDifference:
    """Leave out what is not chosen. `dependents` gives the derivations of the head with few dependents."""
    if selection.is_everything:
        return difference
    few = None if selection.at_most_dependents is None else dependents()
    wanted = {each.casefold() for each in selection.maintainers}
    chosen = [
        pair
        for pair in difference.pairs
        if (not selection.globs or any(_matches(pair, glob) for glob in selection.globs))
        and (selection.expression is None or _searches(pair, selection.expression))
        and (not wanted or any(each.casefold() in wanted for each in pair.maintainers))
        and (few is None or (pair.after is not None and pair.after.drv in few))
    ]
    left_out = len(difference.pairs) - len(chosen)
    return SetDifference(tuple(chosen), difference.unchanged, left_out)


def _names(pair: AttrPair) -> Sequence[str]:
    """Return the attribute, and the same without its system where it begins or goes on with that."""
    names = [pair.attr]
    system = pair.system
    if system and pair.attr.startswith(f"{system}."):
        names.append(pair.attr.removeprefix(f"{system}."))
    elif system and f".{system}." in pair.attr:
        names.append(pair.attr.partition(f".{system}.")[2])
    return names


def _matches(pair: AttrPair, glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in _names(pair))


def _searches(pair: AttrPair, expression: re.Pattern[str]) -> bool:
    return any(expression.search(name) for name in _names(pair))


def changed(pairs: Iterable[AttrPair]) -> list[AttrPair]:
    """Return those that are on both sides."""
    return [pair for pair in pairs if pair.before is not None and pair.after is not None]
