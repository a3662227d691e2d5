"""Comparisons of stored derivations down to the first causes of what differs: reads what `infra.nix.causes` asks for.

Derivations are read in groups of GROUP_BYTES and compared in a thread. A pair that is larger is a group of its own, and
one such group is in memory at a time for all questions, so that a question costs little memory and no event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from coordinator.stores.derivation_records import Stored
from coordinator.stores.derivations import DerivationStore
from infra.nix import aterm
from infra.nix.causes import Bounds, Causes, Compared, Uncompared, search
from infra.nix.difference import ChangedInput, Difference, compare
from infra.nix.rebuilds import FoldedRebuild, fold
from infra.nix.store_path import base_name_of

#: Bounds of a command's question, and of a page's, which is answered within a fraction of a second.
WHOLE: Final = Bounds(pairs=4_000)
PAGE: Final = Bounds(pairs=300)
#: Bounds of a question about a whole set of packages: some 20 s of a thread.
REBUILD: Final = Bounds(pairs=50_000)
#: Bytes of derivations that one question reads, by its bounds.
TEXT_BYTES: Final = {WHOLE: 160 * 1024 * 1024, PAGE: 4 * 1024 * 1024, REBUILD: 512 * 1024 * 1024}
#: Bytes of derivations in memory for one group of comparisons.
GROUP_BYTES: Final = 2 * 1024 * 1024
#: Answers that are kept, some 20 KiB each: derivations never change.
REMEMBERED: Final = 128
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _SearchEnd(Generic[_Result]):
    """End of a search, with what it returned."""

    result: _Result


class Comparisons:
    """Compares derivations of one store, given by base name."""

    def __init__(self, derivations: DerivationStore) -> None:
        self._derivations = derivations
        self._known: OrderedDict[tuple[str, str, Bounds], Causes] = OrderedDict()
        #: Held while a pair of large ones is compared.
        self._large = asyncio.Lock()
        self._folding = asyncio.Lock()

    async def causes(self, before: str, after: str, bounds: Bounds = WHOLE) -> Causes:
        """Return the first causes of what differs between two derivations. Raises `DerivationsError`."""
        question = (before, after, bounds)
        causes = self._known.pop(question, None)
        if causes is None:
            causes = await self._search(before, after, bounds)
        # One that is not there may come.
        if all(cause.uncompared is not Uncompared.UNKNOWN for cause in causes.causes):
            self._known[question] = causes
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return causes

    async def fold(self, changed: Sequence[ChangedInput]) -> FoldedRebuild:
        """Return what all of `changed` follow from; one such question at a time. Raises `DerivationsError`."""
        async with self._folding:
            return await self._driven(fold(changed, REBUILD), REBUILD, ())

    async def _search(self, before: str, after: str, bounds: Bounds) -> Causes:
        return await self._driven(search(before, after, bounds), bounds, (ChangedInput(before, after),))

    async def _driven(
        self,
        work: Generator[Sequence[ChangedInput], Sequence[Compared], _Result],
        bounds: Bounds,
        tops: Collection[ChangedInput],
    ) -> _Result:
        """Compare what a search wants to have compared, and return what it returns."""
        room = TEXT_BYTES[bounds]
        step = await asyncio.to_thread(_next_step, work, None)
        while not isinstance(step, _SearchEnd):
            wanted = step
            stored = await self._derivations.stored({name for pair in wanted for name in _names(pair)})
            answers, groups = _planned(wanted, stored, room, tops)
            for group, size in groups:
                room -= size
                answers.update(await self._compared(group, size))
            # In a thread: the last step of a large one walks all that was found.
            step = await asyncio.to_thread(_next_step, work, [answers[pair] for pair in wanted])
        return step.result

    async def _compared(self, group: Sequence[ChangedInput], size: int) -> dict[ChangedInput, Compared]:
        async with AsyncExitStack() as stack:
            if size > GROUP_BYTES:
                await stack.enter_async_context(self._large)
            texts = await self._derivations.texts({name for pair in group for name in _names(pair)})
            return await asyncio.to_thread(_compare_all, group, texts)


def _next_step(
    work: Generator[Sequence[ChangedInput], Sequence[Compared], _Result], answers: Sequence[Compared] | None
) -> Sequence[ChangedInput] | _SearchEnd[_Result]:
    try:
        return next(work) if answers is None else work.send(answers)
    except StopIteration as end:
        return _SearchEnd(end.value)


def _planned(
    wanted: Sequence[ChangedInput], stored: Mapping[str, Stored], room: int, tops: Collection[ChangedInput]
) -> tuple[dict[ChangedInput, Compared], list[tuple[list[ChangedInput], int]]]:
    """Return the answers that need no reading, and the others in groups with their bytes.

    A pair that its dependents take for the same has no difference, unless it is one of `tops`.
    """
    answers: dict[ChangedInput, Compared] = {}
    groups: list[tuple[list[ChangedInput], int]] = []
    for pair in wanted:
        both = [stored[name] for name in _names(pair) if name in stored]
        size = sum(each.size for each in both)
        if len(both) < 2:
            answers[pair] = Uncompared.UNKNOWN
        elif both[0].modulo == both[1].modulo and pair not in tops:
            answers[pair] = Difference()
        elif size > room:
            answers[pair] = Uncompared.TOO_LARGE
        else:
            room -= size
            if not groups or groups[-1][1] + size > GROUP_BYTES:
                groups.append(([], 0))
            groups[-1][0].append(pair)
            groups[-1] = (groups[-1][0], groups[-1][1] + size)
    return answers, groups


def _names(pair: ChangedInput) -> tuple[str, str]:
    return base_name_of(pair.before), base_name_of(pair.after)


def _compare_all(pairs: Sequence[ChangedInput], texts: Mapping[str, bytes]) -> dict[ChangedInput, Compared]:
    answers: dict[ChangedInput, Compared] = {}
    for pair in pairs:
        before, after = (texts.get(name) for name in _names(pair))
        if before is None or after is None:
            answers[pair] = Uncompared.UNKNOWN
        else:
            answers[pair] = compare(aterm.parse(before), aterm.parse(after))
    return answers
