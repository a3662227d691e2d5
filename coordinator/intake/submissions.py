"""Submissions from a client's wish to the core: planned, taken, and run again where they ended without success.

Running again is submitting again under the same name: the graph is planned anew and the cache looked up anew, because
what was in it then may be gone. What the core takes for known to fail is built again only where a client asked for
that.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import asdict, replace

from coordinator.api.models import StepStatus, SubmissionState
from coordinator.api.requests import RootRequest, SubmitRequest
from coordinator.api.root_limits import RootLimits
from coordinator.defaults import OPERATOR
from coordinator.engine.engine import Engine
from coordinator.errors import BadRequestError, ConflictError, ForbiddenError, IntakeError
from coordinator.intake.client_meter import ClientMeter, placed
from coordinator.intake.graph import Planned
from coordinator.intake.idempotency import IdempotencyKeys, wish_digest
from coordinator.intake.intake import Intake
from coordinator.intake.wish_terms import terms_of
from coordinator.journal.codec import OriginNote, SubmissionNote, encode_note
from coordinator.journal.notes import Note
from coordinator.readmodel.packed_roots import with_packed_roots
from coordinator.readmodel.rows import StepRow, SubmissionRow
from coordinator.readmodel.views import Views
from infra.collector import collector_paused
from infra.slices import free_in_slices, in_slices
from scheduler.events import PriorityAsked, RetryAsked, SubmissionCancelled, SubmissionGrown, SubmissionReceived
from scheduler.model import StepKey, SubmissionClosedError, SubmissionId, SubmissionRefusedError
from scheduler.terms import Withdrawal

#: Submissions that one retried step lets run again; the newest.
RUN_AGAIN_AT_ONCE = 20


class Submissions:
    """The ways into the core for what clients want built. All methods raise `UnavailableError`, `IntakeError`."""

    def __init__(self, engine: Engine, views: Views, intake: Intake) -> None:
        self._engine = engine
        self._views = views
        self._intake = intake
        self._keys = IdempotencyKeys(views)
        self.meter = ClientMeter()

    async def submit(self, wish: SubmitRequest, owner: str = OPERATOR) -> SubmissionRow:
        """Plan a wish and hand it over; returns its row once it is durable.

        A wish whose idempotency key the owner has used gets the submission that has it. Raises `ConflictError` where
        that has another wish, `HeldError` where that is not known before it is complete.
        """
        if not wish.roots and not wish.open:
            raise IntakeError("a submission has no root; name what it is to build, or open it (`open`) and send roots.")
        with collector_paused():
            if not wish.idempotency_key:
                return await self._submit(wish, OriginNote(owner, client=wish.client))
            digest = await asyncio.to_thread(wish_digest, wish)
            origin = OriginNote(owner, key=wish.idempotency_key, wish=digest, client=wish.client)
            return await self._keys.once(origin, wish, lambda: self._submit(wish, origin))

    async def _submit(self, wish: SubmitRequest, origin: OriginNote) -> SubmissionRow:
        asked_at = self._engine.now()
        terms = terms_of(wish, origin.owner, asked_at)
        planned = await self._intake.submit(wish)
        stages = placed(wish.stages, asked_at)
        tags = tuple(sorted(wish.tags.items()))
        origin = replace(origin, branch=wish.branch, pull=wish.pull, commit=wish.commit, tags=tags)
        note = SubmissionNote(wish.label, planned.roots, planned.derivations, wish.traceparent, stages, origin=origin)
        name = SubmissionId(secrets.token_hex(5))

        def event(planned: Planned) -> SubmissionReceived:
            return replace(
                planned.event(name),
                asked_at=asked_at,
                retry_failed=wish.retry_failed,
                wait_s=wish.wait_s,
                open=wish.open,
                terms=terms,
                supersedes=wish.supersede,
            )

        row = await self._hand_over(planned, event, note)
        if not wish.open:
            self.meter.count(wish, planned.derivations)
        objects = planned.objects()
        del planned, note
        await free_in_slices(objects)
        return row

    def require_terms(self, wish: SubmitRequest, owner: str) -> None:
        """Raise `IntakeError` where what a wish sets for its submission cannot be."""
        terms_of(wish, owner, self._engine.now())

    async def cancel(self, submission: str) -> SubmissionRow:
        """Withdraw a submission; a repeat changes nothing. Raises `NotFoundError`, `UnavailableError`."""
        row = self._views.submission(submission)
        if not row.ended and not row.withdrawn:
            await self._engine.offer(SubmissionCancelled(row.id))
        return row

    async def bump(self, submission: str, priority: int | None) -> SubmissionRow:
        """Give a submission a priority, None for one above all that wait of its owner; nothing where it has ended.

        Raises `NotFoundError`, `UnavailableError`.
        """
        row = self._views.submission(submission)
        if not row.ended and not row.withdrawn:
            await self._engine.offer(PriorityAsked(row.id, priority))
        return row

    async def retry(self, submission: str) -> SubmissionRow:
        """Let a submission run again whose roots have failed; nothing happens where none has.

        Raises `NotFoundError`, and `BadRequestError` for one that was cancelled.
        """
        row = self._views.submission(submission)
        if row.withdrawn and row.why is not Withdrawal.FAIL_FAST:
            raise BadRequestError(
                f"submission {row.id} was {row.state.value}; submit its roots again with `drover build`."
            )
        if row.failed or row.state is SubmissionState.FAILED:
            await self._run_again(row, retry_failed=True)
        return row

    async def replan(self, row: SubmissionRow) -> None:
        """Plan a running submission anew: the cache has lost something that it held. What failed stays failed."""
        asked_at = self._engine.now()
        with collector_paused():
            wish = await self._wish(row)
            planned = await self._intake.submit(wish, sources_may_lack=True)
            await self._hand_over(planned, lambda plan: replace(plan.event(row.id), asked_at=asked_at, replanned=True))
            objects = [*planned.objects(), *wish.roots]
            del planned, wish
            await free_in_slices(objects)

    async def retry_step(
        self, text: str, may_change: Callable[[str], bool] = lambda _: True
    ) -> tuple[StepRow, list[SubmissionRow]]:
        """Build a failed step again, for the submissions that it made fail, which run again; returns both.

        For a doomed step it is the step that doomed it. Only submissions of owners that `may_change` accepts run again.
        Raises `NotFoundError` as `Views.step`, and `ForbiddenError` where it made only submissions of others fail.
        """
        step = self._views.step(text)
        if step.state is StepStatus.DOOMED:
            step = self._views.step(step.life.cause)
        if step.state is not StepStatus.FAILED:
            return step, []
        failed = self._views.failed_through(step)
        submissions = [row for row in failed if may_change(self._views.note(row.id).origin.owner)][:RUN_AGAIN_AT_ONCE]
        if failed and not submissions:
            raise ForbiddenError(
                f"step {step.key} made only submissions of others fail; submit what needs it with "
                "`drover build --retry` to have it built again."
            )
        for row in submissions:
            await self._run_again(row, retry=(step.key,))
        if step.state is StepStatus.FAILED:
            # No submission waits for it: the next one that wants it builds it.
            await self._engine.offer(RetryAsked(step.key))
        return step, submissions

    async def _run_again(
        self, row: SubmissionRow, *, retry_failed: bool = False, retry: tuple[StepKey, ...] = ()
    ) -> None:
        asked_at = self._engine.now()
        with collector_paused():
            wish = await self._wish(row)
            planned = await self._intake.submit(wish)
            await self._hand_over(
                planned,
                lambda plan: replace(
                    plan.event(row.id), asked_at=asked_at, retry_failed=retry_failed, retry=retry, again=True
                ),
            )
            objects = [*planned.objects(), *wish.roots]
            del planned, wish
            await free_in_slices(objects)

    async def _hand_over(
        self, planned: Planned, make: Callable[[Planned], SubmissionReceived], note: SubmissionNote | None = None
    ) -> SubmissionRow:
        """Give the event that `make` makes of the plan to the engine, its names to the views, its leases to its row.

        `note` is of a new submission. Raises `IntakeError` where the core refuses the graph.
        """
        try:
            # In threads: they list and compress what a large graph has.
            event = await asyncio.to_thread(make, planned)
            stored, note = (None, None) if note is None else await asyncio.to_thread(_stored_and_kept, note)
        except Exception:
            self._intake.leases.give_back(planned.leases)
            raise
        # Before the facts: where this is cancelled the submission may yet become known.
        self._views.add_details({}, {} if note is None else {event.submission: note})
        return await self.hand_over(planned, event, stored)

    async def hand_over(
        self, planned: Planned, event: SubmissionReceived | SubmissionGrown, stored: Note | None
    ) -> SubmissionRow:
        """Give the event of a plan to the engine, its names to the views, its leases to its submission.

        Raises `IntakeError` where the core refuses the graph, `ConflictError` where the submission grows no more.
        """
        try:
            await in_slices(self._views.adding_details(planned.infos), can_wait=True)
            try:
                await self._engine.submit(event, stored)
            except SubmissionRefusedError as error:
                await in_slices(self._views.unknowing(planned.infos, event.submission), can_wait=True)
                if isinstance(error, SubmissionClosedError):
                    raise ConflictError(f"submission {event.submission} takes no further roots: {error}.") from None
                raise IntakeError(f"the graph of this submission cannot be built: {error}.") from None
            row = self._views.submission(event.submission)
        except Exception:
            # Whatever it was, nothing knows this submission, so nothing else would end its leases.
            self._intake.leases.give_back(planned.leases)
            raise
        self._intake.fixed.on_lacking(planned.lacking)
        # Where this is cancelled the submission may yet become known: its leases end by their time.
        self._intake.leases.attach(row.id, planned.leases)
        # Steps that were forgotten in the meantime have lost their names.
        await in_slices(self._views.adding_details(planned.infos, only_known=True), can_wait=True)
        return row

    async def _wish(self, row: SubmissionRow) -> SubmitRequest:
        """Return the request with which the client submitted."""
        return await asyncio.to_thread(_request, self._views.note(row.id))


def _stored_and_kept(note: SubmissionNote) -> tuple[Note, SubmissionNote]:
    return encode_note(note), with_packed_roots(note)


def _request(note: SubmissionNote) -> SubmitRequest:
    roots = tuple(
        RootRequest(
            attr=root.attr,
            drv=root.drv,
            outputs=tuple(name for name, _ in root.outputs),
            limits=RootLimits(**asdict(root.limits)) if root.limits else None,
        )
        for root in note.roots
    )
    # An open one may have none yet.
    return SubmitRequest(roots=roots, label=note.label, open=not roots)
