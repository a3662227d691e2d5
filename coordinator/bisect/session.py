"""One bisection: evaluates, asks the farm, builds and remembers as the strategy says, until it has its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, TypeVar

from coordinator.bisect.errors import BisectError
from coordinator.bisect.memory import Evaluated, Memory
from coordinator.bisect.search import (
    BuildNow,
    EvaluateNow,
    Found,
    Judgement,
    Knowledge,
    next_step,
    still_wanted,
)
from coordinator.bisect.verdicts import Criterion, Origin, Outcome, Until
from coordinator.evaluation.model import EvaluatedRoot

#: Most builds side by side, whatever the farm has.
MAX_SLOTS: Final = 64
_T = TypeVar("_T")


class Builds(Protocol):
    """The farm, as a bisection uses it."""

    async def slots(self, root: EvaluatedRoot) -> int:
        """Return how many builds of this kind the farm has room for now."""
        ...

    async def settled(self, roots: Sequence[EvaluatedRoot]) -> set[str]:
        """Return the derivations of `roots` whose outcome the farm has without a build."""
        ...

    async def outcome(self, root: EvaluatedRoot, commit: str) -> Outcome:
        """Have a derivation built, unless the farm has its outcome."""
        ...

    async def likeness(self, good: Outcome, outcome: Outcome) -> dict[str, str]:
        """Return how alike each output is to that of good."""
        ...

    async def withdraw(self, root: EvaluatedRoot) -> None:
        """End the build of a derivation that is no longer of interest."""
        ...


class Witness(Protocol):
    """Receiver of what a bisection does, for people."""

    def evaluated(self, revisions: Sequence[str]) -> None:
        """These commits were evaluated."""
        ...

    def builds(self, revisions: Sequence[str]) -> None:
        """These commits are being built."""
        ...

    def judged(self, revision: str, answer: Judgement, outcome: Outcome, why: str) -> None:
        """A commit was judged, and with it all of the same derivation."""
        ...

    def passed_over(self, revision: str, why: str) -> None:
        """A commit cannot be tested."""
        ...


@dataclass(frozen=True, slots=True)
class CommitVerdict:
    """Meaning of a derivation, by the first commit that it was tested for."""

    revision: str
    answer: Judgement
    outcome: Outcome
    why: str


@dataclass(slots=True)
class Figures:
    """Costs of a bisection."""

    evaluated: int = 0
    built: int = 0
    cached: int = 0
    known: int = 0
    #: Times that builds were begun.
    rounds: int = 0


@dataclass(frozen=True, slots=True)
class Conclusion:
    """End of a bisection."""

    found: Found
    known: Knowledge
    #: By derivation.
    verdicts: dict[str, CommitVerdict]
    #: Why, by revision.
    not_evaluated: dict[str, str]
    figures: Figures


@dataclass(slots=True)
class Bisection:
    """A bisection of `line`, whose first commit is good and whose last one is bad."""

    line: Sequence[str]
    criterion: Criterion
    evaluate: Callable[[str], Awaitable[EvaluatedRoot | str]]
    builds: Builds
    memory: Memory
    witness: Witness
    figures: Figures = field(default_factory=Figures)
    _verdicts: dict[str, CommitVerdict] = field(default_factory=dict)
    _running: dict[str, asyncio.Task[Outcome]] = field(default_factory=dict)
    _commits: dict[str, str] = field(default_factory=dict)
    _good: Outcome | None = None

    async def run(self) -> Conclusion:
        """Search to the end.

        Raises:
            BisectError: Good is not good, or bad is not bad.
            CoordinatorError: The farm, git or Nix failed; what is known is kept.
        """
        await self._evaluate((0, len(self.line) - 1))
        await self._check_ends()
        try:
            found = await self._search()
            known = self.known()
            broken = {self.line[at]: self.memory.evaluated[self.line[at]].error for at in sorted(known.broken)}
            return Conclusion(found, known, self._verdicts, broken, self.figures)
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    def known(self) -> Knowledge:
        """Return what is known, as the strategy takes it."""
        found = {at: self.memory.evaluated.get(revision) for at, revision in enumerate(self.line)}
        return Knowledge(
            len(self.line),
            {at: each.drv for at, each in found.items() if each is not None and each.drv},
            {drv: verdict.answer for drv, verdict in self._verdicts.items()},
            frozenset(at for at, each in found.items() if each is not None and not each.drv),
        )

    # Both ends.

    async def _check_ends(self) -> None:
        ends = []
        for role, revision in (("good", self.line[0]), ("bad", self.line[-1])):
            found = self.memory.evaluated[revision]
            if not found.drv:
                raise BisectError(f"the {role} commit {revision[:12]} cannot be tested: {found.error}")
            ends.append(found.root)
        good, bad = ends
        if good.drv == bad.drv:
            raise BisectError(
                f"the good and the bad commit have the same derivation, {good.drv}; no commit made it bad"
            )
        self.witness.builds([self.line[0], self.line[-1]])
        outcomes = await asyncio.gather(self._outcome(good, self.line[0]), self._outcome(bad, self.line[-1]))
        self._good = outcomes[0]
        self._settle(good.drv, self.line[0], outcomes[0])
        self._settle(bad.drv, self.line[-1], await self._compared(outcomes[1]))
        for role, wanted, root in (("good", Judgement.GOOD, good), ("bad", Judgement.BAD, bad)):
            verdict = self._verdicts[root.drv]
            if verdict.answer is not wanted:
                raise BisectError(f"the {role} commit {verdict.revision[:12]} is not {role}: {verdict.why}")

    # The search.

    async def _search(self) -> Found:
        for at, revision in enumerate(self.line):
            found = self.memory.evaluated.get(revision)
            if found is not None and 0 < at < len(self.line) - 1:
                self._recall(revision, found)
        while True:
            known = self.known()
            await self._withdraw(self._running.keys() - still_wanted(known, self._running.keys()))
            slots = await self._slots()
            match next_step(known, slots, self._running.keys()):
                case Found() as found_it:
                    return found_it
                case EvaluateNow(positions):
                    await self._evaluate(positions)
                    await self._ask(positions)
                case BuildNow(positions):
                    self._begin(positions)
                    await self._next_end()

    def _recall(self, revision: str, found: Evaluated) -> None:
        """Judge what an earlier run has brought to an end."""
        outcome = self.memory.outcomes.get(found.drv)
        if not found.drv:
            self.witness.passed_over(revision, found.error)
        elif outcome is not None and found.drv not in self._verdicts:
            self._settle(found.drv, revision, outcome)

    async def _slots(self) -> int:
        """Return how many builds may run at a time, with those that run."""
        free = await self.builds.slots(self.memory.evaluated[self.line[-1]].root)
        return min(MAX_SLOTS, max(1, len(self._running) + free))

    async def _evaluate(self, positions: Iterable[int]) -> None:
        revisions = [self.line[at] for at in positions if self.line[at] not in self.memory.evaluated]
        for revision, found in zip(revisions, await _all_of(map(self.evaluate, revisions)), strict=True):
            evaluated = Evaluated.of(found)
            self.figures.evaluated += 1
            self.memory.evaluate(revision, evaluated)
            if not evaluated.drv and revision not in {self.line[0], self.line[-1]}:
                self.witness.passed_over(revision, evaluated.error)
        self.witness.evaluated(revisions)

    async def _ask(self, positions: Iterable[int]) -> None:
        """Take the outcomes of new derivations that the farm has without a build."""
        new: dict[str, str] = {}
        for at in positions:
            drv = self.memory.evaluated[self.line[at]].drv
            if drv and drv not in self._verdicts and drv not in self._running:
                new.setdefault(drv, self.line[at])
        roots = [self.memory.evaluated[revision].root for revision in new.values()]
        settled = await self.builds.settled(roots) if roots else set()
        known = [root for root in roots if root.drv in settled]
        outcomes = await _all_of(self._outcome(root, new[root.drv]) for root in known)
        for root, outcome in zip(known, outcomes, strict=True):
            self._settle(root.drv, new[root.drv], outcome)

    def _begin(self, positions: Sequence[int]) -> None:
        if not positions:
            return
        self.figures.rounds += 1
        for at in positions:
            root = self.memory.evaluated[self.line[at]].root
            self._commits[root.drv] = self.line[at]
            self._running[root.drv] = asyncio.create_task(self._outcome(root, self.line[at]))
        self.witness.builds([self.line[at] for at in positions])

    async def _next_end(self) -> None:
        """Wait for builds to end."""
        await asyncio.wait(self._running.values(), return_when=asyncio.FIRST_COMPLETED)
        for drv in [drv for drv, task in self._running.items() if task.done()]:
            self._settle(drv, self._commits[drv], await self._running.pop(drv))

    async def _outcome(self, root: EvaluatedRoot, revision: str) -> Outcome:
        kept = self.memory.outcomes.get(root.drv)
        return kept if kept is not None else await self._compared(await self.builds.outcome(root, revision))

    async def _compared(self, outcome: Outcome) -> Outcome:
        """Return an outcome with the likeness of its outputs to those of good, where that is what counts."""
        good = self._good
        if self.criterion.until is not Until.DIFFERS or good is None or not (good.is_built and outcome.is_built):
            return outcome
        return replace(outcome, likeness=await self.builds.likeness(good, outcome))

    async def _withdraw(self, drvs: Iterable[str]) -> None:
        for drv in list(drvs):
            task = self._running.pop(drv)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await self.builds.withdraw(self.memory.evaluated[self._commits[drv]].root)

    def _settle(self, drv: str, revision: str, outcome: Outcome) -> None:
        if drv not in self.memory.outcomes:
            match outcome.origin:
                case Origin.BUILT:
                    self.figures.built += 1
                case Origin.CACHED:
                    self.figures.cached += 1
                case Origin.KNOWN:
                    self.figures.known += 1
            if outcome.lasts:
                self.memory.settle(drv, outcome)
        answer, why = self.criterion.judge(outcome, self._good if revision != self.line[0] else None)
        self._verdicts[drv] = CommitVerdict(revision, answer, outcome, why)
        self.witness.judged(revision, answer, outcome, why)


async def _all_of(work: Iterable[Awaitable[_T]]) -> list[_T]:
    """Wait for all; one that fails ends the others."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
