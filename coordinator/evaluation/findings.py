"""Findings of an evaluation: kept ones, and those of nix-eval-jobs or of our own evaluators.

Both programs give the same findings. What nix-eval-jobs does not get to, because it ended early, our own evaluators do:
they keep an error with its attribute, where nix-eval-jobs ends.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import field, replace
from enum import StrEnum
from os.path import isfile
from typing import Final, TypeAlias

from coordinator.api.root_limits import RootLimits
from coordinator.evaluation.cache import EvaluationCache, KeptFindings
from coordinator.evaluation.cache_keys import (
    NEEDS_MORE,
    KeyedSource,
    keyed,
    may_be_kept,
    restricted,
    without_search_path,
)
from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.eval_jobs import PROGRAM, JobsEnded, findings_of_jobs
from coordinator.evaluation.import_store import (
    NO_IMPORTS,
    ImportBuilds,
    ImportStore,
    may_import,
    open_store,
)
from coordinator.evaluation.model import AttrPlace, EvaluatedRoot, Evaluation, FailedAttr, Finding, LeftOut
from coordinator.evaluation.pool import OtherEvaluator, PooledSource, PoolLimits, findings_of_pool
from coordinator.evaluation.source import FlakeOrigin, NixValue, store_root
from coordinator.records import record

#: What Nix prints where an evaluation may not build what it imports.
_NEEDS_IMPORT: Final = "'allow-import-from-derivation' is disabled"
#: Source and asked path of a root, its derivation, outputs and limits.
RootKey: TypeAlias = tuple[int, int, str, tuple[str, ...], RootLimits | None]
_NO_PROGRAM: Final = f"{PROGRAM} is not on PATH; install it, or evaluate with --evaluator own"


class EvaluatorChoice(StrEnum):
    """Program that evaluates; `auto`: nix-eval-jobs if it is on PATH, our own evaluators else."""

    AUTO = "auto"
    NIX_EVAL_JOBS = "nix-eval-jobs"
    OWN = "own"


@record(frozen=True, slots=True)
class EvaluationMeans:
    """Programs and places that an evaluation may use."""

    limits: PoolLimits
    #: Whole environment of the evaluators.
    env: Mapping[str, str]
    #: Is given what Nix printed for people of an attribute, in one piece.
    on_messages: Callable[[str], None]
    choice: EvaluatorChoice = EvaluatorChoice.AUTO
    #: Where findings are kept; None: nowhere.
    cache: EvaluationCache | None = None
    #: Maker of what is imported from derivations; None: Nix, in the client's own store.
    imports: ImportBuilds | None = None


async def evaluate(sources: Sequence[NixValue], means: EvaluationMeans) -> Evaluation:
    """Evaluate sources to their end; what it takes and raises is as for `findings_of`."""
    async with aclosing(findings_of(sources, means)) as findings:
        return gathered([each async for each in findings])


def root_key(place: AttrPlace, root: EvaluatedRoot) -> RootKey:
    """Return what makes two findings one root: one derivation under two names in one set is one, as for Nix."""
    return place.source, place.at, root.drv, root.outputs, root.limits


def gathered(findings: Sequence[tuple[AttrPlace, Finding]]) -> Evaluation:
    """Return the result of all findings, in the order in which Nix goes through attributes."""
    found = sorted(findings, key=lambda each: each[0].order)
    wanted: dict[RootKey, EvaluatedRoot] = {}
    aliases: dict[str, EvaluatedRoot] = {}
    left_out: dict[str, LeftOut] = {}
    failed: dict[str, FailedAttr] = {}
    for place, finding in found:
        match finding:
            case EvaluatedRoot():
                first = wanted.setdefault(root_key(place, finding), finding)
                if first.attr != finding.attr:
                    aliases.setdefault(finding.attr, finding)
            case LeftOut(attr):
                left_out.setdefault(attr, finding)
            case FailedAttr(attr):
                failed.setdefault(attr, finding)
    others = tuple(aliases.values())
    return Evaluation(tuple(wanted.values()), tuple(left_out.values()), tuple(failed.values()), others)


async def findings_of(sources: Sequence[NixValue], means: EvaluationMeans) -> AsyncGenerator[tuple[AttrPlace, Finding]]:
    """Evaluate sources; gives each finding with its place as soon as it is there, in no order.

    What imports from derivations waits for builds, and everything else goes on meanwhile.

    Raises:
        EvaluationError: No evaluator can be started.
    """
    there = means.choice is not EvaluatorChoice.OWN and shutil.which(PROGRAM, path=means.env.get("PATH")) is not None
    if means.choice is EvaluatorChoice.NIX_EVAL_JOBS and not there:
        raise EvaluationError(_NO_PROGRAM)
    plans = [await _plan(source, PROGRAM if there else "nix", means) for source in sources]
    places: list[AttrPlace] = []
    for number, plan in enumerate(plans):
        for place, kept in plan.told(means.on_messages):
            yield replace(place, source=number), kept
        places += [replace(place, source=number) for place in (plan.kept.failed if plan.kept else ())]
    fresh = [number for number, plan in enumerate(plans) if plan.kept is None]
    async with open_store(means.imports, means.env) if means.imports else nullcontext() as store:
        reaches = _Reaches(plans, means, store)
        other = None
        if there:
            other = reaches.other_evaluator(fresh)
        else:
            places += reaches.whole(fresh)
        pool = findings_of_pool(
            reaches.sources, means.limits, places, on_messages=means.on_messages, again=reaches.again, other=other
        )
        async with aclosing(pool) as findings:
            async for found, finding in findings:
                place = reaches.asked_place(found)
                plans[place.source].take(place, finding)
                yield place, finding
    for plan in plans:
        await plan.keep(means)


class _Reaches:
    """Sources as they are evaluated with more and more within reach, as far as an attribute fails for the want of it.

    Within reach are first the source alone, then what is built for its imports, then what is outside of it. Each reach
    has its own copy of each source, so that the place of an attribute says how far it reaches.
    """

    def __init__(self, plans: Sequence[_SourcePlan], means: EvaluationMeans, store: ImportStore | None) -> None:
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


@record(slots=True)
class _SourcePlan:
    """One source in its evaluation."""

    asked: NixValue
    #: As it is evaluated.
    source: NixValue
    keyed: KeyedSource | None = None
    #: What is known of it without an evaluation.
    kept: KeptFindings | None = None
    found: list[tuple[AttrPlace, EvaluatedRoot | LeftOut]] = field(default_factory=list)
    failed: list[AttrPlace] = field(default_factory=list)
    #: Whether it turned out to depend on more than its source.
    needs_more: bool = False
    #: Whether what it imports from derivations is for a later round.
    waits_for_imports: bool = False

    @property
    def is_confined(self) -> bool:
        """True where it is evaluated within reach of its source only."""
        return self.source is not self.asked

    @property
    def source_without_imports(self) -> NixValue:
        """The source, as it is evaluated where nothing is built."""
        return replace(self.source, flags=(*self.source.flags, *NO_IMPORTS)) if self.waits_for_imports else self.source

    def told(self, on_messages: Callable[[str], None]) -> Sequence[tuple[AttrPlace, EvaluatedRoot | LeftOut]]:
        """Return what is known of it without an evaluation, with a message that says so."""
        if self.kept is None:
            return ()
        on_messages(
            f"{len(self.kept.found)} findings of {self.asked.name} come from the evaluation cache; "
            "--no-eval-cache evaluates anew"
        )
        return self.kept.found

    def take(self, place: AttrPlace, finding: Finding) -> None:
        """Take a finding of its evaluation."""
        if isinstance(finding, FailedAttr):
            self.failed.append(place)
        else:
            self.found.append((place, finding))

    async def keep(self, means: EvaluationMeans) -> None:
        """Keep what was found, if that may be done."""
        if means.cache is None or self.keyed is None or self.needs_more or not self.found:
            return
        before = self.kept.found if self.kept else ()
        if await may_be_kept(self.keyed, means.env):
            entry = KeptFindings((*before, *self.found), tuple(self.failed))
            await asyncio.to_thread(means.cache.put, self.keyed.key, entry)


async def _plan(source: NixValue, program: str, means: EvaluationMeans) -> _SourcePlan:
    confined = restricted(source) if isinstance(source.origin, FlakeOrigin) else source
    its = None if means.cache is None else await keyed(source, program, means.env)
    waits = means.imports is not None and may_import(source.flags)
    if its is None or means.cache is None:
        return _SourcePlan(source, confined, waits_for_imports=waits)
    kept = await asyncio.to_thread(means.cache.get, its.key)
    if kept is not None and not await asyncio.to_thread(_all_there, kept, source.flags):
        kept = None
    return _SourcePlan(source, its.source, its, kept, waits_for_imports=waits)


def _all_there(kept: KeptFindings, flags: Sequence[str]) -> bool:
    """Return whether the store has all derivations that were found."""
    root = store_root(flags)
    # A question for each of thousands: no object of a path for it.
    return all(isfile(f"{root}{each.drv}") for _, each in kept.found if isinstance(each, EvaluatedRoot))  # noqa: PTH113
