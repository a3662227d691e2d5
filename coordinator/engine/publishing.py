"""Publishing what finished builds uploaded: the effect that goes to the cache instead of a worker.

Rules:
1. Nothing in the evidence is trusted: the outputs must be exactly those of the step, and the cache checks bytes, hashes
   and references before it signs.
2. What is uploaded is not built again because a store or a database is away: it is tried again, for PUBLISH_WITHIN_S,
   and nothing else waits for it.
3. `submit` never waits. What waits to be published is bounded by PUBLISH_BACKLOG, beyond which reports wait at the
   sink.
4. A publication costs the loop, the journal and the views little more for ten steps than for one. So one that others
   may join waits for them: for the end of the publication under way, and for GATHER_S where no step waits for it and
   more builds are in hand. One that a step waits for, or the last in hand, begins at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.journal.codec import Evidence, decode_evidence
from coordinator.journal.errors import CodecError
from coordinator.stores.derivations import DerivationsError, DerivationStore, StepInfo
from infra.cache.cache import Cache
from infra.cache.publishing.claims import Conflict, PublishOutcome, Rejected, RejectReason
from infra.clock import Clock
from infra.nix.store_path import base_name_of
from infra.objects.errors import CacheError
from infra.retry import RetryBudget
from scheduler.effects import PublishOutputs
from scheduler.events import Event, OutputsPublished, PublishFailed
from scheduler.model import Failure, FailureKind, LeaseId, StepKey

#: Publications in one call of the cache.
PUBLISH_BATCH = 256
#: Calls of the cache at one time: one verifies while the other waits for a large object.
PUBLISHERS = 2
#: Seconds for which others may join a publication that no step waits for, or whose outputs one under way delays.
GATHER_S = 0.03
#: Publications waiting before workers' reports are no longer taken in.
PUBLISH_BACKLOG = 4096
#: Seconds for which publishing is tried again where what keeps it may pass.
PUBLISH_WITHIN_S = 60.0

Post = Callable[[Sequence[Event]], Awaitable[None]]
#: Returns whether a step waits for this one.
Awaited = Callable[[StepKey], bool]
#: Names those of some paths that a step needs and the cache has lost, and begins their repair; "" for none.
LossCheck = Callable[[StepKey, Sequence[str]], Awaitable[str]]
#: Gets, of each lease, when the outputs began to be verified, were verified, and were published.
Timed = Callable[[LeaseId, float, float, float], None]

_log = logging.getLogger(__name__)


def always_awaited(_step: StepKey) -> bool:
    """Take each step for one that others wait for."""
    return True


@dataclass(frozen=True, slots=True)
class _NotNow:
    """Publishing failed in a way that may pass; `failed` is the message where it does not pass."""

    failed: PublishFailed


class Publications:
    """Publishes until `run` is cancelled; each effect ends in one event, which `post` takes."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        cache: Cache,
        derivations: DerivationStore,
        post: Post,
        losses: LossCheck,
        clock: Clock,
        timed: Timed,
        *,
        awaited: Awaited,
        building: Callable[[], bool],
    ) -> None:
        """`building` returns whether there are leases whose outputs may come."""
        self._awaited = awaited
        self._building = building
        self._clock = clock
        self._timed = timed
        self._losses = losses
        self._cache = cache
        self._derivations = derivations
        self._post = post
        self._waiting: deque[PublishOutputs] = deque()
        self._filled = asyncio.Event()
        #: One gathers at a time; set where what waits should begin.
        self._gathering = asyncio.Lock()
        self._due = asyncio.Event()
        #: Publications in a call of the cache.
        self._under_way = 0
        self._roomy = asyncio.Event()
        self._roomy.set()
        self._turns = asyncio.Semaphore(PUBLISHERS)
        #: Those that are tried again, and why.
        self._away: dict[LeaseId, str] = {}

    @property
    def trouble(self) -> str:
        """Reason that outputs wait to be published at the moment, "" while all is well."""
        return next(iter(self._away.values()), "")

    def submit(self, effect: PublishOutputs) -> None:
        """Take an effect over; returns at once."""
        self._waiting.append(effect)
        self._filled.set()
        self._look_if_due()
        self._measure()

    async def room(self) -> None:
        """Wait until publishing has caught up; the caller has more outputs to bring."""
        await self._roomy.wait()

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(PUBLISHERS):
                group.create_task(self._serve(group))

    def _measure(self) -> None:
        if len(self._waiting) + len(self._away) > PUBLISH_BACKLOG:
            self._roomy.clear()
        else:
            self._roomy.set()

    async def _serve(self, group: asyncio.TaskGroup) -> None:
        while True:
            async with self._gathering:
                await self._filled.wait()
                await self._gather()
                batch = [self._waiting.popleft() for _ in range(min(PUBLISH_BATCH, len(self._waiting)))]
                if not self._waiting:
                    self._filled.clear()
            self._measure()
            failed = await self._publish(batch)
            if failed:
                group.create_task(self._again(failed))

    async def _gather(self) -> None:
        """Let others join what waits, for at most GATHER_S."""
        self._due.clear()
        self._look_if_due()
        if self._due.is_set():
            return
        timer = asyncio.get_running_loop().call_later(GATHER_S, self._due.set)
        try:
            await self._due.wait()
        finally:
            timer.cancel()

    def _look_if_due(self) -> None:
        """Begin with what waits unless more may join it soon."""
        if (
            len(self._waiting) >= PUBLISH_BATCH
            or not self._building()
            or (not self._under_way and any(self._awaited(effect.lease.step) for effect in self._waiting))
        ):
            self._due.set()

    async def _again(self, failed: Mapping[PublishOutputs, PublishFailed]) -> None:
        """Publish again, for a while, what failed in a way that may pass."""
        budget = RetryBudget(PUBLISH_WITHIN_S)
        while failed:
            if not self._away:
                _log.warning("%s; it is tried again", next(iter(failed.values())).failure.message)
            self._away.update((effect.lease, failed_step.failure.message) for effect, failed_step in failed.items())
            self._measure()
            left: Mapping[PublishOutputs, PublishFailed] = {}
            if await budget.pause():
                left = await self._publish(list(failed))
            else:
                await self._post(list(failed.values()))
            for effect in failed.keys() - left.keys():
                self._away.pop(effect.lease, None)
            failed = left
        self._measure()
        if not self._away:
            _log.warning("nothing waits to be published again any more")

    async def _publish(self, batch: Sequence[PublishOutputs]) -> dict[PublishOutputs, PublishFailed]:
        """Publish a batch with one call of the cache and post what comes of it; returns what may be tried again."""
        async with self._turns:
            self._under_way += len(batch)
            try:
                outcomes = await self._outcomes(batch)
            finally:
                self._under_way -= len(batch)
                self._look_if_due()
        failed = {
            effect: outcome.failed
            for effect, outcome in zip(batch, outcomes, strict=True)
            if isinstance(outcome, _NotNow)
        }
        await self._post([outcome for outcome in outcomes if not isinstance(outcome, _NotNow)])
        return failed

    async def _outcomes(self, batch: Sequence[PublishOutputs]) -> list[OutputsPublished | PublishFailed | _NotNow]:
        """One for each effect, in order."""
        began = verified_at = self._clock.now()

        def verified() -> None:
            nonlocal verified_at
            verified_at = self._clock.now()

        try:
            infos = await self._derivations.steps([effect.lease.step for effect in batch])
            checked = [(effect.lease, _claim(effect, infos)) for effect in batch]
            claims = [
                output.narinfo(base_name_of(infos[lease.step].drv))
                for lease, claim in checked
                if isinstance(claim, Evidence)
                for output in claim.outputs
            ]
            outcomes = {outcome.store_path: outcome for outcome in await self._cache.publish(claims, verified)}
        except (CacheError, DerivationsError) as error:
            failure = Failure(FailureKind.INFRASTRUCTURE, f"publishing failed: {error}")
            return [_NotNow(PublishFailed(effect.lease, failure)) for effect in batch]
        ended = self._clock.now()
        for effect in batch:
            self._timed(effect.lease, began, verified_at, ended)
        return [
            await self._judged_by_losses(_verdict(lease, claim, outcomes), claim, outcomes) for lease, claim in checked
        ]

    async def _judged_by_losses(
        self,
        verdict: OutputsPublished | PublishFailed | _NotNow,
        claim: Evidence | str,
        outcomes: Mapping[str, PublishOutcome],
    ) -> OutputsPublished | PublishFailed | _NotNow:
        """Wait for references that the cache lost since the build began, instead of building again in vain."""
        if not isinstance(verdict, PublishFailed) or isinstance(claim, str):
            return verdict
        missing = [
            f"{output.path.rpartition('/')[0]}/{name}"
            for output in claim.outputs
            if isinstance(outcome := outcomes.get(output.path), Rejected)
            and outcome.reason is RejectReason.MISSING_REFERENCES
            for name in outcome.missing
        ]
        why = await self._losses(verdict.lease.step, missing) if missing else ""
        return PublishFailed(verdict.lease, Failure(FailureKind.INPUT_LOST, why)) if why else verdict


