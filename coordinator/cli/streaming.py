"""Evaluation and submission at one time: the farm builds what was found first while the rest is looked for.

The first root goes at once, further ones in batches of a second. Finding waits where sending is behind, so that both
are bounded. A batch is sent again where the coordinator was away; what it has already changes nothing there. The
submission is sealed when all has come. Where this program fails or is interrupted, it is sealed as incomplete.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Final, Literal

from coordinator.api.limits import MAX_UNEVALUATED, kept_text
from coordinator.api.models import StepView, SubmissionView
from coordinator.cli.evaluation import show_evaluation, show_messages
from coordinator.cli.follow import follow
from coordinator.cli.progress import Progress
from coordinator.cli.screen import Screen
from coordinator.cli.sending import ClientStages, SentParts, send_closure, sending_again, taken_after_sending
from coordinator.client.api_client import ApiClient
from coordinator.client.bodies import GrowBody, RootBody, SealBody, StageBody, SubmitBody, UnevaluatedBody
from coordinator.client.closure import LocalStore
from coordinator.client.errors import RefusedError, UnreachableError
from coordinator.errors import ConflictError, CoordinatorError, HeldError
from coordinator.evaluation.findings import RootKey, gathered, root_key
from coordinator.evaluation.inputs import Inputs, findings_asked, require_some
from coordinator.evaluation.model import AttrPlace, EvaluatedRoot, Evaluation, FailedAttr, Finding
from coordinator.evaluation.source_plan import EvaluationMeans
from infra.retry import RetryBudget

#: Roots of one batch at most, and seconds from one batch to the next while there are fewer.
BATCH_ROOTS: Final = 5000
BATCH_EVERY_S: Final = 1.0
#: Roots that wait to be sent before finding waits too.
MAX_WAITING: Final = 2 * BATCH_ROOTS
#: Seconds between signs of life of a client that finds nothing for long.
SIGN_EVERY_S: Final = 15.0
#: Seconds between two attempts while another client with the same idempotency key is ahead of this one.
HELD_EVERY_S: Final = 2.0
#: Seconds that an interrupted program takes to seal its submission.
SEAL_S: Final = 5.0


class StreamedBuild:
    """One build: what is found, what waits to be sent, and the submission that grows by it."""

    def __init__(
        self,
        client: ApiClient,
        screen: Screen,
        inputs: Inputs,
        store: Callable[[str], LocalStore],
        opening: SubmitBody,
    ) -> None:
        """`store` gives the store of a derivation, `opening` has all that is said of the submission but its roots."""
        self._client = client
        self._screen = screen
        self._inputs = inputs
        self._store_of = store
        #: This run, among others with the same idempotency key.
        self._name = os.urandom(8).hex()
        self._opening = replace(opening, client=self._name)
        #: Name of the submission, empty before there is one; whether it may still grow.
        self.id = ""
        self.is_open = False
        #: It was sealed, or left to the farm to seal, before all had come.
        self.cut_short = False
        #: When this began, the first root was found, the submission was opened, all was evaluated, and the first of its
        #: steps began. Unix seconds.
        self.moments: dict[str, float] = {"began": time.time()}
        self._findings: list[tuple[AttrPlace, Finding]] = []
        #: How many of them were gathered last, and what came of that.
        self._gathered: tuple[int, Evaluation] | None = None
        self._keys: set[RootKey] = set()
        self._waiting: list[EvaluatedRoot] = []
        self._drvs: list[str] = []
        self._sent = SentParts()
        self._progress = Progress()
        self._opened, self._arrived, self._room = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._all_found = self._all_sent = self._waited = False
        #: Begin and sum of the client's stages.
        self._stages: dict[Literal["evaluate", "closure", "upload"], tuple[float, float]] = {}

    @property
    def evaluation(self) -> Evaluation:
        """Findings so far."""
        # Asked for several times at the end, and no less work for one of them.
        if self._gathered is None or self._gathered[0] != len(self._findings):
            self._gathered = len(self._findings), gathered(self._findings)
        return self._gathered[1]

    def show_messages(self, text: str) -> None:
        """Write what Nix printed for people, beside a live region where one stands."""
        if self._screen.live and self.id:
            if text.strip():
                self._screen.line(text.rstrip("\n"))
        else:
            show_messages(text)

    async def run(
        self, means: EvaluationMeans, failed: dict[str, StepView], line: Callable[[str], None]
    ) -> SubmissionView:
        """Evaluate, submit and follow to the end; returns the last state. `failed` is filled as by `follow`.

        Raises:
            EvaluationError: There is nothing to build, or no evaluator can be started.
            CoordinatorError: The farm refused something, or has been away for too long.
        """
        work = asyncio.create_task(self._work(means, line))
        opened = asyncio.create_task(self._opened.wait())
        try:
            await asyncio.wait({work, opened}, return_when=asyncio.FIRST_COMPLETED)
            if not self.id:
                await work
            return await self._follow(work, failed)
        finally:
            opened.cancel()
            work.cancel()
            await asyncio.gather(work, opened, return_exceptions=True)

    async def _follow(self, work: asyncio.Task[None], failed: dict[str, StepView]) -> SubmissionView:
        async def send_again(whole: bool) -> None:
            await send_closure(self._client, self._store, self._drvs, self._screen, ClientStages(), whole=whole)

        async with sending_again(send_again, self._screen) as on_step:

            def note(step: StepView) -> None:
                if step.started_at:
                    self.moments.setdefault("first_step", step.started_at)
                on_step(step)

            following = asyncio.create_task(
                follow(self._client, self.id, self._screen, failed, note, progress=self._progress)
            )
            try:
                await asyncio.wait({work, following}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    # What failed here ends the command; what was taken goes on.
                    work.result()
                return await following
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    @property
    def _store(self) -> LocalStore:
        return self._store_of(self._drvs[0])

    async def _work(self, means: EvaluationMeans, line: Callable[[str], None]) -> None:
        """Find, send and seal."""
        finding, sending = asyncio.create_task(self._find(means)), asyncio.create_task(self._send())
        living = asyncio.create_task(self._give_signs())
        try:
            await asyncio.wait({finding, sending}, return_when=asyncio.FIRST_EXCEPTION)
            for task in (finding, sending):
                if task.done():
                    task.result()
            self._all_sent = True
            require_some(self._inputs, self.evaluation, self.show_messages)
            show_evaluation(self._inputs.name, self.evaluation, self.show_messages, line)
            await self._seal("")
        except asyncio.CancelledError:
            # An interruption that comes while the last request is under way takes nothing from what was sent.
            await self._seal_at_once("" if self._all_sent else "its client was interrupted before all was evaluated")
            raise
        except RefusedError as error:
            if error.reason != ConflictError.code or not self.id:
                await self._seal_at_once(f"its client failed before all was evaluated: {error}")
                raise
            # It was cancelled, or the farm has sealed it: what follows it says so.
            self.is_open = False
            line(f"drover: {error}")
        except (CoordinatorError, OSError) as error:
            await self._seal_at_once(f"its client failed before all was evaluated: {error}")
            raise
        finally:
            for task in (finding, sending, living):
                task.cancel()
            await asyncio.gather(finding, sending, living, return_exceptions=True)

    async def _find(self, means: EvaluationMeans) -> None:
        failed = 0
        try:
            async with aclosing(findings_asked(self._inputs, means)) as findings:
                async for place, finding in findings:
                    self._findings.append((place, finding))
                    failed += isinstance(finding, FailedAttr)
                    if isinstance(finding, EvaluatedRoot) and root_key(place, finding) not in self._keys:
                        self._keys.add(root_key(place, finding))
                        await self._put(finding)
                    self._progress.evaluating = f"evaluating: {len(self._keys)} found, {failed} failed"
        finally:
            self._all_found = True
            self._arrived.set()
        self.moments["evaluated"] = time.time()
        self._stages["evaluate"] = self.moments["began"], self.moments["evaluated"] - self.moments["began"]
        self._progress.evaluating = f"evaluated: {len(self._keys)} found, {failed} failed"

    async def _put(self, root: EvaluatedRoot) -> None:
        self.moments.setdefault("first_root", time.time())
        self._waiting.append(root)
        self._arrived.set()
        while len(self._waiting) >= MAX_WAITING:
            self._room.clear()
            await self._room.wait()

    async def _send(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await self._arrived.wait()
            batch = self._waiting[:BATCH_ROOTS]
            if not batch:
                if self._all_found:
                    return
                self._arrived.clear()
                continue
            until = clock() + BATCH_EVERY_S
            await self._send_batch(batch)
            del self._waiting[: len(batch)]
            self._room.set()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    while len(self._waiting) < BATCH_ROOTS and not self._all_found:
                        self._arrived.clear()
                        await self._arrived.wait()
            if self._waiting or self._all_found:
                self._arrived.set()

    async def _send_batch(self, batch: Sequence[EvaluatedRoot]) -> None:
        """Send what the farm lacks of a batch, and let the submission grow by it."""
        drvs = [each.drv for each in batch]
        first = not self._drvs
        self._drvs += drvs
        roots = tuple(
            RootBody(attr=each.attr, drv=each.drv, outputs=each.outputs, limits=each.limits) for each in batch
        )
        stages = ClientStages()

        async def send(whole: bool) -> tuple[str, ...]:
            told = self._screen if first else None
            return await send_closure(
                self._client, self._store, drvs, told, stages, sent_before=self._sent, whole=whole
            )

        async def take(makers: tuple[str, ...]) -> SubmissionView:
            if not self.id:
                await self._open()
            return await self._client.grow(self.id, self._growth(roots, makers))

        budget: RetryBudget | None = None
        while True:
            stages = ClientStages()
            try:
                await taken_after_sending(send, take)
            except (UnreachableError, RefusedError) as error:
                if await self._waits_behind(error):
                    continue
                if isinstance(error, RefusedError) and not error.is_passing:
                    raise
                budget = budget or self._client.budget()
                self._client.on_lost(str(error))
                if not await budget.pause():
                    raise
            else:
                self._note(stages)
                return

    def _growth(self, roots: tuple[RootBody, ...] = (), makers: tuple[str, ...] = ()) -> GrowBody:
        return GrowBody(roots=roots, makers=makers, retry_failed=self._opening.retry_failed, client=self._name)

    async def _waits_behind(self, error: Exception) -> bool:
        """Wait a moment where a refusal says that another client with the same key is ahead; False for any other."""
        if not isinstance(error, RefusedError) or error.reason != HeldError.code:
            return False
        if not self._waited:
            self._waited = True
            self._screen.status(f"another client with this idempotency key fills {self.id}; waiting for what it finds")
        await asyncio.sleep(HELD_EVERY_S)
        return True

    async def _open(self) -> None:
        view = await self._client.submit(self._opening)
        self.id, self.is_open = view.id, True
        self.moments["opened"] = time.time()
        self._opened.set()

    def _note(self, stages: ClientStages) -> None:
        for stage in stages.taken:
            begin, sum_s = self._stages.get(stage.name, (stage.begin, 0.0))
            self._stages[stage.name] = begin, sum_s + stage.end - stage.begin

    async def _give_signs(self) -> None:
        """Say that this program works still, while nothing is found for long."""
        await self._opened.wait()
        while True:
            await asyncio.sleep(SIGN_EVERY_S)
            with suppress(CoordinatorError, OSError):
                await self._client.grow(self.id, self._growth())

    async def _seal(self, incomplete: str) -> None:
        evaluation = self.evaluation
        failed = evaluation.failed[:MAX_UNEVALUATED]
        not_evaluated = tuple(
            UnevaluatedBody(attr=kept_text(each.attr), message=kept_text(each.error)) for each in failed
        )
        stages = tuple(
            StageBody(name=name, begin=begin, end=begin + max(0.0, sum_s))
            for name, (begin, sum_s) in self._stages.items()
        )
        request = SealBody(
            not_evaluated=not_evaluated,
            unevaluated=len(evaluation.failed),
            incomplete=kept_text(incomplete),
            stages=stages,
            client=self._name,
            drv_count=len(set(self._drvs)),
        )
        while True:
            try:
                await self._client.seal(self.id, request)
            except RefusedError as error:
                if incomplete or not await self._waits_behind(error):
                    raise
            else:
                self.is_open = False
                return

    async def _seal_at_once(self, incomplete: str) -> None:
        """Seal what is open, if that can be done soon; the farm does it later where it cannot.

        `incomplete` says why not all of it was sent, and is empty where all was.
        """
        if self.is_open:
            self.cut_short = bool(incomplete)
            with suppress(CoordinatorError, OSError, TimeoutError):
                async with asyncio.timeout(SEAL_S):
                    await self._seal(incomplete)
