"""Remote evaluations: queued, run side by side as far as the farm allows, and what became of each.

An evaluation is a run of `program` in a sandbox (with a git revision, one of `git_program` before it) whose frames are
read here. Its derivations and sources go through intake as any client's, and are verified there; nothing that it says
is believed, and every part of it is bounded. Roots are submitted as they are found. An evaluation lives in this process
alone: a coordinator that stops ends it, and the client, which gets 404 for it then, begins it again under the same
idempotency key. That finds its tree kept, and goes on in its submission, which is left open for that.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from coordinator.api.evaluations import EVALUATION_PREFIX, EvaluationState, EvaluationView
from coordinator.api.requests import IntakeQuery, RemoteEvaluationRequest, RootRequest
from coordinator.errors import ConflictError, CoordinatorError, NotFoundError, UnavailableError
from coordinator.intake.growth import Growth
from coordinator.intake.intake import Intake
from coordinator.intake.submissions import Submissions
from coordinator.remote_evaluation import git_program, program
from coordinator.remote_evaluation.errors import RemoteFailedError, RemoteOffError
from coordinator.remote_evaluation.found_submission import FoundSubmission, evaluated_digest, opening_of
from coordinator.remote_evaluation.frames import BadFrameError, FrameKind
from coordinator.remote_evaluation.gateway import Gateway
from coordinator.remote_evaluation.git_sources import refuse_url, require_source
from coordinator.remote_evaluation.jobs import EvaluationJob, GitJob, MissingNames
from coordinator.remote_evaluation.record import EvaluationRecord
from coordinator.remote_evaluation.sandboxed_run import SandboxedRun, running
from coordinator.remote_evaluation.sandboxes import Sandboxes
from coordinator.remote_evaluation.trees import TreeStore

_log = logging.getLogger(__name__)

#: Seconds that an answer waits for another state.
WAIT_S: Final = 20.0
#: Evaluations that ended and are remembered.
REMEMBERED: Final = 200
_PIECE_BYTES: Final = 256 * 1024
#: Part of an evaluation's memory that its evaluators may have: the rest is for what reads their results.
_EVALUATORS_PART: Final = 0.75


@dataclass(frozen=True, slots=True)
class EvaluationBounds:
    """Bounds of remote evaluation."""

    at_once: int
    waiting: int
    memory_bytes: int
    timeout_s: float
    evaluators: int
    #: Schemes of git addresses.
    schemes: frozenset[str]
    #: Names, or `NAME:PORT`.
    hosts: tuple[str, ...]


class RemoteEvaluations:
    """The room; `off` is the sentence that says why there is no remote evaluation here, empty where there is."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        sandboxes: Sandboxes | None,
        trees: TreeStore,
        gateway: Gateway,
        bounds: EvaluationBounds,
        intake: Intake,
        submissions: Submissions,
        growth: Growth,
        run_dir: Path,
        off: str = "",
    ) -> None:
        self.trees = trees
        self.off = off
        self._sandboxes = sandboxes
        self._gateway = gateway
        self._bounds = bounds
        self._intake = intake
        self._submissions = submissions
        self._growth = growth
        self._stopping = False
        self._run_dir = run_dir
        self._evaluations: dict[str, EvaluationRecord] = {}
        self._slots: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(bounds.at_once):
            self._slots.put_nowait(slot)

    def require(self) -> Sandboxes:
        """Return the sandboxes. Raises `RemoteOffError` where there are none."""
        if self._sandboxes is None:
            raise RemoteOffError(self.off)
        return self._sandboxes

    def begin(self, ask: RemoteEvaluationRequest, owner: str, *, submits: bool = True) -> EvaluationView:
        """Queue an evaluation whose submission is the owner's; the same again is the one that goes on.

        Without `submits` there is no submission: the derivations that it finds are stored, and `found` has them.

        Raises:
            ConflictError: The owner's evaluation with this idempotency key evaluates something else.
            RemoteOffError: There is none here.
            IntakeError: It names no source, or one that this farm does not fetch, or terms that cannot be.
            TreeMissingError: Its tree is not here.
            UnavailableError: Too many wait.
        """
        self.require()
        require_source(ask)
        if ask.git:
            refuse_url(ask.git, self._gateway, self._bounds.schemes, self._bounds.hosts)
        else:
            self.trees.require(ask.tree)
        self._submissions.require_terms(opening_of(ask, ""), owner)
        if (same := self._same(ask, owner)) is not None:
            return same.view()
        open_ones = sum(not each.state.ended for each in self._evaluations.values())
        if open_ones >= self._bounds.at_once + self._bounds.waiting:
            raise UnavailableError(
                f"{self._bounds.waiting} evaluations wait already, the limit of this farm; try again later."
            )
        evaluation = EvaluationRecord(
            f"{EVALUATION_PREFIX}{secrets.token_hex(8)}", ask, owner, submits=submits, tree=ask.tree
        )
        self._evaluations[evaluation.id] = evaluation
        evaluation.task = asyncio.create_task(self._run(evaluation), name=f"remote evaluation {evaluation.id}")
        self._forget()
        return evaluation.view()

    def _same(self, ask: RemoteEvaluationRequest, owner: str) -> EvaluationRecord | None:
        """Return the owner's evaluation with the key of a request that goes on. Raises `ConflictError`."""
        for each in self._evaluations.values():
            known = each.ask.idempotency_key
            if known and (known, each.owner, each.state.ended) == (ask.idempotency_key, owner, False):
                if evaluated_digest(each.ask) != evaluated_digest(ask):
                    raise ConflictError(
                        f"the idempotency key {known[:60]!r} is that of evaluation {each.id}, which evaluates "
                        "something else; use a new key for a new wish."
                    )
                return each
        return None

    def found(self, name: str) -> tuple[RootRequest, ...]:
        """Return what an evaluation that submits nothing has found so far. Raises `NotFoundError`."""
        return tuple(self._find(name, lambda _owner: True).found)

    async def view(self, name: str, may_see: Callable[[str], bool], seen: str = "") -> EvaluationView:
        """Return an evaluation; while its state is the one `seen`, wait for news of it for a while.

        Raises `NotFoundError`, also where the owner is one that `may_see` does not allow.
        """
        evaluation = self._find(name, may_see)
        if evaluation.state == seen and not evaluation.state.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    await evaluation.changed.wait()
        return evaluation.view()

    async def cancel(self, name: str, may_change: Callable[[str], bool]) -> EvaluationView:
        """End an evaluation; what it has submitted goes on. A repeat changes nothing.

        Raises `NotFoundError` as `view`.
        """
        evaluation = self._find(name, may_change)
        if not evaluation.state.ended and evaluation.task is not None:
            evaluation.task.cancel()
            await asyncio.wait([evaluation.task])
        return evaluation.view()

    async def stop(self) -> None:
        """End all that run; their submissions stay open for those who begin them again."""
        self._stopping = True
        tasks = [each.task for each in self._evaluations.values() if each.task is not None and not each.task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _find(self, name: str, may_see: Callable[[str], bool]) -> EvaluationRecord:
        if (found := self._evaluations.get(name)) is None or not may_see(found.owner):
            raise NotFoundError(
                f"there is no evaluation {name[:40]}; it ended long ago, or the coordinator has started anew since: "
                "begin it again."
            )
        return found

    def _forget(self) -> None:
        ended = [name for name, each in self._evaluations.items() if each.state.ended]
        for name in ended[: max(0, len(ended) - REMEMBERED)]:
            del self._evaluations[name]

    async def _run(self, evaluation: EvaluationRecord) -> None:
        """Run an evaluation to its end, whatever that is."""
        slot = -1
        submission = FoundSubmission(self._submissions, self._growth, evaluation)
        try:
            slot = await self._slots.get()
            if evaluation.ask.git:
                evaluation.become(EvaluationState.FETCHING)
                evaluation.tree = await self._fetch(evaluation.ask, slot)
            evaluation.become(EvaluationState.EVALUATING)
            await self._evaluate(evaluation, slot, submission)
            evaluation.become(EvaluationState.DONE)
        except asyncio.CancelledError:
            if not self._stopping:
                await submission.cut_short("its evaluation was cancelled before all was evaluated")
            evaluation.become(EvaluationState.CANCELLED)
        except CoordinatorError as error:
            evaluation.error = str(error)
            await submission.cut_short(f"its evaluation failed before all was evaluated: {error}")
            evaluation.become(EvaluationState.FAILED)
        except Exception:  # noqa: BLE001 - a fault of ours ends this evaluation and no other
            _log.exception("remote evaluation %s failed", evaluation.id)
            evaluation.error = "the evaluation failed by a fault of the coordinator; its log says more"
            await submission.cut_short(evaluation.error)
            evaluation.become(EvaluationState.FAILED)
        finally:
            if slot >= 0:
                self._slots.put_nowait(slot)

    async def _fetch(self, ask: RemoteEvaluationRequest, slot: int) -> str:
        """Fetch a git revision; returns its tree's name."""
        bounds = self.trees.bounds
        job = GitJob(url=ask.git, rev=ask.rev, tree_bytes=bounds.size_bytes, tree_entries=bounds.entries)
        async with self._program(slot, git_program.__name__, gateway=True) as run:
            await run.send(FrameKind.JOB, job.model_dump_json().encode())
            async with aclosing(_stream(run, FrameKind.TREE, FrameKind.TREE_END)) as tree:
                return await self.trees.add(tree)

    async def _evaluate(self, evaluation: EvaluationRecord, slot: int, submission: FoundSubmission) -> None:
        with self.trees.using(evaluation.tree) as path:
            async with self._program(slot, program.__name__, gateway=bool(self._bounds.hosts)) as run:
                feeding = asyncio.create_task(_feed(run, self._job(evaluation.ask), path), name="tree of an evaluation")
                try:
                    while await self._take(evaluation, submission, run, *await run.receive()):
                        pass
                finally:
                    feeding.cancel()
                    await asyncio.gather(feeding, return_exceptions=True)
        if not evaluation.root_count:
            raise RemoteFailedError("the evaluation ended without a derivation")
        if evaluation.submits:
            await submission.seal()

    @asynccontextmanager
    async def _program(self, slot: int, name: str, *, gateway: bool) -> AsyncIterator[SandboxedRun]:
        """Run a program in the sandbox of a slot for as long as the block runs, with the gateway where it has one."""
        sandboxes, bounds = self.require(), self._bounds
        socket = self._run_dir / f"gateway-{slot}" if gateway else None
        words = [sys.executable, "-I", "-B", "-m", name]
        command = sandboxes.command(slot, words, gateway=socket, uris=" ".join(_uris(bounds)))
        async with AsyncExitStack() as stack:
            if socket is not None:
                await stack.enter_async_context(self._gateway.serving(socket, sandboxes.uid(slot)))
            yield await stack.enter_async_context(running(command, bounds.memory_bytes, bounds.timeout_s))

    def _job(self, ask: RemoteEvaluationRequest) -> EvaluationJob:
        flags = [word for name, text in ask.args for word in ("--arg", name, text)]
        flags += [word for name, text in ask.argstrs for word in ("--argstr", name, text)]
        return EvaluationJob(
            file=ask.file,
            expression=ask.expression,
            directory=ask.directory,
            attrs=ask.attrs,
            systems=ask.systems,
            flags=tuple(flags),
            evaluators=self._bounds.evaluators,
            memory_bytes=int(self._bounds.memory_bytes * _EVALUATORS_PART),
            timeout_s=min(ask.timeout_s or self._bounds.timeout_s, self._bounds.timeout_s),
            tree_bytes=self.trees.bounds.size_bytes,
            tree_entries=self.trees.bounds.entries,
            allowed_uris=tuple(_uris(self._bounds)),
        )

    async def _take(
        self, evaluation: EvaluationRecord, submission: FoundSubmission, run: SandboxedRun, kind: FrameKind, data: bytes
    ) -> bool:
        """Take one frame of the program, with the stream that it begins; False: it is done."""
        try:
            match kind:
                case FrameKind.DONE:
                    return False
                case FrameKind.ERROR:
                    raise RemoteFailedError(data.decode(errors="replace"))
                case FrameKind.QUERY:
                    await self._answer(run, IntakeQuery.model_validate_json(data))
                case FrameKind.DERIVATIONS | FrameKind.DERIVATIONS_END:
                    await self._take_derivations(evaluation, run, (kind, data))
                case FrameKind.SOURCES | FrameKind.SOURCES_END:
                    await self._take_sources(run, (kind, data))
                case FrameKind.ROOTS:
                    roots = evaluation.taken_roots(data)
                    if evaluation.submits:
                        await submission.grow(roots)
                    else:
                        evaluation.found += roots
                case _:
                    evaluation.take(kind, data)
        except ValidationError:
            raise BadFrameError("the evaluator sent what is none of its answers") from None
        return True

    async def _answer(self, run: SandboxedRun, query: IntakeQuery) -> None:
        missing = await self._intake.missing(query)
        answer = MissingNames(derivations=missing.derivations, sources=missing.sources)
        await run.send(FrameKind.MISSING, answer.model_dump_json().encode())

    async def _take_derivations(
        self, evaluation: EvaluationRecord, run: SandboxedRun, first: tuple[FrameKind, bytes]
    ) -> None:
        async with aclosing(_stream(run, FrameKind.DERIVATIONS, FrameKind.DERIVATIONS_END, first)) as body:
            await self._intake.add_derivations(body, f"evaluation {evaluation.id}")

    async def _take_sources(self, run: SandboxedRun, first: tuple[FrameKind, bytes]) -> None:
        async with aclosing(_stream(run, FrameKind.SOURCES, FrameKind.SOURCES_END, first)) as body:
            await self._intake.add_sources(body)


async def _feed(run: SandboxedRun, job: EvaluationJob, tree: Path) -> None:
    """Send a program its job and its tree."""
    await run.send(FrameKind.JOB, job.model_dump_json().encode())
    try:
        with tree.open("rb", buffering=0) as file:
            while data := await asyncio.to_thread(file.read, _PIECE_BYTES):
                await run.send(FrameKind.TREE, data)
    except OSError as error:
        run.end(f"its tree cannot be read: {error.strerror}")
    await run.send(FrameKind.TREE_END)


async def _stream(
    run: SandboxedRun, kind: FrameKind, end: FrameKind, first: tuple[FrameKind, bytes] | None = None
) -> AsyncGenerator[bytes]:
    """Yield the pieces of a stream up to its end.

    Raises:
        RemoteFailedError: The program ended, or says why it cannot go on.
        BadFrameError: Something else came.
    """
    found, data = first or await run.receive()
    while found is kind:
        yield data
        found, data = await run.receive()
    if found is FrameKind.ERROR:
        raise RemoteFailedError(data.decode(errors="replace"))
    if found is not end:
        raise BadFrameError("the evaluator sent a frame that is not its own")


def _uris(bounds: EvaluationBounds) -> Iterator[str]:
    for scheme in sorted(bounds.schemes):
        for host in bounds.hosts:
            yield f"{scheme}://{host}/"
