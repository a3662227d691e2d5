"""Findings of an evaluation: kept ones, and those of nix-eval-jobs or of our own evaluators.

Both programs give the same findings. What nix-eval-jobs does not get to, because it ended early, our own evaluators do:
they keep an error with its attribute, where nix-eval-jobs ends.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Final, TypeAlias

from coordinator.api.root_limits import RootLimits
from coordinator.evaluation.cache_keys import program_of
from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.model import AttrPlace, EvaluatedRoot, Evaluation, FailedAttr, Finding, LeftOut
from coordinator.evaluation.pool_limits import PROGRAM
from coordinator.evaluation.source import NixValue
from coordinator.evaluation.source_plan import EvaluationMeans, EvaluatorChoice, plan_of

#: Source and asked path of a root, its derivation, outputs and limits.
RootKey: TypeAlias = tuple[int, int, str, tuple[str, ...], RootLimits | None]
_NO_PROGRAM: Final = f"{PROGRAM} is not on PATH; install it, or evaluate with --evaluator own"


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
    there = means.choice is not EvaluatorChoice.OWN and program_of(PROGRAM, means.env) is not None
    if means.choice is EvaluatorChoice.NIX_EVAL_JOBS and not there:
        raise EvaluationError(_NO_PROGRAM)
    plans = [await plan_of(source, PROGRAM if there else "nix", means) for source in sources]
    places: list[AttrPlace] = []
    for number, plan in enumerate(plans):
        for place, kept in plan.told(means.on_messages):
            yield replace(place, source=number), kept
        places += [replace(place, source=number) for place in (plan.kept.failed if plan.kept else ())]
    if places or any(plan.kept is None for plan in plans):
        from coordinator.evaluation.fresh_findings import fresh_findings  # noqa: PLC0415 - slow to import

        async with aclosing(fresh_findings(plans, means, places, by_jobs=there)) as findings:
            async for place, finding in findings:
                plans[place.source].take(place, finding)
                yield place, finding
    for plan in plans:
        await plan.keep(means)
