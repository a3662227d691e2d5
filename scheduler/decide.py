"""From an event to facts. Nothing here changes the state: whoever iterates applies each fact before asking for more.

So every function is a generator that reads a state which already holds what it said before. Stale events (an old
attempt, a builder that is gone, a repeat) yield nothing; a graph that cannot be is refused before any fact.

What follows from a failure stands in `failures`, by kind: the next recipe that can help, else the step fails and dooms
what stands on it; or back-off and again, another builder first, until the budget is spent; or, for a lease handed back,
again at once, with back-off from the fourth time on. A cancelled lease that is still open counts as handed back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import assert_never

from scheduler import events as e
from scheduler import facts as f
from scheduler.failures import CONSEQUENCES, Course
from scheduler.model import (
    BuilderId,
    Failure,
    FailureKind,
    Instant,
    LeaseId,
    StepKey,
    StepState,
    SubmissionRefusedError,
)
from scheduler.policy import Limits, Policy
from scheduler.records import Builder, Queue, Step
from scheduler.state import FarmState, is_lapsed

_LEASED, _PUBLISHING, _DONE = StepState.LEASED, StepState.PUBLISHING, StepState.DONE
_OPEN = (_LEASED, _PUBLISHING)


class Decider:
    """The decisions, with the policy and the budgets they are made under. Holds nothing else."""

    __slots__ = ("_limits", "_policy", "_state")

    def __init__(self, state: FarmState, limits: Limits, policy: Policy) -> None:
        self._state = state
        self._limits = limits
        self._policy = policy

    def decide(self, event: e.Event, now: Instant) -> Iterator[f.Fact]:  # noqa: C901, PLR0912  one arm per event
        """Yield what follows from one event, without granting leases (`assign` does, once per batch)."""
        match event:
            case e.BuildSucceeded():
                step = self._state.lease_holder(event.lease, _LEASED)
                if step is not None and step.builder == event.builder:
                    yield f.StepBuilt(event.lease, event.builder, event.evidence, now)
            case e.OutputsPublished():
                if self._state.lease_holder(event.lease, _PUBLISHING) is not None:
                    yield f.StepDone(event.lease, now)
            case e.BuilderReported():
                yield from self._reported(event, now)
            case e.BuildFailed():
                step = self._state.lease_holder(event.lease, _LEASED)
                if step is not None and step.builder == event.builder:
                    yield from self._build_failed(step, event.failure, now)
            case e.PublishFailed():
                step = self._state.lease_holder(event.lease, _PUBLISHING)
                if step is not None:
                    yield from self._publish_failed(step, event.failure, now)
            case e.SubmissionReceived():
                yield from self._received(event, now)
            case e.SubmissionCancelled():
                if event.submission in self._state.submissions:
                    yield f.SubmissionWithdrawn(event.submission, now)
            case e.BuilderJoined():
                yield from self._joined(event, now)
            case e.BuilderLost():
                yield from self._lost(event, now)
            case e.TimePassed():
                pass
            case _:
                assert_never(event)
        if self._state.orphans:
            yield from self._abandon_orphans(now)

    def due(self, now: Instant) -> Iterator[f.Fact]:
        """Yield what the passing of time has decided: silent builders, back-offs that ended."""
        state = self._state
        while state.builders:
            builder = next(iter(state.builders.values()))
            if builder.heard + self._limits.lease_ttl_s > now:
                break
            reason = f"no word from {builder.id} for {self._limits.lease_ttl_s:.0f} s"
            yield from self._remove(builder, reason, now, silent=True)
        yield from self._abandon_orphans(now)
        while state.ready.delayed and state.ready.delayed[0][0] <= now:
            yield f.BackOffEnded(state.ready.delayed[0][2].key)

    def deadline(self) -> Instant | None:
        """Return when `due` will next have something to say."""
        state = self._state
        nearest = [state.ready.delayed[0][0]] if state.ready.delayed else []
        for builder in state.builders.values():
            nearest.append(Instant(builder.heard + self._limits.lease_ttl_s))
            break
        return min(nearest, default=None)

    def assign(self, now: Instant) -> Iterator[f.Fact]:
        """Grant leases, the best-ranked step first, until no free builder can take any ready step.

        Only queues of builders with free slots are looked at, and of each only its first step: steps that nobody can
        take cost nothing.
        """
        free = self._state.free
        if not free:
            return
        queues: dict[Queue, None] = {}
        for builder in free.values():
            for queue in builder.queues:
                if queue.heap:
                    queues[queue] = None
        while queues:
            best = min(queues, key=_head) if len(queues) > 1 else next(iter(queues))
            step = best.heap[0][2]
            able = [builder for builder in free.values() if builder.id in best.builders]
            if not able:
                del queues[best]
                continue
            builder = self._policy.place(step, able) if len(able) > 1 else able[0]
            yield f.StepLeased(LeaseId(step.key, step.attempt + 1), builder.id, step.active, now)
            if not free:
                return
            if not best.heap:
                del queues[best]

    def _build_failed(self, step: Step, failure: Failure, now: Instant) -> Iterator[f.Fact]:
        match CONSEQUENCES[failure.kind].course:
            case Course.END:
                yield from self._end(step, failure, now)
            case Course.RETRY:
                yield from self._retry(step, failure, now)
            case Course.HAND_BACK:
                yield from self._hand_back(step, failure, now)

    def _publish_failed(self, step: Step, failure: Failure, now: Instant) -> Iterator[f.Fact]:
        match CONSEQUENCES[failure.kind].course:
            case Course.END:
                # Another recipe would run into the same path in the cache.
                yield from self._fail(step, failure, now)
            case Course.RETRY:
                yield from self._retry(step, failure, now)
            case Course.HAND_BACK:
                yield from self._retry(step, Failure(FailureKind.INFRASTRUCTURE, failure.message), now)

    def _end(self, step: Step, failure: Failure, now: Instant) -> Iterator[f.Fact]:
        """Take a failure for final: the next recipe that can help takes over, else the step fails."""
        recipe = None
        if CONSEQUENCES[failure.kind].next_recipe and step.state is _LEASED:
            recipe = yield from self._next_recipe(step)
        if recipe is None:
            yield from self._fail(step, failure, now)
        else:
            yield f.StepFellBack(step.key, recipe, failure)

    def _retry(self, step: Step, failure: Failure, now: Instant) -> Iterator[f.Fact]:
        row = CONSEQUENCES[failure.kind]
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
        yield f.LeaseRevoked(step.lease, step.builder, failure, Instant(now + wait))

    def _hand_back(self, step: Step, failure: Failure, now: Instant) -> Iterator[f.Fact]:
        returns = step.returns + 1
        if returns > self._limits.returns:
            message = f"handed back {returns} times: {failure.message}"
            yield from self._retry(step, Failure(FailureKind.INFRASTRUCTURE, message), now)
            return
        beyond = returns - self._limits.returns_at_once
        wait = self._policy.back_off_s(step.key, beyond) if beyond > 0 else 0.0
        returned = Failure(FailureKind.RETURNED, failure.message)
        yield f.LeaseRevoked(step.lease, step.builder, returned, Instant(now + wait))

    def _fail(self, step: Step, failure: Failure, now: Instant) -> Iterator[f.Fact]:
        """Fail a step; what stands on it falls back to a recipe that can do without, or is doomed."""
        yield f.StepFailed(step.key, step.attempt, step.builder, failure, now)
        pending = deque((step,))
        while pending:
            for dependent in tuple(pending.popleft().dependents):
                yield from self._stop(dependent, now, f"{step.key} failed")
                recipe = yield from self._next_recipe(dependent)
                if recipe is None:
                    yield f.StepDoomed(dependent.key, step.key)
                    pending.append(dependent)
                else:
                    missing = Failure(FailureKind.DEPENDENCY, f"needs {step.key}, which failed")
                    yield f.StepFellBack(dependent.key, recipe, missing)

    def _stop(self, step: Step, now: Instant, why: str) -> Iterator[f.Fact]:
        if step.state in _OPEN:
            yield f.LeaseRevoked(step.lease, step.builder, Failure(FailureKind.CANCELLED, why), now)

    def _abandon_orphans(self, now: Instant) -> Iterator[f.Fact]:
        orphans = self._state.orphans
        while orphans:
            step = next(iter(orphans.values()))
            yield from self._stop(step, now, "nobody wants it any more")
            yield f.StepAbandoned(step.key)

    def _next_recipe(self, step: Step) -> Generator[f.Fact, None, int | None]:
        """Return the next recipe that can help; what it needs and has lapsed is revived first."""
        for recipe in range(len(step.recipes)):
            if recipe != step.active and recipe not in step.tried and self._helps(step, recipe):
                # Below a fall-back steps keep their recipe: the check was made for these.
                yield from self._revive(self._needs(step, recipe), restart=False)
                return recipe
        return None

    def _needs(self, step: Step, recipe: int) -> list[Step]:
        return [self._state.steps[key] for key in step.recipes[recipe].needs]

    def _helps(self, step: Step, recipe: int) -> bool:
        """Whether a recipe neither leads back to its step nor stands on a failure of this life of the step.

        An older failure is no evidence: what has lapsed before this life began may be tried again.
        """
        if self._leads_back(step, recipe):
            return False
        return all(
            below.state not in (StepState.FAILED, StepState.DOOMED) or below.ended < step.born
            for below in self._below(self._needs(step, recipe), through_done=False)
        )

    def _leads_back(self, step: Step, recipe: int) -> bool:
        """Whether `step` stands below that recipe. Done steps count: should they be lost, their needs count again."""
        return step in self._below(self._needs(step, recipe), through_done=True)

    def _below(self, starts: Iterable[Step], *, through_done: bool) -> dict[Step, None]:
        """Return everything reachable through recipes in use."""
        seen = dict.fromkeys(starts)
        pending = list(seen)
        while pending:
            step = pending.pop()
            if through_done or step.state is not _DONE:
                for need in self._state.needs_of(step):
                    if need not in seen:
                        seen[need] = None
                        pending.append(need)
        return seen

    def _revive(self, starts: Iterable[Step], *, restart: bool) -> Iterator[f.Fact]:
        """Revive what has lapsed at or below `starts`. Below an engaged step nothing has."""
        seen = dict.fromkeys(starts)
        pending = list(seen)
        while pending:
            step = pending.pop()
            if is_lapsed(step):
                first = restart and not (step.active and self._leads_back(step, 0))
                yield f.StepRevived(step.key, 0 if first else step.active)
            if step.state is _DONE or step.engaged:
                continue
            for need in self._state.needs_of(step):
                if need not in seen:
                    seen[need] = None
                    pending.append(need)

    def _received(self, event: e.SubmissionReceived, now: Instant) -> Iterator[f.Fact]:
        state = self._state
        if event.submission in state.submissions:
            return
        self._check_closed(event)
        self._check_acyclic(event)
        yield from self._take_steps(event, now)
        roots = [state.steps[key] for key in event.roots]
        yield from self._revive(roots, restart=True)
        members = state.descend(roots)
        yield f.SubmissionAccepted(
            submission=event.submission,
            at=now,
            roots=event.roots,
            members=tuple(step.key for step in members),
            held=tuple(step.key for step in members if step.state is _DONE),
            joined=tuple(step.key for step in members if step.engaged),
        )

    def _take_steps(self, event: e.SubmissionReceived, now: Instant) -> Iterator[f.Fact]:
        """Learn steps and recipes, and square what the core took for done with what the cache answered."""
        state = self._state
        held = dict.fromkeys(event.held)
        lost: list[Step] = []
        for spec in event.steps:
            step = state.steps.get(spec.key)
            if step is None:
                yield f.StepAdded(spec)
                continue
            if step.state is _DONE and spec.key not in held and step.done_at < event.asked_at:
                lost.append(step)
            for recipe in spec.recipes:
                if recipe not in step.recipes:
                    yield f.RecipeAdded(spec.key, recipe)
        yield from self._hold(event, now)
        for step in lost:
            if step.state is _DONE:
                yield from self._revive(state.needs_of(step), restart=True)
                yield f.StepLost(step.key)

    def _hold(self, event: e.SubmissionReceived, now: Instant) -> Iterator[f.Fact]:
        seen_at = min(now, event.asked_at)
        for key in dict.fromkeys(event.held):
            step = self._state.steps.get(key)
            if step is None:
                yield f.StepHeld(key, seen_at)
            elif step.state is not _DONE:
                yield from self._stop(step, now, "the cache holds the result")
                yield f.StepHeld(key, seen_at)

    def _check_closed(self, event: e.SubmissionReceived) -> None:
        """Raise `SubmissionRefusedError` for a graph with missing members, before any fact is said of it."""
        known = dict.fromkeys(event.held)
        for spec in event.steps:
            if not spec.recipes:
                raise SubmissionRefusedError(f"{spec.key} has no recipe")
            known[spec.key] = None
        named = [*event.roots, *(need for spec in event.steps for recipe in spec.recipes for need in recipe.needs)]
        for key in named:
            if key not in known and key not in self._state.steps:
                raise SubmissionRefusedError(f"{key} is needed and neither known, given nor held")

    def _check_acyclic(self, event: e.SubmissionReceived) -> None:
        """Raise `SubmissionRefusedError` where the graph of recipes in use would run in a circle.

        Recipes of known steps need only steps that were known when they came, so a circle runs through steps that get
        their first recipe now. It runs through these alone unless one of them was known as merely held.
        """
        graph: dict[StepKey, tuple[StepKey, ...]] = {}
        known_before: list[StepKey] = []
        for spec in event.steps:
            known = self._state.steps.get(spec.key)
            if known is None or not known.recipes:
                graph.setdefault(spec.key, spec.recipes[0].needs)
                known_before += [] if known is None else [spec.key]
        if known_before:
            self._add_known(graph)
        dependents: dict[StepKey, list[StepKey]] = {key: [] for key in graph}
        unmet: dict[StepKey, int] = {}
        for key, needs in graph.items():
            inner = [need for need in needs if need in graph]
            unmet[key] = len(inner)
            for need in inner:
                dependents[need].append(key)
        clear = [key for key, count in unmet.items() if count == 0]
        # The list grows while it is walked: Kahn's topological sort.
        for key in clear:
            for dependent in dependents[key]:
                unmet[dependent] -= 1
                if unmet[dependent] == 0:
                    clear.append(dependent)
        if len(clear) < len(graph):
            stuck = next(key for key, count in unmet.items() if count)
            raise SubmissionRefusedError(f"the needs of {stuck} run in a circle")

    def _add_known(self, graph: dict[StepKey, tuple[StepKey, ...]]) -> None:
        """Add what is known and stands below the steps of `graph`, with the recipes in use."""
        pending = [need for needs in graph.values() for need in needs]
        while pending:
            key = pending.pop()
            step = self._state.steps.get(key)
            if key not in graph and step is not None and step.recipes:
                graph[key] = step.recipe.needs
                pending += step.recipe.needs

    def _joined(self, event: e.BuilderJoined, now: Instant) -> Iterator[f.Fact]:
        spec = event.builder
        builder = self._state.builders.get(spec.id)
        if builder is not None and builder.spec is not None and builder.spec.incarnation != spec.incarnation:
            listed = frozenset(event.leases)
            failure = Failure(FailureKind.WORKER_LOST, f"{spec.id} started anew")
            for step in tuple(builder.leases.values()):
                if step.lease not in listed and step.key in builder.leases:
                    yield from self._retry(step, failure, now)
        missing = yield from self._missing(builder, event.leases, now)
        unknown = self._unknown(spec.id, event.leases)
        yield f.BuilderAdmitted(spec, event.capacity, now, missing, unknown)

    def _reported(self, event: e.BuilderReported, now: Instant) -> Iterator[f.Fact]:
        builder = self._state.builders.get(event.builder)
        if builder is None or builder.spec is None:
            silent = self._state.silent.get(event.builder)
            if silent is not None and silent.incarnation == event.incarnation:
                yield from self._joined(e.BuilderJoined(silent, event.capacity, event.leases), now)
            return
        if builder.spec.incarnation != event.incarnation:
            return
        missing = yield from self._missing(builder, event.leases, now)
        unknown = self._unknown(event.builder, event.leases)
        yield f.BuilderRefreshed(event.builder, event.capacity, now, missing, unknown)

    def _missing(
        self, builder: Builder | None, listed: tuple[LeaseId, ...], now: Instant
    ) -> Generator[f.Fact, None, tuple[LeaseId, ...]]:
        """Return the leases to hand over again; one that was handed over too often is revoked.

        A builder known only from the journal is told at once: its leases may never have been handed over.
        """
        if builder is None or not builder.leases:
            return ()
        names = frozenset(listed)
        missing: list[LeaseId] = []
        for step in tuple(builder.leases.values()):
            overdue = builder.spec is None or now - step.asked_at >= self._limits.start_grace_s
            if step.lease in names or not overdue or step.key not in builder.leases:
                continue
            if step.resends >= self._limits.start_resends:
                message = f"{builder.id} was told {step.resends + 1} times to start and does not hold the lease"
                yield from self._retry(step, Failure(FailureKind.INFRASTRUCTURE, message), now)
            else:
                missing.append(step.lease)
        # A revocation above may have ended others (a step that failed dooms what stands on it).
        return tuple(lease for lease in missing if lease.step in builder.leases)

    def _unknown(self, builder: BuilderId, listed: tuple[LeaseId, ...]) -> tuple[LeaseId, ...]:
        """Return the leases a builder names without a right. One being published may be named until acknowledged."""
        unknown: list[LeaseId] = []
        for lease in listed:
            step = self._state.steps.get(lease.step)
            if step is None or step.attempt != lease.attempt or step.builder != builder or step.state not in _OPEN:
                unknown.append(lease)
        return tuple(unknown)

    def _lost(self, event: e.BuilderLost, now: Instant) -> Iterator[f.Fact]:
        builder = self._state.builders.get(event.builder)
        if builder is None:
            silent = self._state.silent.get(event.builder)
            if silent is not None and silent.incarnation == event.incarnation:
                yield f.BuilderRemoved(event.builder, event.reason, now)
        elif builder.spec is not None and builder.spec.incarnation == event.incarnation:
            yield from self._remove(builder, event.reason, now, silent=False)

    def _remove(self, builder: Builder, reason: str, now: Instant, *, silent: bool) -> Iterator[f.Fact]:
        failure = Failure(FailureKind.WORKER_LOST, reason)
        while builder.leases:
            yield from self._retry(next(iter(builder.leases.values())), failure, now)
        yield f.BuilderRemoved(builder.id, reason, now, silent)


def _head(queue: Queue) -> tuple[int, int, Step]:
    return queue.heap[0]
