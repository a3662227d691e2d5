"""State of the core, and `evolve`, which alone changes it.

The steps are in `graph`, the submissions that want them in `wanted`, builders in `builders`; here are the lives of
steps, and the way from each fact to what it changes.

Rules: no function but `evolve` mutates; `evolve` reads no clock and asks no policy but for the rank (an index, never
a fact), so the same durable facts give the same durable state for ever. Nothing here recurses. A fact that concerns
many steps may be applied with pauses (`apply`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from typing import assert_never

from scheduler import facts as f
from scheduler.builders import Builders
from scheduler.early import EarlyLeases
from scheduler.failures import CONSEQUENCES, is_fault
from scheduler.graph import Merged
from scheduler.locality import make
from scheduler.model import NO_INSTANT, FailureKind, ImpossibleError, Recipe, StepKey, StepSpec, StepState
from scheduler.pauses import PAUSE, PIECE, Pause, whole
from scheduler.records import FEW_DEPENDENTS, NO_BUILDER, NO_TRIES, Hold, Step
from scheduler.transitions import LAPSED, SUBJECT, UNFINISHED
from scheduler.wanted import WantedSteps

_WAITING, _READY, _LEASED = StepState.WAITING, StepState.READY, StepState.LEASED
_PUBLISHING, _DONE = StepState.PUBLISHING, StepState.DONE


class FarmState(WantedSteps):
    """Everything the core knows."""

    def __init__(self, rank: Callable[[Step], int], weigh: Callable[[str], int]) -> None:
        super().__init__(rank, weigh)
        roster = self._roster = Builders(self.builders, self.ready)
        self.free, self.silent, self.quarantined = roster.free, roster.silent, roster.quarantined
        self.ended_leases = roster.ended
        #: Leases that were granted before all needs were done.
        self.early = EarlyLeases()
        #: At least the attempts of every step ever forgotten: those of a step that never had any begin above.
        self.attempt_floor = 0
        #: Counts the beginnings and ends of lives of steps, and so orders a failure before or after the life that meets
        #: it.
        self.generation = 0
        #: How many steps ever became known: the next one's sequence.
        self.known = 0
        #: The steps that have failed.
        self.failed: dict[StepKey, Step] = {}
        #: While a snapshot is taken in: the steps whose dependents are not linked yet; for each of them the number of
        #: these and their sequences. As an array, because a million small objects would leave holes everywhere.
        self._unlinked: list[Step] = []
        self._links = array("Q")

    def evolve(self, fact: f.Fact) -> None:
        """Apply one fact. Raises `ImpossibleError` for a fact that cannot follow from this state."""
        rest = self.apply(fact)
        if rest is not None:
            for _ in rest:
                pass
        if self.ready.buried:
            whole(self.ready.pruning())
        if self.ready.crowded:
            whole(self.ready.sweeping())
            self.ready.discarded.clear()

    def apply(self, fact: f.Fact) -> Iterator[Pause] | None:  # noqa: C901, PLR0911, PLR0912, PLR0915  one arm each
        """Apply one fact, or begin to: what is left of one that concerns many steps is returned, to be exhausted.

        The most frequent facts come first, and without `match`, which takes longer. Raises as `evolve`.
        """
        if isinstance(fact, f.StepLeased):
            self._leased(fact)
            return None
        if isinstance(fact, f.StepBuilt):
            self._built(fact)
            return None
        if isinstance(fact, f.StepDone):
            return self._done(fact)
        match fact:
            case f.BuilderRefreshed():
                self._roster.refreshed(fact)
            case f.StepAdded():
                self._added(fact.spec)
            case f.WorksRevised():
                return self._revised(fact)
            case f.RecipeAdded():
                step = self._subject(fact, fact.step)
                step.recipes = (*step.recipes, fact.recipe)
                self.references.add(fact.recipe.needs)
            case f.StepCached():
                return self._held(fact)
            case f.SubmissionAccepted() | f.SubmissionRetried():
                return self._accepted(fact)
            case f.SubmissionGrew():
                return self._grew(fact)
            case f.SubmissionSealed():
                self._sealed(fact)
            case f.LeaseRevoked():
                self._revoked(fact)
            case f.BackOffEnded():
                self._back_off_ended(fact)
            case f.StepFailed():
                self._failed(fact)
            case f.StepDoomed():
                step = self._subject(fact, fact.step)
                self._finish(step, StepState.DOOMED)
                step.cause = fact.cause
            case f.StepAbandoned():
                self._finish(self._subject(fact, fact.step), StepState.ABANDONED)
            case f.StepFellBack():
                return self._fell_back(fact)
            case f.StepRevived():
                self._revived(fact)
            case f.StepLost():
                return self._lost(fact)
            case f.SubmissionWithdrawn():
                return self._withdrawn(fact)
            case f.SubmissionBumped():
                self._bumped(fact)
            case f.SubmissionForgotten():
                return self._submission_forgotten(fact)
            case f.StepsForgotten():
                return self._steps_forgotten(fact)
            case f.BuilderAdmitted():
                self._roster.admitted(fact)
            case f.BuilderRemoved():
                self._roster.removed(fact)
            case f.BuilderQuarantined():
                self._roster.quarantine(fact)
            case f.QuarantineEnded():
                self._roster.end_quarantine(fact)
            case f.BuildersRated():
                self._roster.rated(fact)
            case f.StepHeld():
                step = self._subject(fact, fact.step)
                since = fact.at if step.held is None else step.held.since
                step.held = Hold(fact.builder, since, fact.until, fact.over, fact.memory_bytes)
            case f.FarmResumed():
                self._roster.resumed(fact.at)
            case f.StepRestored():
                self._step_restored(fact)
            case f.SubmissionRestored():
                self._submission_restored(fact)
            case f.BuilderRestored():
                self._roster.restored(fact.builder, fact.heard, [self.steps[key] for key in fact.leases])
            case f.FarmRestored():
                self._restored(fact)
            case f.StepReady() | f.StepWaiting() | f.MembersJoined():
                raise ImpossibleError(f"{type(fact).__name__} follows from another fact")
            case _:
                assert_never(fact)
        return None

    def _subject(self, fact: f.Fact, key: StepKey) -> Step:
        step = self.steps.get(key)
        if step is None or step.state not in SUBJECT[type(fact)]:
            raise ImpossibleError(f"{type(fact).__name__} cannot be said of {step or key}")
        return step

    def _added(self, spec: StepSpec) -> None:
        if spec.key in self.steps or not spec.recipes:
            raise ImpossibleError(f"{spec.key} is known, or has no recipe")
        self._know(spec.key, spec.recipes, _WAITING, spec.work_ms)
        step = self.steps[spec.key]
        step.memory_bytes, step.output_bytes = spec.memory_bytes, spec.output_bytes

    def _revised(self, fact: f.WorksRevised) -> Iterator[Pause]:
        steps: list[Step] = []
        for count, (key, work_ms) in enumerate(fact.works, 1):
            if not count % PIECE:
                yield PAUSE
            step = self.steps.get(key)
            if step is None or step.state not in UNFINISHED:
                raise ImpossibleError(f"work cannot be said of {step or key}")
            if step.queue is not None:
                step.queue.ready_ms += work_ms - step.work_ms
            step.work_ms = work_ms
            holder = self.builders.get(step.builder)
            if holder is not None:
                # When it should have room was computed of the former work.
                holder.moves += 1
            steps.append(step)
        yield from self._retail(steps)

    def _know(self, key: StepKey, recipes: tuple[Recipe, ...], state: StepState, work_ms: int = 0) -> None:
        self.generation += 1
        step = Step(key, recipes, self.known, state)
        step.expect(work_ms)
        self.known += 1
        step.generation_started = self.generation
        self.steps[key] = step
        self.references.meet(step)
        for recipe in recipes:
            self.references.add(recipe.needs)
            self.edges_changed += len(recipe.needs)

    def _held(self, fact: f.StepCached) -> Iterator[Pause] | None:
        rest = None
        if fact.step in self.steps:
            self.failed.pop(fact.step, None)
            rest = self._finish(self._subject(fact, fact.step), _DONE)
        else:
            self._know(fact.step, (), _DONE)
        step = self.steps[fact.step]
        step.done_at = fact.at
        step.output_bytes = fact.output_bytes or step.output_bytes
        return rest

    def _steps_forgotten(self, fact: f.StepsForgotten) -> Iterator[Pause]:
        looked_at = 0
        for key in fact.steps:
            if looked_at >= PIECE:
                looked_at = 0
                yield PAUSE
            step = self.references.unreferenced.get(key)
            if step is None or step.wanted or step.engaged or step.builder:
                raise ImpossibleError(f"{step or key} is forgotten and referred to or wanted")
            self.references.forget(step)
            looked_at += 1 + sum(len(recipe.needs) for recipe in step.recipes)
            del self.steps[key]
            self.failed.pop(key, None)
            self.attempt_floor = max(self.attempt_floor, step.attempt)

    def next_attempt(self, step: Step) -> int:
        """Return the attempt of the next lease: never one that the step, or an earlier one of this key, has had."""
        return (step.attempt or self.attempt_floor) + 1

    def _finish(self, step: Step, target: StepState) -> Iterator[Pause] | None:
        """Enter one of the finished states: nothing is wanted of the step, and it wants nothing.

        Where a done step has many dependents, the iterator that is returned updates them, as in `apply`.
        """
        self._move(step, target)
        if step.roots:
            for submission in step.roots:
                self._end_share(submission)
                if target is not _DONE:
                    self._root_failed(submission)
            step.roots = ()
        step.evidence = b""
        if self.orphans:
            self.orphans.pop(step.key, None)
        self._release(step)
        if target is not _DONE:
            self.generation += 1
            step.generation_ended = self.generation
            return None
        if len(step.dependents) > PIECE:
            return self._meet_in_pieces(step.dependents)
        self._meet(step.dependents)
        return None

    def _done(self, fact: f.StepDone) -> Iterator[Pause] | None:
        step = self.steps.get(fact.lease.step)
        if step is None or step.state is not _PUBLISHING or step.follows:
            raise ImpossibleError(f"{fact.lease} cannot be done: {step}")
        step.done_at = fact.at
        if self.early.successors or self.early.released:
            self.early.done(step)
        self._roster.end_lease(step, fact.at)
        return self._finish(step, _DONE)

    def _failed(self, fact: f.StepFailed) -> None:
        step = self._subject(fact, fact.step)
        if step.state is _LEASED:
            self._roster.blame(step, fact.failure)
        self._roster.acquit(step, fact.failure)
        self.early.end(step)
        self._roster.end_lease(step, fact.at)
        self._finish(step, StepState.FAILED)
        step.failure, step.failed_at = fact.failure, fact.at
        self.failed[step.key] = step

    def _begin_life(self, step: Step) -> None:
        self.generation += 1
        step.generation_started = self.generation
        step.tried = NO_TRIES
        step.faults = step.returns = step.moves = 0
        step.strikes = step.accounts = ()
        step.avoid, step.not_before = NO_BUILDER, NO_INSTANT
        step.failure = step.cause = None

    def _revived(self, fact: f.StepRevived) -> None:
        step = self._subject(fact, fact.step)
        self.failed.pop(step.key, None)
        self._move(step, _WAITING)
        self._begin_life(step)
        self._use(step, fact.recipe)

    def _use(self, step: Step, recipe: int) -> None:
        if recipe >= len(step.recipes):
            raise ImpossibleError(f"{step.key} has no recipe {recipe}")
        step.active = recipe
        step.below = None
        step.home = None

    def _lost(self, fact: f.StepLost) -> Iterator[Pause]:
        step = self._subject(fact, fact.step)
        self._move(step, _WAITING)
        self._begin_life(step)
        for count, dependent in enumerate(step.dependents, 1):
            dependent.unmet += 1
            if dependent.state is _READY:
                self._move(dependent, _WAITING)
                self.turned.append(dependent)
            if not count % PIECE:
                yield PAUSE
        if step.dependents:
            yield from self._engage((yield from self.descending((step,))))

    def _fell_back(self, fact: f.StepFellBack) -> Iterator[Pause]:
        step = self._subject(fact, fact.step)
        self._roster.acquit(step, fact.failure)
        if step.state is _LEASED:
            self.early.end(step)
            self._roster.end_lease(step, fact.at)
            self._move(step, _WAITING)
        elif step.state is _READY:
            self._move(step, _WAITING)
        self._release(step)
        step.tried = step.tried | {step.active}
        step.faults, step.strikes, step.accounts = 0, (), ()
        step.avoid, step.not_before = NO_BUILDER, NO_INSTANT
        self._use(step, fact.recipe)
        below = yield from self.descending((step,))
        self.joined.append((step, below))
        self._fall_in(step, below)
        yield from self._engage(below)

    def _leased(self, fact: f.StepLeased) -> None:
        lease = fact.lease
        step = self.steps.get(lease.step)
        if (
            step is None
            or (step.state is not _READY and step.state is not _WAITING)
            or lease.attempt != (step.attempt or self.attempt_floor) + 1
            or fact.recipe != step.active
        ):
            raise ImpossibleError(f"{lease} cannot follow {step}")
        if step.state is _WAITING:
            self.early.begin(step, fact.builder)
        # A replayed lease was granted after its back-off, whose end the journal does not hold.
        step.not_before = NO_INSTANT
        step.attempt = lease.attempt
        step.builder = fact.builder
        step.asked_at, step.resends = fact.at, 0
        self.ready.taken(step, self.builders.get(fact.builder))
        step.state = _LEASED
        self._roster.lease(step, fact.builder, fact.at)
        if step.dependents:
            self.early.fresh.append(step)

    def _open(self, fact: f.LeaseRevoked | f.StepBuilt) -> Step:
        step = self.steps.get(fact.lease.step)
        # It has a builder in no other state than those from which the facts lead on.
        if step is None or step.attempt != fact.lease.attempt or step.builder != fact.builder:
            raise ImpossibleError(f"{fact.lease} is not the open lease of {step}")
        return step

    def _built(self, fact: f.StepBuilt) -> None:
        step = self._open(fact)
        if step.state is not _LEASED:
            raise ImpossibleError(f"{fact.lease} is built already")
        roster = self._roster
        roster.has_built(step, fact.builder)
        if fact.output_bytes or step.output_bytes:
            make(step, self.builders[fact.builder].place, fact.output_bytes)
        roster.free_slot(step)
        step.state = _PUBLISHING
        step.evidence = fact.evidence
        if step.dependents:
            self.early.fresh.append(step)
            if self.early.successors:
                self.early.built(step, lambda follower: roster.take_place(follower, fact.at))

    def _revoked(self, fact: f.LeaseRevoked) -> None:
        step = self._open(fact)
        if step.state is _LEASED:
            self._roster.blame(step, fact.failure)
        self.early.end(step)
        self._roster.end_lease(step, fact.at)
        step.evidence = b""
        step.moves += fact.moved
        step.memory_bytes = fact.memory_bytes or step.memory_bytes
        kind = fact.failure.kind
        if is_fault(kind):
            step.faults += 1
            if fact.failure.signature:
                step.accounts = (*step.accounts, (fact.builder, fact.failure.signature))
            if CONSEQUENCES[kind].tries is not None:
                step.strikes = (*step.strikes, kind)
        elif kind is not FailureKind.CANCELLED:
            step.returns += 1
        if kind is not FailureKind.CANCELLED:
            step.avoid = fact.builder
        step.not_before = fact.not_before
        if fact.payer:
            self.paid_until[fact.payer] = fact.paid_until
        if step.unmet:
            self._move(step, _WAITING)
        else:
            self._become_ready(step)

    def _back_off_ended(self, fact: f.BackOffEnded) -> None:
        step = self._subject(fact, fact.step)
        step.not_before = NO_INSTANT
        self.ready.prune_delayed()
        self.ready.enqueue(step)

    # A snapshot: facts that set what many facts before have led to. `snapshot.tell_all` yields them.

    def _step_restored(self, fact: f.StepRestored) -> None:
        if fact.step in self.steps:
            raise ImpossibleError(f"{fact.step} is restored and known already")
        step = Step(fact.step, fact.recipes, fact.sequence, fact.state)
        step.expect(fact.work_ms)
        step.memory_bytes, step.output_bytes = fact.memory_bytes, fact.output_bytes
        # Journals of before 2026-11-30 hold no tails: as many steps of which nothing is known.
        step.tail_ms = fact.tail_ms or (fact.depth + 1) * step.work_ms
        self.steps[fact.step] = step
        step.depth, step.generation_started = fact.depth, fact.born
        step.attempt, step.done_at = fact.attempt, fact.done_at
        step.roots = fact.roots
        past = fact.past
        if past is not None:
            step.active, step.generation_ended, step.failed_at = past.active, past.ended, past.failed_at
            step.builder, step.evidence = past.builder, past.evidence
            step.failure, step.cause = past.failure, past.cause
            step.tried, step.strikes = frozenset(past.tried) or NO_TRIES, past.strikes
            step.accounts = past.accounts
            step.faults, step.returns, step.moves = past.faults, past.returns, past.moves
            step.avoid, step.not_before = past.avoid, past.not_before
            if past.follows:
                self.early.restore(step, past.follows)
            if fact.state is StepState.FAILED:
                self.failed[step.key] = step
        if fact.dependents:
            self._unlinked.append(step)
            self._links.append(len(fact.dependents))
            self._links.extend(fact.dependents)

    def _restored(self, fact: f.FarmRestored) -> None:
        """Link the restored steps with each other, and index the ready ones."""
        if len(self.steps) != fact.steps:
            raise ImpossibleError(f"a snapshot of {fact.steps} steps has brought {len(self.steps)}")
        self.generation, self.known, self.attempt_floor = fact.life, fact.known, fact.floor
        by_sequence = {step.sequence: step for step in self.steps.values()}
        links = iter(self._links)
        for step in self._unlinked:
            linked = tuple([by_sequence[sequence] for sequence in islice(links, next(links))])
            step.dependents = linked if len(linked) <= FEW_DEPENDENTS else dict.fromkeys(linked)
        self._unlinked, self._links = [], array("Q")
        self.early.link_restored(self.steps, self.builders)
        self.references.unreferenced.update(self.steps)
        for roots in (*self.submissions.values(), *self.withdrawn.values()):
            self.references.add(root.key for root in roots)
        self._restore_owners()
        for step in self.steps.values():
            self.references.add_needs(step)
            if not step.wanted or step.state is _DONE or step.state in LAPSED:
                continue
            step.needs = self.needs_of(step)
            step.below = None
            step.engaged = True
            for need in step.needs:
                if need.state is not _DONE:
                    step.unmet += 1
            if step.state is _READY:
                if step.not_before:
                    self.ready.delay(step)
                else:
                    self.ready.enqueue(step)

    def _restore_owners(self) -> None:
        merged: Merged = {}
        for submission, roots in self.submissions.items():
            for root in roots:
                if submission in root.roots:
                    self._own(root, (self.shares.begin(submission),), merged)
            self._settle_end(submission)
        # Each before its needs, as in `_engage`.
        for step in self.descend(step for step in self.steps.values() if step.roots):
            for need in self._below(step, below_done=False):
                self._own(need, step.owners, merged)


def is_lapsed(step: Step) -> bool:
    """Return whether the step finished without a result."""
    return step.state in LAPSED
