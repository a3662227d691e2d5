"""Sources of an evaluation: with what means, within what reach, and what is known of them without it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from enum import StrEnum
from os.path import isfile

from coordinator.evaluation.cache import EvaluationCache, KeptFindings
from coordinator.evaluation.cache_keys import KeyedSource, keyed, may_be_kept, restricted
from coordinator.evaluation.import_store import NO_IMPORTS, ImportBuilds, may_import
from coordinator.evaluation.model import AttrPlace, EvaluatedRoot, FailedAttr, Finding, LeftOut
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.evaluation.source import FlakeOrigin, NixValue, store_root
from infra.records import record


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


@record(slots=True)
class SourcePlan:
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


async def plan_of(source: NixValue, program: str, means: EvaluationMeans) -> SourcePlan:
    """Return how a source is evaluated by a program, with what is kept of it."""
    confined = restricted(source) if isinstance(source.origin, FlakeOrigin) else source
    its = None if means.cache is None else await keyed(source, program, means.env)
    waits = means.imports is not None and may_import(source.flags)
    if its is None or means.cache is None:
        return SourcePlan(source, confined, waits_for_imports=waits)
    kept = await asyncio.to_thread(means.cache.get, its.key)
    if kept is not None and not await asyncio.to_thread(_all_there, kept, source.flags):
        kept = None
    return SourcePlan(source, its.source, its, kept, waits_for_imports=waits)


def _all_there(kept: KeptFindings, flags: Sequence[str]) -> bool:
    """Return whether the store has all derivations that were found."""
    root = store_root(flags)
    # A question for each of thousands: no object of a path for it.
    return all(isfile(f"{root}{each.drv}") for _, each in kept.found if isinstance(each, EvaluatedRoot))  # noqa: PTH113
