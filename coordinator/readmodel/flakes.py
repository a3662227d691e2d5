"""Judgement of flakes: is it the package or the machine? Pure: ended attempts in, records out.

A recipe's attempts differ in nothing but chance and machine. One that failed and later succeeded is flaky.

A worker is compared with the others at the same packages. Of the failures of each package, a worker that is like the
others has its share of the tries; the sum over packages is what is expected of it. Each failure falls on the worker, or
does not, like a draw without replacement, so by Hoeffding (1963, theorems 1 and 4) the chance that of `failures` at
least `failed` fall on it is at most exp(-failures * KL(failed/failures, expected/failures)), with KL the relative
entropy of two coins. That holds for any numbers, also small ones, where a normal approximation would blame at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from coordinator.api.flakes import RecipeRecordView, WorkerRecordView
from coordinator.stores.timings import AttemptEnds, AttemptTiming
from coordinator.stores.worker_counts import WorkerCounts

#: Chance that any worker of a farm is shown although all are alike; each worker has its part of it.
FALSE_ALARM: Final = 0.01
#: Fewer failed recipes on a worker are no evidence, however unlikely.
LEAST_FAILED: Final = 3
#: Reasons for a retry that may be the recipe's own doing, as a verdict is.
_OWN: Final = frozenset({"transient", "source_gone", "killed", "connection_lost"})
#: Verdicts that follow from something else than a build.
_NOT_BUILT: Final = frozenset({"dependency", "no_worker"})

#: A step, and the index of its recipe.
Recipe = tuple[str, int | None]


@dataclass(slots=True)
class _Tally:
    attempts: int = 0
    succeeded: int = 0
    first_failed_at: float = math.inf
    last_done_at: float = -math.inf

    def view(self) -> RecipeRecordView:
        flaky = self.last_done_at > self.first_failed_at
        return RecipeRecordView(attempts=self.attempts, succeeded=self.succeeded, flaky=flaky)


def succeeded(outcome: str | None, reason: str | None) -> bool | None:
    """Return whether an attempt's end speaks for its recipe or against it; None where it says nothing of it."""
    if outcome == "done":
        return True
    if outcome == "failed":
        return None if reason in _NOT_BUILT else False
    return False if outcome == "retried" and reason in _OWN else None


def recipe_records(ends: Iterable[AttemptEnds]) -> dict[Recipe, RecipeRecordView]:
    """Return the record of each recipe of which an attempt came to an end of its own."""
    tallies: dict[Recipe, _Tally] = {}
    for each in ends:
        success = succeeded(each.outcome, each.reason)
        if success is None:
            continue
        tally = tallies.setdefault((each.step, each.recipe), _Tally())
        tally.attempts += each.count
        if success:
            tally.succeeded += each.count
            tally.last_done_at = max(tally.last_done_at, each.last_at)
        else:
            tally.first_failed_at = min(tally.first_failed_at, each.first_at)
    return {recipe: tally.view() for recipe, tally in tallies.items()}


def newest_records(ends: Iterable[AttemptEnds]) -> dict[str, RecipeRecordView]:
    """Return the record of each step's newest recipe; steps without one are left out."""
    ends = list(ends)
    newest: dict[str, AttemptEnds] = {}
    for each in ends:
        if each.step not in newest or each.last_attempt > newest[each.step].last_attempt:
            newest[each.step] = each
    records = recipe_records(ends)
    found = {step: records.get((step, each.recipe)) for step, each in newest.items()}
    return {step: record for step, record in found.items() if record is not None}


def ends_of(timings: Iterable[AttemptTiming]) -> list[AttemptEnds]:
    """Return the ends of attempts, one by one."""
    return [
        AttemptEnds(each.step, each.recipe, each.outcome, each.reason, 1, each.ended_at, each.ended_at, each.attempt)
        for each in timings
        if each.outcome is not None and each.ended_at is not None
    ]


def worker_records(counts: Iterable[WorkerCounts]) -> Mapping[str, WorkerRecordView]:
    """Return each worker's record, judged among as many as are compared."""
    counts = list(counts)
    compared = sum(each.failures > 0 for each in counts)
    return {
        each.worker: WorkerRecordView(
            attempts=each.attempts,
            failed_attempts=each.failed_attempts,
            failed=each.failed,
            failures=each.failures,
            expected=each.expected,
            stands_out=stands_out(each.failed, each.expected, each.failures, compared),
        )
        for each in counts
    }


def stands_out(failed: int, expected: float, failures: int, compared: int) -> bool:
    """Return whether `failed` of all `failures` are too many for one of `compared` workers that are alike."""
    return failed >= LEAST_FAILED and chance(failed, expected, failures) * compared <= FALSE_ALARM


def chance(failed: int, expected: float, failures: int) -> float:
    """Return an upper bound of the chance that at least `failed` of `failures` fall where `expected` would."""
    if failed <= expected or not failures:
        return 1.0
    observed, share = failed / failures, expected / failures
    divergence = _part(observed, share) + _part(1 - observed, 1 - share)
    return math.exp(-failures * divergence)


def _part(observed: float, share: float) -> float:
    if observed <= 0:
        return 0.0
    return observed * math.log(observed / share) if share > 0 else math.inf
