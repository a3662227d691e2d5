"""Submission of a remote evaluation: opened with its first roots, grown by the others, sealed at its end.

The room is its client, by a name that follows from owner and idempotency key: an evaluation that is begun again after
the coordinator has started anew goes on in the submission of the one before.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from hashlib import sha256
from typing import Final

from coordinator.api.limits import MAX_UNEVALUATED, kept_text
from coordinator.api.requests import (
    GrowRequest,
    RemoteEvaluationRequest,
    RootRequest,
    SealRequest,
    SubmissionOrigin,
    SubmitRequest,
    UnevaluatedAttr,
)
from coordinator.errors import CoordinatorError, HeldError
from coordinator.intake.growth import Growth
from coordinator.intake.submissions import Submissions
from coordinator.remote_evaluation.record import EvaluationRecord

#: Seconds between two attempts while another client with the same idempotency key is ahead.
HELD_EVERY_S: Final = 2.0
#: Fields of a request that say what is evaluated.
_EVALUATED: Final = ("tree", "git", "rev", "file", "expression", "directory", "attrs", "systems", "args", "argstrs")


def evaluated_digest(ask: RemoteEvaluationRequest) -> str:
    """Return the digest of what is evaluated."""
    return sha256(repr([getattr(ask, name) for name in _EVALUATED]).encode()).hexdigest()


def opening_of(ask: RemoteEvaluationRequest, client: str) -> SubmitRequest:
    """Return all that a request says of its submission."""
    return SubmitRequest(
        roots=(),
        open=True,
        client=client,
        evaluates=evaluated_digest(ask),
        **{name: getattr(ask, name) for name in SubmissionOrigin.model_fields},
        label=ask.label,
        retry_failed=ask.retry_failed,
        wait_s=ask.wait_s,
        traceparent=ask.traceparent,
    )


class FoundSubmission:
    """The submission of one evaluation."""

    def __init__(self, submissions: Submissions, growth: Growth, evaluation: EvaluationRecord) -> None:
        self._submissions = submissions
        self._growth = growth
        self._evaluation = evaluation
        #: Empty before it is opened.
        self._id = ""
        key = evaluation.ask.idempotency_key or evaluation.id
        self._client = f"remote-{sha256(f'{evaluation.owner} {key}'.encode()).hexdigest()[:32]}"

    async def grow(self, roots: tuple[RootRequest, ...]) -> None:
        """Take further roots. Raises `CoordinatorError` where the farm does not take them."""
        evaluation = self._evaluation
        if not self._id:
            opening = opening_of(evaluation.ask, self._client)
            self._id = (await self._submissions.submit(opening, evaluation.owner)).id
        request = GrowRequest(roots=roots, retry_failed=evaluation.ask.retry_failed, client=self._client)
        while True:
            try:
                await self._growth.grow(self._id, request)
            except HeldError:
                await asyncio.sleep(HELD_EVERY_S)
            else:
                break
        if not evaluation.submission:
            # Named once it has something to show.
            evaluation.submission = self._id
            evaluation.wake()

    async def seal(self) -> None:
        """Seal it: all roots have come. Raises `CoordinatorError`."""
        while True:
            try:
                await self._growth.seal(self._id, self._sealing(""))
            except HeldError:
                await asyncio.sleep(HELD_EVERY_S)
            else:
                return

    async def cut_short(self, why: str) -> None:
        """Seal it as incomplete, where there is one that this evaluation grows."""
        if self._id:
            # Where another client grows it, or the coordinator stops, it is sealed later.
            with suppress(CoordinatorError):
                await self._growth.seal(self._id, self._sealing(why))

    def _sealing(self, incomplete: str) -> SealRequest:
        evaluation = self._evaluation
        failed = evaluation.failed[:MAX_UNEVALUATED]
        return SealRequest(
            not_evaluated=tuple(
                UnevaluatedAttr(attr=kept_text(each.attr), message=kept_text(each.error)) for each in failed
            ),
            unevaluated=evaluation.failed_count,
            incomplete=kept_text(incomplete),
            client=self._client,
            drv_count=len(evaluation.drvs),
        )
