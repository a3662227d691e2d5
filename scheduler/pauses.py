"""Pauses in long work: places where the driver of the core may do other work before it goes on.

A mass rebuild has some hundred thousand steps, and one event may concern all of them. Work of that kind is written as a
generator that yields `PAUSE` after each `PIECE` of it; between two pauses it takes some milliseconds. The core itself
decides nothing at a pause: driven to its end at once (`whole`) the work gives the same facts in the same order. Between
the pauses of one call the state may be read, with the call's work half done, but takes nothing else in.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, MutableMapping, Sequence
from enum import Enum
from typing import Final, Literal, TypeVar

_S = TypeVar("_S")
_T = TypeVar("_T")


class Pause(Enum):
    """The type of `PAUSE`."""

    HERE = 1


PAUSE: Final[Literal[Pause.HERE]] = Pause.HERE
#: Steps and edges looked at, or changed, between two pauses: some microseconds each. Edges count because few steps may
#: have very many: a thousand packages that all need the same thirty have thirty thousand.
PIECE: Final = 512
#: Facts applied between two pauses of a call: some ten microseconds each, with what follows from them. Fewer where they
#: change `PIECE` edges.
FACTS_PIECE: Final = 64


def whole(work: Generator[object, None, _T]) -> _T:
    """Do all of the work at once; return what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: _T = end.value
            return result


def picked(items: Sequence[_S], pick: Callable[[Sequence[_S]], Iterable[_T]]) -> Generator[Pause, None, tuple[_T, ...]]:
    """Return what `pick` gives of all pieces of `items`, with a pause after each."""
    found: list[_T] = []
    for start in range(0, len(items), PIECE):
        found += pick(items[start : start + PIECE])
        yield PAUSE
    return tuple(found)


def unique(items: Iterable[_S]) -> Generator[Pause, None, dict[_S, None]]:
    """Return the items in order, each once."""
    seen: dict[_S, None] = {}
    for count, item in enumerate(items, 1):
        seen[item] = None
        if not count % PIECE:
            yield PAUSE
    return seen


def emptied(large: MutableMapping[_S, _T]) -> Generator[Pause, None, None]:
    """Empty a mapping that nothing needs any more: to let go of a large one in one go takes milliseconds too."""
    while large:
        for _ in range(min(PIECE, len(large))):
            large.popitem()
        yield PAUSE
    # Its table too, which does not shrink as entries go: five megabytes of one that had 100,000.
    large.clear()
