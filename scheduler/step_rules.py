"""Rules for steps: failures, retries, falling back, doom, revival, abandonment. Yields facts, changes nothing.

Every function here is a generator that reads a state that already holds the facts it yielded before.

The failure cache: a step that failed for a cacheable reason (`failures`) *stands* as failed for a time to live.
A submission that meets it takes it for known instead of building it again, and what stands on it is doomed at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice

from scheduler import facts as f
from scheduler.failures import CONSEQUENCES, Course
from scheduler.model import MOST_MEMORY_BYTES, NO_INSTANT, Failure, FailureKind, Instant, StepKey, StepState
from scheduler.pauses import PAUSE, PIECE, Pause, unique
from scheduler.policy import Limits, Policy
from scheduler.records import Builder, Step
from scheduler.resource_limits import in_force
from scheduler.state import FarmState, is_lapsed

_LEASED, _DONE, _FAILED, _DOOMED = StepState.LEASED, StepState.DONE, StepState.FAILED, StepState.DOOMED
#: Seconds over which `Limits.retries_per_hour` counts.
ALLOWANCE_S = 3600.0
_OPEN = (StepState.LEASED, StepState.PUBLISHING)
#: Orphans that are taken from the front of a dictionary at once.
ORPHANS_AT_ONCE = 8 * PIECE


def is_known_failure(step: Step, limits: Limits, now: Instant) -> bool:
    """Return whether the step failed by its own fault, and not so long ago that it should be tried anew."""
    failure = step.failure
    return (
        step.state is _FAILED
        and failure is not None
        and CONSEQUENCES[failure.kind].cacheable
        and now - step.failed_at < limits.failure_ttl_s
    )


def _nothing_stands(_step: Step) -> bool:
    return False


class StepRules:
    """The fate of steps, under budgets and a policy."""

    __slots__ = ("_limits", "_policy", "_state")

    def __init__(self, state: FarmState, limits: Limits, policy: Policy) -> None:
        self._state = state
        self._limits = limits
        self._policy = policy

    def build_failed(self, step: Step, failure: Failure, limit: int, now: Instant) -> Iterator[f.FactOrPause]:
        """Yield the consequences of the end of a leased step's open lease, at `limit` where that is not 0."""
        if limit and in_force(self._state.limits_wanted(step), self._limits.build).exceeds(failure.kind, limit):
            # A submission allows the step more than this build had, so neither recipe nor builder is at fault.
            message = f"its limit was raised while it ran ({failure.message})"
            failure = Failure(FailureKind.RETURNED, message, failure.signature)
        if step.follows and failure.kind is FailureKind.RETURNED:
            # Its builder could not begin so early: that says nothing of either.
            yield from self.stop(step, now, failure.message)
            return
        match CONSEQUENCES[failure.kind].course:
            case Course.END:
                yield from self._end(step, failure, now)
            case Course.RETRY:
                yield from self.retry(step, failure, now)
            case Course.HAND_BACK:
                yield from self._hand_back(step, failure, now)

    def publish_failed(self, step: Step, failure: Failure, now: Instant) -> Iterator[f.FactOrPause]:
        """Yield what follows when the outputs of a publishing step could not be published."""
        match CONSEQUENCES[failure.kind].course:
            case Course.END:
                # Another recipe would run into the same path in the cache.
                yield from self._fail(step, failure, now)
            case Course.RETRY:
                yield from self.retry(step, failure, now)
            case Course.HAND_BACK if CONSEQUENCES[failure.kind].waits:
                yield from self._hand_back(step, failure, now)
            case Course.HAND_BACK:
                yield from self.retry(step, Failure(FailureKind.INFRASTRUCTURE, failure.message), now)

    def retry(self, step: Step, failure: Failure, now: Instant) -> Iterator[f.FactOrPause]:
        """Revoke the open lease with back-off; where the budget is spent, the failure is final."""
        row = CONSEQUENCES[failure.kind]
        if self._is_recipes_own(step, failure):
            builders = " and ".join(
                dict.fromkeys(
                    (*[by for by, signature in step.accounts if signature == failure.signature][:1], step.builder)
                )
            )
            message = f"{failure.message} (the same again, on {builders})"
            yield from self._end(step, Failure(FailureKind.PERMANENT, message, failure.signature), now)
            return
        strikes = step.strikes.count(failure.kind) + 1
        if row.tries is not None and strikes > row.tries:
            message = f"{failure.message} (for the {strikes}. time)"
            yield from self._end(step, Failure(row.then or failure.kind, message), now)
            return
        if step.faults + 1 >= self._limits.attempts:
            # The budget is spent on faults of several kinds: a kind with tries left has not proven itself.
            kind = failure.kind if row.tries is None else FailureKind.INFRASTRUCTURE
            message = f"{failure.message} (after {step.faults} other tries)"
            yield from self._end(step, Failure(kind, message), now)
            return
        wait = self._policy.back_off_s(step.key, step.faults + 1)
        yield self._charged(step, failure, now, Instant(now + wait))

    def _charged(self, step: Step, failure: Failure, now: Instant, not_before: Instant) -> f.LeaseRevoked:
        """Let the submission pay for another attempt of the step, which waits where its allowance is spent.

        The first failure of a step is free unless the allowance is spent: one fault of the farm's may hit all that
        runs. Of several submissions that want the step, the first pays.
        """
        payer = self._state.wisher(step) if self._limits.retries_per_hour else None
        asks = self._asks(step, failure)
        if payer is None:
            return f.LeaseRevoked(step.lease, step.builder, failure, not_before, at=now, memory_bytes=asks)
        paid = max(self._state.paid_until.get(payer, NO_INSTANT), now)
        if not step.faults and paid <= now + ALLOWANCE_S:
            return f.LeaseRevoked(step.lease, step.builder, failure, not_before, at=now, memory_bytes=asks)
        paid = Instant(paid + ALLOWANCE_S / self._limits.retries_per_hour)
        not_before = max(not_before, Instant(paid - ALLOWANCE_S))
        return f.LeaseRevoked(step.lease, step.builder, failure, not_before, payer, paid, at=now, memory_bytes=asks)

    def _asks(self, step: Step, failure: Failure) -> int:
        """Return the memory that a step asks for after a failure; 0: as before.

        One that died of too little asks for twice what it had: what it asked for, at least a lease's share there.
        """
        builder = self._state.builders.get(step.builder)
        if not CONSEQUENCES[failure.kind].lacks_memory or builder is None or builder.spec is None:
            return 0
        had = max(step.memory_bytes, builder.spec.memory_bytes // max(1, builder.offered))
        return min(2 * had, MOST_MEMORY_BYTES)

    def _is_recipes_own(self, step: Step, failure: Failure) -> bool:
        """Return whether the recipe in use failed so before, and the builders' records leave the blame with it.

        Two builders that report the same are believed, unless steps built elsewhere are evidence against one of them.
        The same builder twice is believed where no fault of another step is held against it or may have to be, and it
        has not called itself unfit since (it tries itself when a build ends so).
        """
        if not failure.signature or step.state is not _LEASED:
            return False
        before = [by for by, signature in step.accounts if signature == failure.signature]
        if not before:
            return False
        here = self._state.builders[step.builder]
        if here.unfit or any(key != step.key for key in here.strikes):
            return False
        return any(by != here.id for by in before) or self._is_alone_in_doubt(step, here)

    def _is_alone_in_doubt(self, step: Step, builder: Builder) -> bool:
        """Return whether all that a builder is suspected of stands with steps of one submission."""
        wanted_by = {self._state.wisher(step)}
        wanted_by.update(
            self._state.wisher(self._state.steps[key]) for key in builder.suspicions if key in self._state.steps
        )
        return len(wanted_by) == 1

    def give_up(self, step: Step, failure: Failure, now: Instant) -> Iterator[f.FactOrPause]:
        """End a ready step that no builder can take."""
        yield from self._end(step, failure, now)

    def stop(self, step: Step, now: Instant, why: str) -> Iterator[f.FactOrPause]:
        """Revoke the open lease, if there is one: the farm no longer wants the build."""
        if step.state in _OPEN:
            yield f.LeaseRevoked(step.lease, step.builder, Failure(FailureKind.CANCELLED, why), now, at=now)

    def abandon_orphans(self, now: Instant) -> Iterator[f.FactOrPause]:
        """Stop and abandon the steps that no submission wants any more."""
        orphans = self._state.orphans
        while orphans:
            # Many at once: to find the first of a dictionary whose front is gone costs as much as that front. Not all
            # at once: a copy of very many is a long piece.
            for step in tuple(islice(orphans.values(), ORPHANS_AT_ONCE)):
                if step.key in orphans:
                    yield from self.stop(step, now, "nobody wants it any more")
                    yield f.StepAbandoned(step.key)

    def doom(
        self, step: Step, cause: StepKey, now: Instant, stands: Callable[[Step], bool] = _nothing_stands
    ) -> Iterator[f.FactOrPause]:
        """End what stands on a step that has failed for good, or let it fall back to a recipe that can do without.

        No recipe can that needs what has failed and `stands`.
        """
        pending = deque((step,))
        looked_at = 0
        while pending:
            looked_at += 1
            if not looked_at % PIECE:
                yield PAUSE
            for dependent in (yield from unique(pending.popleft().dependents)):
                yield from self.stop(dependent, now, f"{cause} failed")
                recipe = yield from self._next_recipe(dependent, now, stands)
                if recipe is None:
                    yield f.StepDoomed(dependent.key, cause)
                    pending.append(dependent)
                else:
                    missing = Failure(FailureKind.DEPENDENCY, f"needs {cause}, which failed")
                    yield f.StepFellBack(dependent.key, recipe, missing, now)

    def revive(
        self, starts: Iterable[Step], *, restart: bool, stands: Callable[[Step], bool] = _nothing_stands
    ) -> Iterator[f.FactOrPause]:
        """Revive what has lapsed at or below `starts`, but what `stands` and what is below it. Engaged steps are sound.

        With `restart` a step begins with its first recipe again, else with the one that it had.
        """
        seen = yield from unique(starts)
        pending = list(seen)
        looked_at = 0
        while pending:
            step = pending.pop()
            looked_at += 1
            if looked_at >= PIECE:
                looked_at = 0
                yield PAUSE
            if is_lapsed(step):
                if stands(step):
                    continue
                yield (yield from self.revived(step, restart=restart))
            if step.state is _DONE or step.engaged:
                continue
            needs = self._state.needs_of(step)
            looked_at += len(needs)
            for need in needs:
                if need not in seen:
                    seen[need] = None
                    pending.append(need)

    def revived(self, step: Step, *, restart: bool) -> Generator[Pause, None, f.StepRevived]:
        """Return the fact that a lapsed step lives again; an earlier recipe may lead back to it by now."""
        first = restart and not (step.active and (yield from self._leads_back(step, 0)))
        return f.StepRevived(step.key, 0 if first else step.active)

    def _end(self, step: Step, failure: Failure, now: Instant) -> Iterator[f.FactOrPause]:
        """Take a failure for final: the next recipe that can help takes over, else the step fails."""
        recipe = None
        if CONSEQUENCES[failure.kind].next_recipe and step.state in (_LEASED, StepState.READY):
            recipe = yield from self._next_recipe(step, now)
        if recipe is None:
            yield from self._fail(step, failure, now)
        else:
            yield f.StepFellBack(step.key, recipe, failure, now)

    def _fail(self, step: Step, failure: Failure, now: Instant) -> Iterator[f.FactOrPause]:
        yield f.StepFailed(step.key, step.attempt, step.builder, failure, now)
        yield from self.doom(step, step.key, now)

    def _hand_back(self, step: Step, failure: Failure, now: Instant) -> Iterator[f.FactOrPause]:
        returns = step.returns + 1
        if returns > self._limits.returns:
            message = f"handed back {returns} times: {failure.message}"
            yield from self.retry(step, Failure(FailureKind.INFRASTRUCTURE, message), now)
            return
        waits = CONSEQUENCES[failure.kind].waits
        beyond = returns - (0 if waits else self._limits.returns_at_once)
        wait = self._policy.back_off_s(step.key, beyond) if beyond > 0 else 0.0
        returned = failure if waits else Failure(FailureKind.RETURNED, failure.message)
        yield f.LeaseRevoked(step.lease, step.builder, returned, Instant(now + wait), at=now)

    def _next_recipe(
        self, step: Step, now: Instant, stands: Callable[[Step], bool] = _nothing_stands
    ) -> Generator[f.FactOrPause, None, int | None]:
        """Return the next recipe that can help; what it needs and has lapsed is revived first."""
        for recipe in range(len(step.recipes)):
            if recipe == step.active or recipe in step.tried:
                continue
            if (yield from self._helps(step, recipe, now, stands)):
                # Below a fall-back steps keep their recipe: the check was made for these.
                yield from self.revive(self._needs(step, recipe), restart=False)
                return recipe
        return None

    def _needs(self, step: Step, recipe: int) -> list[Step]:
        return [self._state.steps[key] for key in step.recipes[recipe].needs]

    def _helps(
        self, step: Step, recipe: int, now: Instant, stands: Callable[[Step], bool]
    ) -> Generator[Pause, None, bool]:
        """Return whether a recipe neither leads back to its step nor stands on a known failure or one of this life.

        An older failure is no evidence: what has lapsed before this life began may be tried again.
        """
        if (yield from self._leads_back(step, recipe)):
            return False
        for count, below in enumerate((yield from self._below(step, recipe, through_done=False)), 1):
            if below.state in (_FAILED, _DOOMED):
                earlier = below.generation_ended < step.generation_started
                if not earlier or is_known_failure(below, self._limits, now) or stands(below):
                    return False
            if not count % PIECE:
                yield PAUSE
        return True

    def _leads_back(self, step: Step, recipe: int) -> Generator[Pause, None, bool]:
        """Return whether `step` stands below that recipe. Done steps count: once lost, their needs count again."""
        return step in (yield from self._below(step, recipe, through_done=True))

    def _below(self, step: Step, recipe: int, *, through_done: bool) -> Generator[Pause, None, dict[Step, None]]:
        """Return everything reachable through a recipe of a step, and below it through recipes in use."""
        seen = dict.fromkeys(self._needs(step, recipe))
        pending = list(seen)
        looked_at = 0
        while pending:
            below = pending.pop()
            looked_at += 1
            if through_done or below.state is not _DONE:
                needs = self._state.needs_of(below)
                looked_at += len(needs)
                for need in needs:
                    if need not in seen:
                        seen[need] = None
                        pending.append(need)
            if looked_at >= PIECE:
                looked_at = 0
                yield PAUSE
        return seen
