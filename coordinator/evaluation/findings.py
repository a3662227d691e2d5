"""Findings of an evaluation, by nix-eval-jobs where it is there and by evaluators of our own else.

Both give the same findings. What nix-eval-jobs does not get to, because it ended early, our own evaluators do: they
keep an error with its attribute, where nix-eval-jobs ends.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from enum import StrEnum
from typing import Final

from coordinator.api.requests import RootLimits
from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.eval_jobs import PROGRAM, JobsEnded, findings_of_jobs
from coordinator.evaluation.model import AttrPlace, EvaluatedRoot, Evaluation, FailedAttr, Finding, LeftOut
from coordinator.evaluation.pool import PoolLimits, findings_of_pool
from coordinator.evaluation.source import NixValue

_NO_PROGRAM: Final = f"{PROGRAM} is not on PATH; install it, or evaluate with --evaluator own"


class EvaluatorChoice(StrEnum):
    """Program that evaluates; `auto`: nix-eval-jobs if it is on PATH, our own evaluators else."""

    AUTO = "auto"
    NIX_EVAL_JOBS = "nix-eval-jobs"
    OWN = "own"


async def evaluate(
    sources: Sequence[NixValue],
    limits: PoolLimits,
    *,
    env: Mapping[str, str],
    on_messages: Callable[[str], None],
    choice: EvaluatorChoice = EvaluatorChoice.AUTO,
) -> Evaluation:
    """Evaluate sources to their end; what it takes and raises is as for `findings_of`.

    The result is in the order in which Nix goes through attributes. One derivation under two names in one set is one
    root, as for Nix.
    """
    async with aclosing(findings_of(sources, limits, env=env, on_messages=on_messages, choice=choice)) as findings:
        found = sorted([each async for each in findings], key=lambda each: each[0].order)
    wanted: dict[tuple[int, int, str, tuple[str, ...], RootLimits | None], EvaluatedRoot] = {}
    left_out: dict[str, LeftOut] = {}
    failed: dict[str, FailedAttr] = {}
    for place, finding in found:
        match finding:
            case EvaluatedRoot(_, drv, outputs, its_limits):
                wanted.setdefault((place.source, place.at, drv, outputs, its_limits), finding)
            case LeftOut(attr):
                left_out.setdefault(attr, finding)
            case FailedAttr(attr):
                failed.setdefault(attr, finding)
    return Evaluation(tuple(wanted.values()), tuple(left_out.values()), tuple(failed.values()))


async def findings_of(
    sources: Sequence[NixValue],
    limits: PoolLimits,
    *,
    env: Mapping[str, str],
    on_messages: Callable[[str], None],
    choice: EvaluatorChoice = EvaluatorChoice.AUTO,
) -> AsyncGenerator[tuple[AttrPlace, Finding]]:
    """Evaluate sources; gives each finding with its place as soon as it is there, in no order.

    Args:
        sources: What is evaluated.
        limits: What it may take.
        env: Whole environment of the evaluators.
        on_messages: Is given what Nix printed for people of an attribute, in one piece.
        choice: Which program evaluates.

    Raises:
        EvaluationError: No evaluator can be started.
    """
    there = choice is not EvaluatorChoice.OWN and shutil.which(PROGRAM, path=env.get("PATH")) is not None
    if choice is EvaluatorChoice.NIX_EVAL_JOBS and not there:
        raise EvaluationError(_NO_PROGRAM)
    given: set[tuple[int, int, tuple[str, ...]]] = set()
    left = list(range(len(sources)))
    while there and left:
        source = left[0]
        try:
            async with aclosing(
                findings_of_jobs(source, sources[source], limits, env=env, on_messages=on_messages)
            ) as findings:
                async for place, finding in findings:
                    given.add((place.source, place.at, place.path))
                    yield place, finding
        except JobsEnded as ended:
            on_messages(f"{ended}; drover's own evaluators do the rest")
            break
        left.pop(0)
    if not left:
        return
    rest = findings_of_pool([sources[at] for at in left], limits, env=env, on_messages=on_messages)
    async with aclosing(rest) as findings:
        async for place, finding in findings:
            its = replace(place, source=left[place.source])
            if (its.source, its.at, its.path) not in given:
                yield its, finding
