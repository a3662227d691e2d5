"""Findings that no earlier evaluation has: of nix-eval-jobs, or of our own evaluators.

Imported only where something is to be evaluated, because it takes a while.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import replace
from typing import Final

from coordinator.evaluation.cache_keys import NEEDS_MORE, without_search_path
from coordinator.evaluation.eval_jobs import JobsEnded, findings_of_jobs
from coordinator.evaluation.import_store import ImportStore, open_store
from coordinator.evaluation.model import AttrPlace, FailedAttr, Finding
from coordinator.evaluation.pool import OtherEvaluator, PooledSource, findings_of_pool
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.evaluation.source_plan import EvaluationMeans, SourcePlan

#: What Nix prints where an evaluation may not build what it imports.
_NEEDS_IMPORT: Final = "'allow-import-from-derivation' is disabled"


async def fresh_findings(
    plans: Sequence[SourcePlan], means: EvaluationMeans, places: Sequence[AttrPlace], *, by_jobs: bool
) -> AsyncGenerator[tuple[AttrPlace, Finding]]:
    """Evaluate `places`, and all of what nothing is kept of: by nix-eval-jobs first, where that is there."""
    fresh = [number for number, plan in enumerate(plans) if plan.kept is None]
    async with open_store(means.imports, means.env) if means.imports else nullcontext() as store:
        reaches = _Reaches(plans, means, store)
        other = reaches.other_evaluator(fresh) if by_jobs else None
        asked = [*places, *(() if by_jobs else reaches.whole(fresh))]
        pool = findings_of_pool(
            reaches.sources, means.limits, asked, on_messages=means.on_messages, again=reaches.again, other=other
        )
        async with aclosing(pool) as findings:
            async for found, finding in findings:
                yield reaches.asked_place(found), finding


class _Reaches:
    """Sources as they are evaluated with more and more within reach, as far as an attribute fails for the want of it.

    Within reach are first the source alone, then what is built for its imports, then what is outside of it. Each reach
    has its own copy of each source, so that the place of an attribute says how far it reaches.
    """

    def __init__(self, plans: Sequence[SourcePlan], means: EvaluationMeans, store: ImportStore | None) -> None:
        self._plans = plans
        self._means = means
        env = without_search_path(means.env) if all(plan.is_confined for plan in plans) else means.env
        stores = [store if plan.waits_for_imports else None for plan in plans]
        own = [PooledSource(plan.source_without_imports, env) for plan in plans]
        importing = [PooledSource(plan.source, env, each) for plan, each in zip(plans, stores, strict=True)]
        outside = [PooledSource(plan.asked, means.env, each) for plan, each in zip(plans, stores, strict=True)]
        self.sources: Final = (*own, *importing, *outside)
        #: Places that nix-eval-jobs was done with.
        self._done: set[tuple[int, int, tuple[str, ...]]] = set()

    def asked_place(self, place: AttrPlace) -> AttrPlace:
        """Return a place of a copy as that of the source that was asked for."""
        return replace(place, source=place.source % len(self._plans))

    def whole(self, numbers: Sequence[int]) -> list[AttrPlace]:
        """Return the places of all that is asked of sources."""
        return [AttrPlace(number, at) for number in numbers for at in range(len(self._plans[number].asked.asked))]

    def again(self, place: AttrPlace, finding: Finding) -> Sequence[AttrPlace] | None:
        """Return the place with more reach instead of an error that this may mend; None: the finding stands."""
        number, count = place.source % len(self._plans), len(self._plans)
        if (place.source, place.at, place.path) in self._done:
            return ()
        plan = self._plans[number]
        text = finding.text if isinstance(finding, FailedAttr) else ""
        if place.source < count and plan.waits_for_imports and _NEEDS_IMPORT in text:
            return (replace(place, source=count + number),)
        if place.source < 2 * count and plan.is_confined and NEEDS_MORE.search(text):
            plan.needs_more = True
            return (replace(place, source=2 * count + number),)
        return None

    def other_evaluator(self, numbers: Sequence[int]) -> OtherEvaluator:
        """Return nix-eval-jobs, which leaves memory for an evaluator of our own where that may have to import."""
        limits = self._means.limits
        shares = limits.evaluators + 2
        part = (shares - 1) / shares if any(each.imports for each in self.sources) else 1.0
        limits = replace(limits, memory_bytes=int(limits.memory_bytes * part))
        return OtherEvaluator(self._found_by_jobs(numbers, limits), limits.memory_bytes)

    async def _found_by_jobs(
        self, numbers: Sequence[int], limits: PoolLimits
    ) -> AsyncGenerator[AttrPlace | tuple[AttrPlace, Finding]]:
        """Give the findings of nix-eval-jobs, and the places that it does not get to."""
        means = self._means
        for done, number in enumerate(numbers):
            jobs = findings_of_jobs(
                number, self.sources[number].value, limits, env=self.sources[number].env, on_messages=means.on_messages
            )
            try:
                async with aclosing(jobs):
                    async for place, finding in jobs:
                        instead = self.again(place, finding)
                        self._done.add((place.source, place.at, place.path))
                        if instead is None:
                            yield place, finding
                        for each in instead or ():
                            yield each
            except JobsEnded as ended:
                means.on_messages(f"{ended}; drover's own evaluators do the rest")
                for place in self.whole(numbers[done:]):
                    yield place
                return
