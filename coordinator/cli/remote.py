"""The evaluation of `drover build --remote`: on the coordinator's machine, watched from here."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from coordinator.api.evaluations import EvaluationState, EvaluationView
from coordinator.api.requests import RemoteEvaluationRequest
from coordinator.api.sent_streams import in_thread
from coordinator.cli.ci import defused
from coordinator.cli.evaluation import show_evaluation, show_messages
from coordinator.cli.printing import size
from coordinator.cli.screen import Screen
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import BadArgumentError, ClientError, RefusedError
from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.model import Evaluation, FailedAttr
from coordinator.terminal_controls import harmless
from infra.records import record

if TYPE_CHECKING:
    from coordinator.client.working_tree import WorkingTree

#: Times that an evaluation is begun because the coordinator has started anew and knows the one before no more.
BEGUN_AT_MOST: Final = 5
_SAID: Final = {
    EvaluationState.QUEUED: "waiting for a turn to evaluate at the coordinator",
    EvaluationState.FETCHING: "the coordinator fetches the git revision",
    EvaluationState.EVALUATING: "the coordinator evaluates",
}


@record(frozen=True, slots=True)
class RemoteSource:
    """Origin of a remote evaluation's files: a revision of a repository, or (both empty) the working tree."""

    git: str = ""
    rev: str = ""


async def evaluate_remotely(
    client: ApiClient,
    wanted: RemoteEvaluationRequest,
    source: RemoteSource,
    screen: Screen,
    begun: Callable[[str], None],
) -> tuple[str, Evaluation]:
    """Evaluate at the coordinator, and show what was left out and what failed; returns the submission's name.

    Args:
        client: Of the coordinator.
        wanted: The request without its source; `file` and `directory` as they are named on this machine.
        source: Where its files come from.
        screen: For what happens.
        begun: Receives the evaluation's name as soon as it has one.

    Raises:
        EvaluationError: There is nothing to build.
        CoordinatorError: It cannot be evaluated there.
    """
    from coordinator.client.working_tree import working_tree  # noqa: PLC0415 - slow to import

    # One key for all that is begun: it goes on in the same submission after the coordinator has started anew.
    wanted = wanted.model_copy(update={"idempotency_key": wanted.idempotency_key or secrets.token_hex(16)})
    tree: WorkingTree | None = None
    if source.git:
        asked = wanted.model_copy(update={"git": source.git, "rev": source.rev})
    else:
        tree = await working_tree(_directory(wanted), os.environ)
        if tree.untracked:
            screen.status(f"{tree.untracked} files are not sent, because git does not track them (`git add` them)")
        asked = await asyncio.to_thread(_with_tree, wanted, tree)
    for _ in range(BEGUN_AT_MOST):
        view = await _begin(client, asked, tree, screen)
        begun(view.id)
        ended = await _watch(client, view, screen)
        if ended is not None:
            return ended.submission, _evaluation(ended)
        screen.status("the coordinator has started anew and knows the evaluation no more; it begins again")
    raise ClientError("the coordinator starts anew again and again; see its log")


async def watch_evaluation(client: ApiClient, name: str, screen: Screen) -> tuple[str, Evaluation]:
    """Watch an evaluation to its end, as `evaluate_remotely` does; returns its submission's name."""
    ended = await _watch(client, await client.evaluation(name), screen)
    if ended is None:
        raise EvaluationError(f"the coordinator has started anew and knows {name} no more; build it again")
    return ended.submission, _evaluation(ended)


def _directory(wanted: RemoteEvaluationRequest) -> Path:
    """Return the directory on this machine whose repository is meant."""
    path = Path(wanted.file.partition("#")[0] or ".")
    return path if path.is_dir() else path.parent


def _with_tree(wanted: RemoteEvaluationRequest, tree: WorkingTree) -> RemoteEvaluationRequest:
    """Read the tree and return the request for a working tree, with the paths in it."""
    root = tree.root.resolve()

    def inside(text: str) -> str:
        path = Path(text or ".").resolve()
        if not path.is_relative_to(root):
            raise BadArgumentError(f"{text} does not lie in the repository {root}, which is what is sent")
        return str(path.relative_to(root))

    file, mark, attr = wanted.file.partition("#")
    if wanted.file and not mark and not Path(file).exists():
        raise EvaluationError(f"{file} does not exist; name the Nix file to evaluate")
    # Where relative paths of arguments begin, if that is in the tree.
    here = str(Path.cwd().relative_to(root)) if Path.cwd().is_relative_to(root) else ""
    where = {"directory": here, "file": f"{inside(file)}{mark}{attr}" if wanted.file else ""}
    return wanted.model_copy(update={**where, "tree": tree.name()})


async def _begin(
    client: ApiClient, asked: RemoteEvaluationRequest, tree: WorkingTree | None, screen: Screen
) -> EvaluationView:
    """Begin an evaluation, and send its tree where the coordinator lacks it."""
    try:
        return await client.evaluate(asked)
    except RefusedError as refusal:
        if refusal.reason != "tree_missing" or tree is None:
            raise
    sent = 0

    def counted() -> Iterator[bytes]:
        nonlocal sent
        for piece in tree.compressed():
            sent += len(piece)
            yield piece

    await client.send_tree(asked.tree, in_thread(counted()))
    screen.status(f"sent {len(tree.paths)} files of {tree.root} ({size(sent)})")
    return await client.evaluate(asked)


async def _watch(client: ApiClient, view: EvaluationView, screen: Screen) -> EvaluationView | None:
    """Return an evaluation once it has ended; None where the coordinator knows it no more.

    Raises `UnreachableError` after a long time without a coordinator.
    """
    said: EvaluationState | None = None
    submission = ""
    while not view.state.ended:
        if view.state is not said:
            said = view.state
            screen.status(f"{_SAID[said]} ({view.id})")
        if view.submission != submission:
            submission = view.submission
            screen.status(f"what it has found is built already: drover watch {submission}")
        try:
            view = await client.evaluation(view.id, view.state)
        except RefusedError as refusal:
            if refusal.reason != "not_found":
                raise
            return None
    return view


def _evaluation(view: EvaluationView) -> Evaluation:
    """Show what an evaluation said, and return what failed. Raises `EvaluationError` where nothing is to be built."""
    show_messages(view.messages)
    failed = tuple(FailedAttr(each.attr, each.error, each.text, each.position) for each in view.failed)
    if view.state is EvaluationState.CANCELLED:
        raise EvaluationError(f"the evaluation {view.id} was cancelled")
    if view.state is EvaluationState.FAILED:
        raise EvaluationError(view.error)
    if view.left_out:
        click.echo(f"drover: {harmless(view.left_out)}", err=True)
    evaluation = Evaluation((), (), failed)
    show_evaluation("", evaluation, show_messages, lambda text: click.echo(defused(harmless(text)), err=True))
    return evaluation
