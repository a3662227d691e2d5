"""Findings of an evaluation: kept ones, and those of nix-eval-jobs or of our own evaluators.

Both programs give the same findings. What nix-eval-jobs does not get to, because it ended early, our own evaluators do:
they keep an error with its attribute, where nix-eval-jobs ends.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Final, TypeAlias

from coordinator.api.requests import RootLimits
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
    store_root,
)
from coordinator.evaluation.model import AttrPlace, EvaluatedRoot, Evaluation, FailedAttr, Finding, LeftOut
from coordinator.evaluation.pool import PoolLimits, findings_of_pool
from coordinator.evaluation.source import FlakeOrigin, NixValue

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


@dataclass(frozen=True, slots=True)
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

    What imports from derivations comes last, so that everything else need not wait for builds.

    Raises:
        EvaluationError: No evaluator can be started.
    """
    there = means.choice is not EvaluatorChoice.OWN and shutil.which(PROGRAM, path=means.env.get("PATH")) is not None
    if means.choice is EvaluatorChoice.NIX_EVAL_JOBS and not there:
        raise EvaluationError(_NO_PROGRAM)
    plans = [await _plan(source, PROGRAM if there else "nix", means) for source in sources]
    again: list[AttrPlace] = []
    for number, plan in enumerate(plans):
        for place, kept in plan.told(means.on_messages):
            yield replace(place, source=number), kept
        again += [replace(place, source=number) for place in (plan.kept.failed if plan.kept else ())]
    env = without_search_path(means.env) if all(plan.is_confined for plan in plans) else means.env
    first = _Round([plan.source_without_imports for plan in plans], replace(means, env=env))
    confined = _Round([plan.source for plan in plans], replace(means, env=env))
    later = _Later(plans)
    fresh = [number for number, plan in enumerate(plans) if plan.kept is None]
    rounds = (first.whole(fresh, with_jobs=there), first.at_places(again), confined.with_imports(later.importing))
    for findings in rounds:
        async with aclosing(later.sorted_out(findings)) as sorted_out:
            async for place, finding in sorted_out:
                yield place, finding
    async with aclosing(_Round(sources, means).with_imports(later.outside)) as findings:
        async for place, finding in findings:
            yield place, finding
    for plan in plans:
        await plan.keep(means)


class _Later:
    """Places that are evaluated anew with more within their reach, because they failed for the want of it."""

    def __init__(self, plans: Sequence[_SourcePlan]) -> None:
        self._plans = plans
        #: Those that import from derivations.
        self.importing: list[AttrPlace] = []
        #: Those that look outside of their source.
        self.outside: list[AttrPlace] = []

    async def sorted_out(
        self, findings: AsyncGenerator[tuple[AttrPlace, Finding]]
    ) -> AsyncGenerator[tuple[AttrPlace, Finding]]:
        """Give findings, but no error that more reach may mend."""
        async with aclosing(findings):
            async for place, finding in findings:
                plan = self._plans[place.source]
                text = finding.text if isinstance(finding, FailedAttr) else ""
                if plan.waits_for_imports and _NEEDS_IMPORT in text:
                    self.importing.append(place)
                elif plan.is_confined and NEEDS_MORE.search(text):
                    self.outside.append(place)
                    plan.needs_more = True
                else:
                    plan.take(place, finding)
                    yield place, finding


@dataclass(slots=True)
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
    return all(Path(f"{root}{each.drv}").is_file() for _, each in kept.found if isinstance(each, EvaluatedRoot))


class _Round:
    """Evaluation of sources with the same means."""

    def __init__(self, sources: Sequence[NixValue], means: EvaluationMeans) -> None:
        self._sources = sources
        self._means = means

    async def whole(self, numbers: Sequence[int], *, with_jobs: bool) -> AsyncGenerator[tuple[AttrPlace, Finding]]:
        """Evaluate all that is asked of the sources of these numbers."""
        means, left = self._means, list(numbers)
        given: set[tuple[int, int, tuple[str, ...]]] = set()
        while with_jobs and left:
            number = left[0]
            jobs = findings_of_jobs(
                number, self._sources[number], means.limits, env=means.env, on_messages=means.on_messages
            )
            try:
                async with aclosing(jobs):
                    async for place, finding in jobs:
                        given.add((place.source, place.at, place.path))
                        yield place, finding
            except JobsEnded as ended:
                means.on_messages(f"{ended}; drover's own evaluators do the rest")
                break
            left.pop(0)
        places = [AttrPlace(number, at) for number in left for at in range(len(self._sources[number].asked))]
        async with aclosing(self.at_places(places)) as findings:
            async for place, finding in findings:
                if (place.source, place.at, place.path) not in given:
                    yield place, finding

    async def at_places(
        self, places: Sequence[AttrPlace], imports: ImportStore | None = None
    ) -> AsyncGenerator[tuple[AttrPlace, Finding]]:
        """Evaluate places, and what is below them, by evaluators of our own."""
        if not places:
            return
        means = self._means
        findings = findings_of_pool(
            self._sources,
            means.limits,
            env=means.env,
            on_messages=means.on_messages,
            places=places,
            imports=imports,
        )
        async with aclosing(findings):
            async for place, finding in findings:
                yield place, finding

    async def with_imports(self, places: Sequence[AttrPlace]) -> AsyncGenerator[tuple[AttrPlace, Finding]]:
        """Evaluate places that may import from derivations, by way of their maker if there is one."""
        places = tuple(places)
        if not places:
            return
        means = self._means
        async with (
            open_store(means.imports, means.env) if means.imports else nullcontext() as store,
            aclosing(self.at_places(places, store)) as findings,
        ):
            async for place, finding in findings:
                yield place, finding
