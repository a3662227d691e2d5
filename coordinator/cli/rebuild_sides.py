"""The two sides of `drover rebuild`: revisions, files, flakes or submissions, evaluated side by side."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from coordinator.api.models import StepStatus
from coordinator.cli.evaluation import EvaluationRequest, evaluate, make_store
from coordinator.cli.import_builds import FarmImports
from coordinator.client.api_client import ApiClient
from coordinator.client.closure import LocalStore, local_store
from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.model import EvaluatedRoot, Evaluation, some
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.evaluation.revisions import Checkout, Repository
from coordinator.rebuild.model import Package, SetSide
from coordinator.rebuild.outcome import SideResult, SideState
from infra.nix import aterm
from infra.nix.errors import FormatError
from infra.records import record

#: Paths that differ from a commit which a sentence names.
DEFAULT_FILE: Final = "default.nix"


@record(frozen=True, slots=True)
class SidesRequest:
    """Arguments of the command that say what is compared: one pair of these."""

    #: Revisions of the repository around `file`.
    revisions: tuple[str, str] | None = None
    file: str = ""
    #: Files or flakes.
    files: tuple[str, str] | None = None
    submissions: tuple[str, str] | None = None


@record(frozen=True, slots=True)
class LoadedSide:
    """One side with what is needed to build it."""

    packages: SetSide
    #: Wanted derivations by attribute; empty of a submission.
    roots: Mapping[str, EvaluatedRoot]
    #: Known results by derivation, of a submission.
    results: Mapping[str, SideResult]
    submission: str = ""


@record(frozen=True, slots=True)
class Sides:
    """Both sides, and sentences about what was not taken."""

    base: LoadedSide
    head: LoadedSide
    #: Of the evaluated derivations; None where both sides are submissions.
    store: LocalStore | None = None
    notes: tuple[str, ...] = ()


@asynccontextmanager
async def evaluated_files(
    request: SidesRequest, evaluation: EvaluationRequest
) -> AsyncIterator[tuple[list[tuple[str, EvaluationRequest]], tuple[str, ...]]]:
    """Give name and evaluation of both sides, for as long as their checkouts are there, and what is not taken.

    Raises:
        EvaluationError: A revision, or a file in it, is not there.
    """
    if request.files is not None:
        yield [(file, replace(evaluation, files=(file,))) for file in request.files], ()
        return
    assert request.revisions is not None  # noqa: S101 - one pair is given
    file = await asyncio.to_thread(Path(request.file or DEFAULT_FILE).absolute)
    repository = await Repository.around(file, os.environ)
    inside = await asyncio.to_thread(_inside, repository, file)
    commits = [await repository.commit_of(revision) for revision in request.revisions]
    notes = _dirty(await repository.uncommitted())
    async with AsyncExitStack() as stack:
        sides = []
        for revision, commit in zip(request.revisions, commits, strict=True):
            checkout = await stack.enter_async_context(repository.checkout(commit))
            name = commit[:12] if commit.startswith(revision) else f"{revision} ({commit[:12]})"
            await asyncio.to_thread(_require, checkout, inside, revision)
            notes += _submodules(checkout, revision)
            # Kept findings are those of a directory; this one is never there again.
            sides.append((name, replace(evaluation, files=(str(checkout.directory / inside),), eval_cache=False)))
        yield sides, tuple(notes)


def _inside(repository: Repository, file: Path) -> Path:
    try:
        return file.resolve().relative_to(repository.root.resolve())
    except ValueError:
        raise EvaluationError(f"{file} is not in the repository {repository.root}; name a file of it") from None


def _require(checkout: Checkout, inside: Path, revision: str) -> None:
    if not (checkout.directory / inside).exists():
        raise EvaluationError(f"revision {revision} has no {inside}; name a file that both revisions have")


def _dirty(paths: Sequence[str]) -> list[str]:
    if not paths:
        return []
    return [f"not taken, because revisions are compared: what is not committed ({some(paths)}); commit it to take it"]


def _submodules(checkout: Checkout, revision: str) -> list[str]:
    if not checkout.submodules:
        return []
    return [f"{revision} is evaluated without its submodules: {some(checkout.submodules)}"]


async def evaluate_sides(
    request: SidesRequest,
    evaluation: EvaluationRequest,
    settings: Sequence[str],
    store: str | None,
    imports: Callable[[], FarmImports],
) -> Sides:
    """Evaluate both sides side by side, each with half of what one evaluation may take.

    `imports` gives what makes what a side imports from derivations.

    Raises:
        EvaluationError: A side does not evaluate at all; the sentence names it.
    """
    await make_store(store)
    async with evaluated_files(request, _halved(evaluation)) as (sides, notes):
        asked = [
            _evaluated(f"the {role}, {name},", each, settings, store, imports())
            for role, (name, each) in zip(ROLES, sides, strict=True)
        ]
        # Both to their ends: what is wrong with each is worth knowing.
        found = await asyncio.gather(*asked, return_exceptions=True)
    errors = [each for each in found if isinstance(each, BaseException)]
    if errors:
        raise errors[0]
    evaluations = [each for each in found if isinstance(each, Evaluation)]
    local = local_store(store, evaluations[1].wanted[0].drv)
    loaded = [
        await asyncio.to_thread(_loaded, name, each, local) for (name, _), each in zip(sides, evaluations, strict=True)
    ]
    return Sides(loaded[0], loaded[1], local, notes)


ROLES: Final = ("base", "head")


async def _evaluated(
    name: str, request: EvaluationRequest, settings: Sequence[str], store: str | None, imports: FarmImports
) -> Evaluation:
    try:
        async with imports as made:
            return await evaluate(request, settings, store, made)
    except EvaluationError as error:
        raise EvaluationError(f"{name} does not evaluate: {error}") from None


def _halved(request: EvaluationRequest) -> EvaluationRequest:
    memory_bytes = request.memory_mib and request.memory_mib * 1024 * 1024
    whole = PoolLimits.of_machine(request.evaluators, memory_bytes, request.timeout_s or None)
    memory_mib = whole.memory_bytes // 2 // (1024 * 1024)
    return replace(request, evaluators=max(1, whole.evaluators // 2), memory_mib=max(1, memory_mib))


def _loaded(name: str, evaluation: Evaluation, store: LocalStore) -> LoadedSide:
    roots = {each.attr: each for each in (*evaluation.aliases, *evaluation.wanted)}
    read: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {}
    packages = {}
    for attr, root in roots.items():
        if root.drv not in read:
            read[root.drv] = _system_and_outputs(store, root.drv)
        system, outputs = read[root.drv]
        wanted = tuple(each for each in outputs if not root.outputs or each[0] in root.outputs)
        packages[attr] = Package(attr, system, root.drv, wanted, root.maintainers)
    failed = {each.attr: each.error for each in evaluation.failed}
    return LoadedSide(SetSide(name, packages, failed), roots, {})


def _system_and_outputs(store: LocalStore, drv: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    try:
        derivation = aterm.parse(store.read(drv))
    except FormatError as error:
        raise EvaluationError(f"{drv} is not a derivation: {error}") from None
    return derivation.system, tuple((output.name, output.path) for output in derivation.outputs)


async def submitted_sides(client: ApiClient, submissions: tuple[str, str]) -> Sides:
    """Return two submissions as sides.

    Raises:
        CoordinatorError: One is not known; the sentence names it.
    """
    base, head = [await _submitted(client, role, name) for role, name in zip(ROLES, submissions, strict=True)]
    return Sides(base, head)


async def _submitted(client: ApiClient, role: str, name: str) -> LoadedSide:
    view = await client.whole(await client.submission(name))
    systems = {step.key: step.system for step in await client.steps(view.id)}
    packages, results = {}, {}
    for root in view.roots:
        outputs = tuple(sorted(root.outputs.items()))
        packages[root.attr] = Package(root.attr, systems.get(root.step, ""), root.drv, outputs)
        results[root.drv] = result_of(root.state, root.failure.step if root.failure else "")
    label = f"{role} {view.id}" + (f" ({view.label})" if view.label else "")
    return LoadedSide(SetSide(label, packages), {}, results, view.id)


def result_of(state: StepStatus, cause: str) -> SideResult:
    """Return the result of a root by its step's state."""
    match state:
        case StepStatus.DONE:
            return SideResult(SideState.BUILT)
        case StepStatus.FAILED | StepStatus.DOOMED:
            return SideResult(SideState.FAILED, cause)
        case _:
            return SideResult(SideState.UNKNOWN)