def _claim(effect: PublishOutputs, infos: Mapping[StepKey, StepInfo]) -> Evidence | str:
    """Return the evidence if it is about exactly the outputs of the step, else a sentence why not."""
    try:
        evidence = decode_evidence(effect.evidence)
    except CodecError as error:
        return str(error)
    info = infos.get(effect.lease.step)
    if info is None:
        return "the coordinator does not know the outputs of the step"
    wanted = sorted(path for _, path in info.outputs)
    reported = sorted(output.path for output in evidence.outputs)
    if wanted != reported:
        other = next((path for path in reported if path not in wanted), "")
        fault = f"reported {other}, which is no output of it" if other else "did not report all outputs"
        return f"the worker {fault}"
    return evidence


def _verdict(
    lease: LeaseId, claim: Evidence | str, outcomes: Mapping[str, PublishOutcome]
) -> OutputsPublished | PublishFailed | _NotNow:
    """Return what became of one step's outputs. A conflict is no failure: the first bits stay and can be fetched."""
    if isinstance(claim, str):
        return PublishFailed(lease, Failure(FailureKind.INFRASTRUCTURE, f"publishing was refused: {claim}"))
    for output in claim.outputs:
        outcome = outcomes.get(output.path)
        if isinstance(outcome, Conflict):
            _log.warning("%s is not reproducible: its first publication stays", output.path)
        elif outcome is None or isinstance(outcome, Rejected):
            why = outcome.message if isinstance(outcome, Rejected) else "the cache did not answer"
            passes = isinstance(outcome, Rejected) and outcome.reason is RejectReason.STORE_FAILED
            sentence = f"publishing of {output.path} {'failed' if passes else 'was refused'}: {why}"
            failed = PublishFailed(lease, Failure(FailureKind.INFRASTRUCTURE, sentence))
            return _NotNow(failed) if passes else failed
    return OutputsPublished(lease)
