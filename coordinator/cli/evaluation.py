"""The evaluation of `drover build`, as a person sees it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import PurePath
from typing import Final

import click

from coordinator.cli import exit_status
from coordinator.cli.ci import defused
from coordinator.client.closure import local_store
from coordinator.evaluation.cache import EvaluationCache
from coordinator.evaluation.import_store import NO_IMPORTS, ImportBuilds
from coordinator.evaluation.inputs import Inputs, evaluation_of
from coordinator.evaluation.model import Evaluation, left_out_text, some
from coordinator.evaluation.pool_limits import TIMEOUT_S, PoolLimits
from coordinator.evaluation.source_plan import EvaluationMeans, EvaluatorChoice
from coordinator.terminal_controls import harmless
from infra.process import ProcessError, run
from infra.records import record

#: Seconds for Nix to make a store, and most bytes that it says of that.
MAKE_S: Final = 600.0
_MAKE_OUTPUT_BYTES: Final = 1024 * 1024
#: Failed attributes that are shown with all that Nix printed of them; of the others its first line.
MAX_WHOLE: Final = 20


@record(frozen=True, slots=True)
class EvaluationRequest:
    """Arguments of the command that say what is built, and what its evaluation may take of this machine."""

    files: tuple[str, ...] = ()
    attrs: tuple[str, ...] = ()
    #: A Nix expression in place of a file.
    expression: str = ""
    #: Systems that it is evaluated for; none: this machine's.
    systems: tuple[str, ...] = ()
    #: `--arg`, `--argstr` and `-I` words, for the evaluation only.
    flags: tuple[str, ...] = ()
    #: None: what this machine has.
    evaluators: int | None = None
    memory_mib: int | None = None
    #: Of one attribute; 0: forever.
    timeout_s: float = TIMEOUT_S
    #: Name of an `EvaluatorChoice`.
    evaluator: str = EvaluatorChoice.AUTO
    #: Whether findings of earlier evaluations count, and these are kept.
    eval_cache: bool = True
    impure: bool = False
    #: Whether an import from a derivation is an error.
    no_ifd: bool = False


async def evaluate(
    request: EvaluationRequest, settings: Sequence[str], store: str | None, imports: ImportBuilds | None = None
) -> Evaluation:
    """Evaluate what is asked for, and show what was left out and what failed.

    Args:
        request: What is asked for.
        settings: `--option NAME VALUE` words.
        store: Directory of the store to evaluate into; None: this machine's.
        imports: Maker of what is imported from derivations; None: that store itself.
    """
    inputs, means = inputs_of(request, settings, store, show_messages, imports)
    evaluation = await evaluation_of(
        inputs,
        means.limits,
        env=means.env,
        on_messages=show_messages,
        choice=means.choice,
        cache=means.cache,
        imports=imports,
    )
    show_evaluation(inputs.name, evaluation, show_messages, lambda text: click.echo(defused(harmless(text)), err=True))
    return evaluation


async def make_store(store: str | None) -> None:
    """Make the store below a directory where there is none, before evaluations into it run side by side.

    Nix lets two programs that find none make it both, and one of them fails.
    """
    if store:
        # Evaluators say what is wrong with a store that cannot be made.
        with suppress(ProcessError):
            await run(
                ["nix-store", "--init", *local_store(store).flags],
                env=os.environ,
                timeout_s=MAKE_S,
                max_output_bytes=_MAKE_OUTPUT_BYTES,
            )


def evaluated_from(request: EvaluationRequest) -> str:
    """Return the digest of what is evaluated, by the words of the command; where its files lie does not count."""
    files = [PurePath(path).name + mark + attr for path, mark, attr in (file.partition("#") for file in request.files)]
    flags = request.flags
    arguments = [flags[at : at + 3] for at, word in enumerate(flags) if word in {"--arg", "--argstr"}]
    words = [files, request.expression, request.attrs, request.systems, arguments]
    return sha256(repr(words).encode()).hexdigest()


def inputs_of(
    request: EvaluationRequest,
    settings: Sequence[str],
    store: str | None,
    on_messages: Callable[[str], None],
    imports: ImportBuilds | None = None,
) -> tuple[Inputs, EvaluationMeans]:
    """Return what is to be evaluated and with what; the arguments are as for `evaluate`."""
    nothing_built = NO_IMPORTS if request.no_ifd else ()
    flags = (*request.flags, *settings, *nothing_built, *(local_store(store).flags if store else ()))
    inputs = Inputs(request.files, request.expression, request.attrs, request.systems, flags, request.impure)
    memory_bytes = request.memory_mib and request.memory_mib * 1024 * 1024
    limits = PoolLimits.of_machine(request.evaluators, memory_bytes, request.timeout_s or None)
    cache = EvaluationCache.of_user(os.environ) if request.eval_cache and not request.impure else None
    choice = EvaluatorChoice(request.evaluator)
    return inputs, EvaluationMeans(limits, os.environ, on_messages, choice, cache, imports)


def show_evaluation(
    name: str, evaluation: Evaluation, on_messages: Callable[[str], None], line: Callable[[str], None]
) -> None:
    """Show what was left out of the thing of that name, and what failed."""
    if evaluation.left_out:
        line(f"drover: {left_out_text(name, evaluation.left_out)}")
    for number, each in enumerate(evaluation.failed):
        if number < MAX_WHOLE:
            on_messages(each.text)
        where = f" (at {each.position})" if each.position else ""
        line(f"drover: {each.attr} cannot be evaluated: {each.error}{where}")


def status_of(evaluation: Evaluation, line: Callable[[str], None]) -> int:
    """Return the exit status where all that was evaluated is built, and say which attributes were not evaluated."""
    if not evaluation.failed:
        return exit_status.OK
    names = harmless(some([each.attr or "all" for each in evaluation.failed]))
    line(f"not built, because they could not be evaluated: {names}")
    return exit_status.EVALUATION_FAILED


def show_messages(text: str) -> None:
    """Write what Nix printed for people: with its colours, but with nothing that a terminal or a runner obeys."""
    if not text.strip():
        return
    if sys.stderr.isatty():
        click.echo(harmless(text.rstrip("\n"), colours=True), err=True)
    else:
        click.echo(defused(harmless(text.rstrip("\n"))), err=True)
