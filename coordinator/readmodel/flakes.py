"""Judgement of flakes: is it the package or the machine? Pure: ended attempts in, records out.

A recipe's attempts differ in nothing but chance and machine. One that failed and later succeeded is flaky.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from coordinator.api.flakes import RecipeRecordView
from coordinator.stores.timings import AttemptEnds, AttemptTiming

#: Reasons for a retry that may be the recipe's own doing, as a verdict is.
_OWN: Final = frozenset({"transient", "killed", "connection_lost"})
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
